"""Raw rows get one score from the training code, the predictor, the raw graph, and both layouts of Triton."""

from pathlib import Path
from typing import Any

import made
import numpy as np
import onnxruntime
import polars as pl
import pytest
import triton_server

from recsys.deploy.calibration import Calibration
from recsys.deploy.golden import training_logits
from recsys.deploy.predictor import load
from recsys.deploy.raw_graph import RawGraphs
from recsys.deploy.raw_rows import RawRows
from recsys.deploy.triton import Batching, write_triton

EMBEDDING: dict[str, Any] = {"use": "table", "dim": 8, "init_std": 0.3}
MLP: dict[str, Any] = {"use": "mlp", "hidden": [16, 8]}
WITH_LISTS: dict[str, Any] = {**made.DATA, **made.LISTS}
TWO_TASKS: dict[str, Any] = {
    **made.DATA,
    "label": {"click": "click", "buy": "buy"},
    "categorical": {"user": {"hash_buckets": 29, "null_values": [3]}, "item": {"null_values": ["i7"]}, "shop": {}},
    "numeric": {"price": {"transform": "log"}, "age": {"null_values": [-1]}},
}
# name → data, model; the first few are compared in every run of the tests
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepfm_two_tasks": (TWO_TASKS, {"interaction": ["fm", MLP], "head": {"wide": True}}),
    "din_lists": (WITH_LISTS, {"sequence": "din", "interaction": MLP}),
    "cross": (WITH_LISTS, {"interaction": ["cross", MLP]}),
}
QUICK = ("deepfm_two_tasks", "din_lists")


def logs(rows: int, seed: int) -> pl.DataFrame:
    """Raw rows: a third of the values is such that training never saw them, some are missing.

    Numbers stay within some deviations of their mean: for others float32 itself holds a logit less closely than 1e-6.
    """
    random = np.random.default_rng(seed)

    def pick(values: list[Any], strange: list[Any]) -> list[Any]:
        odd, at = random.random(rows) < 0.33, random.integers(0, len(values), rows)
        other = random.integers(0, len(strange), rows)
        return [strange[j] if o else values[i] for o, i, j in zip(odd, at, other, strict=True)]

    def lists(values: list[str], lengths: Any) -> list[list[Any]]:
        more: list[Any] = [*values, "new", "", None]
        return [[more[i] for i in random.integers(0, len(more), n)] for n in lengths]

    lengths = random.integers(0, 9, rows)
    return pl.DataFrame(
        {
            "user": pick(list(range(41)), [None, -1, 2**40, 977, -(2**62)]),
            "item": pick([f"i{n}" for n in range(30)], [None, "", "i99", "é"]),
            "shop": pick([f"s{n}" for n in range(9)], [None, "s99", "\U0001f600", "x" * 300]),
            "city": pick(["Köln", "paris ", "Paris", "東京", ""], [None, "K\u0308", "LYON", "\tkoeln"]),
            "price": pick([float(n) for n in range(17)], [None, float("nan"), -5.5, 30.0, 0.25]),
            "age": pick([float(n) for n in range(60)], [None, -1.0, 90.0, 29.5]),
            "tags": lists([f"t{n}" for n in range(5)], random.integers(0, 7, rows)),
            "past": lists([f"i{n}" for n in range(30)], lengths),
            "past_shop": lists([f"s{n}" for n in range(9)], lengths),
        },
        schema_overrides={"user": pl.Int64, "price": pl.Float64, "age": pl.Float64},
        strict=False,
    )


def compare(folder: Path, name: str, rows: int) -> None:
    data, model = RECIPES[name]
    model = {"embedding": EMBEDDING, **model}
    encoder, trained = made.write(folder / "bundle", data, model)
    predictor = load(folder / "bundle")
    graphs = RawGraphs(predictor.bundle, normalized=True)
    whole = onnxruntime.InferenceSession(graphs.whole(), providers=["CPUExecutionProvider"])
    for ensemble, model_name in ((False, "one"), (True, "three")):
        write_triton(graphs, folder / "models", model_name, ensemble=ensemble, batching=Batching(rows=rows))
    frame = logs(rows, seed=4).select(predictor.columns)
    wanted = training_logits(encoder, trained, frame)
    tensors = RawRows(predictor.spec).tensors(frame.to_dicts())
    scores = predictor.predict(frame)
    found: dict[str, dict[str, Any]] = {"predictor": dict(scores.probability)}
    raw = whole.run(["probability"], tensors)[0]
    found["raw graph"] = {task: raw[:, t] for t, task in enumerate(predictor.tasks)}
    for model_name in ("one", "three"):
        served = triton_server.Model(folder / "models" / model_name).run(tensors)["probability"]
        found[model_name] = {task: served[:, t] for t, task in enumerate(predictor.tasks)}
    trainer = Calibration.none(predictor.tasks).probabilities(wanted)
    for task in predictor.tasks:
        assert np.ptp(trainer[task]) > 0.02
        assert len(np.unique(trainer[task])) > 0.5 * rows
        for way, scored in found.items():
            gap = np.abs(scored[task] - trainer[task]).max()
            assert gap <= 1e-6, (name, task, way, gap)


@pytest.mark.parametrize("name", QUICK)
def test_every_way_to_score_gives_the_trainers_scores(tmp_path: Path, name: str) -> None:
    compare(tmp_path, name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_way_to_score_gives_the_trainers_scores_for_many_rows(tmp_path: Path, name: str) -> None:
    compare(tmp_path, name, 12_000)
