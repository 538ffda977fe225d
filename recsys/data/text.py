"""Comma- and tab-separated files in blocks of whole records; records that cannot be read are set aside."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.quarantine import BAD_ROWS, ROW
from recsys.errors import DataError

BOM = b"\xef\xbb\xbf"
_MARK = "\\ufeff"
"""A byte order mark, as it is shown."""
_HEADER_BYTES = 1 << 20
_LONGEST_RECORD = 1 << 26
_SAMPLE = 1 << 16
_SHOWN = 200
_OTHER_SEPARATORS = (";", "\t", "|", ",")
_NUMBER = "__number"


@dataclass(frozen=True)
class TextBlock:
    """Records that follow each other.

    Args:
        frame: the columns asked for, all text, and `ROW`, the number of each record, from 1 for the one after the
            header.
        bad: records that cannot be read, as in `BAD_ROWS`.
        records: number of both together.
    """

    frame: pl.DataFrame
    bad: pl.DataFrame
    records: int


def header(path: str, separator: str) -> list[str]:
    """Return the column names of a text file.

    Raises:
        DataError: no text of lines in UTF-8; one column where another separator would give more; or repeated names,
            with both positions.
    """
    with open(path, "rb") as raw:
        _refuse_other_bytes(path, raw.read(_HEADER_BYTES))
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline(_HEADER_BYTES)
    names = next(csv.reader([line], delimiter=separator), [])
    better = [s for s in _OTHER_SEPARATORS if s != separator and s in line]
    if len(names) <= 1 and better:
        near = max(better, key=line.count)
        raise DataError(f"{path}: 1 column found with separator {separator!r}, did you mean separator {near!r}?")
    positions: dict[str, int] = {}
    for position, name in enumerate(names, start=1):
        if name in positions:
            raise DataError(f"{path}: column {name!r} appears twice, at positions {positions[name]} and {position}")
        positions[name] = position
    return names


def _refuse_other_bytes(path: str, first: bytes) -> None:
    """Raise an error for what a reader of lines would take for an empty file, or for one column with an odd name."""
    if first.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: compressed by gzip; unpack it first")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: text in UTF-16; save the file as UTF-8")
    if b"\r" in first and b"\n" not in first:
        raise DataError(f"{path}: lines end with carriage returns only; save the file with line feeds")


def text_blocks(path: str, separator: str, columns: Sequence[str], rows: int) -> Iterator[TextBlock]:
    """Read a file in blocks of about `rows` records.

    A record ends at a line end outside quotes. Set aside are records with another number of fields than the header,
    a repeated header, records with a NUL character or a byte order mark in front, and those that are not UTF-8: a
    parser would fill them with nulls, which would pass for missing values, or stop.

    Args:
        path: local file with a header.
        separator: one character.
        columns: those to return, in any order.
        rows: records per block, about; memory is that of one block.

    Raises:
        DataError: a quote is not closed.
    """
    names = header(path, separator)
    with open(path, "rb") as file:
        first = file.readline()
        reader = _Reader(path, separator, names, [c for c in names if c in set(columns)], first)
        size = bytes_of(rows, path, len(first))
        rest = b""
        while chunk := file.read(size):
            block, rest = reader.read(rest + chunk + file.readline())
            if block.records:
                yield block
        if rest:
            raise reader.unclosed()


def bytes_of(rows: int, path: str, skip: int) -> int:
    """Return the bytes of so many lines, judged by the first ones after `skip` bytes."""
    with open(path, "rb") as file:
        file.seek(skip)
        sample = file.read(_SAMPLE)
    return max(rows * len(sample) // max(sample.count(b"\n"), 1), 1)


class _Reader:
    """Turns chunks of whole lines into blocks, and keeps count of lines and records."""

    def __init__(self, path: str, separator: str, names: list[str], columns: list[str], first: bytes) -> None:
        self._path = path
        self._separator = separator
        self._names = names
        self._columns = columns
        self._header = first.removeprefix(BOM).rstrip(b"\r\n").decode("utf-8", "replace")
        self._line = 2  # the number in the file of the next line
        self._record = 1
        self._opening = f'(^|{re.escape(separator)})"'

    def read(self, chunk: bytes) -> tuple[TextBlock, bytes]:
        """Return the records of a chunk, and its end where that is the beginning of a record."""
        chunk, broken = _blank_broken_lines(chunk)
        lines = pl.DataFrame({"text": _lines(chunk)})
        quoted = b'"' in chunk
        ends, rest, stray = self._ends(lines["text"]) if quoted else (None, 0, [])
        if rest:
            at = len(chunk) - chunk.endswith(b"\n")
            for _ in range(rest):
                at = chunk.rfind(b"\n", 0, at)
            chunk, left = chunk[: at + 1], chunk[at + 1 :]
            if len(left) > _LONGEST_RECORD:
                raise self.unclosed()
            lines = lines.head(len(lines) - rest)
        else:
            left = b""
        records = lines.with_row_index(_NUMBER)
        if ends is not None:  # a value with a line end in it
            records = (
                records.with_columns(pl.Series("record", np.searchsorted(ends, np.arange(len(lines)))))
                .group_by("record", maintain_order=True)
                .agg(pl.col("text").str.join("\n"), pl.col(_NUMBER).first())
            )
        records = records.select(
            "text",
            line=pl.col(_NUMBER).cast(pl.Int64) + self._line,
            row=pl.int_range(self._record, self._record + pl.len(), dtype=pl.Int64),
        )
        broken |= dict.fromkeys(stray)
        bad = self._bad(records, quoted, {line + self._line: text for line, text in broken.items()})
        good = records.filter(~pl.col("row").is_in(bad["row"].implode())) if len(bad) else records
        if len(bad):
            keep = records["row"].is_in(good["row"].implode()).to_numpy()
            chunk = _only(chunk, records["line"].to_numpy() - self._line, keep)
        frame = self._parse(chunk, good["row"])
        self._line += len(lines)
        self._record += len(records)
        return TextBlock(frame, bad, len(records)), left

    def unclosed(self) -> DataError:
        """Return the error for the record that begins at the next line."""
        return DataError(f"{self._path}, line {self._line}: a quote is not closed")

    def _ends(self, lines: pl.Series) -> tuple[npt.NDArray[np.int64] | None, int, list[int]]:
        """Return where records end in a chunk with quotes.

        Returns:
            (last line of every record, or None if each line is one; number of lines after the last whole record;
            lines with a quote in a value that is not quoted)
        """
        facts = lines.to_frame("text").select(
            odd=pl.col("text").str.count_matches('"', literal=True) % 2 == 1,
            opens=pl.col("text").str.contains(self._opening),
        )
        odd = np.flatnonzero(facts["odd"].to_numpy())
        opens = facts["opens"].to_numpy()
        inside, within, stray = -1, np.zeros(len(lines), bool), []
        for at in odd.tolist():
            if inside >= 0:
                within[inside:at] = True
                inside = -1
            elif opens[at]:
                inside = at
            else:
                stray.append(at)
        rest = len(lines) - inside if inside >= 0 else 0
        within = within[: len(lines) - rest]
        return (np.flatnonzero(~within) if within.any() else None), rest, stray

    def _bad(self, records: pl.DataFrame, quoted: bool, broken: dict[int, str | None]) -> pl.DataFrame:
        """Return the records that cannot be read; `broken` has the text of lines emptied, None for a stray quote."""
        text = pl.col("text")
        bare = text.str.replace_all(r'"[^"]*"', "") if quoted else text
        fields = bare.str.count_matches(self._separator, literal=True) + 1
        wanted = len(self._names)
        counted = records.with_columns(fields=fields)
        wrong = (pl.col("fields") != wanted) | (text.str.strip_chars_end("\r") == self._header)
        found = counted.filter(wrong | pl.col("line").is_in(list(broken)) if broken else wrong)
        if found.is_empty():
            return BAD_ROWS
        rows = []
        for line in found.iter_rows(named=True):
            text_of = broken.get(line["line"])
            if text_of is not None:
                rule, problem, value = "encoding", broken_text(text_of), text_of
            elif line["line"] in broken:
                rule, problem, value = "fields", "a quote in a value that is not quoted", line["text"]
            elif line["fields"] == wanted:
                rule, problem, value = "fields", "the header again", line["text"]
            else:
                count = line["fields"]
                many = "field" if count == 1 else "fields"
                rule, problem, value = "fields", f"{count} {many} where the header has {wanted}", line["text"]
            value = value.strip("\r")[:_SHOWN]
            rows.append((self._path, line["row"], None, value, rule, f"line {line['line']}: {problem}"))
        return pl.DataFrame(rows, schema=BAD_ROWS.schema, orient="row")

    def _parse(self, data: bytes, rows: pl.Series) -> pl.DataFrame:
        if not len(rows):
            empty = pl.DataFrame(schema=dict.fromkeys(self._columns, pl.String()))
            return empty.with_columns(pl.Series(ROW, [], pl.Int64))
        frame = pl.scan_csv(
            data, separator=self._separator, has_header=False, new_columns=self._names, infer_schema=False
        )
        found = frame.select(self._columns).collect()
        if found.height != len(rows):
            raise DataError(
                f"{self._path}, lines {self._line} to {self._line + len(rows)}: {found.height} rows in "
                f"{len(rows)} records; a quote stands where none is expected"
            )
        return found.with_columns(rows.alias(ROW))


def shown_text(line: bytes) -> str:
    """Return a line with escapes for what is not UTF-8, NUL characters and byte order marks."""
    return line.decode("utf-8", "backslashreplace").replace("\0", "\\x00").replace("\ufeff", _MARK)


def broken_text(shown: str) -> str:
    """Return what is wrong with the characters of a line, by what `shown_text` gave."""
    return "a byte order mark in the midst" if shown.startswith(_MARK) else "not UTF-8, or a NUL character"


def _lines(chunk: bytes) -> pl.Series:
    """Return the lines of a chunk of UTF-8, line ends removed."""
    if b"\x01" in chunk:
        text = chunk.decode()
        return pl.Series("text", text.removesuffix("\n").split("\n"))
    frame = pl.read_csv(
        chunk, separator="\x01", quote_char=None, has_header=False, new_columns=["text"], infer_schema=False
    )
    return frame["text"].fill_null("")


def _only(chunk: bytes, first: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]) -> bytes:
    """Return a chunk with those records only that are to be kept; record i begins with line `first[i]`."""
    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1
    bounds = [*np.concatenate([[0], ends])[first].tolist(), len(chunk)]
    return b"".join(chunk[bounds[i] : bounds[i + 1]] for i in np.flatnonzero(keep).tolist())


def _blank_broken_lines(chunk: bytes) -> tuple[bytes, dict[int, str | None]]:
    """Empty the lines with characters that cannot stand; also return them by their index, as shown text.

    That is, what is not UTF-8, NUL characters, and a byte order mark in front, as joined files have in their midst.
    """
    if b"\0" not in chunk and BOM not in chunk:
        try:
            chunk.decode()
            return chunk, {}
        except UnicodeDecodeError:
            pass
    lines = chunk.split(b"\n")
    broken: dict[int, str | None] = {}
    for index, line in enumerate(lines):
        try:
            if b"\0" not in line and not line.startswith(BOM):
                line.decode()
                continue
        except UnicodeDecodeError:
            pass
        broken[index] = shown_text(line)
        lines[index] = b""
    return b"\n".join(lines), broken
