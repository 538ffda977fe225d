"""What a generation of the stage `evolve` costs, in validation passes of the same model: medians, CPU time.

    OMP_NUM_THREADS=1 python tests/benchmarks/evolve.py [--rows 300000] [--repeats 5]

Nothing here asserts a time; figures depend on the machine, ratios much less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.train.distributed import World
from recsys.train.run import Run
from recsys.train.score import measure, predict
from recsys_evolve import Scorer

INTERACTIONS = {
    "mlp 64-32": "{use: mlp, hidden: [64, 32]}",
    "mlp 400-400-400": "{use: mlp, hidden: [400, 400, 400]}",
    "cross 4 + mlp 400-400-400": "[{use: cross, layers: 4}, {use: mlp, hidden: [400, 400, 400]}]",
}


def build(rows: int, interaction: str, folder: Path) -> Run:
    registry = load_registry()
    changes = [f"data.source.rows={rows}", "model.embedding={use: optembed, dim: 16}", "train.monitor=auc"]
    recipe = load_recipe(find_recipe("quickstart"), registry, [*changes, f"model.interaction={interaction}"])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), folder / "cache")
    console = Console(quiet=True)
    return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)


def medians(tasks: list[Callable[[], object]], repeats: int) -> list[float]:
    """Of the tasks in turn, so that whatever else the machine does falls on all of them."""
    taken: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats + 1):
        for task, times in zip(tasks, taken, strict=True):
            start = time.process_time()
            task()
            times.append(time.process_time() - start)
    return [statistics.median(times[1:]) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.05, help="of the validation rows, for `rows` of the stage")
    arguments = parser.parse_args()
    print(f"{'interaction':28}{'one pass':>10}{'20 candidates':>15}{'in passes':>11}{'on some rows':>14}")
    for name, interaction in INTERACTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = build(arguments.rows, interaction, Path(folder))
            draw = random.Random(0)
            candidates = [tuple(draw.randint(1, 16) for _ in run.schema.fields) for _ in range(20)]
            valid, size, metric = run.split("valid"), run.train.eval_batch_size, run.metric("auc")

            def one_pass() -> object:
                found = predict(run.model, valid, size, World(), torch.device("cpu"))  # noqa: B023
                return measure(found, {"auc": metric})  # noqa: B023

            scorer, some = Scorer(run, 0), Scorer(run, 0, int(arguments.share * len(valid)))
            tasks = [one_pass, lambda: scorer(candidates), lambda: some(candidates)]  # noqa: B023
            one, whole, part = medians(tasks, arguments.repeats)
        print(f"{name:28}{one * 1e3:>7.0f} ms{whole * 1e3:>12.0f} ms{whole / one:>11.1f}{part / one:>14.2f}")


if __name__ == "__main__":
    main()
