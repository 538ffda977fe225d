"""A loss with weights and a state of its own, and a recipe's propensity: trained, saved, resumed, evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recsys.train.checkpoint import sha256

Command = Callable[..., str]
PLUGIN = '''
from __future__ import annotations
import os, signal
from collections.abc import Iterable, Mapping
import torch
from recsys.api import Batch, Component, EncodedSchema, hookimpl, make_weight
from torch import Tensor, nn
from torchmetrics import Metric

CALLS = []

class Own(nn.Module):
    """BCE of the logit plus a weight of the first field's value, times 1/propensity; counts its steps."""

    def __init__(
        self, tasks: tuple[str, ...], schema: EncodedSchema, *, allow_low_ess: bool = False, heavy: bool = False
    ) -> None:
        super().__init__()
        self.tasks, self.allow_low_ess, self.heavy = tasks, allow_low_ess, heavy
        self.needs = ("propensity",)
        self.shift = nn.Parameter(0.1 * torch.randn(schema.fields[0].rows))
        self.register_buffer("seen", torch.zeros(()))
        self.last = torch.zeros(2, dtype=torch.float64)

    def sums(self) -> Tensor:
        return self.last

    def facts(self, sums: Tensor) -> dict[str, float]:
        return {"rows": float(sums[0]), "inverse": float(sums[1] / sums[0])}

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if self.training:
            self.seen += 1
            CALLS.append(1)
            if os.environ.get("STOP_AT") == str(len(CALLS)):
                signal.raise_signal(signal.SIGTERM)
        theta = batch.context["propensity"].double()
        self.last = torch.stack([torch.ones_like(theta), 1 / theta]).sum(1)
        z = logits[self.tasks[0]].float() + self.shift[batch.ids[:, 0]]
        row = nn.functional.softplus(z) - batch.label[self.tasks[0]] * z
        return (row * make_weight(batch.context["propensity"], "cap", 2.0)).mean()

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        theta = batch.context["propensity"]
        raw = make_weight(theta)
        if self.heavy:
            raw = torch.where(torch.arange(len(raw), device=raw.device) == 0, 1e9, raw)
        return raw, make_weight(theta, "cap", 2.0)

class Share(nn.Module):
    """(n_v / max n)^0.5 of a field's values."""

    def __init__(self, schema: EncodedSchema, *, field: str = "item") -> None:
        super().__init__()
        self.place = [f.name for f in schema.fields].index(field)
        self.register_buffer("table", torch.zeros(schema.fields[self.place].rows))

    def fit(self, rows: Iterable[Batch]) -> None:
        for batch in rows:
            shown = batch.ids[batch.context["observed"] == 1, self.place]
            self.table += torch.bincount(shown, minlength=len(self.table))
        self.table.copy_((self.table / self.table.max()).sqrt().clamp(0.01, 1))

    def estimate(self, batch: Batch) -> Tensor:
        return self.table[batch.ids[:, self.place]]

class MeanInverse(Metric):
    """Mean of 1/propensity."""

    needs = ("propensity",)
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logit: Tensor, label: Tensor, propensity: Tensor) -> None:
        self.sum += (1 / propensity).sum()
        self.rows += len(label)

    def compute(self) -> Tensor:
        return self.sum / self.rows

@hookimpl
def recsys_components() -> list[Component]:
    return [Component("loss", "own", Own), Component("propensity", "share", Share),
            Component("metric", "mean_inverse", MeanInverse)]
'''
RECIPE = """\
data:
  source: {use: simulated, preset: mnar, rows: 4000, seed: 3, users: 60, items: 40}
  label: y
  categorical: [user, item]
  context: {observed: observed}
model: {embedding: {use: table, dim: 4}, interaction: fm}
loss: own
propensity: {use: share}
train: {epochs: 2, batch_size: 100, patience: 0, clip_norm: 5.0}
stages:
  - {use: fit}
  - {use: fit, name: again, epochs: 1}
  - {use: evaluate, metrics: [auc, mean_inverse]}
  - {use: export}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(PLUGIN)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return [tmp_path / "recipe.yaml", "--plugin", tmp_path / "own.py"]


@pytest.mark.parametrize("stop", [17, 32, 77])
def test_stopped_and_resumed_is_as_if_never_stopped(
    recsys: Command, recipe: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """In the midst of an epoch, at the end of one, and in the second stage, which goes on with the loss's state."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    recsys("train", *recipe, "--out", whole)
    monkeypatch.setenv("STOP_AT", str(stop))
    with pytest.raises(SystemExit):
        recsys("train", *recipe, "--out", run)
    assert not (run / "metrics.json").exists()
    monkeypatch.delenv("STOP_AT")
    recsys("train", "--resume", run, "--plugin", tmp_path / "own.py")
    for name in ("model.safetensors", "loss.safetensors", "history.json"):
        for stage in ("1-fit", "2-again"):
            assert sha256(run / stage / name) == sha256(whole / stage / name), (stage, name)
    assert sha256(run / "propensity.safetensors") == sha256(whole / "propensity.safetensors")
    first, second = (load_file(whole / stage / "loss.safetensors") for stage in ("1-fit", "2-again"))
    assert second["seen"] > first["seen"] > 0  # of the best epochs; the second stage has not begun again
    assert not torch.equal(first["shift"], second["shift"])
    assert set(load_file(whole / "export" / "model.safetensors")) == set(load_file(whole / "2-again/model.safetensors"))
    assert not list((whole / "export").rglob("*loss*"))
    assert not list((whole / "export").rglob("*propensity*"))


def test_the_loss_is_clipped_with_the_model_and_its_start_depends_on_the_seed_alone(
    recsys: Command, recipe: list[Any], tmp_path: Path
) -> None:
    base = [*recipe, "train.optimizer=sgd", "train.epochs=1", "stages=[{use: fit}]"]
    for name, norm, seed in (("a", 1e-9, 1), ("b", 1e-9, 1), ("c", 0.0, 1), ("d", 1e-9, 2)):
        recsys("train", *base, f"train.clip_norm={norm}", f"train.seed={seed}", "--out", tmp_path / name)
    a, b, c, d = (load_file(tmp_path / n / "1-fit" / "loss.safetensors")["shift"] for n in "abcd")
    assert torch.equal(a, b)
    assert 1e-5 < float((a - c).abs().max()) < 0.1  # without a limit the same start has moved
    assert float((a - d).abs().max()) > 0.05


def test_weights_are_recorded_and_few_effective_rows_stop_the_training(
    recsys: Command, recipe: list[Any], tmp_path: Path
) -> None:
    told = recsys("train", *recipe, "--out", tmp_path / "run")
    assert "1-fit · weights: " in told
    history = json.loads((tmp_path / "run" / "1-fit" / "history.json").read_text())["epochs"]
    table = load_file(tmp_path / "run" / "propensity.safetensors")["table"]
    assert 0.1 < history[0]["weights/ess_share"] <= 1
    assert 0 < history[0]["weights/clipped"] < 1
    assert "weights/calibration_z" in history[0]
    assert history[0]["weights/ess"] == pytest.approx(history[1]["weights/ess"])  # all rows, in another order
    assert "1-fit · loss: rows 3200.0000, inverse " in told
    assert [epoch["loss/rows"] for epoch in history] == [3200, 3200]
    assert history[1]["loss/inverse"] == pytest.approx(history[0]["loss/inverse"])
    assert history[0]["loss/inverse"] > 1
    assert float(table.min()) == pytest.approx(0.01)  # values without rows keep their place
    heavy = [*recipe, "loss.heavy=true", "train.batch_size=200"]
    with pytest.raises(SystemExit, match=r"effective rows of 3,200 .*below 0\.01.*allow_low_ess: true"):
        recsys("train", *heavy, "--out", tmp_path / "heavy")
    told = recsys("train", *heavy, "loss.allow_low_ess=true", "--out", tmp_path / "allowed")
    assert "below 0.1); expect a high variance" in told
    flat = [
        recipe[0],
        "loss={use: ips, value: 1.0}",
        "propensity={use: popularity, count: observed, relative_to: rows}",
    ]
    with pytest.raises(
        SystemExit, match=r"1-fit · epoch 1: all [\d,]+ weights, .* beyond their bound and count as 1: "
    ):
        recsys("train", *flat, *recipe[1:], "--out", tmp_path / "flat")


def test_metrics_get_the_estimate_too_and_so_does_recsys_evaluate(
    recsys: Command, recipe: list[Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = json.loads(recsys("train", *recipe, "--out", run, "--json").splitlines()[-1])["metrics"]["test"]
    again = recsys("evaluate", run, "--split", "test", "--metric", "mean_inverse", "--json", *recipe[1:])
    assert json.loads(again.splitlines()[-1])["metrics"]["test"]["mean_inverse"] == found["mean_inverse"] > 1


def test_what_is_missing_or_there_twice_is_named(recsys: Command, recipe: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"loss: 'own' needs the context column 'propensity'; .*`propensity:`"):
        recsys("train", *recipe, "propensity=null", "--out", tmp_path / "a")
    with pytest.raises(SystemExit, match=r"data\.context names the column of a propensity already, beside 'share'"):
        recsys("train", *recipe, "data.context.propensity=propensity", "--out", tmp_path / "b")
    recipe[0].write_text(RECIPE.replace("{use: share}", "{use: shar}"))
    with pytest.raises(SystemExit, match=r"recipe\.yaml:8.*unknown propensity 'shar'\. Did you mean 'share'\?"):
        recsys("train", *recipe, "--out", tmp_path / "c")


@pytest.mark.ddp
def test_two_processes_train_the_loss_as_one_does(recsys: Command, recipe: list[Any], tmp_path: Path) -> None:
    import subprocess
    import sys

    recsys("train", *recipe, "stages=[{use: fit}]", "--out", tmp_path / "one")
    command = [sys.executable, "-m", "recsys.cli", "train", *map(str, recipe), "stages=[{use: fit}]"]
    command += ["train.devices=2", "train.accelerator=cpu", "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in ("model.safetensors", "loss.safetensors"):
        one, two = (load_file(tmp_path / n / "1-fit" / name) for n in ("one", "two"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
    one, two = (json.loads((tmp_path / n / "1-fit/history.json").read_text())["epochs"][-1] for n in ("one", "two"))
    for fact in ("ess", "clipped", "max_share", "top_share", "calibration_z"):
        assert two[f"weights/{fact}"] == pytest.approx(one[f"weights/{fact}"]), fact
    for fact in ("rows", "inverse"):
        assert two[f"loss/{fact}"] == pytest.approx(one[f"loss/{fact}"]), fact
