"""How fast the data path is: batch supply and encoding. Run by hand: `python tests/benchmarks/data_path.py`.

Prints the median of several repeats. Batch supply counts CPU seconds of this process (one torch thread); encoding
counts wall-clock minutes and the peak memory of a fresh process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from recsys.contracts import EncodedSchema, Field
from recsys.data.batches import TrainBatches
from recsys.data.blocks import EncodedColumns
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.shards import Shards, write_blocks, write_shards

NUMERIC, CATEGORICAL = 13, 26
SUPPLY_ROWS = 202_027


def supply(folder: Path, columns: int, batch_size: int, repeats: int, in_memory: bool) -> list[float]:
    """Return rows per CPU-second of every repeat, shuffled."""
    rng = np.random.default_rng(0)
    sizes = (60_000, 4_000, 200, 30_000, 10)
    fields = tuple(Field(f"c{i}", sizes[i % len(sizes)]) for i in range(columns))
    ids = {f.name: rng.integers(0, f.rows, SUPPLY_ROWS) for f in fields}
    block = EncodedColumns(SUPPLY_ROWS, ids, {}, {}, {"label": rng.integers(0, 2, SUPPLY_ROWS).astype(np.uint8)}, {})
    target = folder / f"supply-{columns}-{in_memory}"
    write_blocks(EncodedSchema(fields), [block], target)
    batches = TrainBatches(Shards.open(target, in_memory=in_memory), batch_size, seed=0)
    speeds = []
    for repeat in range(repeats + 1):
        start = time.process_time()
        rows = sum(len(batch) for batch in batches.epoch(repeat))
        speeds.append(rows / (time.process_time() - start))
    return speeds[1:]  # the first one warms up


def write_logs(path: Path, rows: int) -> None:
    """Write synthetic logs of 13 numeric and 26 categorical columns (half of them text), with some nulls."""
    rng = np.random.default_rng(0)
    null = pl.Series(rng.random(rows) < 0.1)
    frame: dict[str, pl.Series] = {"label": pl.Series(rng.integers(0, 2, rows).astype(np.uint8))}
    for i in range(NUMERIC):
        frame[f"I{i}"] = pl.Series(rng.lognormal(2, 2, rows))
    for i in range(CATEGORICAL):
        values = pl.Series(rng.zipf(1.2, rows) % 10 ** (2 + i % 5))
        frame[f"C{i}"] = (values * 2_654_435_761 % 4_294_967_296).cast(pl.String) if i % 2 else values
    data = pl.DataFrame(frame).with_columns(pl.when(~null).then(pl.exclude("label")).name.keep())
    data.write_parquet(path, row_group_size=131_072)


def encode(path: Path, folder: Path, batch_rows: int) -> dict[str, float]:
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
    start, cpu = time.perf_counter(), time.process_time()
    logs = pl.scan_parquet(path)
    encoder = Encoder.fit(logs, config)
    fitted = time.perf_counter()
    rows = len(write_shards(encoder, logs, folder))
    done = time.perf_counter()
    return {
        "rows": rows,
        "seconds": done - start,
        "fit_seconds": fitted - start,
        "cpu_seconds": time.process_time() - cpu,
        "rows_per_minute": rows / (done - start) * 60,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "vocabulary": sum(f.rows for f in encoder.schema.fields),
    }


def main() -> None:
    """Run everything, or one encoding in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="rows to encode; several to compare")
    parser.add_argument("--batch-rows", type=int, default=131_072)
    parser.add_argument("--encode", nargs=2, metavar=("LOGS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.encode:
        print(json.dumps(encode(Path(arguments.encode[0]), Path(arguments.encode[1]), arguments.batch_rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for columns in (10, 39):
            for in_memory in (True, False):
                speeds = supply(folder, columns, arguments.batch_size, arguments.repeats, in_memory)
                where = "in memory" if in_memory else "memory-mapped"
                print(
                    f"batch supply, {columns} columns, {where}: "
                    f"median {statistics.median(speeds) / 1e6:.2f} M rows/CPU-s "
                    f"({min(speeds) / 1e6:.2f} to {max(speeds) / 1e6:.2f}, {arguments.repeats} repeats)"
                )
        for rows in arguments.rows:
            logs = folder / f"logs-{rows}.parquet"
            write_logs(logs, rows)
            results = []
            for repeat in range(max(arguments.repeats, 3)):
                command = [sys.executable, __file__, "--batch-rows", str(arguments.batch_rows)]
                command += ["--encode", str(logs), str(folder / f"encoded-{rows}-{repeat}")]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            median = {key: statistics.median(r[key] for r in results) for key in results[0]}
            print(
                f"encoding, {rows:,} rows x {NUMERIC + CATEGORICAL} columns, batch_rows {arguments.batch_rows:,}: "
                f"median {median['rows_per_minute'] / 1e6:.2f} M rows/min, {median['seconds']:.1f} s "
                f"(fit {median['fit_seconds']:.1f} s, CPU {median['cpu_seconds']:.1f} s), "
                f"peak memory {median['peak_mib']:.0f} MiB, {median['vocabulary']:,} ids"
            )


if __name__ == "__main__":
    main()
