"""Speed of a bundle, on one thread: graph beside eager, raw row to score, cold start, and what pruning saves.

    OMP_NUM_THREADS=1 python tests/benchmarks/serve.py

39 fields, a table of 1,000,000 × 16, one attention layer and a perceptron. Prints medians, and ratios of figures that
were taken in turn in the same run; only ratios mean something on a machine that others use too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys.contracts import Batch, Selection
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.deploy.golden import batch_of
from recsys.deploy.predictor import Predictor, load
from recsys.deploy.write import Facts, write_bundle
from recsys.nn.model import Model
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_model
from recsys.recipe.check import check_document
from recsys.recipe.reader import Document

NUMBERS, CATEGORIES = 13, 26


def logs(values: int) -> pl.DataFrame:
    """Rows in which every field has so many values."""
    random = np.random.default_rng(1)
    columns: dict[str, Any] = {f"c{i}": random.permutation(values) * (i + 3) for i in range(CATEGORIES)}
    columns |= {f"n{i}": random.exponential(3.0, values) for i in range(NUMBERS)}
    columns["y"] = np.arange(values) % 2
    return pl.DataFrame(columns)


def made(values: int, dim: int) -> tuple[Encoder, Model, pl.DataFrame, dict[str, Any]]:
    """An encoder and a model that was not trained."""
    data = {
        "source": {"use": "files", "path": "none.parquet"},
        "label": "y",
        "categorical": [f"c{i}" for i in range(CATEGORIES)],
        "numeric": {f"n{i}": {"transform": "log"} for i in range(NUMBERS)},
    }
    block = {
        "embedding": {"use": "table", "dim": dim, "init_std": 0.1},
        "interaction": [{"use": "autoint", "layers": 1, "heads": 2}, {"use": "mlp", "hidden": [256, 128]}],
    }
    frame = logs(values)
    encoder = Encoder.fit(frame.lazy(), DataConfig.model_validate(data))
    registry = load_registry(environ={})
    recipe = check_document(Document({"data": data, "model": block}, {(): "bench"}), registry, "bench", Path())
    return encoder, build_model(recipe, registry, encoder.schema, 1).eval(), frame, {"data": data, "model": block}


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of this thread's processor that each call takes, in turn: others on the machine count little."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            found[name].append(time.thread_time() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cold_start(folder: Path, repeats: int) -> tuple[float, float]:
    """Median processor seconds of `load` in a fresh process: with the golden check, imports apart; and of all of it."""
    code = (
        "import time, onnxruntime, numpy\nfrom recsys.deploy.predictor import load\nstart = time.process_time()\n"
        f"load({str(folder)!r})\nprint(time.process_time() - start, time.process_time())"
    )
    loads, wholes = [], []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        load_time, process = map(float, done.stdout.split())
        loads.append(load_time)
        wholes.append(process)
    return statistics.median(loads), statistics.median(wholes)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table")
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder, model, frame, recipe = made(options.rows // CATEGORIES, 16)
    (block,) = encoder.transform(frame.head(65_536).lazy(), labels=False)
    sample = batch_of(encoder, block)
    place = Path(tempfile.mkdtemp())
    try:
        whole = write(place / "whole", encoder, model, sample, recipe)
        speeds(whole, model, sample, frame, options.rounds)
        starts(whole)
        shrunk(place, whole, encoder, model, sample, recipe, frame, options.rounds)
    finally:
        shutil.rmtree(place)


def write(folder: Path, encoder: Encoder, model: Model, sample: Batch, recipe: dict[str, Any]) -> Path:
    """Write a bundle."""
    folder.mkdir()
    start = time.perf_counter()
    write_bundle(folder, encoder, model, sample, Facts(recipe, {}, {}, ""))
    print(f"{folder.name}: {size(folder):,} bytes, written in {time.perf_counter() - start:.1f} s")
    return folder


def speeds(folder: Path, model: Model, sample: Batch, frame: pl.DataFrame, rounds: int) -> None:
    """Graph beside eager, and raw rows to scores."""
    predictor = load(folder)
    rows = frame.drop("y").head(512).to_dicts()
    for count, bar in ((1, 0.35), (512, 0.7)):
        ids, values = sample.ids[:count].contiguous(), sample.values[:count].contiguous()  # type: ignore[index]
        encoded = predictor.encoder.rows(rows[:count])
        feeds = predictor.feeds(encoded)

        def eager(ids: torch.Tensor = ids, values: torch.Tensor = values) -> None:
            with torch.inference_mode():
                model.logits(ids, values)

        taken = in_turn(
            {
                "eager": eager,
                "graph": lambda feeds=feeds, count=count: predictor._run(feeds, count),
            },
            rounds if count == 1 else max(rounds // 10, 10),
        )
        ratio = taken["graph"] / taken["eager"]
        print(f"batch {count}: " + ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in taken.items()))
        print(f"  graph / eager {ratio:.2f} (bar {bar})")
        encode, whole = raw_to_score(predictor, rows, count, rounds)
        print(
            f"  raw rows to scores: {1e3 * whole:.3f} ms, of it {1e3 * encode:.3f} ms encoding ({encode / whole:.0%})"
        )
        print(f"  {count / whole:,.0f} rows/s from raw rows")


def raw_to_score(predictor: Predictor, rows: list[dict[str, Any]], count: int, rounds: int) -> tuple[float, float]:
    """Median seconds of encoding, and of encoding and scoring, of one call after another, each with other rows."""
    parts, wholes = [], []
    for n in range(max(10 * rounds // count, 20)):
        at = n * count % len(rows)
        start = time.thread_time()
        encoded = predictor.encoder.rows(rows[at : at + count])
        between = time.thread_time()
        predictor.score(encoded)
        wholes.append(time.thread_time() - start)
        parts.append(between - start)
    return statistics.median(parts), statistics.median(wholes)


def starts(folder: Path) -> None:
    """From files to a predictor that has proven itself."""
    load_time, process = cold_start(folder, 3)
    print(f"cold start: load with golden rows {load_time:.2f} s (bar 1.5), the whole process {process:.2f} s")


def shrunk(
    place: Path,
    whole: Path,
    encoder: Encoder,
    model: Model,
    sample: Batch,
    recipe: dict[str, Any],
    frame: pl.DataFrame,
    rounds: int,
) -> None:
    """A quarter of the rows of every vocabulary, renumbered so that those kept are the first, as `export` does."""
    quarter = {f.name: torch.arange(f.rows) < f.rows // 4 for f in model.schema.fields if not f.numeric}
    small = model.prune(Selection(model.embedding.fields.names, quarter))
    folder = write(place / "pruned", encoder, small, sample, recipe)
    print(f"  pruned to 25 %: {size(folder) / size(whole):.1%} of the bytes (bar 30 %)")
    rows = frame.drop("y").head(512).to_dicts()
    predictors = {"whole": load(whole), "pruned": load(folder)}
    for count in (1, 512):
        calls = {n: lambda p=p, count=count: p.predict(rows[:count]) for n, p in predictors.items()}
        taken = in_turn(calls, rounds if count == 1 else max(rounds // 10, 10))
        print(f"  batch {count}: pruned / whole {taken['pruned'] / taken['whole']:.2f} of the time")


if __name__ == "__main__":
    main()
