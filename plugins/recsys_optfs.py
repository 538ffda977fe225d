"""OptFS: every value of every field has a gate, and the values whose gates close go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adam import adam

from recsys.api import Column, Component, Fields, Guard, RecipeError, Run, Selection, hookimpl

MOST = 1 << 31
"""Gates that a selector may have; more values than that were hashed, not counted."""
BETAS = (0.9, 0.999)
"""Of the gates' Adam."""
CHUNK = 1 << 16
"""Gates that a pass works on at a time: on a CPU they stay in its cache."""


class OptFS(nn.Module):
    """One gate for each value of each field.

    In the search e'_c = e_c · σ(τ g_c) / σ(g⁽⁰⁾), so that all gates begin at 1, and interactions of two values pass the
    product of their gates. The loss has the further term λ Σ_c σ(τ g_c), over all values in every step. τ goes
    from 1 to γ in T levels of equal length, τ_t = γ^{t / (T − 1)}, as published one for each epoch of the search. At
    its end the values with g_c > 0 stay, times 1 / σ(g⁽⁰⁾), also in what `prune` leaves; the others are zeros. The
    stage that searches keeps the gates of its last epoch, not those of the best one. Then `rewind` gives everything but
    the gates the weights of an early epoch back, and a second fit trains what is left.

    The gates have an Adam of their own, without decay. What it makes of a value that is never seen decides which rare
    values go: the penalty's gradient, some 1e-9, is less than `eps`, so how far its gate falls depends on `eps` and on
    the number of steps: with the published options and a tenth of the steps it stays. Any gradient of the loss
    raises the second moment and holds the penalty up, so frequent values stay more easily than rare ones. Every fit
    stage says beforehand where such a gate will end (`untouched`); shorter runs need a larger `penalty` or `rate`. With
    `fall` neither `eps` nor the number of steps counts: there is no penalty, but gates sink at one rate,
    σ(τ (g_c − fall · progress)), and Adam sees the gradient of the loss alone.

    The public code rewinds linear layers, batch norms and the embedding only; for DCN `rewind` does the same with
    `keep: [interactions.0.bias]`. Fields that share a vocabulary have gates of their own.

    Lyu et al., "Optimizing Feature Set for Click-Through Rate Prediction", WWW 2023, arXiv 2301.10909. Defaults are
    those published for DCN on Criteo, with the second epoch to rewind to.

    Args:
        penalty: λ.
        temperature: γ, the last τ.
        epochs: T, the epochs of the search; one means that τ stays at 1.
        start: g⁽⁰⁾, every gate at the beginning.
        rate: step size of the gates; published is that of the weights.
        eps: of the gates' Adam.
        fall: instead of the penalty: how far every gate sinks in the search.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        penalty: NonNegativeFloat = 1e-8,
        temperature: PositiveFloat = 1e4,
        epochs: PositiveInt = 5,
        start: float = 0.5,
        rate: PositiveFloat = 3e-4,
        eps: PositiveFloat = 1e-8,
        fall: NonNegativeFloat | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(fields)
        self.fields = fields
        self.pressure = penalty if fall is None else 0.0
        self.temperature, self.epochs, self.start = temperature, epochs, start
        self.rate, self.eps, self.fall = rate, eps, fall or 0.0
        count = sum(fields.rows)
        # In the order of the table's rows.
        self.gate = nn.Parameter(torch.full((count,), start))
        # Two rows are a numeric field's: a wrong id is read as missing there.
        columns = enumerate(zip(fields.names, fields.rows, strict=True))
        self.guard = Guard([Column(name, rows, rows <= 2, f) for f, (name, rows) in columns])
        self.offset: Tensor
        self.progress: Tensor
        self.level: Tensor
        self.mean: Tensor
        self.square: Tensor
        self.steps: Tensor
        self.register_buffer("offset", torch.tensor([0, *accumulate(fields.rows)][:-1]), persistent=False)
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("level", torch.zeros((), dtype=torch.int64))  # t; T once it is decided
        for name, size in {"mean": (count,), "square": (count,), "steps": ()}.items():
            self.register_buffer(name, torch.zeros(size), persistent=False)  # of Adam, see get_extra_state

    def factor(self) -> float:
        """1 / σ(g⁽⁰⁾), by which all is multiplied that is kept."""
        return 1.0 + math.exp(-self.start)

    def heat(self) -> Tensor:
        """τ of the level, `[]`."""
        last = self.epochs - 1
        return torch.pow(self.temperature, self.level.clamp(max=last).to(self.gate.dtype) / max(last, 1))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        rows = self.guard(ids) + self.offset
        g = self.gate.index_select(0, rows.flatten()).view(rows.shape) - self.fall * self.progress  # [B, F]
        share = torch.where(self.level < self.epochs, (self.heat() * g).sigmoid(), (g > 0).to(g.dtype))
        return e * (share * self.factor()).unsqueeze(-1)

    def penalty(self) -> Tensor:
        """Return λ Σ_c σ(τ g_c) over all values, `[]`."""
        if not self.pressure:
            return self.gate.new_zeros(())
        total: Tensor = Pressure.apply(self.gate, self.heat(), self.pressure)  # type: ignore[no-untyped-call]
        return total

    def anneal(self, progress: float) -> None:
        """Choose the level; at 1, where no step of a fit stage is, gates are open or closed."""
        self.progress.fill_(progress)
        # The first step of an epoch must not be a rounding error before it.
        self.level.fill_(math.floor(progress * self.epochs + 1e-9))

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """The gates."""
        return (self.gate,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move all gates by Adam, in one pass over gates, gradients and moments; not where the step was skipped."""
        if self.gate.grad is None:
            return
        adam(
            [self.gate],
            [self.gate.grad],
            [self.mean],
            [self.square],
            [],
            [self.steps],
            fused=True,
            found_inf=(self.gate.grad.count_nonzero() == 0).float(),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.rate,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )

    def get_extra_state(self) -> Tensor:
        """The state of Adam, `[2 N + 1]`: for training alone, so no buffers that a model would be said to hold."""
        return torch.cat([self.mean, self.square, self.steps.view(1)])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state of Adam."""
        count = len(self.gate)
        self.mean.copy_(state[:count])
        self.square.copy_(state[count:-1])
        self.steps.copy_(state[-1])

    def reached(self) -> bool:
        """Never before the search ends: it has no best epoch, its last gates count."""
        return False

    @torch.no_grad()
    def height(self) -> Tensor:
        """How far every gate is above where it closes, `[N]`."""
        return self.gate - self.fall * self.progress

    def kept(self) -> Selection:
        """The values with open gates; a field without any is gone."""
        masks = self._by_field((self.height() > 0).cpu())
        return Selection(tuple(name for name, mask in masks.items() if bool(mask.any())), masks)

    def scores(self) -> Mapping[str, Tensor]:
        """How far every value's gate is above where it closes, `[rows]`."""
        return self._by_field(self.height())

    def untouched(self, steps: int) -> float:
        """Where the gate of a value without any gradient but the penalty's is after a search of so many steps."""
        if not self.pressure:
            return self.start - self.fall
        g, mean, square, last = self.start, 0.0, 0.0, max(self.epochs - 1, 1)
        for step in range(steps):
            heat = self.temperature ** ((step * self.epochs // steps) / last)
            half = math.tanh(heat * g / 2) / 2  # σ(τ g) − ½
            slope = self.pressure * heat * (0.25 - half * half)
            mean += (1 - BETAS[0]) * (slope - mean)
            square += (1 - BETAS[1]) * (slope * slope - square)
            size = math.sqrt(square / (1 - BETAS[1] ** (step + 1)))
            g -= self.rate * mean / (1 - BETAS[0] ** (step + 1)) / (size + self.eps)
        return g

    def _by_field(self, values: Tensor) -> dict[str, Tensor]:
        parts = torch.split(values, list(self.fields.rows))
        return {name: part.clone() for name, part in zip(self.fields.names, parts, strict=True)}


class Pressure(torch.autograd.Function):
    """λ Σ σ(τ g): the sum and its gradient λ τ σ (1 − σ), both from one pass over all gates, without a graph."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, heat: Tensor, pressure: float) -> Tensor:
        """`[N], [] -> []`."""
        slope = torch.empty_like(gate)
        size = CHUNK if gate.device.type == "cpu" else max(gate.numel(), 1)
        sums = []
        for g, s in zip(torch.split(gate, size), torch.split(slope, size), strict=True):
            torch.mul(g, heat, out=s).sigmoid_()
            sums.append(s.sum())
            s.addcmul_(s, s, value=-1)
        ctx.save_for_backward(slope, pressure * heat)
        return torch.stack(sums).sum() * pressure

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """`[] -> [N]`."""
        slope, scale = ctx.saved_tensors
        return slope * (gradient * scale), None, None


def _check_sizes(fields: Fields) -> None:
    for name, rows in zip(fields.names, fields.rows, strict=True):
        if rows > MOST:
            raise RecipeError(
                f"optfs has a gate for each value, and '{name}' has {rows:,} ids, whose values were never counted"
            )


@hookimpl
def recsys_before_stage(run: Run, stage: str) -> None:
    """Say, once, what becomes of a value that the search never sees."""
    selector = run.model.selector
    if not isinstance(selector, OptFS) or run.state["stages"] or "train" not in run.splits:
        return
    steps = selector.epochs * math.ceil(len(run.splits["train"]) / run.train.batch_size)
    end = selector.untouched(steps)
    told = f"optfs: in {steps:,} steps the gate of a value that is never seen goes from {selector.start:g} to {end:.3g}"
    if end > 0:
        told = f"[yellow]warning: {told}, so rare values will hardly go; raise `penalty` or `rate`[/yellow]"
    run.say(told)


@hookimpl
def recsys_after_stage(run: Run, stage: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Say how many values are left, by the decision and by gates that are not yet zero."""
    selector = run.model.selector
    if not isinstance(selector, OptFS):
        return
    height = selector.height()
    kept, soft = int((height > 0).sum()), int(((selector.heat() * height).sigmoid() > 0).sum())
    run.say(f"{stage}: optfs keeps {kept:,} of {len(height):,} values; {soft:,} gates are not yet zero")


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "fit", "name": "search", "epochs": 5, "snapshot_epoch": 2},
        {"use": "rewind", "to": "search"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain", "epochs": 20, "patience": 1},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "optfs", OptFS, stages)]
