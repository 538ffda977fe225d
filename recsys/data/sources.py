"""Where raw rows come from: files of logs, found below a data root, with side tables joined on."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import polars as pl
from typing_extensions import TypedDict  # typing.TypedDict is no type for pydantic before Python 3.12

from recsys.data.formats import Format, check_lines, format_of, is_remote, naming, scan_file
from recsys.data.schema import DatasetNote
from recsys.errors import DataError, did_you_mean, listing

_GLOB = ("*", "?", "[")
_ROW = "__row"


class MissingSplit(DataError):
    """A source that was asked for a split it does not have."""


@runtime_checkable
class Traceable(Protocol):
    """A source that can say where a row came from. Sources need not; errors are then less precise."""

    def where(self, split: str, wrong: pl.Expr) -> str | None:
        """Return "file, row N" of the first row for which `wrong` holds."""
        ...

    def require(self, split: str, columns: Sequence[str]) -> None:
        """Raise a `DataError` naming the file that lacks one of `columns`."""
        ...


@runtime_checkable
class Readable(Protocol):
    """A source that can find the file that stops reading. Sources need not; errors are then less precise."""

    def read_through(self, split: str, columns: Sequence[str]) -> None:
        """Read all rows of a split and drop them; raise a `DataError` naming the file that cannot be read."""
        ...


@contextmanager
def naming_file(source: object, split: str, columns: Sequence[str]) -> Iterator[None]:
    """Let an error in the midst of reading a split name the file: it is looked for only then."""
    try:
        yield
    except DataError as error:
        if isinstance(error.__cause__, pl.exceptions.PolarsError | OSError) and isinstance(source, Readable):
            source.read_through(split, columns)
        raise


@runtime_checkable
class Identified(Protocol):
    """A source whose encoded rows may be kept and used again. Sources need not be."""

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        ...


@dataclass(frozen=True)
class DataRoot:
    """The folders below which relative paths are looked for, in order.

    Args:
        candidates: for instance the folder of `--data-root`, of the variable `RECSYS_DATA`, and the recipe's own.
        about: what to tell a user who lacks the files.
    """

    candidates: tuple[Path, ...]
    about: DatasetNote | None = None

    def find(self, pattern: str) -> list[str]:
        """Return the files that a path, folder or glob stands for, sorted.

        Raises:
            DataError: nothing is there; the text lists every place looked at and where the data is obtained.
        """
        if is_remote(pattern):
            return [pattern]
        places = [Path(pattern).expanduser()]
        if not places[0].is_absolute():
            places = [root / pattern for root in self.candidates]
        for place in places:
            found = _expand(place)
            if found:
                return found
        looked = "".join(f"\n  {place}" for place in places) or "\n  (no data root is set)"
        what = "no file matches" if any(c in pattern for c in _GLOB) else "no such file or folder:"
        raise DataError(f"{what} {pattern!r}. Looked at:{looked}{self._about()}")

    def _about(self) -> str:
        advice = "\nPass --data-root FOLDER or set RECSYS_DATA to the folder that holds it."
        if self.about is None:
            return advice
        columns = f"\nIt must have the columns {', '.join(self.about.columns)}." if self.about.columns else ""
        return f"\nThe data set {self.about.name!r} is obtained from {self.about.where}.{columns}{advice}"


def _expand(place: Path) -> list[str]:
    if place.is_file():
        return [str(place)]
    if place.is_dir():
        files = (f for f in place.rglob("*") if f.is_file())
        return sorted(str(f) for f in files if not any(p.startswith((".", "_")) for p in f.relative_to(place).parts))
    if any(c in str(place) for c in _GLOB):
        return sorted(f for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
    return []


class SideTable(TypedDict):
    """A table joined to every row: `{path: movies.parquet, on: movie_id}`."""

    path: str
    on: str | list[str]


class Files:
    """Logs in files: Parquet, CSV, TSV, NDJSON or Arrow IPC; local, or in an object store.

    Args:
        train: file, folder, glob or list of them with the training rows.
        valid: the same for the validation rows.
        test: the same for the test rows.
        path: the same for all rows, when the recipe's `split` divides them.
        format: parquet, csv, tsv, ndjson or ipc; by default the file extension says.
        separator: between the columns of text files; by default a comma, for TSV a tab.
        join: side tables to join to every row, many to one: a list of `{path, on}`.
        hive: whether folder names such as `day=3` are columns; by default where they look so.
    """

    def __init__(
        self,
        root: DataRoot,
        *,
        train: str | tuple[str, ...] | None = None,
        valid: str | tuple[str, ...] | None = None,
        test: str | tuple[str, ...] | None = None,
        path: str | tuple[str, ...] | None = None,
        format: Format | None = None,
        separator: str | None = None,
        join: tuple[SideTable, ...] = (),
        hive: bool | None = None,
    ) -> None:
        if path is None and train is None:
            raise DataError("source files: give `train` (and `valid`, `test`), or `path` with a `split`")
        if path is not None and (train or valid or test):
            raise DataError("source files: `path` (one set of rows to split) excludes `train`, `valid` and `test`")
        self._root = root
        self._patterns = {"train": train, "valid": valid, "test": test, "all": path}
        self._format = format
        self._separator = separator
        self._join = join
        self._hive = hive
        self._files: dict[str, tuple[str, ...]] = {}
        self._frames: dict[str, pl.LazyFrame] = {}
        self._checked_keys: set[str] = set()

    def files(self, split: str) -> tuple[str, ...]:
        """Return the files of a split in reading order.

        Raises:
            MissingSplit: the recipe names no file for it.
            DataError: a named file or folder does not exist.
        """
        if split not in self._files:
            given = self._patterns.get(split)
            if given is None:
                have = listing(name for name, value in self._patterns.items() if value is not None)
                raise MissingSplit(f"source files: no {split!r} split; the recipe gives {have}")
            patterns = (given,) if isinstance(given, str) else given
            found = [f for pattern in patterns for f in self._root.find(pattern)]
            self._files[split] = tuple(dict.fromkeys(found))
        return self._files[split]

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the raw rows of `train`, `valid`, `test` or `all`, side tables joined, lazily.

        Raises:
            DataError: a file is missing, empty or unreadable; a line of a text file has too many or too few fields;
                files disagree on types; a side table has a key twice.
        """
        if split not in self._frames:
            parts = [self._open(file) for file in self.files(split)]
            for file in self.files(split):
                self._check_lines(file)
            frame = self._with_sides(_stack(self.files(split), parts))
            with naming(listing(self.files(split), 3)):
                empty = frame.head(1).collect().is_empty()
            if empty:
                raise DataError(f"0 rows in {listing(self.files(split), 5)}")
            self._frames[split] = frame
        return self._frames[split]

    def require(self, split: str, columns: Sequence[str]) -> None:
        """Raise a `DataError` naming the file that lacks one of `columns`."""
        sides = [name for side in self._sides() for name in side[1].collect_schema().names()]
        for file in self.files(split):
            names = self._open(file).collect_schema().names()
            for column in columns:
                if column not in names and column not in sides:
                    known = names + sides
                    raise DataError(
                        f"{file}: no column {column!r}.{did_you_mean(column, known)} Columns: {listing(known)}"
                    )

    def where(self, split: str, wrong: pl.Expr) -> str | None:
        """Return "file, row N" (counted from 1) of the first row for which `wrong` holds."""
        for file in self.files(split):
            frame = self._with_sides(self._open(file).with_row_index(_ROW, offset=1))
            with naming(file):
                rows = frame.filter(wrong).select(_ROW).head(1).collect()
            if not rows.is_empty():
                return f"{file}, row {rows[_ROW][0]}"
        return None

    def read_through(self, split: str, columns: Sequence[str]) -> None:
        """Raise a `DataError` naming the first file whose rows cannot be read."""
        for file in self.files(split):
            with naming(file):
                frame = self._open(file)
                known = [c for c in frame.collect_schema().names() if c in columns]
                for _ in frame.select(known).collect_batches(engine="streaming"):
                    pass

    def identity(self) -> str:
        """Return path, size and modification time of every file, side tables included, as one text."""
        names = [f for split, given in self._patterns.items() if given is not None for f in self.files(split)]
        names += [file for side in self._join for file in self._root.find(side["path"])]
        lines = [str((self._format, self._separator, self._hive, self._patterns, self._join))]
        for name in names:
            if is_remote(name):
                lines.append(name)
            else:
                stat = Path(name).stat()
                lines.append(f"{Path(name).resolve()} {stat.st_size} {stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _open(self, file: str) -> pl.LazyFrame:
        hive = "=" in file if self._hive is None else self._hive
        return scan_file(file, format_of(file, self._format), self._separator, hive)

    def _check_lines(self, file: str) -> None:
        kind = format_of(file, self._format)
        if kind in ("csv", "tsv") and not is_remote(file):
            check_lines(file, self._separator or ("\t" if kind == "tsv" else ","))

    def _sides(self) -> list[tuple[str, pl.LazyFrame, list[str]]]:
        sides = []
        for side in self._join:
            files = self._root.find(side["path"])
            table = _stack(files, [self._open(file) for file in files])
            keys = [side["on"]] if isinstance(side["on"], str) else list(side["on"])
            sides.append((listing(files, 3), table, keys))
        return sides

    def _with_sides(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        for name, table, keys in self._sides():
            left, right = frame.collect_schema(), table.collect_schema()
            for key in keys:
                if key not in left:
                    raise DataError(f"join {name}: the logs have no column {key!r}.{did_you_mean(key, left.names())}")
                if key not in right:
                    raise DataError(f"{name}: no column {key!r} to join on.{did_you_mean(key, right.names())}")
            table = table.with_columns(pl.col(key).cast(left[key]) for key in keys)
            if name not in self._checked_keys:
                self._refuse_repeated(name, table, keys)
                self._checked_keys.add(name)
            clash = [c for c in right.names() if c not in keys and c in left.names()]
            if clash:
                raise DataError(f"join {name}: column {clash[0]!r} is in the logs too; rename one of them")
            frame = frame.join(table, on=keys, how="left", maintain_order="left")
        return frame

    def _refuse_repeated(self, name: str, table: pl.LazyFrame, keys: list[str]) -> None:
        with naming(name):
            twice = table.group_by(keys).len("rows").filter(pl.col("rows") > 1).sort(keys).head(1).collect()
        if not twice.is_empty():
            *values, rows = twice.row(0)
            shown = ", ".join(f"{k}={v!r}" for k, v in zip(keys, values, strict=True))
            raise DataError(f"{name}: {rows} rows for {shown}; a side table must have one row per key")


def _stack(files: Iterable[str], frames: list[pl.LazyFrame]) -> pl.LazyFrame:
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
    if all(t.is_integer() for t in types) and pl.UInt64 not in types:
        return pl.Int64()
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
