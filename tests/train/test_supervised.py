"""Parts that the labels teach: their loss is asked for once in each training step, and never outside training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recsys.contracts import Batch
from recsys.data.batches import TrainBatches
from recsys.data.prepare import prepare
from recsys.errors import NonFiniteError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train.distributed import World
from recsys.train.guard import StepGuard
from recsys.train.task import Task

PLUGIN = '''
from __future__ import annotations
import torch
from torch import Tensor, nn
from recsys.api import Batch, Component, Fields, hookimpl, label_bce

CALLS = []
SCALE = [1.0]

class Taught(nn.Module):
    """Gives the first field's vector; a linear layer on all fields learns the label beside it."""

    is_logit = False

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.width = fields.dim
        self.judge = nn.Linear(len(fields) * fields.dim, 1)
        self.logit = None

    def forward(self, e: Tensor) -> Tensor:
        self.logit = self.judge(e.flatten(1)).squeeze(1) if self.training else None
        return e[:, 0]

    def auxiliary(self, batch: Batch) -> Tensor:
        CALLS.append(len(batch))
        assert self.training and self.logit is not None
        return SCALE[0] * label_bce(self.logit, batch)

    def explain(self, e: Tensor) -> dict[str, Tensor]:
        return {}

@hookimpl
def recsys_components():
    return [Component("interaction", "taught", Taught)]
'''

BASE = ("data.source.rows=4000", "train.batch_size=512", "train.epochs=1", "train.patience=0", "train.optimizer=sgd")
STAGES = "stages=[{use: fit}, {use: prune}, {use: evaluate, metrics: [auc]}, {use: export}]"


def start(tmp_path: Path) -> tuple[Any, Any, Any, Any]:
    """Return run, recipe and registry, and the module of the plugin."""
    path = tmp_path / "taught_plugin.py"
    path.write_text(PLUGIN)
    registry = load_registry(files=[path])
    recipe = load_recipe(find_recipe("quickstart"), registry, [*BASE, "model.interaction=taught", STAGES])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")
    console = Console(file=(tmp_path / "log.txt").open("w"))
    folder = tmp_path / "run"
    run = build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)
    return run, recipe, registry, sys.modules[registry.get("interaction", "taught").component.factory.__module__]


def test_it_is_asked_for_in_each_training_step_and_nowhere_else(tmp_path: Path) -> None:
    run, recipe, registry, plugin = start(tmp_path)
    before = run.model.interactions[0].judge.weight.detach().clone()
    run_stages(run, recipe, registry)
    assert plugin.CALLS == [512] * 6 + [128]  # 3,200 training rows, one epoch
    assert not torch.equal(run.model.interactions[0].judge.weight, before)


def test_a_loss_that_is_not_finite_is_found_in_it(tmp_path: Path) -> None:
    run, recipe, registry, plugin = start(tmp_path)
    plugin.SCALE[0] = float("nan")
    with pytest.raises(NonFiniteError):
        run_stages(run, recipe, registry)
    told = json.loads((run.folder / "1-fit" / "non_finite.json").read_text())
    (part,) = told["ranks"]
    assert part["losses"] == ["nan"]
    assert "interactions.0.judge.weight" in json.dumps(part)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_of_a_step_is_the_mean_over_its_rows_however_it_is_divided(tmp_path: Path, accumulate: int) -> None:
    run, _, _, _ = start(tmp_path)
    model = run.model.train()
    task = Task(model, run.loss, lambda model: torch.optim.SGD(model.parameters()), guard(), total_steps=1)
    whole = next(iter(TrainBatches(run.split("train"), 500, 0).epoch(0)))
    parts = list(TrainBatches(run.split("train"), 500, 0, accumulate=accumulate).epoch(0))[:accumulate]
    assert sum(len(part) for part in parts) == len(whole)
    got = sum((task.training_step(part, i) for i, part in enumerate(parts)), torch.zeros(()))
    got = got / accumulate  # as Lightning does
    wanted = by_hand(model, whole)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    ours = torch.autograd.grad(got, list(model.parameters()))
    theirs = torch.autograd.grad(wanted, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def by_hand(model: Any, batch: Batch) -> torch.Tensor:
    """The loss of the model's logit and that of the part's, both from the definition."""
    (y,), (z,) = batch.label.values(), model(batch).values()
    both = [(torch.log1p(torch.exp(x)) - y * x).mean() for x in (z, model.interactions[0].logit)]
    return both[0] + both[1]


def guard() -> StepGuard:
    """A guard that nothing in these tests comes before."""
    return StepGuard(torch.device("cpu"), 0, lambda step: None, lambda step: pytest.fail(f"stopped at {step}"))
