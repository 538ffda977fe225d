"""One pass over a source that encodes all its splits at once, and goes on where an earlier one was broken off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys.data.encode import Encoder
from recsys.data.layout import Layout
from recsys.data.quarantine import BAD_ROWS, Quarantine
from recsys.data.reading import RawBlock, RawRows
from recsys.data.report import SplitReport
from recsys.data.rules import Screen
from recsys.data.shard_files import ShardWriter, sync_folder, write_manifest
from recsys.errors import DataError

SAVE_SECONDS = 5.0
"""Time between two saved states, so that little is done twice; a state costs a flush of what was written."""
_STATE = "state.json"
QUARANTINE = "quarantine.parquet"


@dataclass
class _Member:
    """A split that is encoded in the pass."""

    name: str
    rows: RawRows
    screen: Screen
    writer: ShardWriter
    report: SplitReport


class EncodePass:
    """Encodes the splits that are parts of the same rows of a source.

    Args:
        encoder: fitted on the train split.
        splits: split → its rows; all of one source and one scan.
        folder: of the encoded data; each split goes to a folder of its own in it, the state beside them.
    """

    def __init__(self, encoder: Encoder, splits: Mapping[str, RawRows], folder: Path) -> None:
        self._encoder = encoder
        self._folder = folder
        self._whole = next(iter(splits.values()))
        self._work = folder / f".pass-{self._whole.scanned}"
        self._work.mkdir(parents=True, exist_ok=True)
        saved = self._saved()
        self._start: int = saved["end"]
        what = self._whole.what if len(splits) == 1 else "the logs"
        self.quarantine = Quarantine(encoder.config.bad_rows, what)
        if self._start:
            self.quarantine.restore(pl.read_parquet(self._work / saved["quarantine"]), saved["seen"])
        self._members = [self._member(name, rows, saved["splits"].get(name)) for name, rows in splits.items()]

    def _saved(self) -> dict[str, Any]:
        path = self._work / _STATE
        if not path.is_file():
            return {"end": 0, "splits": {}}
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state

    def _member(self, name: str, rows: RawRows, saved: Mapping[str, Any] | None) -> _Member:
        config = self._encoder.config
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        screen = Screen.of(config, rows.schema, rows.what, quarantine=self.quarantine)
        layout = Layout.of(self._encoder.schema)
        writer = ShardWriter(folder, layout, config.shard_rows, None if saved is None else saved["writer"])
        report = SplitReport() if saved is None else SplitReport.from_json(saved["report"])
        return _Member(name, rows, screen, writer, report)

    def run(self, progress: Callable[[int], None] | None = None) -> dict[str, SplitReport]:
        """Encode everything that is not encoded yet; return the counts of every split.

        Args:
            progress: called with the number of raw rows of the source done so far.

        Raises:
            DataError: a split without rows, or rows that break a rule.
        """
        columns = self._columns()
        saved = time.monotonic()
        for block in self._whole.source.blocks(
            self._whole.scanned, columns, self._encoder.config.batch_rows, self._start
        ):
            self._encode(block)
            if progress is not None:
                progress(block.end)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(block.end)
                saved = time.monotonic()
        self.quarantine.check()
        for member in self._members:
            if not member.report.rows:
                raise DataError(f"0 rows in {member.rows.what}")
            write_manifest(self._folder / member.name, self._encoder.schema, member.writer.close())
        return {member.name: member.report for member in self._members}

    def _columns(self) -> list[str]:
        needed = self._encoder.config.columns()
        wanted = {name for member in self._members for name in member.rows.reads(needed)}
        return [name for name in self._whole.schema.names() if name in wanted]

    def _encode(self, block: RawBlock) -> None:
        if any(member.rows.keep is not None for member in self._members):
            # A line that cannot be read belongs to no split in particular.
            self._members[0].screen.take_unreadable(block)
        for member in self._members:
            part = member.rows.part(block)
            before = self.quarantine.rows
            clean = member.screen.clean(part)
            member.report.aside += self.quarantine.rows - before
            if not clean.is_empty():
                member.writer.add(self._encoder.encode(clean, member.rows.origin(block), member.report))

    def _save(self, end: int) -> None:
        """Make durable what is encoded, then the state that says so; the state before stays whole until then."""
        found = f"quarantine-{end}.parquet"
        self.quarantine.found.write_parquet(self._work / found)
        state = {
            "end": end,
            "seen": self.quarantine.seen,
            "quarantine": found,
            "splits": {m.name: {"writer": m.writer.state(), "report": asdict(m.report)} for m in self._members},
        }
        temporary = self._work / f"{_STATE}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
        for path in (self._work / found, temporary):
            sync_folder(path)
        temporary.replace(self._work / _STATE)
        sync_folder(self._work)
        for old in self._work.glob("quarantine-*.parquet"):
            if old.name != found:
                old.unlink()


def groups(splits: Mapping[str, RawRows]) -> list[dict[str, RawRows]]:
    """Return the splits grouped by the rows of the source that they are parts of."""
    found: dict[str, dict[str, RawRows]] = {}
    for name, rows in splits.items():
        found.setdefault(rows.scanned, {})[name] = rows
    return list(found.values())


def write_quarantine(folder: Path, passes: Sequence[EncodePass]) -> None:
    """Write every row that was set aside to `quarantine.parquet`; no file where there is none."""
    found = pl.concat([BAD_ROWS, *(p.quarantine.found for p in passes)])
    if not found.is_empty():
        found.write_parquet(folder / QUARANTINE)
