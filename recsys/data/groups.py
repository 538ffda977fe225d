"""Training batches of whole groups, such as the rows of one slate: pure functions of (seed, epoch, position) too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from recsys.contracts import Batch
from recsys.data.order import Order
from recsys.data.shards import Shards
from recsys.errors import DataError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupBatches:
    """The micro-batches of one rank, each of whole groups, in random order; every row exactly once per epoch.

    A group is all rows of an equal value of the context column `group`, wherever they stand in the logs; within a
    batch they stand side by side, in the order of the logs. An epoch takes the groups in one random order, as many to a
    step as have `batch_size` rows on the average. The groups of a step do not depend on the number of ranks. Rows are
    read through memory maps; 16 bytes per row are held to find them.

    Args:
        shards: the encoded rows, with the context column `group`.
        batch_size: rows per optimizer step, on the average, over all ranks and micro-batches.
        seed: of the run.
        rank: of this process.
        ranks: number of processes.
        accumulate: micro-batches per optimizer step.

    Raises:
        DataError: a step has fewer groups than ranks times micro-batches.
    """

    shards: Shards
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    sampled: None = None
    _sorted: Numbers = field(init=False, repr=False)
    _starts: Numbers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        group = self.shards.groups()
        by_group = np.argsort(group, kind="stable")
        new = np.flatnonzero(np.diff(group[by_group], prepend=group[by_group[:1]] - 1))
        object.__setattr__(self, "_sorted", by_group)
        object.__setattr__(self, "_starts", np.append(new, len(group)))
        smallest = min(self._per_step, self.groups)
        if smallest < self._pieces:
            raise DataError(
                f"{smallest} groups per step cannot be divided over {self.ranks} processes x {self.accumulate} "
                f"micro-batches ({len(self.shards)} rows in {self.groups} groups, batch_size {self.batch_size}); "
                "raise batch_size, or lower one of the others"
            )

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(self._starts) - 1

    @property
    def rows(self) -> int:
        """Rows per epoch, over all ranks."""
        return len(self.shards)

    @property
    def _pieces(self) -> int:
        return self.ranks * self.accumulate

    @property
    def _per_step(self) -> int:
        return max(round(self.batch_size * self.groups / len(self.shards)), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; a last step of less than half the groups is merged into the one before it."""
        full, rest = divmod(self.groups, self._per_step)
        least = max(self._per_step // 2, self._pieces)
        return max(full, 1) if rest < least else full + 1

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def part(self, epoch: int, step: int, micro: int) -> tuple[Numbers, float]:
        """Return the rows of this rank's part of a micro-batch, and its share of the step."""
        low = step * self._per_step
        high = self.groups if step == self.steps - 1 else low + self._per_step
        taken = Order(self.groups, self.seed, epoch).rows(np.arange(low, high))
        piece = micro * self.ranks + self.rank
        own = taken[(high - low) * piece // self._pieces : (high - low) * (piece + 1) // self._pieces]
        rows = self._sorted[_ranges(self._starts[own], self._starts[own + 1])]
        whole = int((self._starts[taken + 1] - self._starts[taken]).sum())
        return rows, len(rows) * self._pieces / whole

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from optimizer step `start_step` on, `share` as with `TrainBatches`."""
        for step in range(start_step, self.steps):
            for micro in range(self.accumulate):
                rows, share = self.part(epoch, step, micro)
                yield replace(self.shards.gather(rows), share=share)


def _ranges(starts: Numbers, stops: Numbers) -> Numbers:
    """`starts[0] … stops[0] - 1, starts[1] … stops[1] - 1, …`."""
    sizes = stops - starts
    places: Numbers = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return places
