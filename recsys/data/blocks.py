"""Encoded rows in blocks, as columns of numbers; and list columns, flattened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

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
