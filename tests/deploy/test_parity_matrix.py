"""Raw rows get one score from the training code, the predictor, the server, the raw graph, and both Triton layouts."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import onnxruntime
import parity
import polars as pl
import pytest
import triton_server
from serving import JSON, Server

from recsys.data.encode import Encoder
from recsys.deploy.calibration import Calibration, sigmoid
from recsys.deploy.golden import batch_of, exact_logits, logits_of
from recsys.deploy.predictor import load
from recsys.deploy.raw_graph import RawGraphs
from recsys.deploy.raw_rows import RawRows
from recsys.deploy.triton import Batching, write_triton
from recsys.nn.model import Model

ROWS = 12_000
ADMIN = {**JSON, "authorization": "Bearer a-token-for-the-owner"}

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


@functools.cache
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


class Ways:
    """Everything that scores, beside the trainer; `served` is a server whose model can be exchanged."""

    def __init__(self, folder: Path, served: Server | None = None) -> None:
        self.folder = folder
        self.served = served

    def scores(self, name: str, frame: pl.DataFrame) -> dict[str, dict[str, Any]]:
        """Way → task → probability, of a bundle in the folder."""
        predictor = load(self.folder / name)
        graphs = RawGraphs(predictor.bundle, normalized=True)
        rows = frame.to_dicts()
        tensors = RawRows(predictor.spec).tensors(rows)
        whole = onnxruntime.InferenceSession(graphs.whole(), providers=["CPUExecutionProvider"])
        raw = {"raw graph": whole.run(["probability"], tensors)[0]}
        for model_name, ensemble in ((f"{name}_one", False), (f"{name}_three", True)):
            write_triton(
                graphs, self.folder / "models", model_name, ensemble=ensemble, batching=Batching(rows=len(rows))
            )
            raw[model_name] = triton_server.Model(self.folder / "models" / model_name).run(tensors)["probability"]
        found = {way: {task: p[:, t] for t, task in enumerate(predictor.tasks)} for way, p in raw.items()}
        found["frame"] = dict(predictor.predict(frame).probability)
        found["rows"] = dict(predictor.predict(rows).probability)
        if self.served is not None:
            answers = self._over_http(name, predictor.id, rows)
            found["server"] = {task: np.array([answer[task] for answer in answers]) for task in predictor.tasks}
        return found

    def _over_http(self, name: str, bundle: str, rows: list[dict[str, Any]]) -> list[Any]:
        assert self.served is not None
        swapped = self.served.ask("POST", "/v1/swap", {"bundle": name}, ADMIN, self.served.metrics_port)
        assert swapped.status == 200, swapped.body
        found: list[Any] = []
        for first in range(0, len(rows), 1024):
            answer = self.served.score([plain(row) for row in rows[first : first + 1024]])
            assert answer.status == 200, answer.body
            assert answer.json["bundle"] == bundle
            found += answer.json["scores"]
        return found


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it."""
    return {name: None if value != value else value for name, value in row.items()}


def compare(ways: Ways, name: str, encoder: Encoder, model: Model, rows: int) -> None:
    """Every way gives the trainer's scores within 1e-6, or else is no further from the exact ones than the trainer is.

    For single precision itself does not hold the scores of some models as closely as 1e-6, in training as in a graph.
    """
    frame = logs(rows, seed=4).select(load(ways.folder / name).columns)
    (block,) = encoder.transform(frame.lazy(), labels=False)
    batch = batch_of(encoder, block)
    trainer = Calibration.none(model.schema.tasks).probabilities(logits_of(model, batch))
    exact = exact_logits(model, batch) or {}
    scores = ways.scores(name, frame)
    for task in model.schema.tasks:
        assert np.ptp(trainer[task]) > (0.02 if name in RECIPES else 1e-3)
        assert len(np.unique(trainer[task])) > (0.5 if name in RECIPES else 0.05) * rows
        for way, scored in scores.items():
            gap = np.abs(scored[task] - trainer[task]).max()
            assert gap <= 1e-6 or _as_exact(scored[task], trainer[task], exact[task]), (name, task, way, gap)


def _as_exact(scored: Any, trainer: Any, exact: Any) -> bool:
    wanted = sigmoid(exact)
    return bool(np.abs(scored - wanted).max() <= np.abs(trainer - wanted).max() < 5e-6)


@pytest.mark.parametrize("name", QUICK)
def test_every_way_to_score_gives_the_trainers_scores(tmp_path: Path, name: str) -> None:
    data, block = RECIPES[name]
    encoder, model = made.write(tmp_path / name, data, {"embedding": EMBEDDING, **block})
    compare(Ways(tmp_path), name, encoder, model, 300)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("bundles")
    made.write(folder / "first")
    (folder / "token").write_text("a-token-for-the-owner\n")
    served = Server(folder / "first", "--admin-token-file", str(folder / "token"), "--timeout", "30")
    yield Ways(folder, served)
    _, errors = served.stop()
    assert "Traceback" not in errors, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_way_to_score_gives_the_trainers_scores_for_many_rows(ways: Ways, name: str) -> None:
    data, block = RECIPES[name]
    encoder, model = made.write(ways.folder / name, data, {"embedding": EMBEDDING, **block})
    compare(ways, name, encoder, model, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.CASES)
def test_every_way_to_score_every_component(ways: Ways, case: str) -> None:
    data = parity.LISTS if case.startswith("sequence") else parity.DATA
    encoder, block = made.encoder_of(data), parity.recipe(*case.split())
    model = parity.trained(encoder, data, block)
    name = case.replace(" ", "_")
    made.write_model(ways.folder / name, encoder, model, data, block)
    compare(ways, name, encoder, model, ROWS)
