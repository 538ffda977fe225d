"""AdaFS: a controller reads each row's vectors and weighs the fields for that row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Best,
    Component,
    DataError,
    Fields,
    MLPBlock,
    OwnAdam,
    Selection,
    Share,
    chosen,
    full_precision,
    hookimpl,
    how_many,
    passing,
)

MEMORY = 0.98
"""Of the moving average of the weights."""


class AdaFS(nn.Module):
    """Weights of the fields for every row, from a perceptron on its normalised vectors.

    e'_bf = s_bf e_bf, s_b = softmax_f(MLP(BN(e_b))): BN normalises every coordinate of every field, without scale and
    shift. Hard: only the largest s_bf of a row stay, as many as `keep` says, divided by their sum. The last layer of
    the perceptron starts at zero and has no effect in the warm-up: until then all fields weigh alike, 1 / F, where the
    public codes train without weights.

    A field's score is its mean weight over training rows (soft, as a moving average over batches), and the best are
    kept. Weights of single rows save no storage and outlive no pruning: in the search, evaluation sees them, as
    published; after it, what is kept, as it is, and zeros elsewhere; the model is trained again on that. A stage that
    moves the controller on validation rows (`bilevel_fit`, as published) runs all its epochs and keeps the last.

    First-order weights and histories are not weighed.

    Lin et al., "AdaFS: Adaptive Feature Selection in Deep Recommender System", KDD 2022; the defaults are those of
    ERASE, KDD 2024, arXiv 2403.12660.

    Args:
        keep: how many of the fields are kept, a number or a share; with `hard`, for every row too.
        hard: only the best fields of a row.
        hidden: widths of the perceptron's layers.
        dropout: of its activations.
        learn: bilevel: the controller waits for `bilevel_fit`. joint: it learns with all the other weights.
        warmup: share of the stage in which all fields weigh alike.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        keep: Best = 0.5,
        hard: bool = False,
        hidden: tuple[PositiveInt, ...] = (16,),
        dropout: Share = 0.2,
        learn: Literal["bilevel", "joint"] = "bilevel",
        warmup: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1,
    ) -> None:
        super().__init__()
        self.most = how_many(fields, keep)
        self.fields, self.keep, self.hard = fields, keep, hard
        self.learn, self.warmup = learn, warmup
        width = len(fields) * fields.dim
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.layers = MLPBlock(width, hidden, dropout=dropout)
        self.last = nn.Linear(self.layers.width, len(fields))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.adam = OwnAdam(self.architecture())
        self.progress: Tensor
        self.importance: Tensor
        self.seen: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("importance", torch.full((len(fields),), 1 / len(fields)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        s = self.weights(e)
        if self.training:
            self._observe(s.detach())
        if self.hard:
            s = self.best_of(s)
        if not self.training:
            s = torch.where(self.progress < 1, s, self._passes())
        return e * s.to(e.dtype).unsqueeze(2)

    def weights(self, e: Tensor) -> Tensor:
        """s, `[B, F, D] -> [B, F]`, in float32 whatever autocast says.

        Raises:
            DataError: training on a single row, whose variance is not defined.
        """
        if self.training and len(e) == 1:
            raise DataError("selector adafs: the vectors of one row cannot be normalised; use larger batches")
        with full_precision(e):
            x = self.norm(e.flatten(1).to(self.last.weight.dtype))
            z = self.last(self.layers(x)) * (self.progress >= self.warmup)
            s: Tensor = z.softmax(1)
        return s

    def best_of(self, s: Tensor) -> Tensor:
        """The largest weights of each row, and those equal to the least of them, with sum one; `[B, F] -> [B, F]`."""
        least = s.topk(self.most, 1).values[:, -1:]
        left = torch.where(s >= least, s, 0.0)
        return left / left.sum(1, keepdim=True)

    @torch.no_grad()
    def _observe(self, s: Tensor) -> None:
        """Take a batch's weights `[B, F]` into the moving average."""
        fresh = 1 - MEMORY * (self.seen > 0).to(s.dtype)
        self.importance.lerp_(s.mean(0), fresh)
        self.seen.add_(1)

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return torch.zeros((), device=self.progress.device)

    def anneal(self, progress: float) -> None:
        """Note how far the stage is; at 1 the search is over."""
        self.progress.fill_(progress)

    def architecture(self) -> tuple[nn.Parameter, ...]:
        """The controller, unless it learns with the other weights."""
        return () if self.learn == "joint" else (*self.layers.parameters(), *self.last.parameters())

    def search_step(self, rate: float) -> None:
        """Move the controller by Adam."""
        self.adam.step(self.architecture(), rate)

    def reached(self) -> bool | None:
        """None, or False once a search has moved the controller: it keeps its last epoch."""
        return False if self.learn == "bilevel" and self.adam.taken() else None

    def kept(self) -> Selection:
        """The fields with the largest mean weights; all of them before the controller moves."""
        return chosen(self.fields.names, self._passes())

    def scores(self) -> Mapping[str, Tensor]:
        """The mean weight of each field, `[]`."""
        return dict(zip(self.fields.names, self.importance.detach().clone(), strict=True))

    def _passes(self) -> Tensor:
        """`[F]` bool."""
        return passing(self.fields, self.importance, self.keep)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "bilevel_fit", "rate": 1e-3},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "adafs", AdaFS, stages)]
