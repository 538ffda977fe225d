"""Which rows a training step or an evaluation batch holds: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.contracts import Batch
from recsys.data.order import Order, WindowOrder, divide
from recsys.data.shards import Shards
from recsys.data.windows import WindowStream
from recsys.errors import DataError

_SMALLEST_LAST = 64
SHUFFLE_MEMORY = 512
"""MiB."""


class SampledRows(Protocol):
    """What adds sampled rows to batches; see `recsys.data.sampling`."""

    @property
    def rows(self) -> npt.NDArray[np.int64] | None:
        """The logged rows that are trained on, `[n]` int64 ascending; None: all."""
        ...

    def extend(
        self, batch: Batch, epoch: int, low: int, places: npt.NDArray[np.int64], step: Callable[[], Batch]
    ) -> Batch:
        """Return the batch with sampled rows after its own."""
        ...


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one rank, in random order; every row exactly once per epoch over all ranks.

    Rows that fit into `shuffle_memory` are in one random order over all of them (`Order`), through memory maps. More
    rows are read from disk window by window, each window a random sample of blocks of the data (`WindowOrder`); two
    windows together take `shuffle_memory`, or slightly more when some rows have much longer histories than others.
    Either way the rows of a step do not depend on the number of ranks: each rank reads every window.

    Args:
        shards: the encoded rows.
        batch_size: rows per optimizer step, over all ranks and micro-batches.
        seed: of the run.
        rank: of this process.
        ranks: number of processes.
        accumulate: micro-batches per optimizer step.
        shuffle_memory: MiB for the rows that are shuffled, in each process; 0 shuffles all rows as one, however many.
        sampled: adds sampled rows to each batch, and may train on some of the logged rows only; `batch_size`, `share`
            and positions go by logged rows.

    Raises:
        DataError: a step has fewer rows than ranks times micro-batches.
    """

    shards: Shards
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    shuffle_memory: float = SHUFFLE_MEMORY
    sampled: SampledRows | None = None

    def __post_init__(self) -> None:
        smallest = min(self.batch_size, self.rows)
        if smallest < self._pieces:
            raise DataError(
                f"{smallest} rows per step cannot be divided over {self.ranks} processes x {self.accumulate} "
                f"micro-batches ({self.rows} rows, batch_size {self.batch_size}); lower one of them"
            )

    @property
    def rows(self) -> int:
        """Logged rows per epoch, over all ranks."""
        some = None if self.sampled is None else self.sampled.rows
        return len(self.shards) if some is None else len(some)

    @property
    def _pieces(self) -> int:
        return self.ranks * self.accumulate

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; a very short last step is merged into the one before it."""
        full, rest = divmod(self.rows, self.batch_size)
        least = max(min(_SMALLEST_LAST, self.batch_size), 2 * self._pieces)
        return max(full, 1) if rest < least else full + 1

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def bounds(self, step: int, micro: int) -> tuple[int, int, int]:
        """Return first and end position of this rank's part of a micro-batch, and the rows of the whole step."""
        low = step * self.batch_size
        rows = (self.rows if step == self.steps - 1 else low + self.batch_size) - low
        piece = micro * self.ranks + self.rank
        return low + rows * piece // self._pieces, low + rows * (piece + 1) // self._pieces, rows

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from optimizer step `start_step` on.

        `share` of each is its rows x ranks x accumulate / rows of the step: the mean over ranks and micro-batches of
        share x mean loss is then the mean loss of the step's rows.
        """
        spans = ((step, micro) for step in range(start_step, self.steps) for micro in range(self.accumulate))
        order = self.order(epoch)
        if isinstance(order, WindowOrder):
            with WindowStream(self.shards.files, order) as stream:
                for step, micro in spans:
                    low, high, _ = self.bounds(step, micro)
                    yield self._finished(self.shards.complete(stream.batch(low, high)), order, epoch, step, micro)
            return
        for step, micro in spans:
            low, high, _ = self.bounds(step, micro)
            yield self._finished(self._gathered(order, low, high), order, epoch, step, micro)

    def _finished(self, batch: Batch, order: Order | WindowOrder, epoch: int, step: int, micro: int) -> Batch:
        """Set the batch's share, and add what is sampled."""
        low, high, rows = self.bounds(step, micro)
        batch = replace(batch, share=(high - low) * self._pieces / rows)
        if self.sampled is None:
            return batch
        first = step * self.batch_size
        whole = batch if high - low == rows else None
        extended = self.sampled.extend(
            batch,
            epoch,
            low,
            np.arange(low - first, high - first),
            lambda: whole or self._gathered(order, first, first + rows),
        )
        return self.shards.complete(extended)  # what is derived belongs to the items of the sampled rows

    def _gathered(self, order: Order | WindowOrder, low: int, high: int) -> Batch:
        return self.shards.gather(self.numbers(order.rows(np.arange(low, high))))

    def numbers(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of the split that stand at some places among those that are trained on."""
        some = None if self.sampled is None else self.sampled.rows
        return places if some is None else some[places]

    def order(self, epoch: int) -> Order | WindowOrder:
        """Return the order of an epoch's rows; its positions are those of `bounds`, its values go through `numbers`."""
        rows, memory = self.rows, int(self.shuffle_memory * 2**20)
        some = rows < len(self.shards)  # they are picked through the maps, wherever they are
        if some or not memory or self.shards.in_memory or self.shards.size <= memory:
            return Order(rows, self.seed, epoch)
        return WindowOrder(rows, *divide(rows, self.shards.size, memory), self.seed, epoch)


@dataclass(frozen=True)
class EvalBatches:
    """The batches of one rank in the order of the logs; ranks one after the other give every row once, in order.

    The grid of batches does not depend on the number of ranks, so neither do the numbers computed from a batch.

    Args:
        shards: the encoded rows.
        batch_size: rows per batch.
        rank: of this process.
        ranks: number of processes.
        rows: the rows to read, in this order, instead of all.
    """

    shards: Shards
    batch_size: int
    rank: int = 0
    ranks: int = 1
    rows: npt.NDArray[np.int64] | None = None

    @property
    def count(self) -> int:
        """How many rows are read, by all ranks together."""
        return len(self.shards) if self.rows is None else len(self.rows)

    @property
    def _span(self) -> tuple[int, int]:
        grid = -(-self.count // self.batch_size)
        return grid * self.rank // self.ranks, grid * (self.rank + 1) // self.ranks

    def __len__(self) -> int:
        low, high = self._span
        return high - low

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yield (number of the first row among those to read, batch)."""
        for batch in range(*self._span):
            low = batch * self.batch_size
            high = min(low + self.batch_size, self.count)
            yield low, self.shards.read(low, high) if self.rows is None else self.shards.gather(self.rows[low:high])
