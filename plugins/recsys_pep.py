"""PEP: every number of the table is pulled towards zero by a learned threshold, and those that get there go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Component,
    EncodedSchema,
    Run,
    Selection,
    Stored,
    Table,
    hookimpl,
    keep_within,
    pruned_bytes,
    pruned_table,
    require_room,
)

Granularity = Literal["global", "dim", "feature", "feature_dim"]
"""What has a threshold of its own: the table, each dimension, each row, each number."""


class PEP(Table):
    """A table under a soft threshold that is learned with it.

    v̂ = sign(v) · max(|v| − σ(s), 0), with s one number, one per dimension, per row or per number, learned like any
    weight: ∂L/∂v = g · 1[v̂ ≠ 0], ∂L/∂s = −σ(s)(1 − σ(s)) · Σ g · sign(v̂). Only the rows of a batch are computed. With a
    `budget`, a fit stage ends after the first epoch in which what is left takes no more bytes, and keeps that epoch's
    weights. `reset` then gives the numbers that are left their first values, v ⊙ 1[v̂ ≠ 0], `prune` stores these alone,
    and a second fit trains them. Should the epochs end too early, the largest |v̂| that fit are taken; the run says so.

    What moves s: at first the weight decay `train.embedding_l2`, towards s = 0, where σ(s) = ½ is beyond every
    number; then the loss. With Adam s moves by at most about the learning rate in a step, so from −150, as published
    for Criteo, the first number goes after 10⁵ steps. Short runs need a `threshold_init` such as −8, at which σ(s) is
    a part of the numbers' size, and a `threshold_speed` above 1. Without decay, and without a loss that likes zeros,
    the budget may never be reached.

    Liu et al., "Learnable Embedding Sizes for Recommender Systems", ICLR 2021, arXiv 2101.07577.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation; by default Xavier-uniform over `[N, D]`.
        granularity: what has a threshold of its own: `global`, `dim`, `feature` (a row) or `feature_dim` (a number).
        threshold_init: s at the start.
        threshold_speed: multiplies what the optimizer adds to s, as far as the update does not depend on the size of
            the gradient; that is, with Adam its learning rate.
        budget: bytes that what is left may take, as a share of those of the whole table, with the bits that say where
            it stands; by default a fit stage chooses its best epoch as ever.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: PositiveFloat | None = None,
        granularity: Granularity = "feature_dim",
        threshold_init: float = -150.0,
        threshold_speed: PositiveFloat = 1.0,
        budget: PositiveFloat | None = None,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std or 0.0)
        if init_std is None:
            nn.init.xavier_uniform_(self.weight)
        n = self.weight.shape[0]
        shape = {"global": (1, 1), "dim": (1, dim), "feature": (n, 1), "feature_dim": (n, dim)}[granularity]
        self.per_row = granularity.startswith("feature")
        self.stored: Stored = "float32"
        self.speed, self.budget = threshold_speed, budget
        self.s = nn.Parameter(torch.full(shape, threshold_init / threshold_speed))  # s / speed
        self.mask: Tensor | None
        self.register_buffer("mask", None, persistent=False)  # [N, D] bool, once it is decided

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`."""
        v = super()._look_up(rows)
        if self.mask is not None:
            return v * self.mask[rows]
        return soft(
            v, self.s.index_select(0, rows.flatten()).view(*rows.shape, -1) if self.per_row else self.s, self.speed
        )

    @torch.no_grad()
    def shrunk(self) -> Tensor:
        """The whole table as evaluation shows it, `[N, D]`."""
        return self.weight * self.mask if self.mask is not None else soft(self.weight, self.s, self.speed)

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block as evaluation shows them, `[n] -> [n, D]`, detached."""
        v, place = super().read(vocabulary, rows), rows + self.layout.offsets[vocabulary]
        if self.mask is not None:
            return v * self.mask[place]
        return soft(v, self.s.detach()[place] if self.per_row else self.s.detach(), self.speed)

    def left(self) -> Tensor:
        """`[N, D]` bool: the numbers that are not zero; of these the largest that the budget has room for."""
        if self.mask is not None:
            return self.mask
        size = self.shrunk().abs()
        mask = size > 0
        if self.budget is None or self.size(mask) <= self.limit:
            return mask
        largest = keep_within(
            self.schema, self.fields.dim, torch.where(mask, size, -torch.inf), self.budget, self.stored
        )
        for c in self.layout.columns:
            first = self.layout.offsets[c.vocabulary]
            mask[first : first + c.rows] = largest.elements[c.name].to(mask.device)
        return mask

    @property
    def limit(self) -> float:
        """Bytes that what is left may take; infinite without a budget."""
        return math.inf if self.budget is None else self.budget * self.weight.nbytes

    def size(self, mask: Tensor) -> int:
        """Bytes of the pruned table that keeps `mask`."""
        return pruned_bytes(self.schema, self.fields.dim, self._selection(mask), self.stored)

    def reached(self) -> bool | None:
        """Whether what is left fits into the budget; None if there is none, or once it is decided."""
        if self.budget is None or self.mask is not None:
            return None
        return self.size(self.shrunk() != 0) <= self.limit

    def decision(self) -> Mapping[str, Tensor]:
        """The numbers that are left, as an entry of the state."""
        return {"_extra_state": self.left().cpu().byte()}

    def get_extra_state(self) -> Tensor:
        """The decision, `[N, D]` uint8; empty while there is none."""
        return torch.zeros(0, dtype=torch.uint8) if self.mask is None else self.mask.cpu().byte()

    def set_extra_state(self, state: Tensor) -> None:
        """Take up a decision, or that there is none."""
        self.mask = state.bool().to(self.weight.device) if len(state) else None
        self.s.requires_grad_(self.mask is None)

    def check_budget(self, stored: Stored) -> None:
        """Count numbers as they are stored in the end; refuse what even an empty table does not fit into."""
        self.stored = stored
        if self.budget is not None:
            require_room(self.schema, self.fields.dim, self.budget, stored)

    def kept(self) -> Selection:
        """The numbers that are left, of every column."""
        return self._selection(self.left())

    def _selection(self, mask: Tensor) -> Selection:
        blocks = torch.split(mask.cpu(), list(self.layout.rows))
        elements = {c.name: blocks[c.vocabulary][: c.rows].clone() for c in self.layout.columns}
        return Selection(self.fields.names, elements=elements)

    def prune(self, selection: Selection) -> Any:
        """Return the smaller table, which learns like any other; it has no thresholds."""
        return pruned_table(self.schema, self, selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The whole table, and what says which part of it counts."""
        tables = {"weight": self.weight.detach()}
        return tables | ({"s": self.s.detach()} if self.mask is None else {"mask": self.mask})


def soft(v: Tensor, s: Tensor, speed: float) -> Tensor:
    """sign(v) · max(|v| − σ(speed · s), 0)."""
    return v.sign() * (v.abs() - (speed * s).sigmoid()).relu()


@hookimpl
def recsys_after_stage(run: Run, stage: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Say how far a fit stage has come."""
    table = run.model.embedding
    if isinstance(table, PEP) and table.budget is not None and table.mask is None:
        size = table.size(table.shrunk() != 0)
        room = "within" if size <= table.limit else "[yellow]still above[/yellow]"
        run.say(f"{stage}: what pep leaves takes {size:,} bytes, {room} the budget of {table.limit:,.0f}")


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding, with its stages."""
    stages = (
        {"use": "fit", "name": "search"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("embedding", "pep", PEP, stages)]
