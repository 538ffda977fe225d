"""A simulated log as Parquet files, with the truth about each row in files of its own.

    OUT/log/part-*.parquet              what a real log would hold
    OUT/truth/part-*.parquet            the same rows: true probabilities, and what was drawn from them
    OUT/uniform/part-*.parquet          rows of the last tenth of the time on which everything was shown, to test on
    OUT/uniform_truth/part-*.parquet    the truth about them
    OUT/manifest.json                   the world, its intercepts, and SHA-256 of the first rows, column by column

A part is one row group of at most 2²⁰ rows, named by its first row. Any range of rows can be written on its own,
by any process, into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys.data.simulate_config import UNIFORM_FROM, VERSION, WorldConfig, config_digest
from recsys.data.simulate_random import Region
from recsys.data.simulate_truth import Tally
from recsys.data.simulate_world import World
from recsys.errors import DataError

PART = 1 << 20
"""Rows of a part, and of the start of the log that the manifest's digests cover."""
_BLOCK = 1 << 17
TABLES = {Region.LOG: ("log", "truth"), Region.UNIFORM: ("uniform", "uniform_truth")}


@dataclass(frozen=True)
class Written:
    """What was written: rows, share of clicks, and the AUC of the true click probability."""

    rows: int
    click_rate: float
    best_auc: float


class ColumnDigests:
    """SHA-256 of every column's values, as little-endian bytes, over the first `PART` rows given to it."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Take in the next rows."""
        frame = frame.head(max(0, PART - self._rows))
        self._rows += len(frame)
        for column in frame.iter_columns():
            values = column.to_numpy()
            digest = self._hashes.setdefault(column.name, hashlib.sha256())
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())

    def texts(self) -> dict[str, str]:
        """Return column → digest in hexadecimal."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def write(
    world: World,
    out: Path,
    start: int,
    stop: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    *,
    uniform: bool = False,
) -> Written:
    """Write the rows `start … stop-1` of a world's log, holding one part in memory at a time.

    Args:
        world: to draw from.
        out: folder; made when absent.
        start: first row.
        stop: row after the last one.
        on_rows: called with the number of rows just drawn.
        uniform: write the rows of the uniform slice with these numbers too.

    Raises:
        DataError: the range is not within the log, or `out` holds these rows or another world already.
    """
    if not 0 <= start < stop <= world.config.rows:
        raise DataError(f"rows {start}:{stop} are not within the log's 0:{world.config.rows}")
    _refuse_clash(out, world.config, start, stop)
    digests: dict[str, dict[str, str]] = {}
    written = _write_rows(world, out, start, stop, Region.LOG, digests, on_rows)
    if uniform and (first := max(start, uniform_from(world.config))) < stop:
        _write_rows(world, out, first, stop, Region.UNIFORM, digests, on_rows)
    _write_manifest(out / _manifest_name(start), world, start, stop, digests)
    return written


def uniform_from(config: WorldConfig) -> int:
    """Return the number of the first row of the uniform slice."""
    return round(UNIFORM_FROM * config.rows)


def _write_rows(
    world: World,
    out: Path,
    start: int,
    stop: int,
    region: Region,
    digests: dict[str, dict[str, str]],
    on_rows: Callable[[int], None],
) -> Written:
    tables = TABLES[region]
    for table in tables:
        (out / table).mkdir(parents=True, exist_ok=True)
    sums = {table: ColumnDigests() for table in tables}
    tally = Tally()
    for first in range(start, stop, PART):
        last = min(first + PART, stop)
        blocks = []
        for a in range(first, last, _BLOCK):
            b = min(a + _BLOCK, last)
            blocks.append(world.rows(a, b, region))
            on_rows(b - a)
        log, truth = (pl.concat([block[side] for block in blocks], rechunk=True) for side in (0, 1))
        tally.add(truth["chance"].to_numpy(), log["y"].to_numpy())
        for table, frame in zip(tables, (log, truth), strict=True):
            sums[table].add(frame)
            _write_part(frame, out / table / part_name(first))
    digests |= {table: digest.texts() for table, digest in sums.items()}
    return Written(tally.rows, tally.rate, tally.auc)


def part_name(first: int) -> str:
    """Return the file name of the part that begins at a row; names sort as rows do."""
    return f"part-{first:012d}.parquet"


def _manifest_name(start: int) -> str:
    return "manifest.json" if start == 0 else f"manifest-{start:012d}.json"


def _write_part(frame: pl.DataFrame, path: Path) -> None:
    # Renamed when whole: a reader or a second attempt never meets half a file.
    unfinished = path.with_suffix(".tmp")
    frame.write_parquet(unfinished, row_group_size=PART)
    os.replace(unfinished, path)


def _write_manifest(path: Path, world: World, start: int, stop: int, digests: Mapping[str, Mapping[str, str]]) -> None:
    content = {
        "simulator": VERSION,
        "config_sha256": config_digest(world.config),
        "config": asdict(world.config),
        "b0": world.calibration.intercept,
        "intercepts": {"flip": world.calibration.flip, "conversion": world.calibration.conversion},
        "rows": [start, stop],
        "log_sha256": log_digest(digests),
        "column_sha256": digests,
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def log_digest(digests: Mapping[str, Mapping[str, str]]) -> str:
    """Return one digest of a log and its uniform slice; the truth has numbers whose last bits are the processor's."""
    told = {table: sums for table, sums in digests.items() if table in (tables[0] for tables in TABLES.values())}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _refuse_clash(out: Path, config: WorldConfig, start: int, stop: int) -> None:
    """Keep two worlds, or the same rows twice, from ending up in one folder."""
    own = (VERSION, config_digest(config))
    for path in sorted(out.glob("manifest*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["simulator"], found["config_sha256"]) != own:
            raise DataError(f"{path}: the folder holds another simulated world; choose another folder")
        first, last = found["rows"]
        if start < last and first < stop:
            raise DataError(f"{path}: rows {first}:{last} are there already; choose another folder or other rows")
    for path in sorted(out.glob("log/part-*.parquet")):
        if start <= int(path.stem.removeprefix("part-")) < stop:
            raise DataError(f"{path}: left by a run that did not finish; remove the folder or choose another")
