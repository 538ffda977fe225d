"""One file of logs to a lazy frame, with errors that name the file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from recsys.data.json_lines import json_schema
from recsys.data.text import BOM, header
from recsys.errors import DataError, did_you_mean, listing

Format = Literal["parquet", "csv", "tsv", "ndjson", "ipc"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".arrow": "ipc",
    ".feather": "ipc",
    ".ipc": "ipc",
}


def is_remote(path: str) -> bool:
    """Whether a path belongs to an object store or a web server, which Polars reads itself."""
    return "://" in path


def format_of(path: str, given: str | None) -> Format:
    """Return the format that was given, or the one that the file's extension says."""
    if given is not None:
        for known in FORMATS:
            if given == known:
                return known
        raise DataError(f"unknown format {given!r}.{did_you_mean(given, FORMATS)} Formats: {listing(FORMATS)}")
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    raise DataError(f"{path}: cannot tell the format from {suffix or 'a name without extension'!r}; set `format`")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn what Polars or the system raises while reading `path` into a `DataError` that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first = str(error).strip().split("\n")[0]
        hint = _utf8_hint(path) if "utf" in first.lower() else ""
        hint = hint or (" (is the file truncated?)" if "PAR1" in first or "out of spec" in first else "")
        raise DataError(f"{path}: cannot be read: {first}{hint}") from error


def scan_file(path: str, kind: Format, separator: str | None, hive: bool) -> pl.LazyFrame:
    """Return the rows of one file; the columns of CSV and TSV files are all text.

    Raises:
        DataError: the file is missing, empty, truncated, or its header is unusable.
    """
    if not is_remote(path):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        if Path(path).stat().st_size == 0:
            raise DataError(f"0 rows in {path}: the file is empty (0 bytes)")
    separator = separator or ("\t" if kind == "tsv" else ",")
    if kind in ("csv", "tsv") and not is_remote(path):
        header(path, separator)
    with naming(path):
        if kind == "parquet":
            frame = pl.scan_parquet(path, hive_partitioning=False)
        elif kind == "ipc":
            frame = pl.scan_ipc(path, hive_partitioning=False)
        elif kind == "ndjson":
            frame = _scan_json(path)
        else:
            frame = pl.scan_csv(path, separator=separator, infer_schema=False)
        known = frame.collect_schema()
    folders = folder_columns(path) if hive else {}
    return frame.with_columns(pl.lit(v).alias(c) for c, v in folders.items() if c not in known)


def _scan_json(path: str) -> pl.LazyFrame:
    if is_remote(path):
        return pl.scan_ndjson(path, infer_schema_length=None)
    schema = json_schema(path)
    with open(path, "rb") as file:
        if file.read(len(BOM)) == BOM:  # rare, so it may be read at once; the parser does not know the mark
            return pl.scan_ndjson(io.BytesIO(file.read()), schema=schema)
    return pl.scan_ndjson(path, schema=schema)


def folder_columns(path: str) -> dict[str, str | int]:
    """Read `…/day=3/part.parquet` as `{day: 3}`."""
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    return {name: int(value) if value.isdecimal() else value for name, value in pairs}


def check_lines(path: str, separator: str) -> None:
    """Refuse a text file with a row of too many or too few fields, or with a quote that is not closed.

    A parser fills short rows with nulls, which would pass for missing values. The lines are counted without parsing
    them, quoted parts removed first. Quoted values that span lines are left to the parser.

    Raises:
        DataError: naming file and line.
    """
    line = pl.col("line")
    bare = line.str.replace_all(r'"[^"]*"', "").str.strip_chars_end("\r")
    lines = pl.scan_csv(
        path, separator="\x01", quote_char=None, has_header=False, new_columns=["line"], infer_schema=False
    ).with_row_index("number", offset=1)
    wrong = pl.col("fields") != pl.col("fields").first()
    number = pl.col("number")
    with naming(path):
        found = (
            lines.with_columns(
                fields=bare.str.count_matches(separator, literal=True) + 1,
                quotes=line.str.count_matches('"', literal=True),
                opens=bare.str.contains(f'(^|{re.escape(separator)})"'),
            )
            .select(
                quotes=pl.col("quotes").sum(),
                opened=number.filter(pl.col("opens")).first(),
                expected=pl.col("fields").first(),
                bad=number.filter(wrong).first(),
                fields=pl.col("fields").filter(wrong).first(),
                text=line.filter(wrong).first(),
            )
            .collect(engine="streaming")
            .row(0, named=True)
        )
    if found["opened"] is not None:
        if found["quotes"] % 2:
            raise DataError(f"{path}, line {found['opened']}: a quote is not closed")
        return
    if found["bad"] is not None:
        raise DataError(
            f"{path}, line {found['bad']}: {found['fields']} fields where the header has {found['expected']}: "
            f"{found['text'][:200]!r}"
        )


def _utf8_hint(path: str) -> str:
    """Name the line of the first byte that is not UTF-8, reading the file in chunks."""
    if is_remote(path):
        return ""
    seen = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            chunk += file.readline()
            try:
                chunk.decode("utf-8")
            except UnicodeDecodeError as error:
                line = seen + chunk.count(b"\n", 0, error.start) + 1
                return f" (line {line} is not UTF-8: byte 0x{chunk[error.start]:02x}; save the file as UTF-8)"
            seen += chunk.count(b"\n")
    return ""
