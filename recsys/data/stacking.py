"""Files under each other: columns by name, types that hold the values of all files."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from recsys.errors import DataError, listing

_WITHIN_INT64 = ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32")


def stack(files: Iterable[str], frames: list[pl.LazyFrame]) -> pl.LazyFrame:
    """Put the frames of several files under each other: columns by name, numbers upcast, common columns only."""
    names = list(files)
    if len(frames) == 1:
        return frames[0]
    schemas = [frame.collect_schema() for frame in frames]
    common = [c for c in schemas[0].names() if all(c in s for s in schemas)]
    casts = {c: _common_type(c, names, [s[c] for s in schemas]) for c in common}
    parts = [
        f.select(pl.col(c).cast(t) if s[c] != t else pl.col(c) for c, t in casts.items())
        for f, s in zip(frames, schemas, strict=True)
    ]
    return pl.concat(parts, how="vertical")


def _common_type(column: str, files: list[str], types: list[pl.DataType]) -> pl.DataType:
    if len(set(types)) == 1:
        return types[0]
    if all(t.is_unsigned_integer() for t in types) and pl.UInt64 in types:
        return pl.UInt64()
    if all(t.is_integer() for t in types):  # what does not fit into 64 bits is for the rules to say
        return pl.Int64() if all(str(t) in _WITHIN_INT64 for t in types) else pl.Int128()
    if all(t.is_numeric() for t in types):
        return pl.Float64()
    texts = (pl.String, pl.Categorical, pl.Enum)
    if all(t in texts or isinstance(t, pl.Categorical | pl.Enum) for t in types):
        return pl.String()
    null = [t for t in types if t != pl.Null]
    if len(set(null)) == 1:
        return null[0]
    groups = "".join(
        f"\n  {t}: {listing([f for f, u in zip(files, types, strict=True) if u == t], 3)}" for t in dict.fromkeys(types)
    )
    raise DataError(f"column {column!r} has different types in different files:{groups}\nCast it in one of them.")
