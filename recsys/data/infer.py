"""A first `data:` block for somebody's logs, guessed from types and values, with the reason beside every guess."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys.data.blocks import event_type, is_list
from recsys.data.formats import naming
from recsys.data.sources import DataRoot, Files
from recsys.errors import listing

ROWS = 1_000_000
"""Rows looked at."""
_MANY = 10_000
_NULLS = ("?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", "\\N")
_LABELS = ("label", "click", "clicked", "is_click", "y", "target", "conversion", "converted", "like", "purchase")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_ID = re.compile(
    r"(?i)(^|_)(id|ids|user|item|ad|app|zip|code|device|site|campaign|channel|city|hash|category)(_|$)|id$"
)
_AMOUNT = re.compile(
    r"(?i)(^|_)(age|count|cnt|num|number|price|amount|hours?|minutes?|seconds?|duration|score|rate|ratio|gain|loss"
    r"|sum|total|avg|mean|size|length|distance)(_|$)|^I\d+$"
)
_SPLIT = re.compile(r"(?i)(^|_)(train|valid|test|fold|split)(_|$)")
_TIME = re.compile(r"(?i)(^|_)(ts|time|timestamp|date|datetime)(_|$)")


@dataclass(frozen=True)
class _Column:
    """What one pass found out about a column; `low` and `high` are None where it holds no numbers."""

    name: str
    dtype: pl.DataType
    rows: int
    nulls: int
    distinct: int
    low: float | None
    high: float | None
    whole: bool
    tokens: tuple[str, ...]

    @property
    def present(self) -> int:
        return self.rows - self.nulls

    @property
    def binary(self) -> bool:
        return self.distinct == 2 and self.low == 0 and self.high == 1 and self.whole and not self.nulls


def infer_schema(*paths: str) -> str:
    """Return YAML text of one `data:` block for the logs in `paths`: files, folders or globs.

    Columns that cannot help (constant, all different, nested) are commented out with the reason.

    Raises:
        DataError: the logs cannot be read, or have no rows.
    """
    source = Files(DataRoot((Path(),)), path=paths)
    logs = source.scan("all").head(ROWS)
    with naming(listing(paths, 3)):
        columns = [_look(logs, name, dtype) for name, dtype in logs.collect_schema().items()]
    label = _guess_label(columns)
    times = [c for c in columns if c is not label and _is_time(c)]
    splits = [c for c in columns if _SPLIT.search(c.name)]
    rest = [c for c in columns if c is not label and c not in times and c not in splits]
    lines = [f"# Guessed from {columns[0].rows:,} rows of {listing(paths, 3)}; check every line.", "data:"]
    lines.append(f"  source: {{use: files, path: {json.dumps(paths[0] if len(paths) == 1 else paths)}}}")
    if times:
        lines.append(f"  split: {{by: time, column: {_text(times[0].name)}, valid: 0.1, test: 0.1}}")
    else:
        lines.append(
            "  split: {by: hash, valid: 0.1, test: 0.1}  # by row; name `columns` to keep e.g. a user together"
        )
    if label is None:
        lines.append("  label: FILL_IN  # no column holds just 0 and 1; or {label: {column: rating, at_least: 4}}")
    else:
        lines.append(f"  label: {_text(label.name)}  # the values are 0 and 1")
    lines += _section("categorical", [c for c in rest if _group(c) == "categorical"])
    lines += _section("numeric", [c for c in rest if _group(c) == "numeric"])
    lines += _section("multi_valued", [c for c in rest if _group(c) == "multi_valued"])
    for column in rest:
        if (reason := _useless(column)) is not None:
            lines.append(f"  # {column.name}: left out, {reason}")
    if times:
        lines += ["  context:", f"    time: {_text(times[0].name)}"]
        lines += [f"  # {c.name}: left out, looks like a time" for c in times[1:]]
    lines += [f"  # {c.name}: left out, looks like a split; use it as split: {{by: column, column: …}}" for c in splits]
    return "\n".join(lines) + "\n"


def _look(logs: pl.LazyFrame, name: str, dtype: pl.DataType) -> _Column:
    column = pl.col(name)
    if is_list(dtype) or not _readable(dtype):
        found = logs.select(rows=pl.len(), nulls=column.null_count()).collect(engine="streaming").row(0, named=True)
        return _Column(name, dtype, found["rows"], found["nulls"], 0, None, None, False, ())
    text = column.cast(pl.String)
    token = text.is_in(_NULLS) if dtype == pl.String else pl.lit(False)
    ordinary = column.is_not_null() & ~token
    number = (text.str.strip_chars() if dtype == pl.String else column).cast(pl.Float64, strict=False).filter(ordinary)
    found = (
        logs.select(
            rows=pl.len(),
            nulls=column.null_count(),
            distinct=column.drop_nulls().n_unique(),
            bad=number.null_count(),
            low=number.min(),
            high=number.max(),
            whole=(number.floor() == number).all(),
            tokens=text.filter(token).unique().sort().implode(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    numeric = not found["bad"] and found["low"] is not None and not dtype.is_temporal()
    low, high = (found["low"], found["high"]) if numeric else (None, None)
    whole = numeric and bool(found["whole"])
    return _Column(
        name, dtype, found["rows"], found["nulls"], found["distinct"], low, high, whole, tuple(found["tokens"])
    )


def _readable(dtype: pl.DataType) -> bool:
    simple = dtype.is_numeric() or dtype.is_temporal() or dtype in (pl.String, pl.Boolean, pl.Null)
    return simple or isinstance(dtype, pl.Categorical | pl.Enum)


def _guess_label(columns: Sequence[_Column]) -> _Column | None:
    binary = [c for c in columns if c.binary and not _SPLIT.search(c.name)]
    named = [c for name in _LABELS for c in binary if c.name.lower() == name]
    return next(iter(named or binary), None)


def _is_time(column: _Column) -> bool:
    if column.dtype.is_temporal():
        return column.nulls == 0 and column.distinct > 1
    return _TIME.search(column.name) is not None and column.low is not None and not column.nulls and column.distinct > 2


def _useless(column: _Column) -> str | None:
    """Return why a column cannot help, or None."""
    if is_list(column.dtype):
        inner = event_type(column.name, column.dtype)
        return None if _readable(inner) else f"lists of {inner} cannot be encoded"
    if not _readable(column.dtype):
        return f"{column.dtype} cannot be encoded"
    if not column.present:
        return "it has no value in any row"
    if column.distinct == 1:
        return "it is constant"
    if column.distinct == column.present > 20 and (column.low is None or column.whole):
        return f"all {column.present:,} values differ: a row id?"
    return None


def _group(column: _Column) -> str | None:
    if _useless(column) is not None:
        return None
    if is_list(column.dtype):
        return "multi_valued"
    if column.low is None or column.high is None or column.distinct == 2:
        return "categorical"
    if not column.whole:
        return "numeric"
    if _ID.search(column.name):
        return "categorical"
    sparse = column.distinct < (column.high - column.low + 1) / 2
    return "numeric" if _AMOUNT.search(column.name) or sparse or column.low < 0 else "categorical"


def _section(name: str, columns: Sequence[_Column]) -> list[str]:
    return [f"  {name}:", *(_line(name, c) for c in columns)] if columns else []


def _line(section: str, column: _Column) -> str:
    options = {"null_values": list(column.tokens)} if column.tokens else {}
    notes = [f"{column.nulls / column.rows:.1%} missing"] if column.nulls else []
    if section == "multi_valued":
        notes.insert(0, str(column.dtype))
    elif section == "numeric":
        notes.insert(0, f"{column.low:g} to {column.high:g}")
        notes += ["under categorical if these are ids"] if column.whole else []
    else:
        kind = "whole numbers" if column.whole else "text" if column.dtype == pl.String else str(column.dtype)
        notes.insert(0, f"{kind}, {column.distinct:,} distinct")
        notes += ["under numeric if they measure something"] if column.whole and column.distinct > 20 else []
        if column.distinct > _MANY:
            notes.append("min_count: 2 or more makes the table smaller")
    shown = f" {json.dumps(options, ensure_ascii=False)}" if options else ""
    return f"    {_text(column.name)}:{shown}  # {'; '.join(notes)}"


def _text(name: str) -> str:
    """Write a name so that YAML reads it as that text."""
    return name if _PLAIN.fullmatch(name) and name.lower() not in _WORDS else json.dumps(name, ensure_ascii=False)
