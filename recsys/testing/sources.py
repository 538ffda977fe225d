"""What a source promises; see `recsys.contracts.Source`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from recsys.data.sources import DataRoot
from recsys.errors import RecsysError
from recsys.testing.kit import Check, expect

ABSENT = "no_such_split"


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a source."""
    return [
        Check("lazy", "return a polars LazyFrame from `scan`, with rows in `train`", lambda: _lazy(build)),
        Check("repeatable", "take rows and random numbers from options only, in a fixed order", lambda: _again(build)),
        Check("same_columns", "give every split the same columns and types", lambda: _columns(build)),
        Check("unknown_split", "raise a DataError that lists the splits there are", lambda: _unknown(build)),
    ]


def _built(build: Callable[..., Any]) -> Any:
    return build(DataRoot((Path(tempfile.gettempdir()),)))


def _scan(build: Callable[..., Any], split: str) -> pl.LazyFrame:
    frame = _built(build).scan(split)
    expect(isinstance(frame, pl.LazyFrame), f"scan returned {type(frame).__name__}, expected polars.LazyFrame")
    result: pl.LazyFrame = frame
    return result


def _lazy(build: Callable[..., Any]) -> None:
    frame = _scan(build, "train").collect()
    expect(frame.height > 0 and frame.width > 0, f"`train` has {frame.height} rows and {frame.width} columns")


def _again(build: Callable[..., Any]) -> None:
    first, second = _scan(build, "train").collect(), _scan(build, "train").collect()
    expect(first.equals(second), "two readings of `train` differ")
    source = _built(build)
    expect(source.scan("train").collect().equals(source.scan("train").collect()), "two scans of one source differ")


def _columns(build: Callable[..., Any]) -> None:
    wanted = _scan(build, "train").collect_schema()
    for split in ("valid", "test"):
        try:
            frame = _scan(build, split)
        except RecsysError:
            continue  # a source need not have them
        expect(frame.collect_schema() == wanted, f"`{split}` and `train` have different columns")


def _unknown(build: Callable[..., Any]) -> None:
    try:
        _built(build).scan(ABSENT).collect()
    except RecsysError as error:
        expect(ABSENT in str(error), f"the error does not name the split: {error}")
        return
    expect(False, f"scan('{ABSENT}') gives rows")
