"""Whether files are what was written: lists of sha256, and the checksums of Parquet pages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recsys.data.digest import sha256_of
from recsys.data.formats import is_remote
from recsys.errors import DataError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_PAGE_HEADER_BYTES = 32
_CHECKSUM_FOLLOWS = 0x15
"""Of a page header in Thrift's compact protocol: the field after the sizes is the next one, a 32-bit integer."""


def check_digests(files: Iterable[str], list_file: str) -> None:
    """Compare files with a list as `sha256sum` prints it; names in it are relative to its folder.

    Raises:
        DataError: the list cannot be read, a file is not in it, or its bytes are other ones.
    """
    listed = _read_list(list_file)
    for file in files:
        if is_remote(file):
            raise DataError(f"{file}: a file in an object store cannot be compared with {list_file}")
        expected = listed.get(Path(file).resolve())
        if expected is None:
            raise DataError(f"{file}: not listed in {list_file}")
        found = sha256_of(Path(file))
        if found != expected:
            raise DataError(f"{file}: altered: its sha256 is {found}, in {list_file} it is {expected}")


def _read_list(list_file: str) -> dict[Path, str]:
    folder = Path(list_file).parent
    found = {}
    try:
        lines = Path(list_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{list_file}, line {number}: expected `sha256  file` as sha256sum prints it: {line!r}")
        found[(folder / match[2]).resolve()] = match[1].lower()
    return found


def check_pages(file: str) -> None:
    """Read a Parquet file whole, comparing every page with its checksum; bytes that rotted are found.

    Raises:
        DataError: pyarrow is not installed; a page has no checksum, or another one.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("page_checksums needs the package pyarrow: pip install 'recsys[checksums]'") from error
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            missing = _without_checksum(file, opened.metadata)
            if missing is not None:
                raise DataError(
                    f"{file}: the pages of column {missing!r} have no checksums; write them "
                    "(pyarrow: write_page_checksum=True), or give a list of sha256 instead"
                )
            for group in range(opened.num_row_groups):
                opened.read_row_group(group)
    except (OSError, IndexError) as error:  # pyarrow's errors are among them
        raise DataError(f"{file}: altered or damaged: {str(error).splitlines()[0]}") from error


def _without_checksum(file: str, metadata: Any) -> str | None:
    """Return the first column whose first page has no checksum; pyarrow passes over pages without."""
    with open(file, "rb") as opened:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                opened.seek(column.dictionary_page_offset or column.data_page_offset)
                header = opened.read(_PAGE_HEADER_BYTES)
                at = 0
                for _ in range(3):  # page type, size, compressed size: a byte for the field, then a varint
                    at += 1
                    while header[at] & 0x80:
                        at += 1
                    at += 1
                if header[at] != _CHECKSUM_FOLLOWS:
                    return str(column.path_in_schema)
    return None
