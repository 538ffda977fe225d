"""LPFS: smoothed ℓ0 gates that a proximal step brings to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Best, Component, Fields, OwnAdam, Run, Selection, chosen, hookimpl, how_many, passing

Form = Literal["lpfs", "lpfs++"]
SLOPE, ROOT = 10.0, 2.0
"""α and t of LPFS++."""


class LPFS(nn.Module):
    """A polarising gate for each field, g(x) = x² / (x² + ε), whose x a soft threshold brings to exactly zero.

    e'_bf = g(x_f) e_bf, or for LPFS++ g(x) = sign(x) x² / (x² + ε) + α ε^{1/t} atan(x) with α = 10 and t = 2, which has
    a slope at zero too, so that a field may come back. As ε falls, ε = `epsilon` · `decay`^⌊step / `every`⌋, g becomes
    a step. x is 1 at first and learns in a fit stage, on training rows, with the weights and from scratch: Adam with
    step size `rate`, then x ← sign(x) max(|x| − `rate` · `strength`, 0) after every step. Nothing else makes an exact
    zero.

    What has x = 0 at the end is dropped, unless `keep` says how many of the largest |x| stay; |x| is the score. Without
    any gradient x reaches zero after 1 / (`rate` · `strength`) steps; the published values mean 100,000 (ERASE) or
    5,000 (AutoFS-in-CTR with λ = 0.1, whose threshold is 2 λ times the step size), so short runs need larger ones. As x
    learns from training rows, fields that are learned by heart, in many epochs over few rows, look useful. The stage
    runs all its epochs and keeps the last. Evaluation sees the gates, in the search as in training; after it what
    is kept, as it is, and zeros elsewhere: the weights behind a gate do not fit a field without it, and learn again.

    First-order weights and histories do not pass the gates.

    Guo et al., "LPFS: Learnable Polarizing Feature Selection for Click-Through Rate Prediction", arXiv 2206.00267.

    Args:
        form: lpfs, or lpfs++.
        epsilon: ε at the beginning.
        decay: factor of ε.
        every: steps between two of them.
        rate: step size of x.
        strength: the threshold as a part of the step size.
        keep: how many of the fields are kept, a number or a share. null: those with x ≠ 0, be it none.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        form: Form = "lpfs++",
        epsilon: PositiveFloat = 0.1,
        decay: PositiveFloat = 0.9978,
        every: PositiveInt = 100,
        rate: PositiveFloat = 1e-3,
        strength: NonNegativeFloat = 0.2,
        keep: Best | None = None,
    ) -> None:
        super().__init__()
        self.fields, self.form, self.keep = fields, form, keep
        self.epsilon, self.decay, self.every = epsilon, decay, every
        self.rate, self.strength = rate, strength
        if keep is not None:
            how_many(fields, keep)
        self.x = nn.Parameter(torch.ones(len(fields)))
        self.adam = OwnAdam(self.own_parameters())
        self.progress: Tensor
        self.steps: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps_before = 0

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        gate = self.gates()
        if not self.training:
            gate = torch.where(self.progress < 1, gate, self._passes())
        return e * gate.to(e.dtype).unsqueeze(1)

    def eps(self) -> Tensor:
        """ε now, `[]`."""
        return self.epsilon * torch.pow(self.decay, torch.div(self.steps, self.every, rounding_mode="floor"))

    def gates(self) -> Tensor:
        """g, `[F]`."""
        eps = self.eps().to(self.x.dtype)
        square = self.x.square()
        g = square / (square + eps)
        if self.form == "lpfs":
            return g
        return self.x.sign() * g + SLOPE * eps.pow(1 / ROOT) * self.x.atan()

    def penalty(self) -> Tensor:
        """Zero, `[]`: the proximal step stands in its place."""
        return torch.zeros((), device=self.progress.device)

    def anneal(self, progress: float) -> None:
        """Note how far the stage is; at 1 the search is over."""
        self.progress.fill_(progress)

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """What the gates are computed from."""
        return (self.x,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move x by Adam, then towards zero, and count the step."""
        if self.x.grad is None:
            return
        self.adam.step(self.own_parameters(), self.rate)
        self.x.copy_(shrunk(self.x, self.rate * self.strength))
        self.steps.add_(1)

    def reached(self) -> bool | None:
        """None before x moves, then False: a stage that moves it keeps its last epoch."""
        return False if int(self.steps) else None

    def kept(self) -> Selection:
        """The fields with x ≠ 0, or the best."""
        return chosen(self.fields.names, self._passes())

    def scores(self) -> Mapping[str, Tensor]:
        """|x| of each field, `[]`."""
        return dict(zip(self.fields.names, self.x.detach().abs(), strict=True))

    def _passes(self) -> Tensor:
        """`[F]` bool."""
        size = self.x.detach().abs()
        return size > 0 if self.keep is None else passing(self.fields, size, self.keep)


def shrunk(x: Tensor, threshold: float) -> Tensor:
    """sign(x) max(|x| − threshold, 0)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


@hookimpl
def recsys_before_stage(run: Run, stage: str) -> None:
    """Remember how far the search is."""
    if isinstance(run.model.selector, LPFS):
        run.model.selector.steps_before = int(run.model.selector.steps)


@hookimpl
def recsys_after_stage(run: Run, stage: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Say what has come to zero; warn of a stage too short for anything to get there."""
    selector = run.model.selector
    if not isinstance(selector, LPFS) or int(selector.steps) == selector.steps_before:
        return
    zero, steps = int((selector.x == 0).sum()), int(selector.steps)
    told = f"{stage}: lpfs has x = 0 for {zero} of {len(selector.fields)} fields, ε {float(selector.eps()):.3g}"
    if not zero and steps * selector.rate * selector.strength < 1:
        need = 1 / (selector.rate * selector.strength) if selector.strength else float("inf")
        told = (
            f"[yellow]warning: {told}; in {steps:,} steps nothing gets there from 1, which takes about {need:,.0f} "
            "without any gradient: raise `rate` or `strength`[/yellow]"
        )
    run.say(told)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "fit", "name": "search"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "lpfs", LPFS, stages)]
