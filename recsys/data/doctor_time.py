"""Times of logged rows: their range, the unit they seem to be in, and what cannot be a time of the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Unit → how many of it make a second."""
FIRST, LAST = 631_152_000, 4_102_444_800
"""A clock time of a log lies between 1990-01-01 and 2100-01-01, in seconds since 1970."""
_DAY = 86_400


@dataclass
class Times:
    """The times of one column in one split.

    Args:
        rows: rows that have a time.
        unreadable: rows with a text that is neither a number nor an ISO date.
        low: earliest, in the column's own unit; dates are seconds since 1970. None without rows.
        high: latest.
        zero: rows on or before 1970-01-01.
        units: unit → rows whose number is a time of 1990 to 2100 in that unit.
        beyond: unit → rows later than 2100 in that unit.
        early: rows that are not later than `after`.
        after: the latest time of the train split, for the splits that should follow it.
    """

    after: float | int | None = None
    rows: int = 0
    unreadable: int = 0
    low: float | int | None = None
    high: float | int | None = None
    zero: int = 0
    early: int = 0
    units: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNITS, 0))
    beyond: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNITS, 0))

    def add(self, values: pl.Series) -> None:
        """Take a block of raw values."""
        time = as_numbers(values)
        self.unreadable += len(values) - values.null_count() - len(time)
        if not len(time):
            return
        self.rows += len(time)
        low, high = time.min().item(), time.max().item()
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        self.zero += int((time < _DAY).sum())
        for unit, scale in UNITS.items():
            self.units[unit] += int(((time >= FIRST * scale) & (time < LAST * scale)).sum())
            self.beyond[unit] += int((time >= LAST * scale).sum())
        if self.after is not None:
            self.early += int((time <= self.after).sum())

    @property
    def unit(self) -> str | None:
        """The unit in which more than half of the rows are times of 1990 to 2100; None where there is none."""
        best = max(self.units, key=lambda unit: self.units[unit])
        return best if self.units[best] * 2 > self.rows else None

    def shown(self, value: float | int | None) -> str:
        """Return a time as text: as a date where the unit is known, else as it is."""
        if value is None:
            return "–"
        if self.unit is None or not 0 <= value < LAST * UNITS[self.unit]:
            return f"{value:,}"
        return f"{datetime.fromtimestamp(value / UNITS[self.unit], UTC):%Y-%m-%d %H:%M}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "rows": self.rows,
            "min": self.low,
            "max": self.high,
            "unit": self.unit,
            "unreadable": self.unreadable,
            "not_after_train": None if self.after is None else self.early,
        }


def as_numbers(values: pl.Series) -> npt.NDArray[Any]:
    """Return the present values as int64 or float64: dates as seconds since 1970, text as numbers or ISO dates."""
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        number = text.cast(pl.Float64, strict=False)
        if number.null_count() > values.null_count():
            dates = text.to_frame("t").select(_iso(pl.col("t"))).to_series()
            number = number if dates.null_count() > number.null_count() else dates
        values = number
    if values.dtype in (pl.Date, pl.Datetime):
        values = values.cast(pl.Datetime("us")).dt.epoch("s")
    present = values.cast(pl.Float64 if not values.dtype.is_integer() else values.dtype, strict=False).drop_nulls()
    time = present.to_numpy()
    return time[np.isfinite(time)] if time.dtype.kind == "f" else time


def _iso(text: pl.Expr) -> pl.Expr:
    """Read ISO dates, with a time or without, as seconds since 1970."""
    formats = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")
    stamps = [text.str.strip_suffix("Z").str.to_datetime(f, strict=False, time_unit="us") for f in formats]
    days = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.coalesce([*stamps, days]).dt.epoch("s")
