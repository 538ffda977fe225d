"""Raw columns to values: ids that compare, numbers, labels and context. What cannot be read is for the rules to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.hashing import hash_series
from recsys.data.limits import EXACT, EXACT_DOUBLE, LARGEST, WHITE_SPACE
from recsys.data.schema import FLOAT_CONTEXT, Categorical, Label, Normal, Value
from recsys.errors import DataError

Kind = Literal["int", "uint", "text"]
"""How a categorical column's values are compared: as int64, as uint64, or as text."""
STORED: dict[Kind, pl.DataType] = {"int": pl.Int64(), "uint": pl.UInt64(), "text": pl.String()}

_TEXTS = (pl.String, pl.Boolean, pl.Null, pl.Date, pl.Datetime, pl.Time)
"""Types compared as text; a date with time as that of UTC, to the microsecond."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_WIDE = ("Int128", "UInt128")


def kind_of(column: str, dtype: pl.DataType) -> Kind:
    """Return how the values of a categorical column are compared.

    Raises:
        DataError: the type has no defined text or integer form.
    """
    if dtype == pl.UInt64:
        return "uint"
    if dtype.is_integer() or dtype.is_float() or dtype.is_decimal():
        return "int"
    if dtype in _TEXTS or isinstance(dtype, pl.Categorical | pl.Enum):
        return "text"
    raise DataError(f"column {column!r} is {dtype}; a categorical column holds integers, text, booleans or dates")


def largest_exact(dtype: pl.DataType) -> float:
    """Return the largest whole number of a type that no other whole number is rounded to.

    The next power of two is what 16,777,217 becomes as float32, so it is not taken for the id that it may not be.
    """
    return EXACT.get(str(dtype), EXACT_DOUBLE) - 1


def is_wide(dtype: pl.DataType) -> bool:
    """Whether a type holds integers of more than 64 bits; ids must fit into int64."""
    return str(dtype) in _WIDE


def is_one_of(column: pl.Expr, dtype: pl.DataType, tokens: Sequence[Value]) -> pl.Expr:
    """Return whether a value is one of those that a recipe lists; numbers are compared as such, nulls are none."""
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
    declared = is_one_of(column, values.dtype, tokens)
    return values.to_frame().select(pl.when(~declared).then(column).alias(name)).to_series()


def comparable(values: pl.Series, kind: Kind, steps: Sequence[Normal] = ()) -> pl.Series:
    """Return the values as the type that the vocabulary compares; what does not convert becomes null.

    Args:
        values: a categorical column, `[n]`, any type that `kind_of` accepts; numbers are whole.
        kind: how the vocabulary compares.
        steps: what is done to text, see `normalized`.
    """
    dtype = values.dtype
    if isinstance(dtype, pl.Datetime):
        values = values.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if dtype.time_zone else values
        values = values.cast(pl.Datetime("us")).cast(pl.String)
    elif dtype.is_float() or dtype.is_decimal():
        values = values.cast(pl.Float64).fill_nan(None).cast(pl.Int64)
    elif not dtype.is_integer():
        values = values.cast(pl.String)
    if values.dtype == pl.String and kind != "text":
        # Other programs write whole numbers as 12.0 as soon as one value of the column is missing.
        values = values.str.strip_chars().str.replace(r"\.0+$", "")
    if kind == "text" and steps:
        values = normalized(values.cast(pl.String), steps)
    return values if values.dtype == STORED[kind] else values.cast(STORED[kind], strict=False)


def normalized(values: pl.Series, steps: Sequence[Normal]) -> pl.Series:
    """Return texts with the steps applied, one after the other.

    In plain Python: nfc is `unicodedata.normalize("NFC", text)`, strip is `text.strip(WHITE)` with the 25 characters
    that have the Unicode property White_Space, lower is `text.lower()`, which knows no locale. Both agree on every
    text of characters that the Unicode version of Python knows.

    Args:
        values: `[n]` String.
        steps: in order.
    """
    for step in steps:
        if step == "nfc":
            values = values.str.normalize("NFC")
        elif step == "strip":
            values = values.str.strip_chars(WHITE_SPACE)
        else:
            values = values.str.to_lowercase()
    return values


def capped(values: pl.Series, max_bytes: int | None) -> tuple[pl.Series, int]:
    """Return texts with those of more than `max_bytes` bytes of UTF-8 replaced by null, and how many these are."""
    if max_bytes is None or values.dtype != pl.String:
        return values, 0
    size = values.str.len_bytes()
    longest = size.max()
    if not isinstance(longest, int) or longest <= max_bytes:
        return values, 0
    long = (size > max_bytes).fill_null(False)
    return values.to_frame("text").select(pl.when(~long).then("text").alias(values.name)).to_series(), int(long.sum())


def id_values(values: pl.Series, kind: Kind, options: Categorical) -> tuple[pl.Series, int]:
    """Return what a vocabulary compares, null where nothing can be equal, and how many texts were too long.

    Args:
        values: a categorical column, `[n]`, declared nulls removed.
        kind: how the vocabulary compares.
        options: of the field, defaults filled in.
    """
    return capped(comparable(values, kind, options.normalize or ()), options.max_bytes)


def number_of(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Return a column as float64, null where it is no number."""
    return (column.str.strip_chars() if dtype == pl.String else column).cast(pl.Float64, strict=False)


def is_readable_number(dtype: pl.DataType) -> bool:
    """Whether a column may hold numbers, or text that reads as numbers."""
    return dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null)


@dataclass(frozen=True)
class Numbers:
    """A numeric column: `value [n]` float64 with NaN where missing.

    Args:
        value: the numbers.
        nulls: how many were null or declared to be.
        unreadable: how many were no number.
        non_finite: how many were NaN, infinite or too large for float32.
    """

    value: Floats
    nulls: int
    unreadable: int
    non_finite: int


def numbers(values: pl.Series, tokens: Sequence[Value]) -> Numbers:
    """Read a numeric column; what is null, no number, not finite or too large for float32 is missing, and counted."""
    dtype = values.dtype
    column = pl.col(values.name)
    declared = is_one_of(column, dtype, tokens) if tokens and dtype != pl.Null else pl.lit(False)
    clean = values.to_frame().select(
        number=pl.when(~declared).then(number_of(column, dtype)), null=column.is_null() | declared
    )
    nulls = int(clean["null"].sum())
    unreadable = clean["number"].null_count() - nulls
    value = clean["number"].fill_null(float("nan")).to_numpy().astype(np.float64, copy=True)
    finite = np.abs(value) <= LARGEST
    value[~finite] = np.nan
    return Numbers(value, nulls, unreadable, int(len(value) - finite.sum()) - nulls - unreadable)


@dataclass(frozen=True)
class LabelReading:
    """How a task's label is read: `positive` and `valid` per row, and what a valid value is."""

    positive: pl.Expr
    valid: pl.Expr
    expected: str


def label_reading(rule: Label, dtype: pl.DataType) -> LabelReading:
    """Return how a label column is read.

    Raises:
        DataError: the type cannot be a label.
    """
    column = pl.col(rule.column)
    if rule.positive is not None:
        if not (is_readable_number(dtype) or dtype in _TEXTS or isinstance(dtype, pl.Categorical | pl.Enum)):
            raise DataError(f"label column {rule.column!r} is {dtype}; expected numbers, text, booleans or dates")
        return LabelReading(is_one_of(column, dtype, rule.positive), column.is_not_null(), "no null")
    if not is_readable_number(dtype):
        raise DataError(
            f"label column {rule.column!r} is {dtype}; expected 0 and 1, or a rule `at_least` or `positive`"
        )
    number = number_of(column, dtype)
    if rule.at_least is not None:
        valid = number.is_not_null() & number.is_finite().fill_null(False)
        return LabelReading((number >= rule.at_least).fill_null(False), valid, "a number")
    return LabelReading((number == 1).fill_null(False), number.is_in([0.0, 1.0]).fill_null(False), "0 or 1")


def labels(values: pl.Series, rule: Label) -> npt.NDArray[np.uint8]:
    """Return a task's labels, `[n]` uint8 in {0, 1}."""
    positive = label_reading(rule, values.dtype).positive
    return values.to_frame().select(positive.cast(pl.UInt8)).to_series().to_numpy()


_LIMITS: dict[str, tuple[str, Callable[[pl.Expr], pl.Expr]]] = {
    "weight": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "propensity": ("a number in (0, 1]", lambda x: (x >= 2.0**-126) & (x <= 1)),  # the least normal float32
    "popularity": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "delay": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "elapsed": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "grade": ("a finite number ≥ 0", lambda x: x.is_finite() & (x >= 0)),
    "attribute": ("a whole number ≥ -1", lambda x: (x.floor() == x) & (x >= -1) & (x < 2.0**63)),
    "observed": ("0 or 1", lambda x: (x == 0) | (x == 1)),
    "uniform": ("0 or 1", lambda x: (x == 0) | (x == 1)),
    "position": ("a whole number", lambda x: (x.floor() == x) & (x.abs() < 2.0**63)),
    "time": ("a whole number or a date", lambda x: (x.floor() == x) & (x.abs() < 2.0**63)),
}


def context_limit(name: str, column: str, dtype: pl.DataType) -> tuple[str, pl.Expr]:
    """Return what a context column must hold, in words, and whether a row does.

    Raises:
        DataError: the type does not fit.
    """
    if name == "group":
        if is_wide(dtype):
            return "a value of 64 bits", pl.col(column).cast(pl.Int64, strict=False).is_not_null()
        return "a value", pl.col(column).is_not_null()
    expected, limit = _LIMITS[name]
    if not (is_readable_number(dtype) or (name == "time" and dtype in (pl.Date, pl.Datetime))):
        raise DataError(f"context {name} {column!r} is {dtype}; expected {expected}")
    number = _moment(column, dtype).cast(pl.Float64, strict=False)
    return expected, (number.is_not_null() & limit(number)).fill_null(False)


def _moment(column: str, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_temporal():
        return pl.col(column).cast(pl.Datetime("us")).dt.epoch("s")
    return pl.col(column).str.strip_chars() if dtype == pl.String else pl.col(column)


def context(name: str, values: pl.Series) -> npt.NDArray[Any]:
    """Return a context column, float32 or int64 (`FLOAT_CONTEXT`); `group` is hashed, dates are seconds."""
    dtype = values.dtype
    if name == "group":
        return hash_series(comparable(values, kind_of(values.name, dtype))).view(np.int64)
    number = _moment(values.name, dtype)
    wanted = pl.Float32 if name in FLOAT_CONTEXT else pl.Int64
    if not (dtype.is_integer() or dtype.is_temporal()):
        number = number.cast(pl.Float64, strict=False)
    return values.to_frame().select(number.cast(wanted)).to_series().to_numpy()
