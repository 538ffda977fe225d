"""MvFS: several linear views of each row weigh the fields, and a gate says how far to trust each view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from recsys.api import Best, Component, Fields, Selection, chosen, full_precision, hookimpl, how_many, linear, passing

MEMORY = 0.98
"""Of the moving average of the gates."""


class MvFS(nn.Module):
    """Gates of the fields for every row, from several linear views of the row that a softmax mixes.

    e'_bf = s_bf e_bf, s_bf = ½ (1 + tanh(κ (I_bf − ℓ))), I_b = Σ_k π_bk softmax_f(W_k e_b + c_k), where
    π_b = softmax_k(V [softmax_f(W_1 e_b + c_1); …; softmax_f(W_K e_b + c_K)] + d) and κ = max(`sharpness`, t); t is 1
    at first and gains `pace` with every training batch after the warm-up, so κ is 5 for 4,000 batches as published.
    Unlike weights with sum one, a gate opens or closes without regard to the others. All matrices start
    xavier-normal, the views apart, biases at zero; the public code leaves those of the gate on the views as the memory
    happened to be. Everything learns together, on training rows, so ids that are learned by heart look useful; in the
    warm-up all fields weigh alike.

    A field's score is its mean gate over training rows (a moving average over batches), and the best are kept. Gates of
    single rows outlive no pruning: in the search, evaluation sees them, as published; after it, what is kept, as it is,
    and zeros elsewhere; the model is trained again on that. I sums to one over the fields: of more than 1 / ℓ fields
    most gates stay below one half and differ little, whatever the fields are worth. Eight planted fields were told from
    eight of noise little better than by chance with ℓ and κ as published, and all of them with ℓ = 1 / F and κ = 3 F.

    First-order weights and histories do not pass the gates.

    Lee et al., "MvFS: Multi-view Feature Selection for Recommender System", CIKM 2023, arXiv 2309.02064; defaults and
    t as in ERASE, KDD 2024, arXiv 2403.12660.

    Args:
        keep: how many of the fields are kept, a number or a share.
        views: K.
        level: ℓ.
        sharpness: the least κ.
        pace: what t gains with every batch.
        warmup: share of the stage in which all fields weigh alike.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        keep: Best = 0.5,
        views: Annotated[int, pydantic.Field(ge=2)] = 6,
        level: float = 0.2,
        sharpness: PositiveFloat = 5.0,
        pace: NonNegativeFloat = 1e-3,
        warmup: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1,
    ) -> None:
        super().__init__()
        how_many(fields, keep)
        self.fields, self.keep, self.warmup = fields, keep, warmup
        self.level, self.sharpness, self.pace = level, sharpness, pace
        count, width = len(fields), len(fields) * fields.dim
        self.views = nn.Linear(width, views * count)  # all of them in one product
        nn.init.normal_(self.views.weight, std=(2 / (width + count)) ** 0.5)
        nn.init.zeros_(self.views.bias)
        self.trust = linear(views * count, views)
        self.progress: Tensor
        self.batches: Tensor
        self.importance: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))  # after the warm-up
        self.register_buffer("importance", torch.full((count,), 1 / count))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        s = self.gates(e)
        if self.training:
            self._observe(s.detach())
        else:
            s = torch.where(self.progress < 1, s, self._passes())
        return e * s.to(e.dtype).unsqueeze(2)

    def gates(self, e: Tensor) -> Tensor:
        """s, `[B, F, D] -> [B, F]`, in float32 whatever autocast says."""
        with full_precision(e):
            share = self.shares(e.flatten(1).to(self.views.weight.dtype))
            t = 1 + self.pace * self.batches
            s: Tensor = (1 + (t.clamp(min=self.sharpness) * (share - self.level)).tanh()) / 2
        return s

    def shares(self, x: Tensor) -> Tensor:
        """I, `[B, F·D] -> [B, F]`."""
        active = self._active()
        each = (active * self.views(x).unflatten(1, (-1, len(self.fields)))).softmax(2)  # [B, K, F]
        mixed = (active * self.trust(each.flatten(1))).softmax(1)  # [B, K]
        share: Tensor = (mixed.unsqueeze(1) @ each).squeeze(1)
        return share

    @torch.no_grad()
    def _observe(self, s: Tensor) -> None:
        """Take a batch's gates `[B, F]` into the moving average, and move t on."""
        active = self._active()
        fresh = torch.where(self.batches > 0, 1 - MEMORY, 1.0)
        self.importance.lerp_(s.mean(0), fresh.to(s.dtype))
        self.batches.add_(active)

    def _active(self) -> Tensor:
        """Whether the warm-up is over, `[]` bool."""
        return self.progress >= self.warmup

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return torch.zeros((), device=self.progress.device)

    def anneal(self, progress: float) -> None:
        """Note how far the stage is; at 1 the search is over."""
        self.progress.fill_(progress)

    def kept(self) -> Selection:
        """The fields with the largest mean gates; all of them before any differ."""
        return chosen(self.fields.names, self._passes())

    def scores(self) -> Mapping[str, Tensor]:
        """The mean gate of each field, `[]`."""
        return dict(zip(self.fields.names, self.importance.detach().clone(), strict=True))

    def _passes(self) -> Tensor:
        """`[F]` bool."""
        return passing(self.fields, self.importance, self.keep)


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
    return [Component("selector", "mvfs", MvFS, stages)]
