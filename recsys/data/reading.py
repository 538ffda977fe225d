"""Raw rows block by block, each with its file and its number there; memory is that of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.contracts import Source
from recsys.data.formats import Format, is_remote, naming, scan_file
from recsys.data.json_lines import json_blocks
from recsys.data.quarantine import BAD_ROWS, ROW
from recsys.data.text import text_blocks
from recsys.errors import DataError

INDEX = "__index"
"""Name of the column with the number of a raw row among all rows of a source's split, counted from 0."""


@dataclass(frozen=True)
class RawBlock:
    """Raw rows that follow each other.

    Args:
        frame: the rows, with `ROW`, their numbers in the file.
        file: of all of them; None where the source knows no files.
        before: raw rows in the files before this one.
        seen: raw rows that the block stands for, `bad` included.
        end: raw rows of the source's split up to the end of the block.
        bad: rows that could not be read, as `BAD_ROWS`.
    """

    frame: pl.DataFrame
    file: str | None
    before: int
    seen: int
    end: int
    bad: pl.DataFrame


@runtime_checkable
class Blocked(Protocol):
    """A source that gives its rows in blocks. Sources need not: their lazy frames are then streamed."""

    def schema(self, split: str) -> pl.Schema:
        """Return name → type of the columns of a split."""
        ...

    def blocks(self, split: str, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        """Yield blocks of about `rows` raw rows from raw row `start` on, in order."""
        ...


@dataclass(frozen=True)
class Piece:
    """Rows of one file that follow each other: the frame with `ROW`, the rows set aside, the number of both."""

    frame: pl.DataFrame
    bad: pl.DataFrame
    seen: int


def file_pieces(
    path: str, kind: Format, separator: str | None, columns: Sequence[str], rows: int, start: int
) -> Iterator[Piece]:
    """Yield the rows of one file from row `start` on, in pieces of about `rows`; first an empty one for those before.

    Args:
        path: local file, or one in an object store.
        kind: its format.
        separator: of text files; None for the usual one.
        columns: to read.
        rows: rows per piece, about.
        start: rows to pass over.

    Raises:
        DataError: the file cannot be read.
    """
    frame = scan_file(path, kind, separator, False)
    if is_remote(path):
        pieces = _streamed(path, frame, columns, rows)
    elif kind in ("parquet", "ipc"):
        yield from _sliced(path, frame, columns, rows, start)
        return
    elif kind == "ndjson":
        blocks = json_blocks(path, frame.collect_schema(), columns, rows)
        pieces = (Piece(b.frame, b.bad, b.records) for b in blocks)
    else:
        pieces = (
            Piece(b.frame, b.bad, b.records)
            for b in text_blocks(path, separator or ("\t" if kind == "tsv" else ","), columns, rows)
        )
    yield from _from(pieces, start)


def _sliced(path: str, frame: pl.LazyFrame, columns: Sequence[str], rows: int, start: int) -> Iterator[Piece]:
    """Read slice by slice: a streaming engine reads ahead by an amount of its own."""
    with naming(path):
        total = int(frame.select(pl.len()).collect().item())
    if start:
        yield Piece(pl.DataFrame(), BAD_ROWS, min(start, total))
    for at in range(start, total, rows):
        with naming(path):
            read = frame.slice(at, rows).select(columns).collect()
        yield _numbered(read, at)


def _streamed(path: str, frame: pl.LazyFrame, columns: Sequence[str], rows: int) -> Iterator[Piece]:
    with naming(path):
        batches = iter(frame.select(columns).collect_batches(chunk_size=rows, maintain_order=True, engine="streaming"))
    at = 0
    while True:
        with naming(path):
            read = next(batches, None)
        if read is None:
            return
        if not read.is_empty():
            yield _numbered(read, at)
            at += read.height


def _numbered(read: pl.DataFrame, at: int) -> Piece:
    rows = pl.int_range(at + 1, at + 1 + pl.len(), dtype=pl.Int64).alias(ROW)
    return Piece(read.with_columns(rows), BAD_ROWS, read.height)


def _from(pieces: Iterator[Piece], start: int) -> Iterator[Piece]:
    """Pass over the first `start` rows."""
    at = 0
    for piece in pieces:
        before, at = at, at + piece.seen
        passed = min(max(start - before, 0), piece.seen)
        if passed:
            yield Piece(pl.DataFrame(), BAD_ROWS, passed)
        if passed < piece.seen:
            frame, bad = piece.frame.filter(pl.col(ROW) > start), piece.bad.filter(pl.col("row") > start)
            yield Piece(frame, bad, piece.seen - passed)


@dataclass(frozen=True)
class Origin:
    """Where the rows of a block are from.

    Args:
        scanned: the name that the source has them under.
        before: raw rows in the files before theirs.
    """

    scanned: str
    before: int

    def numbers(self, frame: pl.DataFrame) -> npt.NDArray[np.int64]:
        """Return the number of every row among all that the source has under the name, counted from 0, `[n]`."""
        return frame[ROW].to_numpy().astype(np.int64) + (self.before - 1)


@dataclass(frozen=True)
class RawRows:
    """The raw rows of one split of a recipe: those of a source for which `keep` holds.

    Args:
        what: how errors call them.
        schema: name → type of the columns.
        source: gives the blocks.
        scanned: the name of the source's rows.
        keep: which of them belong to the split; over the columns `needs`, of which `INDEX` may be one.
        needs: columns of `keep`.
    """

    what: str
    schema: pl.Schema
    source: Blocked
    scanned: str
    keep: pl.Expr | None = None
    needs: tuple[str, ...] = ()

    def blocks(self, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        """Yield the split's rows in blocks of at most about `rows`, from raw row `start` of the source on."""
        for block in self.source.blocks(self.scanned, self.reads(columns), rows, start):
            yield self.part(block)

    def reads(self, columns: Sequence[str]) -> list[str]:
        """Return the columns that have to be read for `columns`, in the order of the logs."""
        wanted = {*columns, *self.needs}
        return [name for name in self.schema.names() if name in wanted]

    def origin(self, block: RawBlock) -> Origin:
        """Return where a block of the rows is from."""
        return Origin(self.scanned, block.before)

    def part(self, block: RawBlock) -> RawBlock:
        """Return the rows of a block of the source that belong to the split.

        What could not be read belongs to no split in particular; it is left where the split is all of the source.
        """
        if self.keep is None:
            return block
        frame = block.frame
        if INDEX in self.needs:
            frame = frame.with_columns((pl.col(ROW) + (block.before - 1)).alias(INDEX))
        frame = frame.filter(self.keep)
        if INDEX in self.needs:
            frame = frame.drop(INDEX)
        return replace(block, frame=frame, seen=frame.height, bad=BAD_ROWS)


class FrameBlocks:
    """The blocks of a lazy frame, of which no files are known; streamed."""

    def __init__(self, frames: Mapping[str, pl.LazyFrame]) -> None:
        self._frames = frames

    def schema(self, split: str) -> pl.Schema:
        """Return name → type of the columns."""
        with naming(f"the {split} split"):
            return self._frames[split].collect_schema()

    def blocks(self, split: str, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        """Yield blocks of about `rows` rows from row `start` on."""
        for piece in _from(_streamed(f"the {split} split", self._frames[split], columns, rows), start):
            if not piece.frame.width:
                continue
            end = int(piece.frame[ROW][-1])
            yield RawBlock(piece.frame, None, 0, piece.seen, end, piece.bad)


def rows_of(frame: pl.LazyFrame, what: str) -> RawRows:
    """Return the rows of a lazy frame."""
    blocks = FrameBlocks({"all": frame})
    return RawRows(what, blocks.schema("all"), blocks, "all")


def source_rows(source: Source, scanned: str, what: str) -> RawRows:
    """Return the rows that a source has under a name, by its own blocks where it gives them."""
    own: Blocked = source if isinstance(source, Blocked) else FrameBlocks({scanned: source.scan(scanned)})
    schema = own.schema(scanned)
    for name in (ROW, INDEX):
        if name in schema:
            raise DataError(f"{what}: the column name {name!r} is reserved; rename the column")
    return RawRows(what, schema, own, scanned)
