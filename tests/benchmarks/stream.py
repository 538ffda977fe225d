"""How fast rows stream from disk in random order, and in how much memory. Run by hand:

    python tests/benchmarks/stream.py --gib 8 --folder /scratch

Writes an encoded split of so many GiB with random ids under the folder, removes it from the page cache, and goes
through one shuffled epoch in a fresh process: rows per second, CPU seconds and the peak memory of that process, the
imports and all file pages included. Then the same with the files in the page cache, and an evaluation pass.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from recsys.contracts import EncodedSchema, Field, History
from recsys.data.batches import EvalBatches, TrainBatches
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.layout import Layout
from recsys.data.shards import Shards, write_blocks

SIZES = (60_000, 4_000, 200, 30_000, 10)
BLOCK = 1 << 18
EVENTS = 20


def schema_of(columns: int, histories: bool) -> EncodedSchema:
    """Return fields of the sizes of `data_path.py`, and perhaps one history of lists of up to 20 events."""
    fields = tuple(Field(f"c{i}", SIZES[i % len(SIZES)]) for i in range(columns))
    past = (History("past", (Field("past_item", SIZES[0]),), EVENTS, ("c0",)),) if histories else ()
    return EncodedSchema(fields, past)


def blocks(schema: EncodedSchema, rows: int) -> Iterator[EncodedColumns]:
    """Yield random rows; the columns of a block are slices of one random array, so that writing does not take ages."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**32, 2 * BLOCK, np.uint32)
    for low in range(0, rows, BLOCK):
        count = min(BLOCK, rows - low)
        starts = iter(rng.integers(0, BLOCK, 3 * len(schema.fields)).tolist())
        ids = {f.name: pool[(at := next(starts)) : at + count] % np.uint32(f.rows) for f in schema.fields}
        label = (pool[(at := next(starts)) : at + count] & 1).astype(np.uint8)
        history = {}
        for h in schema.histories:
            length = (pool[(at := next(starts)) : at + count] % EVENTS).astype(np.int64)
            events = np.resize(pool, int(length.sum()))[:, None] % np.uint32(h.columns[0].rows)
            history[h.name] = Ragged(events.astype(np.int64), length)
        yield EncodedColumns(count, ids, {}, history, {"label": label}, {})


def forget(folder: Path) -> None:
    """Remove the files from the page cache, where the system has a way to ask for it."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(what: str) -> float:
    """Return MiB of this process, from /proc: `VmHWM`, the peak, or `VmRSS`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{what}:"))


def stream(folder: Path, how: str, batch_size: int, shuffle_memory: float) -> dict[str, float]:
    """Go through all rows once, in this process."""
    shards, before = Shards.open(folder), memory("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    if how == "shuffled":
        batches = TrainBatches(shards, batch_size, seed=0, shuffle_memory=shuffle_memory).epoch(0)
    else:
        batches = (batch for _, batch in EvalBatches(shards, 16_384))
    rows = sum(len(batch) for batch in batches)
    seconds = time.perf_counter() - start
    assert rows == len(shards)
    return {
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "cpu_seconds": time.process_time() - cpu,
        "imports_mib": before,
        "peak_mib": memory("VmHWM"),
    }


def main() -> None:
    """Run everything, or one pass in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's temporary folder")
    parser.add_argument("--columns", type=int, nargs="+", default=[10, 39])
    parser.add_argument("--histories", action="store_true", help="add lists of events")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--shuffle-memory", type=float, default=512, help="MiB")
    parser.add_argument("--pass", dest="one", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        folder, how = arguments.one
        print(json.dumps(stream(Path(folder), how, arguments.batch_size, arguments.shuffle_memory)))
        return
    for columns in arguments.columns:
        schema = schema_of(columns, arguments.histories)
        row = Layout.of(schema).size + (8 + (EVENTS - 1) / 2 * 2 if arguments.histories else 0)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name) / "split"
            start = time.perf_counter()
            shards = write_blocks(schema, blocks(schema, int(arguments.gib * 2**30 / row) + 1), folder)
            print(
                f"{columns} columns: {len(shards):,} rows, {shards.size / 2**30:.2f} GiB, "
                f"written in {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            for how, cached in (("shuffled", False), ("shuffled", True), ("in order", False), ("in order", True)):
                if not cached:
                    forget(folder)
                command = [sys.executable, __file__, "--batch-size", str(arguments.batch_size)]
                command += ["--shuffle-memory", str(arguments.shuffle_memory), "--pass", str(folder), how]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                print(
                    f"  {how}, {'from the page cache' if cached else 'from disk'}: "
                    f"{found['rows_per_second'] / 1e6:.2f} M rows/s, {found['seconds']:.1f} s, "
                    f"CPU {found['cpu_seconds']:.1f} s, peak memory {found['peak_mib']:.0f} MiB "
                    f"({found['imports_mib']:.0f} MiB of it before the first row)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
