"""Raw columns to clean values: ids that compare, numbers, labels and context, with the offending row in every error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.hashing import hash_series
from recsys.data.schema import FLOAT_CONTEXT, Label, Value
from recsys.errors import DataError, listing

Where = Callable[[pl.Expr], str]
"""Gives "file, row N" of the first row for which an expression holds; called only when an error is raised."""
Kind = Literal["int", "uint", "text"]
"""How a categorical column's values are compared: as int64, as uint64, or as text."""
STORED: dict[Kind, pl.DataType] = {"int": pl.Int64(), "uint": pl.UInt64(), "text": pl.String()}

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_EXACT = 2.0**53
_LARGEST = float(np.finfo(np.float32).max)
_ROW = "__row"


def where_in(rows: pl.LazyFrame) -> Where:
    """Return a `Where` for rows whose files are not known: it says the row number only."""

    def where(wrong: pl.Expr) -> str:
        found = rows.with_row_index(_ROW, offset=1).filter(wrong).select(_ROW).head(1).collect()
        return f"row {found[_ROW][0]}" if not found.is_empty() else "some row"

    return where


def kind_of(column: str, dtype: pl.DataType) -> Kind:
    """Return how the values of a categorical column are compared.

    Raises:
        DataError: the type has no defined text or integer form.
    """
    if dtype == pl.UInt64:
        return "uint"
    if dtype in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32) or dtype.is_float():
        return "int"
    if dtype in (pl.String, pl.Boolean, pl.Null) or isinstance(dtype, pl.Categorical | pl.Enum) or dtype.is_temporal():
        return "text"
    raise DataError(f"column {column!r} is {dtype}; a categorical column holds integers, text, booleans or dates")


def is_declared_null(column: pl.Expr, dtype: pl.DataType, tokens: Sequence[Value]) -> pl.Expr:
    """Return whether a value is one of the recipe's null tokens; false for nulls."""
    if dtype.is_numeric():
        numbers = [n for n in map(_as_number, tokens) if n is not None]
        return column.cast(pl.Float64).is_in(numbers).fill_null(False)
    texts = [str(t).lower() if isinstance(t, bool) else str(t) for t in tokens]
    return column.cast(pl.String).is_in(texts).fill_null(False)


def _as_number(token: Value) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None


def with_nulls(values: pl.Series, tokens: Sequence[Value]) -> pl.Series:
    """Return the column with the recipe's null tokens replaced by nulls."""
    if not tokens or values.dtype == pl.Null:
        return values
    name = values.name
    column = pl.col(name)
    declared = is_declared_null(column, values.dtype, tokens)
    return values.to_frame().select(pl.when(~declared).then(column).alias(name)).to_series()


def comparable(values: pl.Series, kind: Kind, where: Where) -> pl.Series:
    """Return the values as the type that the vocabulary compares; what does not convert becomes null.

    Args:
        values: a categorical column, `[n]`, any type that `kind_of` accepts.
        kind: how the vocabulary compares.
        where: names the row of a fractional number.

    Raises:
        DataError: a float column has values that are not whole numbers.
    """
    dtype = values.dtype
    if dtype.is_float() or dtype.is_decimal():
        values = _whole(values, where)
    elif not dtype.is_integer():
        values = values.cast(pl.String)
    if values.dtype == pl.String and kind != "text":
        # Other programs write whole numbers as 12.0 as soon as one value of the column is missing.
        values = values.str.strip_chars().str.replace(r"\.0+$", "")
    return values if values.dtype == STORED[kind] else values.cast(STORED[kind], strict=False)


def _whole(values: pl.Series, where: Where) -> pl.Series:
    """Cast floats with whole values to int64; NaN counts as null."""
    column = pl.col(values.name).cast(pl.Float64)
    wrong = column.is_not_null() & ~column.is_nan() & ((column.floor() != column) | (column.abs() > _EXACT))
    bad = values.to_frame().select(column.filter(wrong).head(1)).to_series()
    if len(bad):
        raise DataError(
            f"{where(wrong)}, column {values.name!r}: {bad[0]!r} is no whole number that a float can hold exactly; "
            "ids must be whole numbers or text. List the column under `numeric`, or store it as integers."
        )
    return values.cast(pl.Float64).fill_nan(None).cast(pl.Int64)


@dataclass(frozen=True)
class Numbers:
    """A numeric column: `value [n]` float64 with NaN where missing, and how many were null or not finite."""

    value: Floats
    nulls: int
    non_finite: int


def numbers(values: pl.Series, tokens: Sequence[Value], where: Where) -> Numbers:
    """Read a numeric column; NaN, infinities and what is too large for float32 are counted and become missing.

    Raises:
        DataError: a text is no number and no declared null token, or the type is no number.
    """
    name, dtype = values.name, values.dtype
    column = pl.col(name)
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null)):
        raise DataError(f"column {name!r} is {dtype}; a numeric column holds numbers. Cast it in the logs.")
    declared = is_declared_null(column, dtype, tokens) if tokens and dtype != pl.Null else pl.lit(False)
    text = column.str.strip_chars() if dtype == pl.String else column
    read = text.cast(pl.Float64, strict=False)
    wrong = column.is_not_null() & ~declared & read.is_null()
    if dtype == pl.String:
        bad = values.to_frame().select(column.filter(wrong).head(1)).to_series()
        if len(bad):
            raise DataError(
                f"{where(wrong)}, column {name!r}: {bad[0]!r} is no number. "
                f"If it means missing, declare it: numeric: {{{name}: {{null_values: [{bad[0]!r}]}}}}"
            )
    clean = values.to_frame().select(pl.when(~declared).then(read)).to_series()
    nulls = clean.null_count()
    value = clean.fill_null(float("nan")).to_numpy().astype(np.float64, copy=True)
    # What float32 cannot hold would be infinite as soon as it reaches the model.
    finite = np.abs(value) <= _LARGEST
    value[~finite] = np.nan
    return Numbers(value, nulls, int(len(value) - finite.sum()) - nulls)


def labels(values: pl.Series, rule: Label, where: Where) -> npt.NDArray[np.uint8]:
    """Return a task's labels, `[n]` uint8 in {0, 1}.

    Raises:
        DataError: a null, or without a rule a value other than 0 and 1; with the distinct bad values and the row.
    """
    name, dtype = values.name, values.dtype
    column = pl.col(name)
    if rule.positive is not None:
        texts = [str(v).lower() if isinstance(v, bool) else str(v) for v in rule.positive]
        read: pl.Expr = column.cast(pl.String).is_in(texts)
        expected = "no null"
        valid = column.is_not_null()
    else:
        if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null)):
            raise DataError(f"label column {name!r} is {dtype}; expected 0 and 1, or a rule `at_least` or `positive`")
        number = (column.str.strip_chars() if dtype == pl.String else column).cast(pl.Float64, strict=False)
        if rule.at_least is not None:
            read, expected = number >= rule.at_least, "a number"
            valid = number.is_not_null() & number.is_finite()
        else:
            read, expected = number == 1, "0 or 1"
            valid = number.is_in([0.0, 1.0]).fill_null(False)
    done = values.to_frame().select(read=read.fill_null(False), valid=valid)
    if not done["valid"].all():
        bad = values.filter(~done["valid"])
        shown = listing([repr(v) for v in bad.unique(maintain_order=True).head(10)])
        raise DataError(
            f"{where(~valid)}, label column {name!r}: expected {expected}, found {shown} "
            f"({len(bad)} rows of those read so far). "
            "To make a 0/1 label of other values, give `{column: …, at_least: …}` or `{column: …, positive: […]}`."
        )
    return done["read"].cast(pl.UInt8).to_numpy()


_LIMITS: dict[str, tuple[str, Callable[[pl.Expr], pl.Expr]]] = {
    "weight": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "propensity": ("a number in (0, 1]", lambda x: (x > 0) & (x <= 1)),
    "position": ("a whole number", lambda x: x.is_finite() & (x.floor() == x)),
    "time": ("a whole number or a date", lambda x: x.is_finite() & (x.floor() == x)),
}


def context(name: str, values: pl.Series, where: Where) -> npt.NDArray[Any]:
    """Return a context column: float32 for weight and propensity, else int64; `group` is hashed, dates are seconds.

    Raises:
        DataError: a null, or a value outside the limits of that name.
    """
    column = pl.col(values.name)
    if name == "group":
        if values.null_count():
            raise DataError(f"{where(column.is_null())}, context group {values.name!r}: expected a value, found null")
        return hash_series(comparable(values, kind_of(values.name, values.dtype), where)).view(np.int64)
    if values.dtype.is_temporal():
        column = column.cast(pl.Datetime("us")).dt.epoch("s")
    elif values.dtype == pl.String:
        column = column.str.strip_chars()
    expected, limit = _LIMITS[name]
    number = column.cast(pl.Float64, strict=False)
    valid = number.is_not_null() & limit(number)
    wrong = ~valid.fill_null(False)
    bad = values.to_frame().select(pl.col(values.name).filter(wrong).head(1)).to_series()
    if len(bad):
        raise DataError(f"{where(wrong)}, context {name} {values.name!r}: expected {expected}, found {bad[0]!r}")
    wanted = pl.Float32 if name in FLOAT_CONTEXT else pl.Int64
    exact = column if values.dtype.is_integer() or values.dtype.is_temporal() else number
    return values.to_frame().select(exact.cast(wanted)).to_series().to_numpy()
