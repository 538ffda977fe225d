"""Losses that know positions, on simulated lists: whole slates in every batch, two processes, and what was learned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot

Command = Callable[..., str]
RECIPE = """\
data:
  source: {use: simulated, preset: slate-plain, rows: 6000, seed: 3, users: 60, items: 100, randomised: 0.5}
  label: y
  categorical: [item, item_0]
  context: {group: request, position: position, uniform: uniform}
model: {embedding: {use: table, dim: 4}, interaction: fm, head: {wide: true}}
loss: {use: dla, positions: 10}
train: {epochs: 2, batch_size: 100, patience: 0, learning_rate: 0.01, monitor: logloss}
stages:
  - {use: fit}
  - {use: positions}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def positions(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((run / "2-positions" / "positions.json").read_text())
    return found


@pytest.mark.parametrize("loss", ["dla", "pal"])
def test_what_was_learned_of_positions_is_told_beside_the_rate_of_clicks(
    recsys: Command, recipe: Path, tmp_path: Path, loss: str
) -> None:
    told = recsys(
        "train", recipe, f"loss.use={loss}", "propensity={use: position_em, items: [item]}", "--out", tmp_path / "run"
    )
    found = positions(tmp_path / "run")
    source = Simulated(DataRoot((), None), preset="slate-plain", rows=6000, seed=3, users=60, items=100, randomised=0.5)
    rate = source.scan("train").group_by("position").agg(pl.col("y").mean()).sort("position").collect()["y"]
    assert found["position"] == list(range(10))
    assert found["click_rate"] == pytest.approx((rate / rate[0]).to_list(), abs=1e-5)
    state = load_file(tmp_path / "run" / "1-fit" / "loss.safetensors")
    (learned,) = state.values()
    want = learned.exp() if loss == "dla" else learned.sigmoid()
    assert found["loss"] == pytest.approx([1.0, *want.tolist()], abs=1e-5)
    theta = load_file(tmp_path / "run" / "propensity.safetensors")["theta"]
    assert found["propensity"] == pytest.approx((theta / theta[0]).tolist(), abs=1e-5)
    assert found["propensity"][9] < 0.5
    assert "click rate" in told


@pytest.mark.slow
def test_the_recipe_finds_the_planted_looks(recsys: Command, tmp_path: Path) -> None:
    """By the randomised rows, and by PAL from all; the rate of clicks is too far off to be mistaken for them."""
    recsys("train", "simulated/slate_positions", "train.threads=1", "--out", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "3-positions" / "positions.json").read_text())
    look = [1 / (k + 1) for k in range(10)]
    off = {
        name: max(abs(a - b) for a, b in zip(found[name], look, strict=True)) for name in found if name != "position"
    }
    assert off["propensity"] < 0.01
    assert off["loss"] < 0.01
    assert off["click_rate"] > 0.012


def test_what_cannot_be_done_with_slates_is_named(recsys: Command, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="loss: 'dla' needs the context column 'group'"):
        recsys("train", recipe, "data.context={position: position}", "--out", tmp_path / "a")
    with pytest.raises(SystemExit, match="sampled rows belong to none"):
        recsys("train", recipe, "sampling={item: item}", "--out", tmp_path / "b")
    with pytest.raises(SystemExit, match="neither the loss nor the propensity model learns looks"):
        recsys("train", recipe, "loss=bce", "--out", tmp_path / "c")


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_compare_the_same_slates_as_one(recsys: Command, recipe: Path, tmp_path: Path) -> None:
    sgd = ["stages=[{use: fit}]", "train.optimizer=sgd", "train.learning_rate=0.5"]
    recsys("train", recipe, *sgd, "--out", tmp_path / "one")
    command: list[Any] = [sys.executable, "-m", "recsys.cli", "train", recipe, *sgd]
    command += ["train.devices=2", "train.accelerator=cpu", "--out", tmp_path / "two"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    for name in ("model.safetensors", "loss.safetensors"):
        one, two = (load_file(tmp_path / n / "1-fit" / name) for n in ("one", "two"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    assert one["scores"].abs().max() > 0.05
