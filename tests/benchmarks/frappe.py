"""Recipes × seeds on Frappe, beside the published numbers; finished runs in the output folder are not repeated.

    python tests/benchmarks/frappe.py --out runs/frappe --seeds 5 dcnv2 mlp fm
    python tests/benchmarks/frappe.py --out runs/frappe --seeds 1 autoint_plus

Prints mean ± standard deviation of the test metrics and the median seconds per epoch, one thread per run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PUBLISHED = {
    "fm": ".9671 / .2065 (1 run)",
    "mlp": ".98405 / .1584 (mean of 5)",
    "dcnv2": ".98382 (mean of 5)",
    "autoint": ".9831 / .1637 (1 run)",
    "autoint_plus": ".9848 / .1490 (1 run)",
}


def train(recipe: str, seed: int, out: Path) -> Path:
    run = out / f"{recipe}-{seed}"
    if (run / "metrics.json").exists():
        return run
    command = [sys.executable, "-m", "recsys.cli", "train"]
    if (run / "state.json").exists() or (run / "run.json").exists():
        command += ["--resume", str(run)]
    else:
        command += [f"frappe/{recipe}", f"train.seed={seed}", "train.threads=1", "--out", str(run)]
    with (out / f"{recipe}-{seed}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run


def summary(recipe: str, runs: list[Path]) -> str:
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    histories = [json.loads((run / "1-fit" / "history.json").read_text()) for run in runs]
    rows = 202_027
    seconds = statistics.median(rows / m["rows_per_second"] for m in metrics)
    cells = []
    for name in ("auc", "logloss"):
        values = [m["metrics"]["test"][name] for m in metrics]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        cells.append(f"{statistics.mean(values):.5f} ± {spread:.5f}")
    best = statistics.mean(h["best_epoch"] for h in histories)
    return (
        f"| {recipe} | {len(runs)} | {cells[0]} | {cells[1]} | {PUBLISHED.get(recipe, '')} | {seconds:.1f} | "
        f"{best:.1f} | {metrics[0]['parameters']:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=sorted(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=2021)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = {r: [pool.submit(train, r, seed, given.out) for seed in seeds] for r in given.recipes}
        print("| recipe | seeds | test AUC | test logloss | published | s per epoch | best epoch | parameters |")
        print("|---|---|---|---|---|---|---|---|")
        for recipe, futures in jobs.items():
            print(summary(recipe, [future.result() for future in futures]), flush=True)


if __name__ == "__main__":
    main()
