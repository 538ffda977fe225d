"""Pruning by magnitude to a budget of bytes, at once or along DeepLight's schedule; and the control, by frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Component,
    EncodedSchema,
    RecipeError,
    Selection,
    Stored,
    Table,
    hookimpl,
    keep_most,
    keep_within,
    require_room,
)

BASE = 0.99
"""Of the schedule's exponential."""


class MagnitudeTable(Table):
    """The embedding table of which the numbers with the largest magnitude are kept, over all fields together.

    keep = {(i, k) : |w_ik| ≥ τ}, with the least τ for which the pruned table, places and id maps included, takes at
    most `budget` times the bytes of the whole one. The stage `prune` asks for it.

    With `every`, the smallest numbers are also zeroed while training, after every so many steps, up to the share
    rate · (1 - .99^(step / scale)) of all. They stay free to grow again, and under Adam they do in the next step: what
    is small in the end is decided by `prune` alone, whose mask is final.

    Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in Ad Serving",
    WSDM 2021, arXiv 2002.06987, §4.3 (the schedule; there `every` is 10 and `scale` 100).

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation.
        budget: bytes of the pruned table, as a share of those of the whole one in float32; with the stage `quantize`,
            numbers count as they are stored in the end.
        every: steps between two zeroings while training; 0 zeroes nothing before `prune`.
        rate: share of zeros that the schedule approaches.
        scale: steps in which the schedule goes 1% of the way that is left.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-4,
        budget: PositiveFloat = 0.25,
        every: NonNegativeInt = 0,
        rate: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        scale: PositiveFloat = 100.0,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.stored: Stored = "float32"
        self.budget, self.every, self.rate, self.scale = budget, every, rate, scale
        self.step = 0

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """None: the optimizer moves them all."""
        return ()

    def after_step(self) -> None:
        """Zero the smallest numbers when it is time."""
        self.step += 1
        if not self.every or self.step % self.every:
            return
        count = int(self.rate * (1 - BASE ** (self.step / self.scale)) * self.weight.numel())
        if count:
            with torch.no_grad():
                size = self.weight.abs()
                self.weight.masked_fill_(size <= size.flatten().kthvalue(count).values, 0.0)

    def check_budget(self, stored: Stored) -> None:
        """Count numbers as they are stored in the end; refuse what even an empty table does not fit into."""
        self.stored = stored
        require_room(self.schema, self.fields.dim, self.budget, stored)

    def kept(self) -> Selection:
        """What keeps the most of Σ e² within the budget: the largest numbers, or whole rows."""
        return keep_most(self.schema, self.fields.dim, self.weight.abs(), self.budget, self.stored)

    def get_extra_state(self) -> Tensor:
        """The number of steps, `[]`: kept by the host, which would else wait for a GPU in every step."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Any) -> None:
        """Go on from a number of steps."""
        self.step = int(state)


class FrequencyTable(Table):
    """The embedding table of which the rows that most training rows use are kept, over all fields together.

    The plain control for methods that learn what to keep: no weight is looked at. Of rows used equally often the first
    ones stay, within a field those whose values came first in the log. The stage `count_rows` counts, and has to come
    before `prune`.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation.
        budget: bytes of the pruned table, as a share of those of the whole one in float32; with the stage `quantize`,
            numbers count as they are stored in the end.
    """

    needs_counts = True

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-4,
        budget: PositiveFloat = 0.25,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.stored: Stored = "float32"
        self.budget = budget
        self.count: Tensor
        self.register_buffer("count", torch.zeros(self.weight.shape[0], dtype=torch.int64))

    def take_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Keep the counts of the rows."""
        for column in self.layout.columns:
            first = self.layout.offsets[column.vocabulary]
            self.count[first : first + column.rows] = counts[column.name].to(self.count.device)

    def check_budget(self, stored: Stored) -> None:
        """Count numbers as they are stored in the end; refuse what even an empty table does not fit into."""
        self.stored = stored
        require_room(self.schema, self.fields.dim, self.budget, stored)

    def kept(self) -> Selection:
        """The most frequent rows that fit into the budget.

        Raises:
            RecipeError: the rows were not counted.
        """
        if not bool(self.count.any()):
            raise RecipeError("embedding frequency: put {use: count_rows} before prune")
        return keep_within(self.schema, self.fields.dim, self.count, self.budget, self.stored)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embeddings."""
    stages = (
        {"use": "fit"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [
        Component("embedding", "magnitude", MagnitudeTable, stages),
        Component("embedding", "frequency", FrequencyTable, ({"use": "count_rows"}, *stages)),
    ]
