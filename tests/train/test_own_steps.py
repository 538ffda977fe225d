"""Embeddings that decide and that change themselves: asked once per optimizer step, and by the stage prune."""

from __future__ import annotations

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
from torch import Tensor, nn
from recsys.api import Component, Selection, Table, hookimpl

LOG = []

class Gated(Table):
    """A table times one number, which it moves itself; rows below 5 are kept, and every second number of a row."""

    def __init__(self, schema, *, dim: int = 8, rate: float = 0.1, poison: int = 0) -> None:
        super().__init__(schema, dim=dim, init_std=0.1)
        self.rate, self.poison = rate, poison
        self.gate = nn.Parameter(torch.ones(()))
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        e = super().forward(ids, values) * self.gate * self.slope
        if self.training:
            LOG.append("forward")
            e = e * float("nan") if self.poison == LOG.count("forward") else e
        return e

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.gate,)

    def after_step(self) -> None:
        LOG.append(None if self.gate.grad is None else float(self.gate.grad))
        with torch.no_grad():
            if self.gate.grad is not None:
                self.gate -= self.rate * self.gate.grad

    def architecture(self) -> tuple[nn.Parameter, ...]:
        return (self.slope,)

    def search_step(self, rate: float) -> None:
        pass

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        return super().read(vocabulary, rows) * (self.gate * self.slope).detach()

    def kept(self) -> Selection:
        every_second = torch.arange(self.fields.dim) % 2 == 0
        rows = {c.name: torch.arange(c.rows) < 5 for c in self.layout.columns}
        return Selection(self.fields.names, elements={n: r.unsqueeze(1) & every_second for n, r in rows.items()})

@hookimpl
def recsys_components():
    return [Component("embedding", "gated", Gated)]
'''

BASE = ("data.source.rows=4000", "train.batch_size=512", "train.epochs=1", "train.patience=0", "train.clip_norm=0")


def start(tmp_path: Path, *changes: str) -> tuple[Any, Any, Any, list[Any]]:
    """Return run, recipe and registry, and the log of the plugin."""
    path = tmp_path / "gated_plugin.py"
    path.write_text(PLUGIN)
    registry = load_registry(files=[path])
    given = [*BASE, "model.embedding=gated", "model.interaction=fm", "stages=[{use: fit}, {use: prune}]", *changes]
    recipe = load_recipe(find_recipe("quickstart"), registry, given)
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build() -> Run:
        console = Console(file=(tmp_path / "log.txt").open("w"))
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    log = sys.modules[registry.get("embedding", "gated").component.factory.__module__].LOG
    return build, recipe, registry, log


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_moves_once_per_optimizer_step_by_the_gradient_of_the_whole_step(tmp_path: Path, accumulate: int) -> None:
    build, recipe, registry, log = start(tmp_path, f"train.accumulate={accumulate}")
    run = build()
    run_stages(run, recipe, registry)
    assert [x if x == "forward" else "step" for x in log] == (["forward"] * accumulate + ["step"]) * 7  # 3,200 rows
    moved = [x for x in log if x != "forward"]
    trained = load_file(tmp_path / "run" / "1-fit" / "model.safetensors")
    assert trained["embedding.gate"].item() == pytest.approx(1 - 0.1 * sum(moved), rel=1e-5)
    assert all(x for x in moved)
    assert trained["embedding.slope"].item() == 1.0, "what a search learns is left alone by a fit stage"


def test_micro_batches_give_the_gradient_of_the_step(tmp_path: Path) -> None:
    logs = []
    for accumulate in (1, 2):
        (tmp_path / str(accumulate)).mkdir()
        build, recipe, registry, log = start(tmp_path / str(accumulate), f"train.accumulate={accumulate}")
        run_stages(build(), recipe, registry)
        logs.append([x for x in log if x != "forward"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_in_a_step_that_is_skipped_it_has_no_gradient(tmp_path: Path) -> None:
    changes = ("model.embedding.poison=3", "train.non_finite=skip")
    for optimizer in ("adam", "sgd", "adagrad"):
        (tmp_path / optimizer).mkdir()
        build, recipe, registry, log = start(tmp_path / optimizer, *changes, f"train.optimizer={optimizer}")
        run = build()
        run_stages(run, recipe, registry)
        moved = [x for x in log if x != "forward"]
        assert not moved[2]
        assert all(x for i, x in enumerate(moved) if i != 2)


def test_prune_does_what_the_embedding_decides_and_the_run_comes_back(tmp_path: Path) -> None:
    build, recipe, registry, _ = start(tmp_path)
    run = build()
    run_stages(run, recipe, registry)
    whole = build()
    whole.model.load_state_dict(load_file(tmp_path / "run" / "1-fit" / "model.safetensors"))
    ids = torch.arange(12).unsqueeze(1).expand(-1, len(run.schema.fields)).contiguous()
    values = torch.ones(ids.shape) if run.schema.has_numeric else None
    want = whole.model.eval().embedding(ids, values)
    sizes = torch.tensor([f.rows for f in run.schema.fields])
    fallback = torch.tensor([0 if f.numeric else 1 for f in run.schema.fields])
    read = torch.where(ids < sizes, ids, fallback)
    keep = (read < 5).unsqueeze(-1) & (torch.arange(want.shape[2]) % 2 == 0)
    got = run.model.eval().embedding(ids, values)
    torch.testing.assert_close(got, want * keep, rtol=1e-6, atol=1e-9)
    again = build()
    again.restore()
    assert torch.equal(again.model.eval().embedding(ids, values), got)
    assert run.model.bytes() < whole.model.bytes() / 3
