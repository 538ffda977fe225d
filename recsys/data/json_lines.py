"""NDJSON files in blocks of whole lines; lines that are no JSON object are set aside with their address."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

from recsys.data.quarantine import BAD_ROWS, ROW, address
from recsys.data.text import BOM, TextBlock, broken_text, bytes_of, shown_text
from recsys.errors import DataError

_SHOWN = 200
_SCHEMA_ROWS = 131_072
_NONE = "__none"
_FULL_LINE = re.compile(rb"^[^\S\n]*[^\s][^\n]*", re.M)
_ODD_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
"""A NUL character, or half of a pair of surrogates: a parser would make a NUL of the other half missing."""


def json_schema(path: str) -> pl.Schema:
    """Return name → type of the columns of a file, all of its lines considered; memory is that of a block.

    Numbers of different kinds are upcast, numbers beside text are text. Lines that cannot be read are passed over.

    Raises:
        DataError: values of a column that no type holds, with the row of the first one that does not fit.
    """
    stat = Path(path).stat()
    return _schema(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _schema(path: str, size: int, modified: int) -> pl.Schema:
    found: dict[str, pl.DataType] = {}
    for lines in _chunks(path, _SCHEMA_ROWS):
        for name, dtype in lines.types().items():
            known = found.get(name, dtype)
            both = _common(known, dtype)
            if both is None:
                lines.conflict(name, known)
            found[name] = both
    return pl.Schema(found)


def json_blocks(path: str, schema: Mapping[str, pl.DataType], columns: Sequence[str], rows: int) -> Iterator[TextBlock]:
    """Read a file in blocks of about `rows` lines.

    A record is a line that is not blank. Set aside are those that are no JSON object, not UTF-8, or have a NUL
    character; a key that a line lacks is null.

    Args:
        path: local file.
        schema: of the file, as `json_schema` gives it.
        columns: those to return.
        rows: lines per block, about; memory is that of one block.

    Raises:
        DataError: a value of another type than the rows before.
    """
    wanted = {name: schema[name] for name in columns}
    for lines in _chunks(path, rows):
        block = lines.read(wanted)
        if block.records:
            yield block


def check_json(path: str) -> None:
    """Refuse a file with a line that cannot be read.

    Raises:
        DataError: naming file and line.
    """
    schema = json_schema(path)
    for block in json_blocks(path, schema, schema.names()[:1], _SCHEMA_ROWS):
        for bad in block.bad.iter_rows(named=True):
            raise DataError(f"{path}, {bad['problem']}: {bad['value']!r}")


@dataclass(frozen=True)
class _Lines:
    """Whole lines of a file.

    Args:
        path: the file.
        chunk: the lines.
        line: number of the first line in the file, from 1.
        record: the same without the blank lines.
    """

    path: str
    chunk: bytes
    line: int
    record: int

    def numbered(self) -> list[tuple[int, int, bytes]]:
        """Return (line, record, text) of every line that is not blank."""
        found = [(i, text) for i, text in enumerate(self.chunk.split(b"\n"), self.line) if text and not text.isspace()]
        return [(line, record, text) for record, (line, text) in enumerate(found, self.record)]

    def divided(self) -> tuple[list[tuple[int, bytes]], pl.DataFrame]:
        """Return (record, text) of the lines that can be read, and the others as `BAD_ROWS`."""
        good, bad = [], []
        for line, record, text in self.numbered():
            broken = _broken(text)
            if broken is None:
                good.append((record, text))
            else:
                rule, problem = broken
                shown = shown_text(text).strip("\r")[:_SHOWN]
                bad.append((self.path, record, None, shown, rule, f"line {line}: {problem}"))
        return good, pl.DataFrame(bad, schema=BAD_ROWS.schema, orient="row")

    def read(self, schema: Mapping[str, pl.DataType]) -> TextBlock:
        """Return the lines as columns of the types given, and `ROW`."""
        frame = _parsed(self.chunk, schema) if _is_plain(self.chunk) else None
        if frame is not None and frame.height == self.chunk.count(b"\n") + (not self.chunk.endswith(b"\n")):
            self._refuse_nested(frame, None)
            rows = pl.int_range(self.record, self.record + frame.height, dtype=pl.Int64, eager=True)
            return TextBlock(frame.select(*schema, rows.alias(ROW)), BAD_ROWS, frame.height)
        good, bad = self.divided()
        frame = _parsed(b"\n".join(text for _, text in good), schema)
        if frame is None:
            self._explain(good, schema)
        self._refuse_nested(frame, good)
        rows = pl.Series(ROW, [record for record, _ in good], pl.Int64)
        return TextBlock(frame.select(*schema, rows), bad, len(good) + len(bad))

    def types(self) -> Mapping[str, pl.DataType]:
        """Return name → type of the columns in these lines."""
        whole = _is_plain(self.chunk) and _parsed(self.chunk, {}) is not None  # lines that are no objects mislead
        found = _inferred(self.chunk) if whole else None
        if found is None:
            good, _ = self.divided()
            found = _inferred(b"\n".join(text for _, text in good))
            if found is None:
                self._refuse_mixed(good)
                raise DataError(f"{self.path}, lines {self.line} and on: values of one column have different types")
        return found

    def _refuse_nested(self, frame: pl.DataFrame, good: Sequence[tuple[int, bytes]] | None) -> None:
        """Raise an error for a list or an object in a column of text; the parser takes its JSON for the text."""
        texts = [name for name, dtype in frame.schema.items() if dtype == pl.String]
        if not texts:
            return
        begins = pl.any_horizontal(pl.col(name).str.head(1).is_in(["[", "{"]) for name in texts)
        at = frame.select(begins.arg_true()).to_series()
        if len(at):
            good = [(record, text) for _, record, text in self.numbered()] if good is None else good
            for index in at.to_list():
                record, text = good[index]
                for name, value in json.loads(text).items():
                    if name in texts and isinstance(value, list | dict):
                        raise self._error(record, name, value, _kind("text"))

    def conflict(self, column: str, dtype: pl.DataType) -> NoReturn:
        """Raise the error of the first value of a column that does not have the type of the rows before."""
        for record, text in self.divided()[0]:
            value = json.loads(text).get(column)
            if value is not None and _kind(value) != _kind_of(dtype):
                raise self._error(record, column, value, _kind_of(dtype))
        raise DataError(f"{self.path}: values of column {column!r} have different types")

    def _refuse_mixed(self, good: Sequence[tuple[int, bytes]]) -> None:
        """Raise the error of the first value of another kind than the values of its column before."""
        seen: dict[str, str] = {}
        for record, text in good:
            for name, value in json.loads(text).items():
                kind = _kind(value)
                known = seen.setdefault(name, kind) if value is not None else kind
                if kind != known and {kind, known} != {"a number", "text"}:
                    raise self._error(record, name, value, known)

    def _explain(self, good: Sequence[tuple[int, bytes]], schema: Mapping[str, pl.DataType]) -> NoReturn:
        """Raise the error of the first value that does not have its column's type."""
        low, high = 0, len(good)
        while high - low > 1:  # the first line that cannot be read is one of low … high-1
            middle = (low + high) // 2
            if _parsed(b"\n".join(text for _, text in good[low:middle]), schema) is None:
                high = middle
            else:
                low = middle
        record, text = good[low]
        for name, value in json.loads(text).items():
            alone = json.dumps({name: value}).encode()
            if name in schema and _parsed(alone, {name: schema[name]}) is None:
                raise self._error(record, name, value, f"{_kind_of(schema[name])} ({schema[name]})")
        raise DataError(f"{address(self.path, record)}: cannot be read: {text[:_SHOWN].decode()!r}")

    def _error(self, record: int, column: str, value: Any, expected: str) -> DataError:
        shown = json.dumps(value, ensure_ascii=False)[:_SHOWN]
        return DataError(
            f"{address(self.path, record)}, column {column!r}: expected {expected} as in other rows, found {shown}"
        )


def _chunks(path: str, rows: int) -> Iterator[_Lines]:
    """Yield the lines of a file, about `rows` at a time."""
    line = record = 1
    with open(path, "rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        size = bytes_of(rows, path, 0)
        while chunk := file.read(size):
            chunk += file.readline()
            yield _Lines(path, chunk, line, record)
            line += chunk.count(b"\n")
            record += sum(1 for _ in _FULL_LINE.finditer(chunk))


def _is_plain(chunk: bytes) -> bool:
    return b"\0" not in chunk and not _ODD_ESCAPE.search(chunk)


def _broken(text: bytes) -> tuple[str, str] | None:
    """Return rule and problem of a line that cannot be read."""
    if b"\0" in text or text.startswith(BOM):
        return "encoding", broken_text(shown_text(text))
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        return "encoding", broken_text(shown_text(text))
    except (ValueError, RecursionError) as error:
        return "json_object", f"not JSON: {error}"
    if not isinstance(value, dict):
        return "json_object", "JSON, but no object"
    if _ODD_ESCAPE.search(text):
        plain = json.dumps(value, ensure_ascii=False)
        if "\\u0000" in plain or any(0xD800 <= ord(character) < 0xE000 for character in plain):
            return "encoding", "an escape for a NUL character, or half of a pair of surrogates"
    return None if _parsed(text, {}) is not None else ("json_object", "not JSON")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; write null")


def _parsed(text: bytes, schema: Mapping[str, pl.DataType]) -> pl.DataFrame | None:
    """Return lines as columns of the types given (and another one), None where they cannot be read so."""
    types = {**schema, _NONE: pl.Null()}  # without any column the parser does not look at the lines
    if not text or text.isspace():
        return pl.DataFrame(schema=types)
    try:
        return pl.read_ndjson(io.BytesIO(text), schema=types)
    except pl.exceptions.PolarsError:
        return None


def _inferred(text: bytes) -> Mapping[str, pl.DataType] | None:
    """Return the types of the columns of lines, None where they cannot be read."""
    if not text or text.isspace():
        return {}
    try:
        return pl.scan_ndjson(io.BytesIO(text), infer_schema_length=None).collect_schema()
    except pl.exceptions.PolarsError:
        return None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def _kind_of(dtype: pl.DataType) -> str:
    if dtype == pl.Boolean:
        return "true or false"
    if dtype.is_numeric():
        return "a number"
    return "text" if dtype == pl.String else "a list" if isinstance(dtype, pl.List) else "an object"


def _common(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """Return the type that holds the values of both, None if there is none."""
    if one == other or other == pl.Null:
        return one
    if one == pl.Null:
        return other
    if isinstance(one, pl.List) and isinstance(other, pl.List):
        inner = _common(pl.List(one.inner).inner, pl.List(other.inner).inner)  # type: ignore[arg-type]
        return None if inner is None else pl.List(inner)
    if one.is_numeric() and other.is_numeric():  # Int128 where one has numbers beyond int64
        return pl.Float64() if one.is_float() or other.is_float() else pl.Int128()
    scalar = (one.is_numeric() or one == pl.String) and (other.is_numeric() or other == pl.String)
    if scalar:
        return pl.String()
    return one if isinstance(one, pl.Struct) and isinstance(other, pl.Struct) else None
