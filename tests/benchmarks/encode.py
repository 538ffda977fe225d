"""Encoding raw Parquet files: speed, peak memory for several `batch_rows`, and bytes per row.

    python tests/benchmarks/encode.py --rows 1000000 4000000 --batch-rows 16384 131072
    python tests/benchmarks/encode.py --rows 50000000 --repeats 1 --folder FOLDER

Every encoding runs in a process of its own. 13 numeric and 26 categorical columns, 5 % of the values missing, text and
integer categories with 100 to 1,000,000 distinct values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from recsys.data.layout import id_type
from recsys.data.prepare import prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files

NUMERIC, CATEGORICAL = 13, 26
FILE_ROWS = 1_000_000


def write_logs(folder: Path, rows: int) -> None:
    """Write simulated logs, a file of a million rows at a time."""
    folder.mkdir()
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        rng = np.random.default_rng(number)
        size = min(FILE_ROWS, rows - first)
        null = pl.Series(rng.random(size) < 0.05)
        frame = {"label": pl.Series(rng.integers(0, 2, size))}
        for i in range(NUMERIC):
            frame[f"I{i}"] = pl.Series(rng.lognormal(2, 2, size))
        for i in range(CATEGORICAL):
            values = pl.Series(rng.zipf(1.2, size) % 10 ** (2 + i % 5))
            frame[f"C{i}"] = (values * 2_654_435_761 % 4_294_967_296).cast(pl.String) if i % 2 else values
        data = pl.DataFrame(frame).with_columns(pl.when(~null).then(pl.exclude("label")).name.keep())
        data.write_parquet(folder / f"logs-{number:05d}.parquet", row_group_size=131_072)


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def encode(logs: Path, batch_rows: int) -> dict[str, float]:
    """Fit and encode, in this process."""
    config = DataConfig.model_validate(
        {
            "source": {},
            "label": "label",
            "categorical": [f"C{i}" for i in range(CATEGORICAL)],
            "numeric": {f"I{i}": {"transform": "log"} for i in range(NUMERIC)},
            "defaults": {"min_count": 2},
            "batch_rows": batch_rows,
        }
    )
    before = peak()
    with tempfile.TemporaryDirectory(dir=logs.parent) as cache:
        wall, cpu = time.perf_counter(), time.process_time()
        prepared = prepare(config, Files(DataRoot((logs,)), train=str(logs)), Path(cache))
        seconds = time.perf_counter() - wall
        shards, fields = prepared.splits["train"], prepared.encoder.schema.fields
        # The smallest integer type that holds every id of a field, a float per number, and a byte for the label.
        needed = 1 + sum(4 if f.numeric else id_type(f.rows).itemsize for f in fields)
        return {
            "rows": len(shards),
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "before_mib": before,
            "peak_mib": peak(),
            "bytes_per_row": shards.size / len(shards),
            "needed_per_row": needed,
            "ids": sum(f.rows for f in fields),
        }


def main() -> None:
    """Write logs, and encode them in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--batch-rows", type=int, nargs="+", default=[131_072])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room for the logs and the encoded data")
    parser.add_argument("--encode", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode:
        print(json.dumps(encode(arguments.encode, arguments.batch_rows[0])))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for rows in arguments.rows:
            logs = Path(name) / f"logs-{rows}"
            write_logs(logs, rows)
            for batch_rows in arguments.batch_rows:
                command = [sys.executable, __file__, "--batch-rows", str(batch_rows), "--encode", str(logs)]
                results = [
                    json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                    for _ in range(arguments.repeats)
                ]
                found = {key: statistics.median(r[key] for r in results) for key in results[0]}
                print(
                    f"{rows:,} rows x {NUMERIC + CATEGORICAL} columns, batch_rows {batch_rows:,}: "
                    f"{rows / found['seconds'] * 60 / 1e6:.2f} M rows/min, {found['seconds']:.1f} s "
                    f"(CPU {found['cpu_seconds']:.1f} s), peak memory {found['peak_mib']:.0f} MiB "
                    f"({found['before_mib']:.0f} before), {found['bytes_per_row']:.0f} bytes per row "
                    f"({found['needed_per_row']:.0f} needed), {found['ids']:,} ids",
                    flush=True,
                )


if __name__ == "__main__":
    main()
