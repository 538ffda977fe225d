"""The order of an epoch's rows, as a function of (seed, epoch, position): nothing to draw, store or replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.data.hashing import mix

Words = npt.NDArray[Any]
Numbers = npt.NDArray[np.int64]
_ROUNDS = 6
_BLOCK_BYTES = 1 << 15
_LEAST_BLOCKS = 1024


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

    def rows(self, positions: Numbers) -> Numbers:
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


class WindowOrder:
    """A random order of rows that lie on disk, in which neighbouring positions need only a window of the rows.

    The rows are cut into blocks of `block_rows` consecutive rows. The blocks are put into random order and divided
    into windows of equally many; the rows of a window are put into random order again. A window thus mixes blocks
    from everywhere: among b rows of one window, which holds m of the data's blocks, the mean of anything that varies
    along the data has at most about 1 + b / m times the variance that b rows drawn from all of the data give it.

    The last block may be short; it stands at a random place like the others.

    Args:
        rows: length of the order, at least 1.
        block_rows: rows per block.
        windows: number of windows; at most one per block is made.
        seed: of the run.
        epoch: another epoch, another order.
    """

    def __init__(self, rows: int, block_rows: int, windows: int, seed: int, epoch: int) -> None:
        self.size = rows
        self._block_rows = block_rows
        self._blocks = -(-rows // block_rows)
        self.windows = min(windows, self._blocks)
        self._missing = self._blocks * block_rows - rows  # rows that the last block has less than the others
        self._key = mix(mix(seed) ^ epoch)
        self._short = mix(self._key) % self._blocks  # the place of the last block; the others are permuted
        self._others = Order(max(self._blocks - 1, 1), self._key, 0)

    def start(self, window: int) -> int:
        """Return the first position of a window; `start(windows)` is the number of rows."""
        place = self._first_place(window)
        return place * self._block_rows - (self._missing if place > self._short else 0)

    def window_of(self, position: int) -> int:
        """Return the window that a position lies in."""
        after_short = position >= (self._short + 1) * self._block_rows - self._missing
        place = (position + (self._missing if after_short else 0)) // self._block_rows
        return ((place + 1) * self.windows - 1) // self._blocks

    def ranges(self, window: int) -> tuple[Numbers, Numbers]:
        """Return first and end row of the window's blocks, each `[blocks]` int64, in ascending order."""
        places = np.arange(self._first_place(window), self._first_place(window + 1))
        others = places[places != self._short]
        blocks = self._others.rows(others - (others > self._short))
        if len(others) < len(places):
            blocks = np.append(blocks, self._blocks - 1)
        low = np.sort(blocks) * self._block_rows
        return low, np.minimum(low + self._block_rows, self.size)

    def inside(self, window: int, positions: Numbers) -> Numbers:
        """Return where the rows at `positions [n]`, all of this window, are among the rows of its ranges.

        Returns:
            `[n]` int64, counting the rows of `ranges(window)` one range after the other.
        """
        first = self.start(window)
        return Order(self.start(window + 1) - first, self._key, 1 + window).rows(positions - first)

    def rows(self, positions: Numbers) -> Numbers:
        """Return the rows at `positions [n]` int64, each in `[0, rows)`; a bijection on that range."""
        starts = [self.start(window) for window in range(self.windows)]
        windows = np.searchsorted(starts, positions, side="right") - 1
        found = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            here = windows == window
            block, rest = np.divmod(self.inside(window, positions[here]), self._block_rows)
            found[here] = self.ranges(window)[0][block] + rest  # only the last range may be short
        return found

    def _first_place(self, window: int) -> int:
        return window * self._blocks // self.windows


def divide(rows: int, size: int, memory: int) -> tuple[int, int]:
    """Return rows per block and number of windows, so that two windows at once fit into the memory.

    A window has at least 1,024 blocks, of 32 KiB if the memory allows: as small as a disk reads well, since a window
    of more blocks is the better sample of the data.

    Args:
        rows: number of rows.
        size: their bytes on disk.
        memory: bytes.
    """
    half = memory / 2
    row = size / rows
    block_rows = max(int(min(_BLOCK_BYTES, half / _LEAST_BLOCKS) / row), 1)
    per_window = max(int(half / (block_rows * row)), 1)
    return block_rows, -(-rows // (block_rows * per_window))
