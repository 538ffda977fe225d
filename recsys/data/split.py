"""Train, valid and test rows of a source: given as files, or divided by time, by hash, or by a column."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from recsys.contracts import Source
from recsys.data.formats import naming
from recsys.data.hashing import hash_series, mix, mix_array
from recsys.data.schema import ColumnSplit, HashSplit, Split, TimeSplit, Value
from recsys.data.sources import MissingSplit, Traceable
from recsys.data.values import Where, where_in
from recsys.errors import DataError, did_you_mean, listing

SPLITS = ("train", "valid", "test")
_SPACE = 2.0**64
_INDEX = "__split_row"


def split_frames(source: Source, split: Split | None) -> Mapping[str, pl.LazyFrame]:
    """Return the raw rows of `train` and, where there are any, of `valid` and `test`.

    A split divides all rows of the source; where the source gives its splits itself, the train rows, and what the
    source gives besides stays as it is (such as an official test file).

    Raises:
        DataError: the split column is missing or has nulls, a split that was asked for gets no rows, or the source
            and the rule both give one.
    """
    if split is None:
        return _given(source)
    if _whole(source) is not None:
        return _divide(source.scan("all"), split)
    given = dict(_given(source))
    frames = dict(_divide(given.pop("train"), split))
    for name, frame in given.items():
        if name in frames:
            raise DataError(f"split: the source gives {name!r} rows, and the rule takes some of the train rows too")
        frames[name] = frame
    return frames


def scanned_as(source: Source, split: Split | None, name: str) -> str:
    """Return under which name a source knows the rows that a split is taken from."""
    if split is None:
        return name
    if _whole(source) is not None:
        return "all"
    return name if name in _given(source) else "train"


def _whole(source: Source) -> pl.LazyFrame | None:
    try:
        return source.scan("all")
    except MissingSplit:
        return None


def _divide(rows: pl.LazyFrame, split: Split) -> Mapping[str, pl.LazyFrame]:
    needed = split.columns if isinstance(split, HashSplit) else (split.column,)
    known = rows.collect_schema().names()
    for column in needed:
        if column not in known:
            raise DataError(f"split: no column {column!r}.{did_you_mean(column, known)} Columns: {listing(known)}")
    if isinstance(split, TimeSplit):
        return _by_time(rows, split)
    if isinstance(split, HashSplit):
        return _by_hash(rows, split)
    return _by_column(rows, split)


def row_finder(source: Source, split: Split | None, name: str, rows: pl.LazyFrame) -> Where:
    """Return what names the file and row of a bad value; where the source cannot, the row of the split.

    Args:
        source: of the rows.
        split: the recipe's split, None where the source gives the splits.
        name: of the split that `rows` are.
        rows: raw rows of that split, or of what is to be scored.
    """
    fallback = where_in(rows)
    if not isinstance(source, Traceable):
        return fallback
    traceable, scanned = source, scanned_as(source, split, name)

    def where(wrong: pl.Expr) -> str:
        return traceable.where(scanned, wrong) or fallback(wrong)

    return where


def _given(source: Source) -> Mapping[str, pl.LazyFrame]:
    frames = {"train": source.scan("train")}
    for name in SPLITS[1:]:
        try:
            frames[name] = source.scan(name)
        except MissingSplit:
            continue
    return frames


def _check_shares(split: TimeSplit | HashSplit) -> None:
    if split.valid + split.test >= 1:
        raise DataError(f"split: valid {split.valid} and test {split.test} leave nothing for train")


def as_time(rows: pl.LazyFrame, column: str) -> pl.Expr:
    """Return the time column as something that orders by time; text is read as numbers or ISO dates.

    Raises:
        DataError: the type does not order by time, or a text is neither.
    """
    kind = rows.collect_schema()[column]
    if kind.is_numeric() or kind.is_temporal():
        return pl.col(column)
    if kind != pl.String:
        raise DataError(f"split: column {column!r} is {kind}; expected numbers, dates or datetimes")
    for read in (pl.col(column).cast(pl.Float64, strict=False), pl.col(column).str.to_datetime(strict=False)):
        try:
            failed = rows.filter(read.is_null() & pl.col(column).is_not_null()).head(1).collect()
        except pl.exceptions.ComputeError:
            continue
        if failed.is_empty():
            return read
    raise DataError(f"split: column {column!r} is text that is neither numbers nor ISO dates")


def _by_time(rows: pl.LazyFrame, split: TimeSplit) -> Mapping[str, pl.LazyFrame]:
    _check_shares(split)
    time = as_time(rows, split.column)
    with naming("split"):
        counts = rows.group_by(time.alias("time")).len("rows").sort("time", nulls_last=True).collect(engine="streaming")
    if counts["time"].null_count():
        raise DataError(
            f"split: {counts['rows'][-1]} rows have no {split.column!r}; a time split needs one in every row"
        )
    total = int(counts["rows"].sum())
    before = (counts["rows"].cum_sum() - counts["rows"]).to_numpy()  # rows strictly earlier than each time
    cuts = []
    for share, what in ((split.valid + split.test, "train"), (split.test, "valid")):
        at = int(np.searchsorted(before, round(total * (1 - share)), side="right")) - 1 if share else counts.height
        if share and before[at] == 0:
            raise DataError(f"split: no rows are left for {what}; too many rows have the same {split.column!r}")
        cuts.append(counts["time"][at] if share else None)
    first, second = cuts
    frames = {"train": rows if first is None else rows.filter(time < first)}
    if split.valid:
        if first == second:
            raise DataError(f"split: no rows are left for valid; too many rows have the same {split.column!r}")
        frames["valid"] = rows.filter(time >= first if second is None else (time >= first) & (time < second))
    if split.test:
        frames["test"] = rows.filter(time >= second)
    return frames


def _by_hash(rows: pl.LazyFrame, split: HashSplit) -> Mapping[str, pl.LazyFrame]:
    _check_shares(split)
    seed = np.uint64(mix(split.seed))

    def draw(values: pl.Series) -> pl.Series:
        hashed = np.full(len(values), seed, np.uint64)
        for part in values.struct.unnest().iter_columns():
            hashed = mix_array(hashed ^ hash_series(part))
        return pl.Series(values.name, hashed)

    columns = list(split.columns) or [_INDEX]
    indexed = rows if split.columns else rows.with_row_index(_INDEX)
    uniform = pl.struct(columns).map_batches(draw, return_dtype=pl.UInt64, is_elementwise=True)
    test = int(split.test * _SPACE)
    valid = test + int(split.valid * _SPACE)
    drawn = indexed.with_columns(__uniform=uniform)
    keep = rows.collect_schema().names()
    u = pl.col("__uniform")
    low, high = pl.lit(test, pl.UInt64), pl.lit(valid, pl.UInt64)
    frames = {"train": drawn.filter(u >= high).select(keep)}
    if split.valid:
        frames["valid"] = drawn.filter((u >= low) & (u < high)).select(keep)
    if split.test:
        frames["test"] = drawn.filter(u < low).select(keep)
    return frames


def _by_column(rows: pl.LazyFrame, split: ColumnSplit) -> Mapping[str, pl.LazyFrame]:
    if not split.valid and not split.test:
        raise DataError("split by column: give the values of `valid`, of `test`, or of both")
    both = {_as_text(v) for v in split.valid} & {_as_text(v) for v in split.test}
    if both:
        raise DataError(f"split by column: {listing(sorted(both))} is listed under valid and under test")
    text = pl.col(split.column).cast(pl.String)
    valid = text.is_in([_as_text(v) for v in split.valid])
    test = text.is_in([_as_text(v) for v in split.test])
    with naming("split"):
        seen = rows.select(null=text.is_null().sum(), valid=valid.sum(), test=test.sum(), rows=pl.len()).collect()
    counts = seen.row(0, named=True)
    if counts["null"]:
        raise DataError(f"split: {counts['null']} rows have no {split.column!r}")
    frames = {"train": rows.filter(~valid & ~test)}
    for name, values, where in (("valid", split.valid, valid), ("test", split.test, test)):
        if values:
            if not counts[name]:
                raise DataError(
                    f"split: no row has {split.column!r} in {listing(_as_text(v) for v in values)} ({name})"
                )
            frames[name] = rows.filter(where)
    if counts["valid"] + counts["test"] == counts["rows"]:
        raise DataError(f"split: no rows are left for train; every {split.column!r} is in valid or test")
    return frames


def _as_text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
