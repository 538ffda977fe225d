"""How popular each item of a train split was in each time slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.data.batches import EvalBatches
from recsys.data.items import Catalogue
from recsys.data.shards import Shards
from recsys.errors import RecipeError

_ROWS = 1 << 16
"""Rows that are read at once."""


@dataclass(frozen=True)
class SlotPopularity:
    """Share of the clicks of a time slot, scaled to [0, 1] within the slot.

    m_{i,t} = (p_{i,t} − min_j p_{j,t}) / (max_j p_{j,t} − min_j p_{j,t}),  p_{i,t} = (n_{i,t} + 1) / (Σ_j n_{j,t} + I),
    n the rows with a label of 1; 1 for all items of a slot in which they are equally popular.

    Args:
        table: `[S, I]` float32, by slot and item number.
        first: time at which the first slot begins.
        last: the latest time of the train split; rows beyond it belong to the last slot.
    """

    table: Tensor
    first: int
    last: int

    def of(self, time: Tensor, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Popularity of items at some times, `[B], [B] -> [B]` float32; 0 for an item without a number."""
        slot = _slots(time.numpy(), self.first, self.last, len(self.table))
        at = torch.from_numpy(slot * self.table.shape[1] + np.maximum(numbers, 0))
        return self.table.flatten()[at] * torch.from_numpy(numbers >= 0)


def read_popularity(shards: Shards, catalogue: Catalogue, slots: int) -> SlotPopularity:
    """Read all rows of a train split twice: when it begins and ends, and which items have clicks when.

    Raises:
        RecipeError: the rows have no time.
    """
    if "time" not in shards.schema.context:
        raise RecipeError(
            "sampling.popularity_slots: time slots need the context column `time`; name it under data.context",
            path=("sampling", "popularity_slots"),
        )
    ends = [(int(b.context["time"].min()), int(b.context["time"].max())) for _, b in EvalBatches(shards, _ROWS)]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    items = len(catalogue.items)
    count = np.zeros(slots * items, np.int64)
    for _, batch in EvalBatches(shards, _ROWS):
        numbers = catalogue.numbers(batch)
        clicked = torch.stack(list(batch.label.values())).amax(0).numpy() > 0
        taken = clicked & (numbers >= 0)
        slot = _slots(batch.context["time"].numpy(), first, last, slots)
        count += np.bincount(slot[taken] * items + numbers[taken], minlength=len(count))
    share = (count.reshape(slots, items) + 1.0) / (count.reshape(slots, items).sum(1, keepdims=True) + items)
    low, high = share.min(1, keepdims=True), share.max(1, keepdims=True)
    scaled = np.where(high > low, (share - low) / np.where(high > low, high - low, 1.0), 1.0)
    return SlotPopularity(torch.from_numpy(scaled.astype(np.float32)), first, last)


def _slots(time: npt.NDArray[np.int64], first: int, last: int, slots: int) -> npt.NDArray[np.int64]:
    """The slot of each time, of `slots` equally long ones."""
    inside = np.clip(time, first, last) - first
    return (inside.astype(np.float64) * slots / (last - first + 1)).astype(np.int64)
