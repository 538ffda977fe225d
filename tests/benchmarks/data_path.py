"""How fast the data path is: batch supply and encoding. Run by hand: `python tests/benchmarks/data_path.py`.

Prints the median of several repeats. Batch supply counts CPU seconds of this process (one torch thread); encoding
counts wall-clock minutes and the peak memory of a fresh process.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from recsys.contracts import EncodedSchema, Field
from recsys.data.batches import TrainBatches
from recsys.data.blocks import EncodedColumns
from recsys.data.shards import Shards, write_blocks
from recsys.train.memory import keep_freed_memory

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


def main() -> None:
    """Run everything, or one encoding in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
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


if __name__ == "__main__":
    main()
