"""Rows read from disk range by range: what is read takes memory only while it is held, unlike pages of a map."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from recsys.contracts import Batch
from recsys.data.layout import Bytes, Layout
from recsys.data.order import WindowOrder
from recsys.data.pieces import Events, Piece, Rows, gather, join
from recsys.data.shard_files import Part, event_type
from recsys.errors import DataError

_AHEAD = 16
"""Ranges that the disk is asked for before they are needed; the reads themselves come one after the other."""
_AT_ONCE = 1 << 16
"""Rows whose offsets are read at once; bounds the temporary arrays."""


class Space:
    """Memory that one read after the other uses again; it grows when a read needs more."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    def take(self, what: str, size: int) -> Bytes:
        """Return `[size]` bytes; what they held before is lost."""
        if what not in self._held or len(self._held[what]) < size:
            self._held.pop(what, None)
            self._held[what] = _map(size + size // 16 + 1)  # what is never touched takes no memory
        return self._held[what][:size]


def _map(size: int) -> Bytes:
    """Return `[size]` bytes straight from the system, which go back to it whatever the allocator keeps for itself."""
    if sys.platform != "linux":
        return np.empty(size, np.uint8)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)  # as numpy does: rows are picked from all over it
    return np.frombuffer(pages, np.uint8)


class RowFiles:
    """The files of a split, for reading ranges of rows.

    Args:
        folder: of the split.
        layout: of its records.
        parts: as the manifest lists them.
    """

    def __init__(self, folder: Path, layout: Layout, parts: Sequence[Part]) -> None:
        self.layout = layout
        self._folder = folder
        self._parts = parts
        self._starts = np.cumsum([0, *(p.rows for p in parts)])

    def read(self, low: Rows, high: Rows, space: Space) -> Piece:
        """Return the rows of the ranges `low[i] … high[i] - 1`, one range after the other.

        Args:
            low: `[ranges]` int64, ascending.
            high: `[ranges]` int64, greater than `low`; the ranges do not overlap.
            space: what is returned lies here, until the next read into it.

        Raises:
            DataError: a file is shorter than when it was opened.
        """
        rows = int((high - low).sum())
        inside = [(p, *self._inside(p, low, high)) for p in range(len(self._parts))]
        inside = [(p, a, b) for p, a, b in inside if len(a)]
        size = self.layout.size
        records = space.take("records", rows * size)
        at = 0
        for p, a, b in inside:
            end = at + int((b - a).sum()) * size
            _read(self._folder / self._parts[p].records, a * size, (b - a) * size, records[at:end])
            at = end
        events = tuple(self._events(h, inside, rows, space) for h in range(len(self.layout.schema.histories)))
        return Piece(records.reshape(rows, size), events)

    def _inside(self, part: int, low: Rows, high: Rows) -> tuple[Rows, Rows]:
        """Return what of the ranges lies in a part, as its own row numbers."""
        first, end = int(self._starts[part]), int(self._starts[part + 1])
        some = slice(np.searchsorted(high, first, side="right"), np.searchsorted(low, end, side="left"))
        return np.maximum(low[some], first) - first, np.minimum(high[some], end) - first

    def _events(self, index: int, inside: Sequence[tuple[int, Rows, Rows]], rows: int, space: Space) -> Events:
        history = self.layout.schema.histories[index]
        kind, width = event_type(history), len(history.columns)
        offsets = space.take(f"offsets {index}", (rows + 1) * 8).view("<i8")
        offsets[0] = at = 0
        spans = []
        for p, low, high in inside:
            path = self._folder / self._parts[p].events[index][0]
            first, end = np.empty_like(low), np.empty_like(low)
            for some in _slices(high - low):
                a, b = low[some], high[some]
                count = b - a
                found = np.empty(int((count + 1).sum()), "<i8")
                _read(path, a * 8, (count + 1) * 8, found.view(np.uint8))
                last = np.cumsum(count + 1) - 1
                first[some], end[some] = found[last - count], found[last]
                length = np.delete(np.diff(found), last[:-1])  # without what lies between two ranges
                offsets[at + 1 : at + 1 + len(length)] = length
                at += len(length)
            spans.append((p, first * width * kind.itemsize, end * width * kind.itemsize))
        np.cumsum(offsets, out=offsets)
        values = space.take(f"values {index}", int(offsets[-1]) * width * kind.itemsize)
        at = 0
        for p, first, end in spans:
            stop = at + int((end - first).sum())
            _read(self._folder / self._parts[p].events[index][1], first, end - first, values[at:stop])
            at = stop
        return Events(offsets, values.view(kind).reshape(-1, width))


def _slices(rows: Rows) -> list[slice]:
    """Cut ranges of so many rows into runs of at most `_AT_ONCE` rows, or of one range."""
    group = np.cumsum(rows) // _AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(rows)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _read(path: Path, start: npt.NDArray[np.int64], size: npt.NDArray[np.int64], target: Bytes) -> None:
    """Read bytes `start[i] … start[i] + size[i] - 1` of a file into `target`, one range after the other."""
    starts, sizes = start.tolist(), size.tolist()
    view = target.data
    with path.open("rb", buffering=0) as file:
        if len(starts) > 1:
            _advise(file.fileno(), 0, 0, soon=False)
        at = 0
        for i, (first, left) in enumerate(zip(starts, sizes, strict=True)):
            if i + _AHEAD < len(starts):
                _advise(file.fileno(), starts[i + _AHEAD], sizes[i + _AHEAD], soon=True)
            file.seek(first)
            while left:
                got = file.readinto(view[at : at + left])
                if not got:
                    raise DataError(f"{path}: shorter than when it was opened; encode the data again")
                at, left = at + got, left - got


def _advise(handle: int, start: int, size: int, soon: bool) -> None:
    """Tell the system that bytes are read soon, or that a file is not read from front to end."""
    if sys.platform == "linux":
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_WILLNEED if soon else os.POSIX_FADV_RANDOM)


class WindowStream:
    """The batches of an epoch in `WindowOrder`: while one window is used, a thread reads the next.

    Args:
        files: of the split.
        order: of the epoch.
    """

    def __init__(self, files: RowFiles, order: WindowOrder) -> None:
        self._files = files
        self._order = order
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="recsys-windows")
        self._spaces = [Space(), Space()]
        self._window = -1
        self._piece: Piece | None = None
        self._next: Future[Piece] | None = None

    def __enter__(self) -> WindowStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, window: int) -> Piece:
        return self._files.read(*self._order.ranges(window), self._spaces[window % 2])

    def batch(self, low: int, high: int) -> Batch:
        """Return the rows at positions `low … high - 1`; positions may only grow from call to call."""
        batches = []
        while low < high:
            window = self._order.window_of(low)
            end = min(high, self._order.start(window + 1))
            rows = self._order.inside(window, np.arange(low, end))
            batches.append(gather(self._files.layout, [(self._take(window), slice(None), rows)], end - low))
            low = end
        return join(batches)

    def _take(self, window: int) -> Piece:
        """Return a window, this one or a later one; the space of those before it is read into again."""
        if self._next is None:
            self._window = window - 1
            self._next = self._pool.submit(self._read, window)
        while self._piece is None or self._window < window:
            self._piece = self._next.result()
            self._window += 1
            if self._window + 1 < self._order.windows:
                self._next = self._pool.submit(self._read, self._window + 1)
        return self._piece
