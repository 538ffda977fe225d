"""How an encoded row lies in a shard: one packed record of fixed width, so that a batch is one gather of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import NULL_ID, NUMERIC_VALUE_ID, EncodedSchema
from recsys.data.blocks import EncodedColumns
from recsys.data.schema import FLOAT_CONTEXT

Bytes = npt.NDArray[np.uint8]
_MOST_RUNS = 8


def id_type(rows: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds ids below `rows`."""
    for kind in (np.uint8, np.uint16, np.uint32):
        if rows - 1 <= np.iinfo(kind).max:
            return np.dtype(kind).newbyteorder("<")
    return np.dtype("<i8")


@dataclass(frozen=True)
class Run:
    """Adjacent columns of one type: `count` of them from `first` on, at byte `offset` of the record."""

    first: int
    count: int
    dtype: np.dtype[Any]
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes in the record."""
        return self.count * self.dtype.itemsize

    def of(self, records: Bytes) -> npt.NDArray[Any]:
        """View `[B, record]` bytes as `[B, count]` numbers."""
        return records[:, self.offset : self.offset + self.size].view(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the record of a schema; a function of the schema alone.

    Ids are kept in runs of neighbouring fields with one width each, at most 8 runs, so that a batch is cast in a few
    slices whatever the number of fields. A numeric field is one float32, NaN where missing; its id follows from that.
    """

    schema: EncodedSchema
    ids: tuple[Run, ...]
    numbers: tuple[Run, ...]
    labels: tuple[Run, ...]
    context: tuple[Run, ...]
    size: int

    @classmethod
    def of(cls, schema: EncodedSchema) -> Layout:
        """Lay out a record: the widest types first, so that every number is aligned."""
        ids = _id_runs(schema)
        numbers = _number_runs(schema)
        labels = [Run(i, 1, np.dtype("u1")) for i in range(len(schema.tasks))]
        context = [Run(i, 1, _context_type(name)) for i, name in enumerate(schema.context)]
        parts = [("ids", r) for r in ids] + [("numbers", r) for r in numbers]
        parts += [("labels", r) for r in labels] + [("context", r) for r in context]
        placed: dict[str, list[Run]] = {"ids": [], "numbers": [], "labels": [], "context": []}
        offset, widest = 0, 1
        for what, run in sorted(parts, key=lambda p: -p[1].dtype.itemsize):
            placed[what].append(Run(run.first, run.count, run.dtype, offset))
            offset += run.size
            widest = max(widest, run.dtype.itemsize)
        size = -(-max(offset, 1) // widest) * widest
        runs = {what: tuple(sorted(found, key=lambda r: r.first)) for what, found in placed.items()}
        return cls(schema, runs["ids"], runs["numbers"], runs["labels"], runs["context"], size)

    def pack(self, block: EncodedColumns) -> Bytes:
        """Return a block as records, `[rows, record]` bytes."""
        records = np.zeros((block.rows, self.size), np.uint8)
        fields = self.schema.fields
        for run in self.ids:
            target = run.of(records)
            for i in range(run.count):
                target[:, i] = block.ids[fields[run.first + i].name]
        for run in self.numbers:
            target = run.of(records)
            for i in range(run.count):
                target[:, i] = block.values[fields[run.first + i].name]
        for run in self.labels:
            run.of(records)[:, 0] = block.label[self.schema.tasks[run.first]]
        for run in self.context:
            run.of(records)[:, 0] = block.context[self.schema.context[run.first]]
        return records

    def unpack(
        self, records: Bytes
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None, Mapping[str, Any], Mapping[str, Any]]:
        """Return ids `[B, F]`, values `[B, F]` or None, labels and context `{name: [B]}` of `[B, record]` bytes."""
        shape = (len(records), len(self.schema.fields))
        ids = np.empty(shape, np.int64)
        for run in self.ids:
            ids[:, run.first : run.first + run.count] = run.of(records)
        values = np.ones(shape, np.float32) if self.numbers else None
        for run in self.numbers:
            at = slice(run.first, run.first + run.count)
            number = run.of(records)  # [B, count]
            missing = np.isnan(number)
            ids[:, at] = np.where(missing, NULL_ID, NUMERIC_VALUE_ID)
            if values is not None:
                values[:, at] = np.where(missing, np.float32(1), number)
        label = {self.schema.tasks[r.first]: r.of(records)[:, 0].astype(np.float32) for r in self.labels}
        context = {self.schema.context[r.first]: r.of(records)[:, 0].copy() for r in self.context}
        return ids, values, label, context


def _context_type(name: str) -> np.dtype[Any]:
    return np.dtype("<f4") if name in FLOAT_CONTEXT else np.dtype("<i8")


def _id_runs(schema: EncodedSchema) -> list[Run]:
    """Group neighbouring categorical fields by width, then widen the cheapest until there are few runs."""
    runs: list[Run] = []
    for i, field in enumerate(schema.fields):
        if not field.numeric:
            runs.append(Run(i, 1, id_type(field.rows)))
    cost = 0
    while True:
        merged: list[Run] = []
        for run in runs:
            last = merged[-1] if merged else None
            if last is not None and _neighbours(last, run) and _extra(last, run) <= cost:
                wide = max(last.dtype, run.dtype, key=lambda t: t.itemsize)
                merged[-1] = Run(last.first, last.count + run.count, wide)
            else:
                merged.append(run)
        joinable = [_extra(a, b) for a, b in pairwise(merged) if _neighbours(a, b)]
        if len(merged) <= _MOST_RUNS or not joinable:
            return merged
        runs, cost = merged, min(joinable)


def _neighbours(a: Run, b: Run) -> bool:
    return a.first + a.count == b.first


def _extra(a: Run, b: Run) -> int:
    """Bytes per row that a joint width would add."""
    wide = max(a.dtype.itemsize, b.dtype.itemsize)
    return a.count * (wide - a.dtype.itemsize) + b.count * (wide - b.dtype.itemsize)


def _number_runs(schema: EncodedSchema) -> list[Run]:
    runs: list[Run] = []
    for i, field in enumerate(schema.fields):
        if not field.numeric:
            continue
        if runs and runs[-1].first + runs[-1].count == i:
            runs[-1] = Run(runs[-1].first, runs[-1].count + 1, runs[-1].dtype)
        else:
            runs.append(Run(i, 1, np.dtype("<f4")))
    return runs
