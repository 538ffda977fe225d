"""Write the logs of a source again with the history columns that a recipe's `sequences:` names."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.contracts import Source
from recsys.data.formats import format_of, naming, scan_file
from recsys.data.history import (
    Bools,
    Codes,
    EventRule,
    HistoryBuilder,
    Ints,
    Numbering,
    Where,
    Windows,
    user_type,
    users_of,
)
from recsys.data.quarantine import ROW
from recsys.data.reading import source_rows
from recsys.data.schema import DataConfig
from recsys.data.shard_files import sync_folder
from recsys.data.sources import Files, MissingSplit
from recsys.data.split import SPLITS, as_time
from recsys.data.values import kind_of, with_nulls
from recsys.errors import DataError, RecipeError, did_you_mean, listing

_BLOCK = 1 << 17
"""Rows of a block, at most."""
_BLOCK_EVENTS = 1 << 22
"""Events of the histories of a block, at most."""
_FILE_ROWS = 1 << 20
_FILE_BYTES = 1 << 28
"""An output file ends with the block that reaches this many rows, or bytes in memory."""


@dataclass(frozen=True)
class HistorySpec:
    """What to build.

    Args:
        user: column whose equal values make one history.
        time: column that orders the rows.
        events: `COLUMN`, `COLUMN=VALUE` or `COLUMN>=NUMBER`: which rows are events; by default all are.
        sort: take rows in any order; the events of the whole log are then held in memory.
    """

    user: str
    time: str
    events: str | None = None
    sort: bool = False


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        paths: split (`all` where the source does not divide its rows) → file or folder.
        rows: split → rows.
        events: rows that are events.
        users: distinct users.
        lengths: history column → number of events in all its lists together.
        held: bytes held between blocks for the events of all users.
    """

    paths: Mapping[str, Path]
    rows: Mapping[str, int]
    events: int
    users: int
    lengths: Mapping[str, int]
    held: int


def write_history(
    source: Source,
    config: DataConfig,
    spec: HistorySpec,
    out: Path,
    *,
    keep: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Written:
    """Add the list columns of `config.sequences` to all rows of a source, and write them to Parquet.

    Rows keep their order, number and columns. The splits of a source that has several are taken one after another as
    one log, so that a test row sees the train events before it. See `recsys.data.history` for what a history is.

    Memory: a block, an output file (at most about 2^28 bytes), and the newest events of every user; with `spec.sort`,
    instead of the last, about `80 + 8 · columns` bytes for every row.

    Args:
        source: the rows.
        config: the recipe's data block.
        spec: what to build.
        out: a new folder; or, when the source does not divide its rows, a new file that ends in `.parquet`. It
            appears when it is complete.
        keep: the columns to write besides; by default all.
        progress: told what is being done and the rows done so far.

    Raises:
        DataError: a column is missing, there already or of an unusable type, a time is missing, the rows are not in
            the order of time (and `spec.sort` is not set), or `out` exists.
        RecipeError: the recipe has no `sequences`, or `spec.events` is no rule.
    """
    log = _Log(source, config, spec)
    one_file = out.suffix == ".parquet"
    if one_file and len(log.frames) > 1:
        raise RecipeError(f"--out {out}: the source has the splits {listing(log.frames)}; name a folder")
    if out.exists():
        raise DataError(f"--out {out}: exists already; remove it or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        told = progress or (lambda what, rows: None)
        split = {name: temporary if name == "all" or one_file else temporary / name for name in log.frames}
        parts = {name: _Parts(folder) for name, folder in split.items()}
        rows = dict.fromkeys(log.frames, 0)
        for name, frame in log.sorted(told) if spec.sort else log.in_order(told):
            parts[name].add(frame if keep is None else frame.select([*keep, *log.columns]))
            rows[name] += frame.height
        for part in parts.values():
            part.close()
        if one_file:
            _join(temporary, out)
        else:
            sync_folder(temporary)
            temporary.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    paths = {name: out if folder == temporary else out / name for name, folder in split.items()}
    return Written(paths, rows, log.events, len(log.users.values) - 1, log.lengths, log.held)


class _Log:
    """The rows of all splits of a source as one log, with what is needed to build histories of it."""

    def __init__(self, source: Source, config: DataConfig, spec: HistorySpec) -> None:
        if not config.sequences:
            raise RecipeError("data.sequences: the recipe names no history to build")
        self.frames = undivided(source, config)
        self._spec, self._config = spec, config
        self._source = source
        self._items = list(dict.fromkeys(item for group in config.sequences.values() for item in group.columns))
        needed = [*dict.fromkeys([spec.user, spec.time, *self._items])]
        self.columns = self._history_columns()
        for name, frame in self.frames.items():
            self._check_columns(name, frame.collect_schema().names(), needed)
        self._rule = None if spec.events is None else EventRule.parse(spec.events, self._common())
        if self._rule is not None:
            needed = [*dict.fromkeys([*needed, self._rule.column])]
        together = pl.concat([frame.select(needed) for frame in self.frames.values()], how="vertical_relaxed")
        with naming("the splits together"):
            self._types = together.collect_schema()
        self._needed = needed
        for item in self._items:
            kind_of(item, self._types[item])
        self._time = self._time_expression(together)
        self.users = Numbering(user_type(spec.user, self._types[spec.user]))
        self._values = [Numbering(self._types[item]) for item in self._items]
        longest = max(group.max_length for group in config.sequences.values())
        self._builder = HistoryBuilder(len(self._items), longest)
        self._rows = max(1, min(_BLOCK, _BLOCK_EVENTS // longest))
        self.events = self.held = 0
        self.lengths = dict.fromkeys(self.columns, 0)

    def in_order(self, progress: Callable[[str, int], None]) -> Iterator[tuple[str, pl.DataFrame]]:
        """Yield (split, block with its history columns), reading once."""
        last, before, done = None, "", 0
        for name, at, block in self._blocks():
            where = self._where(name, at, block)
            time = self._times(block, where)
            back = np.concatenate([[last is not None and time[0] < last], time[1:] < time[:-1]])
            if back.any():
                raise DataError(self._disorder(name, before, at, int(back.argmax())))
            last, before = time[-1], name
            windows = self._builder.step(*self._numbers(block, time, where))
            self.held = max(self.held, self._builder.nbytes)
            yield name, self._with_lists(block, windows)
            done += block.height
            progress("build histories", done)

    def sorted(self, progress: Callable[[str, int], None]) -> Iterator[tuple[str, pl.DataFrame]]:
        """Yield (split, block with its history columns) of rows in any order, reading twice."""
        users, times, events, values, done = [], [], [], [], 0
        for name, at, block in self._blocks(self._needed):
            where = self._where(name, at, block)
            user, time, event, codes = self._numbers(block, self._times(block, where), where)
            users.append(user)
            times.append(time)
            events.append(event)
            values.append(codes)
            done += block.height
            progress("read the events", done)
        time = np.concatenate(times)
        order = np.argsort(time, kind="stable")
        parts = (
            np.concatenate(users)[order],
            time[order],
            np.concatenate(events)[order],
            np.concatenate(values)[order],
        )
        found = self._builder.step(*parts)
        self.held = found.pool.nbytes + 2 * found.first.nbytes
        first, stop = np.empty_like(found.first), np.empty_like(found.stop)
        first[order], stop[order] = found.first, found.stop
        done = 0
        for name, _, block in self._blocks():
            rows = slice(done, done + block.height)
            yield name, self._with_lists(block, Windows(found.pool, first[rows], stop[rows]))
            done += block.height
            progress("build histories", done)

    def _with_lists(self, block: pl.DataFrame, windows: Windows) -> pl.DataFrame:
        lists = []
        for group in self._config.sequences.values():
            for item, column in group.columns.items():
                at = self._items.index(item)
                made = windows.lists(at, self._values[at].values, group.max_length).alias(column)
                self.lengths[column] += int(made.list.len().sum())
                lists.append(made)
        return block.with_columns(lists)

    def _where(self, split: str, at: int, block: pl.DataFrame) -> Where:
        return lambda wrong: self._place(split, at + int(block.select(wrong.fill_null(False).arg_max()).item()))

    def _numbers(
        self, block: pl.DataFrame, time: npt.NDArray[Any], where: Where
    ) -> tuple[Ints, npt.NDArray[Any], Bools, Codes]:
        user = self._user(block[self._spec.user], where)
        if self._rule is None:
            event = np.ones(block.height, np.bool_)
        else:
            event = self._rule.mask(block[self._rule.column], where)
        self.events += int((event & (user >= 0)).sum())
        numbers = zip(self._items, self._values, strict=True)
        codes = [numbering.codes(block[item].cast(self._types[item])) for item, numbering in numbers]
        return user, time, event, np.stack(codes, axis=1)

    def _user(self, raw: pl.Series, where: Where) -> Ints:
        options = self._config.options(raw.name) if raw.name in self._config.categorical else None
        marked = with_nulls(raw, options.null_values or ()) if options is not None else raw
        users = users_of(marked.cast(self._types[raw.name]), where)
        return self.users.codes(users).astype(np.int64) - 1

    def _times(self, block: pl.DataFrame, where: Where) -> npt.NDArray[Any]:
        time = block.select(self._time.alias("time")).to_series()
        wrong = self._time.is_null() | (self._time.is_nan() if time.dtype.is_float() else False)
        if time.null_count() or (time.dtype.is_float() and time.is_nan().any()):
            raise DataError(f"{where(wrong)}, column {self._spec.time!r}: no time; every row needs one")
        return time.to_numpy()

    def _time_expression(self, together: pl.LazyFrame) -> pl.Expr:
        """Return the time as integers or floats that order as the column does."""
        column, dtype = self._spec.time, self._types[self._spec.time]
        if dtype == pl.String:
            try:
                texts = together.select(pl.col(column).drop_nulls().unique()).collect(engine="streaming")
                read = as_time(column, dtype, texts[column])
            except DataError as error:
                raise DataError(str(error).replace("split:", "--time:", 1)) from None
            number = together.select(read).collect_schema()[column].is_numeric()
            return read if number else read.dt.epoch("us")
        if dtype.is_temporal():
            return pl.col(column).cast(dtype).to_physical().cast(pl.Int64)
        if not dtype.is_numeric():
            raise DataError(f"--time: column {column!r} is {dtype}; expected numbers, dates or datetimes")
        if dtype.is_integer():
            return pl.col(column).cast(pl.UInt64 if dtype == pl.UInt64 else pl.Int64)
        return pl.col(column).cast(pl.Float64)

    def _disorder(self, name: str, before: str, at: int, row: int) -> str:
        column = self._spec.time
        advice = "Put the log in the order of time, or pass --sort, which needs memory for the events of the whole log."
        if at + row == 0:
            return f"column {column!r}: the {name} rows begin before the {before} rows end. {advice}"
        place = self._place(name, at + row)
        return f"{place}, column {column!r}: the time is earlier than that of the row before it. {advice}"

    def _blocks(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, int, pl.DataFrame]]:
        """Yield (split, number of its first row in the split, block)."""
        for name in self.frames:
            rows, at = source_rows(self._source, name, f"the {name} rows"), 0
            for raw in rows.blocks(rows.schema.names() if columns is None else columns, self._rows):
                for block in raw.frame.drop(ROW).iter_slices(self._rows):
                    yield name, at, block
                    at += block.height

    def _place(self, split: str, row: int) -> str:
        """Return "file, row N" of a row of a split, or its number there if the files are not known."""
        spec, left = self._config.source, row
        for file in self._source.files(split) if isinstance(self._source, Files) else ():
            frame = scan_file(file, format_of(file, spec.get("format")), spec.get("separator"), False)
            rows = frame.select(pl.len()).collect().item()
            if left < rows:
                return f"{file}, row {left + 1}"
            left -= rows
        return f"row {row + 1} of the {split} rows"

    def _history_columns(self) -> list[str]:
        columns = [c for group in self._config.sequences.values() for c in group.columns.values()]
        twice = sorted({c for c in columns if columns.count(c) > 1})
        if twice:
            raise RecipeError(f"data.sequences: {listing(twice)} is named twice; every history needs its own column")
        return columns

    def _check_columns(self, name: str, known: Sequence[str], needed: Sequence[str]) -> None:
        for column in needed:
            if column not in known:
                raise DataError(
                    f"the {name} rows: no column {column!r}.{did_you_mean(column, known)} Columns: {listing(known)}"
                )
        for column in self.columns:
            if column in known:
                raise DataError(
                    f"the {name} rows have the column {column!r} already; name another under data.sequences"
                )

    def _common(self) -> list[str]:
        names = [frame.collect_schema().names() for frame in self.frames.values()]
        return [column for column in names[0] if all(column in other for other in names)]


def undivided(source: Source, config: DataConfig) -> dict[str, pl.LazyFrame]:
    """Return the rows of a source by split; as `all` where the recipe divides them."""
    if config.split is not None:
        with contextlib.suppress(MissingSplit):
            return {"all": source.scan("all")}
    frames = {}
    for name in SPLITS:
        try:
            frames[name] = source.scan(name)
        except MissingSplit:
            if name == "train":
                return {"all": source.scan("all")}
    return frames


class _Parts:
    """Writes blocks as `part-00000.parquet`, …; a part is in memory until it is large enough."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._waiting: list[pl.DataFrame] = []
        self._rows = self._bytes = self._number = 0

    def add(self, block: pl.DataFrame) -> None:
        self._waiting.append(block)
        self._rows += block.height
        self._bytes += int(block.estimated_size())
        if self._rows >= _FILE_ROWS or self._bytes >= _FILE_BYTES:
            self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        sync_folder(self._folder)

    def _write(self) -> None:
        path = self._folder / f"part-{self._number:05d}.parquet"
        with naming(str(path)):
            pl.concat(self._waiting).write_parquet(path)
        _sync(path)
        self._waiting, self._rows, self._bytes = [], 0, 0
        self._number += 1


def _join(folder: Path, out: Path) -> None:
    """Make one file of the parts in a folder, a row group at a time."""
    parts = sorted(folder.glob("part-*.parquet"))
    whole = parts[0]
    if len(parts) > 1:
        whole = folder / "whole.parquet"
        with naming(str(out)):
            pl.scan_parquet(parts).sink_parquet(whole, maintain_order=True)
        _sync(whole)
    whole.rename(out)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
