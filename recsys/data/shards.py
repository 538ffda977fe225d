"""Encoded rows on disk: packed records, memory-mapped, gathered a whole batch at a time."""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from recsys.contracts import Batch, EncodedSchema, Field, History
from recsys.data.blocks import EncodedColumns
from recsys.data.digest import sha256_of
from recsys.data.encode import Encoder
from recsys.data.layout import Layout
from recsys.data.pieces import Events, Piece, Rows, gather
from recsys.data.reading import RawRows
from recsys.data.report import SplitReport
from recsys.data.shard_files import MANIFEST, VERSION, Part, ShardWriter, event_type, sync_folder, write_manifest
from recsys.data.windows import RowFiles, Space
from recsys.errors import DataError


def write_shards(
    encoder: Encoder,
    logs: RawRows | pl.LazyFrame,
    folder: Path,
    *,
    report: SplitReport | None = None,
    progress: Callable[[int], None] | None = None,
) -> Shards:
    """Encode raw rows, labels and context included, and write them under `folder`.

    Args:
        encoder: fitted on the train split.
        logs: raw rows.
        folder: must not exist yet; it appears only when it is complete.
        report: counts of missing, unknown, non-finite and cut values are added to it.
        progress: called with the number of rows written so far.

    Raises:
        DataError: no rows, rows that break a rule, or the folder exists.
    """
    counts = SplitReport() if report is None else report

    def told() -> Iterator[EncodedColumns]:
        for block in encoder.transform(logs, report=counts):
            yield block
            if progress is not None:
                progress(counts.rows)

    return write_blocks(encoder.schema, told(), folder, shard_rows=encoder.config.shard_rows)


def write_blocks(
    schema: EncodedSchema, blocks: Iterable[EncodedColumns], folder: Path, *, shard_rows: int = 1 << 22
) -> Shards:
    """Write encoded blocks under `folder`, which appears only when it is complete.

    Args:
        schema: of the encoder that made the blocks.
        blocks: encoded rows, in order.
        folder: must not exist yet.
        shard_rows: rows per file.

    Raises:
        DataError: no rows, or the folder exists.
    """
    if folder.exists():
        raise DataError(f"{folder}: exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        writer = ShardWriter(temporary, Layout.of(schema), shard_rows)
        for block in blocks:
            writer.add(block)
        parts = writer.close()
        if not parts:
            raise DataError(f"0 rows to write to {folder}")
        write_manifest(temporary, schema, parts)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Shards.open(folder)


class Shards:
    """The encoded rows of one split, read-only.

    Rows are numbered from 0 in the order of the logs. The object holds memory maps only, so it is cheap to open and
    may be used by many processes at once. Pages of the maps that `gather` touches count as memory of the process, until
    the system needs it for something else; what `read` and `files` read does not.
    """

    def __init__(self, folder: Path, schema: EncodedSchema, parts: tuple[Part, ...], in_memory: bool) -> None:
        self.folder = folder
        self.schema = schema
        self.in_memory = in_memory
        self.files = RowFiles(folder, Layout.of(schema), parts)
        self._parts = parts
        self._layout = self.files.layout
        self._starts = np.cumsum([0, *(p.rows for p in parts)])
        self._pieces = [self._open_part(p) for p in parts]
        self._derived: dict[str, Callable[[Batch], Tensor]] = {}

    def deriving(self, name: str, derive: Callable[[Batch], Tensor]) -> Shards:
        """Return the same rows with one more context column, which is worked out for each batch that is read."""
        derived = copy.copy(self)
        derived._derived = {**self._derived, name: derive}
        derived.schema = replace(self.schema, context=(*self.schema.context, name))
        return derived

    def complete(self, batch: Batch) -> Batch:
        """Return a batch that was read from `files` with the derived context columns."""
        if not self._derived:
            return batch
        return replace(batch, context={**batch.context, **{n: derive(batch) for n, derive in self._derived.items()}})

    def _open_part(self, part: Part) -> Piece:
        records = _map(self.folder / part.records, np.dtype(np.uint8), self.in_memory)
        events = tuple(
            Events(
                _map(self.folder / offsets, np.dtype("<i8"), self.in_memory),
                _map(self.folder / values, event_type(h), self.in_memory).reshape(-1, len(h.columns)),
            )
            for h, (offsets, values) in zip(self.schema.histories, part.events, strict=True)
        )
        return Piece(records.reshape(part.rows, self._layout.size), events)

    @classmethod
    def open(cls, folder: Path, *, in_memory: bool = False) -> Shards:
        """Open what `write_shards` wrote.

        Args:
            folder: the folder of one split.
            in_memory: read everything into memory instead of mapping the files.

        Raises:
            DataError: the folder is incomplete, of another version, or a file has another size than written.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder}: no complete encoded data (no {MANIFEST})")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["version"] != VERSION:
                raise DataError(f"{path}: version {body['version']}, expected {VERSION}; encode the data again")
            schema = schema_from_json(body["schema"])
            parts = tuple(Part.from_json(p) for p in body["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable manifest: {error}") from error
        for part in parts:
            for name, (size, _) in part.files.items():
                file = folder / name
                found = file.stat().st_size if file.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes"
                    raise DataError(f"{file}: {state}, expected {size} bytes; encode the data again")
        return cls(folder, schema, parts, in_memory)

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest.

        Raises:
            DataError: naming the first file that differs.
        """
        for part in self._parts:
            for name, (_, digest) in part.files.items():
                if sha256_of(self.folder / name) != digest:
                    raise DataError(f"{self.folder / name}: altered after it was written (sha256 differs)")

    def digests(self) -> tuple[str, ...]:
        """Return the sha256 of every file, as the manifest has it."""
        return tuple(digest for part in self._parts for _, digest in part.files.values())

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for part in self._parts for size, _ in part.files.values())

    def gather(self, rows: Rows) -> Batch:
        """Return the batch of `rows [B]` int64, in that order; a row may appear more than once.

        Raises:
            IndexError: a row number is not in `[0, len)`.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows must lie in [0, {len(self)})")
        if len(self._parts) == 1:
            return self.complete(gather(self._layout, [(self._pieces[0], slice(None), rows)], len(rows)))
        part = np.searchsorted(self._starts, rows, side="right") - 1
        taken = [(self._pieces[p], part == p, rows[part == p] - self._starts[p]) for p in np.unique(part)]
        return self.complete(gather(self._layout, taken, len(rows)))

    def read(self, low: int, high: int) -> Batch:
        """Return the batch of the rows `low … high - 1`, without maps unless all is in memory.

        Raises:
            IndexError: not `0 <= low < high <= len`.
            DataError: a file is shorter than when it was opened.
        """
        if not 0 <= low < high <= len(self):
            raise IndexError(f"rows must lie in [0, {len(self)})")
        if self.in_memory:
            return self.gather(np.arange(low, high))
        piece = self.files.read(np.array([low]), np.array([high]), Space())
        return self.complete(gather(self._layout, [(piece, slice(None), np.arange(high - low))], high - low))

    def labels(self, task: str) -> npt.NDArray[np.uint8]:
        """Return the labels of all rows, `[rows]` uint8."""
        run = self._layout.labels[self.schema.tasks.index(task)]
        return np.concatenate([run.of(piece.records)[:, 0] for piece in self._pieces])

    def groups(self) -> npt.NDArray[np.int64]:
        """Return the context column `group` of all rows, `[rows]`.

        Raises:
            DataError: there is none.
        """
        if "group" not in self.files.layout.schema.context:
            raise DataError(f"{self.folder}: no context column 'group'; name one under data.context")
        run = self._layout.context[self.files.layout.schema.context.index("group")]
        return np.concatenate([run.of(piece.records)[:, 0] for piece in self._pieces])


def _map(path: Path, dtype: np.dtype[Any], in_memory: bool) -> npt.NDArray[Any]:
    """Map a file of numbers read-only, or read it; an empty file cannot be mapped."""
    if in_memory or path.stat().st_size == 0:
        return np.fromfile(path, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def schema_from_json(body: dict[str, Any]) -> EncodedSchema:
    """Read what `dataclasses.asdict` of an `EncodedSchema` became in JSON."""
    return EncodedSchema(
        fields=tuple(Field(**f) for f in body["fields"]),
        histories=tuple(
            History(h["name"], tuple(Field(**f) for f in h["columns"]), h["max_length"], tuple(h["target"]))
            for h in body["histories"]
        ),
        tasks=tuple(body["tasks"]),
        context=tuple(body["context"]),
    )
