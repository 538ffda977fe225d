"""Which rows a training step or an evaluation batch holds: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import Batch
from recsys.data.hashing import mix
from recsys.data.shards import Shards
from recsys.errors import DataError

Words = npt.NDArray[Any]
_ROUNDS = 6
_SMALLEST_LAST = 64


class Order:
    """A random order of `rows` rows as a function: no state, no array of that length.

    A keyed Feistel network (Luby, Rackoff 1988) permutes the numbers of the least number of bits that holds `rows`;
    what falls outside is permuted again until it falls inside (cycle walking: Black, Rogaway 2002), fewer than two
    rounds of it on average. The halves may differ by one bit; they swap their sizes from round to round.

    Args:
        rows: length of the order, at least 1.
        seed: of the run.
        epoch: another epoch, another order.
    """

    def __init__(self, rows: int, seed: int, epoch: int) -> None:
        if rows < 1:
            raise ValueError("an order needs at least one row")
        self.size = rows
        bits = max((rows - 1).bit_length(), 2)
        self._high, self._low = bits // 2, bits - bits // 2
        self._word = np.uint32 if bits <= 32 else np.uint64
        base = mix(mix(seed) ^ epoch)
        self._keys = tuple(self._word(mix(base + i) & 0xFFFFFFFF) for i in range(_ROUNDS))

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows at `positions [n]` int64, each in `[0, rows)`; a bijection on that range."""
        found = self._permute(positions.astype(self._word))
        outside = np.flatnonzero(found >= self.size)
        while len(outside):
            found[outside] = self._permute(found[outside])
            outside = outside[found[outside] >= self.size]
        return found.astype(np.int64)

    def _permute(self, x: Words) -> Words:
        word = self._word
        left_bits, right_bits = self._high, self._low
        left, right = x >> word(right_bits), x & word((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (_scramble(right, key) & word((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << word(right_bits)) | right


def _scramble(x: Words, key: Any) -> Words:
    """Mix a half with a round key; any function will do, so the finaliser of MurmurHash3 (Appleby) modulo the word."""
    word = x.dtype.type
    y: Words = (x + key) * word(0x85EBCA6B)
    y ^= y >> word(13)
    y *= word(0xC2B2AE35)
    y ^= y >> word(16)
    return y


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one rank, in random order; every row exactly once per epoch over all ranks.

    Args:
        shards: the encoded rows.
        batch_size: rows per optimizer step, over all ranks and micro-batches.
        seed: of the run.
        rank: of this process.
        ranks: number of processes.
        accumulate: micro-batches per optimizer step.

    Raises:
        DataError: a step has fewer rows than ranks times micro-batches.
    """

    shards: Shards
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        smallest = min(self.batch_size, len(self.shards))
        if smallest < self._pieces:
            raise DataError(
                f"{smallest} rows per step cannot be divided over {self.ranks} processes x {self.accumulate} "
                f"micro-batches ({len(self.shards)} rows, batch_size {self.batch_size}); lower one of them"
            )

    @property
    def _pieces(self) -> int:
        return self.ranks * self.accumulate

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; a very short last step is merged into the one before it."""
        full, rest = divmod(len(self.shards), self.batch_size)
        least = max(min(_SMALLEST_LAST, self.batch_size), 2 * self._pieces)
        return max(full, 1) if rest < least else full + 1

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def bounds(self, step: int, micro: int) -> tuple[int, int, int]:
        """Return first and end position of this rank's part of a micro-batch, and the rows of the whole step."""
        low = step * self.batch_size
        rows = (len(self.shards) if step == self.steps - 1 else low + self.batch_size) - low
        piece = micro * self.ranks + self.rank
        return low + rows * piece // self._pieces, low + rows * (piece + 1) // self._pieces, rows

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from optimizer step `start_step` on.

        `share` of each is its rows x ranks x accumulate / rows of the step: the mean over ranks and micro-batches of
        share x mean loss is then the mean loss of the step's rows.
        """
        order = Order(len(self.shards), self.seed, epoch)
        for step in range(start_step, self.steps):
            for micro in range(self.accumulate):
                low, high, rows = self.bounds(step, micro)
                batch = self.shards.gather(order.rows(np.arange(low, high)))
                yield replace(batch, share=(high - low) * self._pieces / rows)


@dataclass(frozen=True)
class EvalBatches:
    """The batches of one rank in the order of the logs; ranks one after the other give every row once, in order.

    The grid of batches does not depend on the number of ranks, so neither do the numbers computed from a batch.

    Args:
        shards: the encoded rows.
        batch_size: rows per batch.
        rank: of this process.
        ranks: number of processes.
    """

    shards: Shards
    batch_size: int
    rank: int = 0
    ranks: int = 1

    @property
    def _span(self) -> tuple[int, int]:
        grid = -(-len(self.shards) // self.batch_size)
        return grid * self.rank // self.ranks, grid * (self.rank + 1) // self.ranks

    def __len__(self) -> int:
        low, high = self._span
        return high - low

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yield (number of the first row, batch)."""
        for batch in range(*self._span):
            low = batch * self.batch_size
            high = min(low + self.batch_size, len(self.shards))
            yield low, self.shards.gather(np.arange(low, high))
