"""Where raw rows come from: files of logs, found below a data root, with side tables joined on."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import polars as pl
from typing_extensions import TypedDict  # typing.TypedDict is no type for pydantic before Python 3.12

from recsys.data.digest import sha256_of
from recsys.data.formats import Format, check_lines, folder_columns, format_of, is_remote, naming, scan_file
from recsys.data.integrity import check_digests, check_pages
from recsys.data.json_lines import check_json
from recsys.data.quarantine import ROW
from recsys.data.reading import RawBlock, file_pieces
from recsys.data.schema import DatasetNote
from recsys.data.stacking import stack
from recsys.errors import DataError, did_you_mean, listing

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_GLOB = ("*", "?", "[")


class MissingSplit(DataError):
    """A source that was asked for a split it does not have."""


@runtime_checkable
class Requiring(Protocol):
    """A source that knows which of its files lacks a column. Sources need not; errors are then less precise."""

    def require(self, split: str, columns: Sequence[str]) -> None:
        """Raise a `DataError` naming the file that lacks one of `columns`."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A source whose encoded rows may be kept and used again. Sources need not be."""

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        ...


@runtime_checkable
class Digested(Protocol):
    """A source that can say so by every byte of its files. Sources need not."""

    def content(self) -> str:
        """Return a text that is equal exactly when the bytes are."""
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


def _sampled(path: Path) -> str:
    """Return size, modification time and a digest of some pieces of a file."""
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in range(_SAMPLES):
            file.seek(max(stat.st_size - _SAMPLE_BYTES, 0) * piece // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"


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
        sha256: list of the files' SHA-256 as `sha256sum` prints it; an altered file is an error.
        page_checksums: compare every page of Parquet files with the checksum in it; needs pyarrow.
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
        sha256: str | None = None,
        page_checksums: bool = False,
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
        self._sha256 = sha256
        self._page_checksums = page_checksums
        self._files: dict[str, tuple[str, ...]] = {}
        self._frames: dict[str, pl.LazyFrame] = {}
        self._checked_keys: set[str] = set()
        self._checked_bytes: set[str] = set()
        self._checked_lines: set[str] = set()
        self._side_tables: list[tuple[pl.DataFrame, list[str]]] | None = None

    def files(self, split: str) -> tuple[str, ...]:
        """Return the files of a split in reading order.

        Raises:
            MissingSplit: the recipe names no file for it.
            DataError: a named file or folder does not exist.
        """
        if split not in self._files:
            given = self._patterns.get(split)
            if given is None:
                raise MissingSplit(f"source files: no {split!r} split; the recipe gives {listing(self.splits())}")
            patterns = (given,) if isinstance(given, str) else given
            found = [f for pattern in patterns for f in self._root.find(pattern)]
            self._files[split] = tuple(dict.fromkeys(found))
        return self._files[split]

    def splits(self) -> list[str]:
        """Return the names that rows are given under."""
        return [name for name, given in self._patterns.items() if given is not None]

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the raw rows of `train`, `valid`, `test` or `all`, side tables joined, lazily.

        Raises:
            DataError: a file is missing, empty or unreadable; a line of a text file has too many or too few fields;
                files disagree on types; a side table has a key twice.
        """
        if split not in self._checked_lines:
            for file in self.files(split):
                self._check_lines(file)
            self._checked_lines.add(split)
        return self._frame(split)

    def schema(self, split: str) -> pl.Schema:
        """Return name → type of the columns of `train`, `valid`, `test` or `all`, those of side tables included.

        Raises:
            DataError: a file is missing, empty or unreadable; files disagree on types; a side table has a key twice.
        """
        return self._frame(split).collect_schema()

    def _frame(self, split: str) -> pl.LazyFrame:
        if split not in self._frames:
            files = self.files(split)
            self._check_bytes([*files, *(file for side in self._join for file in self._root.find(side["path"]))])
            frame = self._with_sides(stack(files, [self._open(file) for file in files]))
            if not any(self._has_rows(file) for file in files):
                raise DataError(f"0 rows in {listing(files, 5)}")
            self._frames[split] = frame
        return self._frames[split]

    def _check_bytes(self, files: Sequence[str]) -> None:
        new = [file for file in dict.fromkeys(files) if file not in self._checked_bytes]
        if self._sha256 is not None:
            check_digests(new, self._root.find(self._sha256)[0])
        if self._page_checksums:
            for file in new:
                if format_of(file, self._format) == "parquet":
                    check_pages(file)
        self._checked_bytes.update(new)

    def unused(self, split: str, used: Sequence[str]) -> list[tuple[str, str]]:
        """Return (file, column) of every column besides `used` and what side tables are joined on."""
        keys = {key for _, _, names in self._sides() for key in names}
        files = [(file, self._open(file)) for file in self.files(split)] + [side[:2] for side in self._sides()]
        return [(f, c) for f, rows in files for c in rows.collect_schema().names() if c not in keys and c not in used]

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

    def blocks(self, split: str, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        """Yield blocks of about `rows` raw rows, side tables joined, from raw row `start` on, in order.

        A block never spans files. Side tables are kept in memory.
        """
        schema = self.schema(split)
        wanted = [name for name in schema.names() if name in set(columns)]
        before = 0
        for file in self.files(split):
            left, seen = max(start - before, 0), 0
            finish = self._finisher(file, wanted, schema)
            kind = format_of(file, self._format)
            for piece in file_pieces(file, kind, self._separator, self._own_columns(file, wanted), rows, left):
                seen += piece.seen
                if piece.frame.width:
                    yield RawBlock(finish(piece.frame), file, before, piece.seen, before + seen, piece.bad)
            before += seen

    def _own_columns(self, file: str, wanted: Sequence[str]) -> list[str]:
        """Return the columns to read from a file: wanted ones, and what side tables are joined on."""
        folders = folder_columns(file) if self._is_hive(file) else {}
        needed = {*wanted, *(key for _, _, keys in self._sides() for key in keys)}
        names = self._open(file).collect_schema().names()
        return [n for n in names if n in needed and n not in folders] or names[:1]

    def _finisher(self, file: str, wanted: Sequence[str], schema: pl.Schema) -> Callable[[pl.DataFrame], pl.DataFrame]:
        """Return what makes the columns of the split of a block of a file."""
        folders = folder_columns(file) if self._is_hive(file) else {}
        sides = self._collected_sides(schema)
        casts = {name: dtype for name, dtype in schema.items() if name in wanted}

        def finish(frame: pl.DataFrame) -> pl.DataFrame:
            frame = frame.with_columns(pl.lit(v).alias(c) for c, v in folders.items() if c not in frame.columns)
            for table, keys in sides:
                frame = frame.with_columns(pl.col(k).cast(table.schema[k]) for k in keys)
                frame = frame.join(table, on=keys, how="left", maintain_order="left")
            found = [pl.col(c) if frame.schema[c] == t else pl.col(c).cast(t) for c, t in casts.items()]
            return frame.select(*found, ROW)

        return finish

    def _collected_sides(self, schema: pl.Schema) -> list[tuple[pl.DataFrame, list[str]]]:
        if self._side_tables is None:
            self._side_tables = []
            for name, table, keys in self._sides():
                with naming(name):
                    cast = table.with_columns(pl.col(key).cast(schema[key]) for key in keys)
                    self._side_tables.append((cast.collect(), keys))
        return self._side_tables

    def identity(self) -> str:
        """Return path, size, modification time and samples of every file, side tables included, as one text."""
        return self._identity(_sampled)

    def content(self) -> str:
        """Return the sha256 of every byte of every file, side tables included, as one text."""
        return self._identity(sha256_of)

    def _identity(self, digest: Callable[[Path], str]) -> str:
        names = [f for split, given in self._patterns.items() if given is not None for f in self.files(split)]
        names += [file for side in self._join for file in self._root.find(side["path"])]
        lines = [str((self._format, self._separator, self._hive, self._patterns, self._join))]
        for name in names:
            path = Path(name)
            lines.append(name if is_remote(name) else f"{path.resolve()} {digest(path)}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _open(self, file: str) -> pl.LazyFrame:
        return scan_file(file, format_of(file, self._format), self._separator, self._is_hive(file))

    def _has_rows(self, file: str) -> bool:
        first = self._open(file).collect_schema().names()[:1]
        return any(p.seen for p in file_pieces(file, format_of(file, self._format), self._separator, first, 1, 0))

    def _is_hive(self, file: str) -> bool:
        return "=" in file if self._hive is None else self._hive

    def _check_lines(self, file: str) -> None:
        kind = format_of(file, self._format)
        if kind in ("csv", "tsv") and not is_remote(file):
            check_lines(file, self._separator or ("\t" if kind == "tsv" else ","))
        if kind == "ndjson" and not is_remote(file):
            check_json(file)

    def _sides(self) -> list[tuple[str, pl.LazyFrame, list[str]]]:
        sides = []
        for side in self._join:
            files = self._root.find(side["path"])
            table = stack(files, [self._open(file) for file in files])
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
