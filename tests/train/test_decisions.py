"""What an embedding has decided outlives reset and rewind; a fit stage with a target ends there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train.distributed import World
from recsys.train.run import Run

PLUGIN = '''
from __future__ import annotations
import torch
from torch import Tensor
from recsys.api import Component, Selection, Table, hookimpl

ASKED = []

class Signs(Table):
    """Rows whose first number is positive stay; the target is reached after some epochs."""

    def __init__(self, schema, *, after: int = 0) -> None:
        super().__init__(schema, dim=4, init_std=0.1)
        self.after = after
        self.register_buffer("stay", torch.ones(len(self.weight), dtype=torch.bool))

    def decision(self) -> dict[str, Tensor]:
        return {"stay": self.weight.detach()[:, 0] > 0}

    def kept(self) -> Selection:
        parts = torch.split(self.stay, list(self.layout.rows))
        return Selection(self.fields.names, {c.name: parts[c.vocabulary] for c in self.layout.columns})

    def reached(self) -> bool | None:
        ASKED.append(1)
        return len(ASKED) >= self.after if self.after else None

@hookimpl
def recsys_components():
    return [Component("embedding", "signs", Signs)]
'''

BASE = (
    "data.source.rows=4000",
    "train.batch_size=512",
    "train.epochs=2",
    "train.learning_rate=1e-2",
    "model.embedding=signs",
    "model.interaction=fm",
)


def start(tmp_path: Path, stages: str, *changes: str) -> tuple[Any, Any, Any, list[int]]:
    """Return what builds the run, recipe and registry, and the plugin's list of questions."""
    path = tmp_path / "signs_plugin.py"
    path.write_text(PLUGIN)
    registry = load_registry(files=[path])
    recipe = load_recipe(find_recipe("quickstart"), registry, [*BASE, f"stages={stages}", *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build() -> Run:
        console = Console(file=(tmp_path / "log.txt").open("w"))
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    asked = sys.modules[registry.get("embedding", "signs").component.factory.__module__].ASKED
    return build, recipe, registry, asked


@pytest.mark.parametrize("back", ["{use: reset}", "{use: reset, reseed: true}", "{use: rewind, to: fit}"])
def test_the_decision_of_the_trained_table_outlives_its_weights(tmp_path: Path, back: str) -> None:
    build, recipe, registry, _ = start(tmp_path, f"[{{use: fit, snapshot_epoch: 0}}, {back}, {{use: prune}}]")
    run = build()
    first = run.model.embedding.weight.detach().clone()
    run_stages(run, recipe, registry)
    trained = load_file(tmp_path / "run" / "1-fit" / "model.safetensors")["embedding.weight"]
    stay = trained[:, 0] > 0
    assert not torch.equal(stay, first[:, 0] > 0), "training has changed the decision"
    again = next(p for p in (tmp_path / "run").iterdir() if p.name.startswith("2-"))
    reset = load_file(again / "model.safetensors")
    assert torch.equal(reset["embedding.stay"], stay)
    assert torch.equal(reset["embedding.weight"], first) == ("reseed" not in back)
    assert run.model.embedding.flat.numel() == 4 * (1 + int(stay.sum()))


def epochs(tmp_path: Path) -> tuple[int, int]:
    """Number of epochs, and the best of them."""
    history = json.loads((tmp_path / "run" / "1-fit" / "history.json").read_text())
    return len(history["epochs"]), history["best_epoch"]


def test_a_stage_ends_when_the_target_is_reached_and_keeps_that_epoch(tmp_path: Path) -> None:
    changes = ("train.epochs=9", "train.patience=1", "train.min_delta=1", "model.embedding.after=4")
    build, recipe, registry, asked = start(tmp_path, "[{use: fit}]", *changes)
    run = build()
    run_stages(run, recipe, registry)
    assert epochs(tmp_path) == (4, 4)
    assert len(asked) == 4
    kept = load_file(tmp_path / "run" / "1-fit" / "model.safetensors")
    assert torch.equal(kept["embedding.weight"], run.model.embedding.weight)


def test_a_target_out_of_reach_leaves_the_last_epoch_and_without_one_patience_decides(tmp_path: Path) -> None:
    for after, wanted in ((9, (3, 3)), (0, (2, 1))):
        folder = tmp_path / str(after)
        folder.mkdir()
        changes = ("train.epochs=3", "train.patience=1", "train.min_delta=1", f"model.embedding.after={after}")
        build, recipe, registry, _ = start(folder, "[{use: fit}]", *changes)
        run_stages(build(), recipe, registry)
        assert epochs(folder) == wanted
