"""How an encoded row lies in a shard: one packed record of fixed width, so that a batch is one gather of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import NULL_ID, NUMERIC_VALUE_ID, EncodedSchema
from recsys.data.blocks import EncodedColumns
from recsys.data.schema import FLOAT_CONTEXT

Bytes = npt.NDArray[np.uint8]
_PADDING = 0.05
"""Largest share of a record that may be padding."""


def id_type(rows: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds ids below `rows`."""
    for kind in (np.uint8, np.uint16, np.uint32):
        if rows - 1 <= np.iinfo(kind).max:
            return np.dtype(kind).newbyteorder("<")
    return np.dtype("<i8")


@dataclass(frozen=True)
class Run:
    """Columns of one type that lie side by side in the record, from byte `offset` on.

    Args:
        columns: which columns of the schema they are, ascending.
        dtype: of all of them.
        offset: of the first.
    """

    columns: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes in the record."""
        return len(self.columns) * self.dtype.itemsize

    @cached_property
    def at(self) -> slice | npt.NDArray[np.int64]:
        """What selects the columns of a batch: a slice where they are neighbours, which is quicker."""
        first, last = self.columns[0], self.columns[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.columns) else np.array(self.columns)

    def of(self, records: Bytes) -> npt.NDArray[Any]:
        """View `[B, record]` bytes as `[B, columns]` numbers."""
        return records[:, self.offset : self.offset + self.size].view(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the record of a schema; a function of the schema alone.

    Ids of one width lie side by side, whatever the order of their fields, so that a record has no byte too many and a
    batch is cast in at most four assignments. A numeric field is one float32, NaN where missing; its id follows from
    that.
    """

    schema: EncodedSchema
    ids: tuple[Run, ...]
    numbers: tuple[Run, ...]
    labels: tuple[Run, ...]
    context: tuple[Run, ...]
    size: int

    @classmethod
    def of(cls, schema: EncodedSchema) -> Layout:
        """Lay out a record: the widest types first, so that every number is aligned where little padding does it."""
        widths = [None if field.numeric else id_type(field.rows) for field in schema.fields]
        placed: dict[str, list[Run]] = {
            "ids": [
                Run(tuple(i for i, width in enumerate(widths) if width == dtype), dtype)
                for dtype in dict.fromkeys(width for width in widths if width is not None)
            ],
            "numbers": [],
            "labels": [Run((i,), np.dtype("u1")) for i in range(len(schema.tasks))],
            "context": [Run((i,), _context_type(name)) for i, name in enumerate(schema.context)],
        }
        if numeric := tuple(i for i, width in enumerate(widths) if width is None):
            placed["numbers"].append(Run(numeric, np.dtype("<f4")))
        offset, widest = 0, 1
        found: dict[str, list[Run]] = {what: [] for what in placed}
        parts = [(what, run) for what, runs in placed.items() for run in runs]
        for what, run in sorted(parts, key=lambda part: -part[1].dtype.itemsize):
            found[what].append(replace(run, offset=offset))
            offset += run.size
            widest = max(widest, run.dtype.itemsize)
        aligned = -(-max(offset, 1) // widest) * widest
        size = aligned if aligned - offset <= _PADDING * offset else max(offset, 1)
        runs = {what: tuple(sorted(of, key=lambda run: run.columns)) for what, of in found.items()}
        return cls(schema, runs["ids"], runs["numbers"], runs["labels"], runs["context"], size)

    def pack(self, block: EncodedColumns) -> Bytes:
        """Return a block as records, `[rows, record]` bytes."""
        records = np.zeros((block.rows, self.size), np.uint8)
        fields = self.schema.fields
        for run in self.ids:
            target = run.of(records)
            for i, column in enumerate(run.columns):
                target[:, i] = block.ids[fields[column].name]
        for run in self.numbers:
            target = run.of(records)
            for i, column in enumerate(run.columns):
                target[:, i] = block.values[fields[column].name]
        for task, run in zip(self.schema.tasks, self.labels, strict=True):
            run.of(records)[:, 0] = block.label[task]
        for name, run in zip(self.schema.context, self.context, strict=True):
            run.of(records)[:, 0] = block.context[name]
        return records

    def unpack(
        self, records: Bytes
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None, Mapping[str, Any], Mapping[str, Any]]:
        """Return ids `[B, F]`, values `[B, F]` or None, labels and context `{name: [B]}` of `[B, record]` bytes."""
        shape = (len(records), len(self.schema.fields))
        ids = np.empty(shape, np.int64)
        for run in self.ids:
            ids[:, run.at] = run.of(records)
        values = np.ones(shape, np.float32) if self.numbers else None
        for run in self.numbers:
            number = run.of(records)  # [B, columns]
            missing = np.isnan(number)
            ids[:, run.at] = np.where(missing, NULL_ID, NUMERIC_VALUE_ID)
            if values is not None:
                values[:, run.at] = np.where(missing, np.float32(1), number)
        tasks = zip(self.schema.tasks, self.labels, strict=True)
        beside = zip(self.schema.context, self.context, strict=True)
        label = {task: run.of(records)[:, 0].astype(np.float32) for task, run in tasks}
        return ids, values, label, {name: run.of(records)[:, 0].copy() for name, run in beside}


def _context_type(name: str) -> np.dtype[Any]:
    return np.dtype("<f4") if name in FLOAT_CONTEXT else np.dtype("<i8")
