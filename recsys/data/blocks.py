"""Rows in blocks of bounded size: raw ones out of a lazy frame, and encoded ones as columns of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.formats import naming
from recsys.data.values import Where
from recsys.errors import DataError


@dataclass(frozen=True)
class Ragged:
    """A list of events per row: `values [E, K]` int64 of all rows one after the other, `length [rows]` int64."""

    values: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedColumns:
    """A block of encoded rows, column by column, in the order of the schema.

    Args:
        rows: number of rows.
        ids: categorical field → `[rows]` ids. Numeric fields have none: theirs follow from the values.
        values: numeric field → `[rows]` float32, NaN where missing.
        history: group → its events.
        label: task → `[rows]` uint8.
        context: name → `[rows]` float32 or int64.
    """

    rows: int
    ids: Mapping[str, npt.NDArray[np.integer]]
    values: Mapping[str, npt.NDArray[np.float32]]
    history: Mapping[str, Ragged]
    label: Mapping[str, npt.NDArray[np.uint8]]
    context: Mapping[str, npt.NDArray[Any]]


def blocks(logs: pl.LazyFrame, columns: Sequence[str], rows: int, what: str) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield (number of the first row, block) in the order of the logs, reading ahead a bounded amount.

    Args:
        logs: raw rows.
        columns: the columns to read.
        rows: rows per block, about.
        what: how errors call the logs.
    """
    at = 0
    with naming(what):
        # In the order of the files: after a projection that reorders columns, Polars reads ahead without limit.
        ordered = [c for c in logs.collect_schema().names() if c in set(columns)]
        batches = iter(logs.select(ordered).collect_batches(chunk_size=rows, maintain_order=True, engine="streaming"))
    while True:
        with naming(what):
            block = next(batches, None)
        if block is None:
            return
        if not block.is_empty():
            yield at, block
            at += block.height


def is_list(dtype: pl.DataType) -> bool:
    """Whether a column holds lists."""
    return isinstance(dtype, pl.List | pl.Array)


def event_type(column: str, dtype: pl.DataType) -> pl.DataType:
    """Return the type of one event of a list column, or of a text column with separators.

    Raises:
        DataError: the column is neither.
    """
    if isinstance(dtype, pl.List | pl.Array):
        inner = dtype.inner
        return inner if isinstance(inner, pl.DataType) else inner()
    if dtype in (pl.String, pl.Null):
        return pl.String()
    raise DataError(f"column {column!r} is {dtype}; expected a list column, or text with separators")


def as_lists(column: pl.Expr, dtype: pl.DataType, separator: str) -> pl.Expr:
    """Return a list or text column as lists; an empty text is an empty list."""
    if isinstance(dtype, pl.Array):
        return column.arr.to_list()
    if dtype in (pl.String, pl.Null):
        text = column.cast(pl.String)
        return pl.when(text != "").then(text.str.split(separator))
    return column


def flatten(values: pl.Series, separator: str, max_length: int) -> tuple[pl.Series, npt.NDArray[np.int64], int]:
    """Return the last `max_length` events of every row as one column, the length of each row, and the rows cut."""
    column = pl.col(values.name)
    lists = values.to_frame().select(as_lists(column, values.dtype, separator)).to_series()
    length = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    cut = int((length > max_length).sum())
    if cut:
        lists = lists.list.tail(max_length)
    some = lists.filter(pl.Series(length > 0))
    return some.explode(), np.minimum(length, max_length), cut


def check_lengths(block: pl.DataFrame, columns: Sequence[str], separator: str, where: Where) -> None:
    """Refuse rows in which the columns of one sequence group have different numbers of events.

    Raises:
        DataError: naming the first such row.
    """
    lengths = [as_lists(pl.col(c), block.schema[c], separator).list.len().fill_null(0) for c in columns]
    for name, length in zip(columns[1:], lengths[1:], strict=True):
        wrong = length != lengths[0]
        bad = block.select(a=lengths[0], b=length).filter(pl.col("a") != pl.col("b")).head(1)
        if not bad.is_empty():
            raise DataError(
                f"{where(wrong)}: {bad['a'][0]} events in {columns[0]!r} but {bad['b'][0]} in {name!r}; "
                "the columns of a sequence must have one value per event each"
            )
