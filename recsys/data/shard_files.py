"""Writing the files of encoded rows, with their size and sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import EncodedSchema, History
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.layout import Layout, id_type

MANIFEST = "manifest.json"
VERSION = 2
_READ = 1 << 20


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


def write_manifest(folder: Path, schema: EncodedSchema, parts: Sequence[Part]) -> None:
    """Write what makes a folder of parts complete, and flush the folder."""
    body = {"version": VERSION, "schema": asdict(schema), "parts": [asdict(part) for part in parts]}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _File:
    """A file that is hashed while it is written; one that was broken off goes on after its first `size` bytes.

    Raises:
        ValueError: those bytes are not the ones that were written.
    """

    def __init__(self, path: Path, size: int = 0, digest: str = "") -> None:
        self.name = path.name
        self._hash = hashlib.sha256()
        self.size = size
        self._file = path.open("r+b" if size else "wb")
        if size:
            self._file.truncate(size)
            while piece := self._file.read(_READ):
                self._hash.update(piece)
            if self._hash.hexdigest() != digest:
                raise ValueError(f"{path}: its bytes are not those that were written")

    def write(self, data: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self._file.write(raw)
        self._hash.update(raw)
        self.size += raw.nbytes

    def flush(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.size, self._hash.hexdigest()

    def close(self) -> tuple[int, str]:
        written = self.flush()
        self._file.close()
        return written


class _OpenPart:
    """The part that is being written."""

    def __init__(self, folder: Path, number: int, layout: Layout, begun: Mapping[str, Any] | None = None) -> None:
        self._layout = layout
        done: Mapping[str, tuple[int, str]] = {} if begun is None else begun["files"]

        def opened(name: str) -> _File:
            return _File(folder / name, *done.get(name, (0,)))

        histories = range(len(layout.schema.histories))
        self._records = opened(f"records-{number:05d}.bin")
        self._offsets = [opened(f"history{h}-offsets-{number:05d}.bin") for h in histories]
        self._values = [opened(f"history{h}-values-{number:05d}.bin") for h in histories]
        self.rows: int = 0 if begun is None else begun["rows"]
        self._events: list[int] = [0 for _ in histories] if begun is None else list(begun["events"])
        if begun is None:
            for file in self._offsets:
                file.write(np.zeros(1, "<i8"))

    @property
    def _files(self) -> list[_File]:
        return [self._records, *self._offsets, *self._values]

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

    def begun(self) -> dict[str, Any]:
        """Flush to disk, and return what is needed to go on from here."""
        return {"rows": self.rows, "events": self._events, "files": {f.name: f.flush() for f in self._files}}

    def close(self) -> Part:
        written = {file.name: file.close() for file in self._files}
        events = tuple((o.name, v.name) for o, v in zip(self._offsets, self._values, strict=True))
        return Part(self.rows, self._records.name, events, written)


class ShardWriter:
    """Writes blocks into parts of at most `shard_rows` rows.

    Args:
        folder: exists.
        layout: of the records.
        shard_rows: rows per part.
        state: of an earlier writer, to go on where it gave it; what was written afterwards is cut off.
    """

    def __init__(self, folder: Path, layout: Layout, shard_rows: int, state: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._layout = layout
        self._shard_rows = shard_rows
        self._open: _OpenPart | None = None
        self._parts: list[Part] = []
        if state is not None:
            self._parts = [Part.from_json(part) for part in state["parts"]]
            if state["open"] is not None:
                self._open = _OpenPart(folder, len(self._parts), layout, state["open"])

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

    def state(self) -> dict[str, Any]:
        """Flush everything to disk, and return plain values from which another writer can go on."""
        begun = None if self._open is None else self._open.begun()
        return {"parts": [asdict(part) for part in self._parts], "open": begun}

    def close(self) -> list[Part]:
        """Finish the last part and return all of them."""
        if self._open is not None:
            self._parts.append(self._open.close())
            self._open = None
        return self._parts
