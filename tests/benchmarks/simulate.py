"""How fast simulated logs are drawn and written, and in how much memory. Run by hand:

    python tests/benchmarks/simulate.py --rows 10_000_000 --presets mnar slate-pbm --folder /scratch

For each world, in a fresh process: CPU seconds for the tables and the intercept, rows per CPU second drawn and written
to Parquet (log and truth), the peak memory of that process, imports included, and CPU minutes that 10⁸ rows would take
at this speed. `--draw` writes nothing. Set POLARS_MAX_THREADS=1 to keep other cores free.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recsys.data.simulate_presets import PRESETS, make_config
from recsys.data.simulate_world import World
from recsys.data.simulate_write import write

BLOCK = 1 << 17


def measure(preset: str, rows: int, folder: Path | None) -> dict[str, float]:
    """Draw a world's log once, in this process."""
    begin = time.process_time()
    world = World(make_config(preset, rows=rows, seed=7))
    built = time.process_time()
    if folder is None:
        for start in range(0, rows, BLOCK):
            world.rows(start, min(start + BLOCK, rows))
    else:
        write(world, folder, 0, rows)
    seconds = time.process_time() - built
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"built": built - begin, "seconds": seconds, "rows": rows, "peak": peak}


def main() -> None:
    """Measure every world in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--presets", nargs="*", default=["mnar", "slate-pbm", "delayed"], choices=PRESETS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    for preset in options.presets:
        if options.one:
            with tempfile.TemporaryDirectory(dir=options.folder) as out:
                print(json.dumps(measure(preset, options.rows, None if options.draw else Path(out))))
            return
        same = ["--rows", str(options.rows), "--folder", str(options.folder), *(["--draw"] if options.draw else [])]
        command = [sys.executable, __file__, "--one", "--presets", preset, *same]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        speed = found["rows"] / found["seconds"]
        print(
            f"{preset:14} tables {found['built']:5.1f} s  {speed:12,.0f} rows/s  peak {found['peak']:6,.0f} MiB  "
            f"10^8 rows in {1e8 / speed / 60:5.1f} CPU minutes"
        )


if __name__ == "__main__":
    main()
