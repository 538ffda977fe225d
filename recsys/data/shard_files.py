"""Writing the files of encoded rows, with their size and sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import History
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.layout import Layout, id_type

MANIFEST = "manifest.json"
VERSION = 1


def event_type(history: History) -> np.dtype[Any]:
    """Return the type of the ids of a history's events."""
    return id_type(max(column.rows for column in history.columns))


@dataclass(frozen=True)
class Part:
    """The files of some consecutive rows.

    Args:
        rows: number of rows.
        records: file with the packed records.
        events: per history of the schema, the files with offsets and values.
        files: file → (bytes, sha256).
    """

    rows: int
    records: str
    events: tuple[tuple[str, str], ...]
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Part:
        """Read what `dataclasses.asdict` became in JSON; file names must be plain."""
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        events = tuple((str(a), str(b)) for a, b in body["events"])
        used = [str(body["records"]), *(name for pair in events for name in pair)]
        if sorted(used) != sorted(files) or any(Path(name).name != name for name in files):
            raise ValueError("file names are not as written")
        return cls(int(body["rows"]), used[0], events, files)


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self._file.write(raw)
        self._hash.update(raw)
        self.size += raw.nbytes

    def close(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self.size, self._hash.hexdigest()


class _OpenPart:
    """The part that is being written."""

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self._layout = layout
        self.rows = 0
        self._records = _File(folder / f"records-{number:05d}.bin")
        histories = range(len(layout.schema.histories))
        self._offsets = [_File(folder / f"history{h}-offsets-{number:05d}.bin") for h in histories]
        self._values = [_File(folder / f"history{h}-values-{number:05d}.bin") for h in histories]
        self._events = [0 for _ in histories]
        for file in self._offsets:
            file.write(np.zeros(1, "<i8"))

    def add(self, block: EncodedColumns, low: int, high: int, records: npt.NDArray[np.uint8]) -> None:
        self._records.write(records[low:high])
        self.rows += high - low
        for h, history in enumerate(self._layout.schema.histories):
            ragged: Ragged = block.history[history.name]
            ends = np.concatenate([[0], np.cumsum(ragged.length)])
            offsets = ends[low + 1 : high + 1] - ends[low] + self._events[h]
            self._offsets[h].write(offsets.astype("<i8"))
            self._values[h].write(ragged.values[ends[low] : ends[high]].astype(event_type(history)))
            self._events[h] += int(ends[high] - ends[low])

    def close(self) -> Part:
        files = [self._records, *self._offsets, *self._values]
        written = {file.name: file.close() for file in files}
        events = tuple((o.name, v.name) for o, v in zip(self._offsets, self._values, strict=True))
        return Part(self.rows, self._records.name, events, written)


class ShardWriter:
    """Writes blocks into parts of at most `shard_rows` rows."""

    def __init__(self, folder: Path, layout: Layout, shard_rows: int) -> None:
        self._folder = folder
        self._layout = layout
        self._shard_rows = shard_rows
        self._open: _OpenPart | None = None
        self._parts: list[Part] = []

    def add(self, block: EncodedColumns) -> None:
        """Append a block."""
        records = self._layout.pack(block)
        low = 0
        while low < block.rows:
            part = self._open or _OpenPart(self._folder, len(self._parts), self._layout)
            self._open = part
            high = min(block.rows, low + self._shard_rows - part.rows)
            part.add(block, low, high, records)
            low = high
            if part.rows == self._shard_rows:
                self._parts.append(part.close())
                self._open = None

    def close(self) -> list[Part]:
        """Finish the last part and return all of them."""
        if self._open is not None:
            self._parts.append(self._open.close())
            self._open = None
        return self._parts
