"""Train, valid and test rows of a source: given as files, or divided by time, by hash, or by a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import polars as pl

from recsys.contracts import Source
from recsys.data.hashing import hash_series, mix, mix_array
from recsys.data.quarantine import ROW, address
from recsys.data.reading import INDEX, RawRows, source_rows
from recsys.data.schema import ColumnSplit, HashSplit, Split, TimeSplit, Value
from recsys.data.sources import MissingSplit
from recsys.errors import DataError, did_you_mean, listing

SPLITS = ("train", "valid", "test")
_SPACE = 2.0**64
_MANY_TIMES = 1 << 20
_ISO = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M")


def split_rows(source: Source, split: Split | None, *, rows: int = 131_072) -> Mapping[str, RawRows]:
    """Return the raw rows of `train` and, where there are any, of `valid` and `test`.

    A split divides all rows of the source; where the source gives its splits itself, the train rows, and what the
    source gives besides stays as it is (such as an official test file).

    Args:
        source: of the rows.
        split: the recipe's split, None where the source gives the splits.
        rows: read at once.

    Raises:
        DataError: the split column is missing or has nulls, a split that was asked for gets no rows, or the source
            and the rule both give one.
    """
    if split is None:
        return _given(source)
    whole = _found(source, "all")
    if whole is not None:
        return _divide(whole, split, rows)
    given = dict(_given(source))
    parts = dict(_divide(given.pop("train"), split, rows))
    for name, part in given.items():
        if name in parts:
            raise DataError(f"split: the source gives {name!r} rows, and the rule takes some of the train rows too")
        parts[name] = part
    return parts


def split_frames(source: Source, split: Split | None) -> Mapping[str, pl.LazyFrame]:
    """Return the raw rows of every split lazily, rows that break a rule included; see `split_rows`."""
    frames = {}
    for name, part in split_rows(source, split).items():
        frame = source.scan(part.scanned)
        if part.keep is not None:
            indexed = frame.with_row_index(INDEX) if INDEX in part.needs else frame
            frame = indexed.filter(part.keep).select(part.schema.names())
        frames[name] = frame
    return frames


def _found(source: Source, scanned: str) -> RawRows | None:
    try:
        return source_rows(source, scanned, f"the {scanned} split" if scanned in SPLITS else "the logs")
    except MissingSplit:
        return None


def _given(source: Source) -> Mapping[str, RawRows]:
    found = {"train": source_rows(source, "train", "the train split")}
    found |= {name: part for name in SPLITS[1:] if (part := _found(source, name)) is not None}
    return found


def _part(whole: RawRows, name: str, keep: pl.Expr, *needs: str) -> RawRows:
    return replace(whole, what=f"the {name} split", keep=keep, needs=needs)


def _divide(whole: RawRows, split: Split, rows: int) -> Mapping[str, RawRows]:
    needed = split.columns if isinstance(split, HashSplit) else (split.column,)
    known = whole.schema.names()
    for column in needed:
        if column not in known:
            raise DataError(f"split: no column {column!r}.{did_you_mean(column, known)} Columns: {listing(known)}")
    if isinstance(split, TimeSplit):
        return _by_time(whole, split, rows)
    if isinstance(split, HashSplit):
        return _by_hash(whole, split)
    return _by_column(whole, split, rows)


def _blocks(whole: RawRows, column: str, rows: int) -> Iterator[pl.DataFrame]:
    """Yield the blocks of the split's column; one without a value is refused."""
    absent = pl.col(column).is_null()
    if whole.schema[column].is_float():
        absent |= pl.col(column).is_nan()
    for block in whole.blocks([column], rows):
        missing = block.frame.filter(absent)
        if not missing.is_empty():
            where = address(block.file, missing[ROW][0])
            raise DataError(f"{where}: no value in column {column!r}; the split needs one in every row")
        yield block.frame


def _check_shares(split: TimeSplit | HashSplit) -> None:
    if split.valid + split.test >= 1:
        raise DataError(f"split: valid {split.valid} and test {split.test} leave nothing for train")


def as_time(column: str, dtype: pl.DataType, sample: pl.Series) -> pl.Expr:
    """Return the time column as something that orders by time; text is read as numbers or ISO dates.

    Args:
        column: its name.
        dtype: its type.
        sample: values by which numbers and dates are told apart.

    Raises:
        DataError: the type does not order by time, or a text is neither.
    """
    if dtype.is_numeric() or dtype.is_temporal():
        return pl.col(column)
    if dtype != pl.String:
        raise DataError(f"split: column {column!r} is {dtype}; expected numbers, dates or datetimes")
    text = pl.col(column).str.strip_chars().str.strip_suffix("Z")
    dates = pl.coalesce(
        [text.str.to_datetime(form, strict=False, time_unit="us") for form in _ISO]
        + [
            pl.col(column).str.to_datetime(f"{form}%z", strict=False, time_unit="us").dt.replace_time_zone(None)
            for form in _ISO
        ]
        + [text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))]
    )
    for read in (text.cast(pl.Float64, strict=False), dates):
        if not sample.to_frame().select(read).to_series().null_count():
            return read
    raise DataError(f"split: column {column!r} is text that is neither numbers nor ISO dates")


def _by_time(whole: RawRows, split: TimeSplit, rows: int) -> Mapping[str, RawRows]:
    _check_shares(split)
    column = split.column
    counted = pl.DataFrame(schema={column: whole.schema[column], "rows": pl.UInt32})
    for block in _blocks(whole, column, rows):
        counted = pl.concat([counted, block.group_by(column).len("rows")])
        if counted.height > _MANY_TIMES:
            counted = counted.group_by(column).agg(pl.col("rows").sum())
    time = as_time(column, whole.schema[column], counted[column])
    counts = counted.group_by(time.alias("time")).agg(pl.col("rows").sum().cast(pl.Int64)).sort("time")
    if not counts.height:
        raise DataError("split: 0 rows")
    total = int(counts["rows"].sum())
    before = (counts["rows"].cum_sum() - counts["rows"]).to_numpy()  # rows strictly earlier than each time
    cuts = []
    for share, what in ((split.valid + split.test, "train"), (split.test, "valid")):
        at = int(np.searchsorted(before, round(total * (1 - share)), side="right")) - 1 if share else counts.height
        if share and before[at] == 0:
            raise DataError(f"split: no rows are left for {what}; too many rows have the same {split.column!r}")
        cuts.append(counts["time"][at] if share else None)
    first, second = cuts
    parts = {"train": whole if first is None else _part(whole, "train", time < first, column)}
    if split.valid:
        if first == second:
            raise DataError(f"split: no rows are left for valid; too many rows have the same {split.column!r}")
        keep = time >= first if second is None else (time >= first) & (time < second)
        parts["valid"] = _part(whole, "valid", keep, column)
    if split.test:
        parts["test"] = _part(whole, "test", time >= second, column)
    return parts


def _by_hash(whole: RawRows, split: HashSplit) -> Mapping[str, RawRows]:
    _check_shares(split)
    seed = np.uint64(mix(split.seed))

    def draw(values: pl.Series) -> pl.Series:
        hashed = np.full(len(values), seed, np.uint64)
        for part in values.struct.unnest().iter_columns():
            hashed = mix_array(hashed ^ hash_series(part))
        return pl.Series(values.name, hashed)

    columns = split.columns or (INDEX,)
    u = pl.struct(columns).map_batches(draw, return_dtype=pl.UInt64, is_elementwise=True)
    test = int(split.test * _SPACE)
    low, high = pl.lit(test, pl.UInt64), pl.lit(test + int(split.valid * _SPACE), pl.UInt64)
    parts = {"train": _part(whole, "train", u >= high, *columns)}
    if split.valid:
        parts["valid"] = _part(whole, "valid", (u >= low) & (u < high), *columns)
    if split.test:
        parts["test"] = _part(whole, "test", u < low, *columns)
    return parts


def _by_column(whole: RawRows, split: ColumnSplit, rows: int) -> Mapping[str, RawRows]:
    if not split.valid and not split.test:
        raise DataError("split by column: give the values of `valid`, of `test`, or of both")
    both = {_as_text(v) for v in split.valid} & {_as_text(v) for v in split.test}
    if both:
        raise DataError(f"split by column: {listing(sorted(both))} is listed under valid and under test")
    text = pl.col(split.column).cast(pl.String)
    valid = text.is_in([_as_text(v) for v in split.valid])
    test = text.is_in([_as_text(v) for v in split.test])
    counts = dict.fromkeys(("rows", "valid", "test"), 0)
    for block in _blocks(whole, split.column, rows):
        found = block.select(rows=pl.len(), valid=valid.sum(), test=test.sum()).row(0, named=True)
        counts = {name: n + found[name] for name, n in counts.items()}
    parts = {"train": _part(whole, "train", ~valid & ~test, split.column)}
    for name, values, keep in (("valid", split.valid, valid), ("test", split.test, test)):
        if values:
            if not counts[name]:
                raise DataError(
                    f"split: no row has {split.column!r} in {listing(_as_text(v) for v in values)} ({name})"
                )
            parts[name] = _part(whole, name, keep, split.column)
    if counts["valid"] + counts["test"] == counts["rows"]:
        raise DataError(f"split: no rows are left for train; every {split.column!r} is in valid or test")
    return parts


def _as_text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
