"""The bilevel stage: what each of its steps moves and leaves, its gradients, its best epoch; one process and two."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys.data.prepare import prepare
from recsys.errors import RecipeError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.testing import contract
from recsys.train.distributed import World
from recsys.train.run import Run
from recsys_bilevel import BilevelFit, Search, unrolled

PLUGIN = '''
from __future__ import annotations
import torch
from torch import Tensor, nn
from recsys.api import Component, Table, hookimpl

class Weighed(Table):
    """A table with one number per field that a search learns."""

    def __init__(self, schema, *, dim: int = 4) -> None:
        super().__init__(schema, dim=dim, init_std=0.1)
        self.alpha = nn.Parameter(torch.full((len(schema.fields),), 0.5))

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        return super().forward(ids, values) * self.alpha.unsqueeze(1)

    def architecture(self) -> tuple[nn.Parameter, ...]:
        return (self.alpha,)

    def search_step(self, rate: float) -> None:
        with torch.no_grad():
            self.alpha.sub_(rate * self.alpha.grad).clamp_(0, 1)

class Aiming(Weighed):
    """Wants as many steps of the search."""

    def __init__(self, schema, *, dim: int = 4, steps: int = 0) -> None:
        super().__init__(schema, dim=dim)
        self.wanted = steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def search_step(self, rate: float) -> None:
        super().search_step(rate)
        self.steps += 1

    def reached(self) -> bool | None:
        return int(self.steps) >= self.wanted if self.wanted > 0 else None

    def architecture(self) -> tuple[nn.Parameter, ...]:
        return (self.alpha,) if self.wanted >= 0 else ()

class Lists:
    """Compares the rows of a group, without a state."""

    compares_groups = True
    needs = ("group",)

    def __init__(self, tasks) -> None:
        self.tasks = tasks

    def __call__(self, logits, batch) -> Tensor:
        return torch.stack([(z - z.mean()).square().mean() for z in logits.values()]).mean()

@hookimpl
def recsys_components():
    parts = [("embedding", "weighed", Weighed), ("embedding", "aiming", Aiming), ("loss", "lists", Lists)]
    return [Component(*part) for part in parts]
'''

BASE = (
    "data.source.rows=4000",
    "model.embedding=weighed",
    "model.interaction=[{use: cross, layers: 1}, {use: mlp, hidden: [8], batch_norm: true}]",
    "model.head.wide=true",
    "train.batch_size=256",
    "train.epochs=2",
    "train.clip_norm=0",
    "train.accelerator=cpu",
)
STAGES = "stages=[{{use: bilevel_fit, rate: 5.0{}}}, {{use: evaluate, splits: [valid]}}]"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "weighed_plugin.py"
    path.write_text(PLUGIN)
    return path


def start(plugin: Path, name: str, *changes: str, options: str = "") -> tuple[Run, Any, Any]:
    folder = plugin.parent
    registry = load_registry(files=[plugin])
    recipe = load_recipe(find_recipe("quickstart"), registry, [*BASE, STAGES.format(options), *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), folder / "cache")
    console = Console(file=(folder / "log.txt").open("a"))
    run = build_run(recipe, registry, folder / name, prepared.encoder, prepared.splits, world=World(), console=console)
    return run, recipe, registry


def search(run: Run, **options: Any) -> Search:
    run.model.train()
    return Search(run, **{"learning_rate": 0.01, "rate": 5.0, "tables": False, "second_order": False} | options)


def batches(run: Run) -> tuple[Any, Any]:
    return run.split("train").read(0, 256), run.split("valid").read(0, 256)


def state(run: Run) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in run.model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, t in before.items() if not torch.equal(t, after[name])}


def test_contract() -> None:
    contract("stage", BilevelFit)


def test_a_training_batch_moves_all_but_the_architecture_and_a_validation_batch_that_alone(plugin: Path) -> None:
    run, _, _ = start(plugin, "run")
    train, valid = batches(run)
    steps = search(run)
    first = state(run)
    steps.move_weights(train)
    second = state(run)
    steps.move_architecture(valid)
    third = state(run)
    assert changed(second, third) == {"embedding.alpha"}
    assert "embedding.alpha" not in changed(first, second)
    weights = {n for n, p in run.model.named_parameters() if p.requires_grad} - {"embedding.alpha"}
    assert weights <= changed(first, second)
    assert any("running_mean" in name for name in changed(first, second)), "statistics are those of training rows"


@pytest.mark.parametrize("second", [False, True])
def test_of_the_tables_alone_the_network_stays(plugin: Path, second: bool) -> None:
    run, _, _ = start(plugin, "run")
    train, valid = batches(run)
    before = state(run)
    search(run, tables=True, second_order=second).step(train, valid)
    moved = changed(before, state(run)) & {n for n, _ in run.model.named_parameters()}
    assert moved == {"embedding.weight", "embedding.alpha", "head.wide.weight"}


def test_three_steps_are_those_of_two_optimizers_side_by_side(plugin: Path) -> None:
    run, _, _ = start(plugin, "run", "train.embedding_l2=0.01")
    run.model.double()
    run.loss = double_bce
    slow = copy.deepcopy(run.model).train()
    alpha = slow.embedding.alpha
    tables = [slow.embedding.weight, slow.head.wide.weight]
    others = [p for p in slow.parameters() if p is not alpha and all(p is not t for t in tables)]
    groups = [{"params": tables, "weight_decay": 0.01}, {"params": others}]
    adam = torch.optim.Adam(groups, lr=0.01, foreach=False)
    steps = search(run)
    for k in range(3):
        train = run.split("train").read(256 * k, 256 * k + 256)
        valid = run.split("valid").read(100 * k, 100 * k + 100)
        steps.step(train, valid)
        slow.zero_grad()
        run.loss(slow(train), train).backward()
        adam.step()
        buffers = {name: b.clone() for name, b in slow.named_buffers()}
        slope = torch.autograd.grad(run.loss(slow(valid), valid), alpha)[0]
        for name, buffer in slow.named_buffers():
            buffer.copy_(buffers[name])
        alpha.data = (alpha - 5.0 * slope).clamp(0, 1).detach()
    for name, tensor in slow.state_dict().items():
        assert float((tensor.double() - run.model.state_dict()[name].double()).abs().max()) <= 1e-9, name


class Toy(nn.Module):
    """L = mean over the batch of (x · w · a + w³ - y)², two weights, one α."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
        self.a = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, batch: Any) -> Tensor:
        x, y = batch
        return ((x @ self.w * self.a + (self.w**3).sum() - y) ** 2).mean()


def test_the_second_order_is_the_derivative_of_what_one_step_ahead_gives() -> None:
    torch.manual_seed(0)
    toy, ahead = Toy(), 0.05
    train, valid = ((torch.randn(6, 2).double(), torch.randn(6).double()) for _ in range(2))
    found = unrolled(toy, {"w": toy.w}, [toy.a], train, valid, ahead)[0]  # type: ignore[arg-type]
    assert found is not None

    def value(a: float) -> float:
        """In Python's numbers: one step of the weights by hand, then the validation loss."""
        w = toy.w.tolist()
        slope, n = [0.0, 0.0], len(train[1])
        for x, y in zip(train[0].tolist(), train[1].tolist(), strict=True):
            error = (x[0] * w[0] + x[1] * w[1]) * a + w[0] ** 3 + w[1] ** 3 - y
            for k in (0, 1):
                slope[k] += 2 * error * (x[k] * a + 3 * w[k] ** 2) / n
        w = [w[k] - ahead * slope[k] for k in (0, 1)]
        rows = zip(valid[0].tolist(), valid[1].tolist(), strict=True)
        return sum(((x[0] * w[0] + x[1] * w[1]) * a + w[0] ** 3 + w[1] ** 3 - y) ** 2 for x, y in rows) / n

    h = 1e-5
    numeric = (value(0.8 + h) - value(0.8 - h)) / (2 * h)
    first = torch.autograd.grad(toy(valid), toy.a)[0]
    assert float(found) == pytest.approx(numeric, rel=1e-8)
    assert abs(float(first) - numeric) > 0.01, "the toy would not tell the orders apart"


def double_bce(logits: dict[str, Tensor], batch: Any) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits["label"], batch.label["label"].double())


def test_the_search_takes_the_second_order_before_the_weights_move(plugin: Path) -> None:
    run, _, _ = start(plugin, "run")
    run.model.double()
    run.loss = double_bce
    train, valid = batches(run)
    slow = copy.deepcopy(run.model).train()
    search(run, second_order=True).step(train, valid)

    def ahead(alpha: Tensor) -> float:
        """L_valid after one plain step of the weights, with α as given."""
        model = copy.deepcopy(slow)
        model.embedding.alpha.data = alpha
        weights = [p for p in model.parameters() if p is not model.embedding.alpha]
        slopes = torch.autograd.grad(run.loss(model(train), train), weights)
        for p, slope in zip(weights, slopes, strict=True):
            p.data -= 0.01 * slope
        return float(run.loss(model(valid), valid).detach())

    start_at, h = slow.embedding.alpha.detach(), 1e-6
    for f in (0, 3):
        step = torch.zeros_like(start_at)
        step[f] = h
        numeric = (ahead(start_at + step) - ahead(start_at - step)) / (2 * h)
        moved = float(start_at[f] - run.model.embedding.alpha.detach()[f])
        assert moved == pytest.approx(5.0 * numeric, rel=1e-5, abs=1e-8)


def history(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "1-bilevel_fit" / "history.json").read_text())
    return found


def test_the_best_epoch_on_validation_stays_and_the_same_recipe_gives_the_same_bits(plugin: Path) -> None:
    made = []
    for name in ("one", "two"):
        changes = ("train.epochs=6", "train.learning_rate=0.05", "train.patience=2", "model.embedding.dim=16")
        changes += ("data.source.rows=3000", "train.plateau_factor=0.5")
        run, recipe, registry = start(plugin, name, *changes)
        run_stages(run, recipe, registry)
        made.append(load_file(run.folder / "1-bilevel_fit" / "model.safetensors"))
        told = history(run)
        losses = [epoch["valid/logloss"] for epoch in told["epochs"]]
        best = told["best_epoch"]
        assert losses[best - 1] == min(losses)
        assert best < len(losses) < 6, "the recipe is to overfit, and to stop two epochs after the best"
        assert len(losses) == best + 2
        assert told["epochs"][-1]["learning_rate"] == pytest.approx(0.05 * 0.5)
        assert run.scores["valid"]["logloss"] == losses[best - 1]
    assert changed(made[0], made[1]) == set()


@pytest.mark.parametrize(("steps", "epochs"), [(10**6, 6), (12, 2)])
def test_a_part_with_a_target_is_searched_until_it_is_reached(plugin: Path, steps: int, epochs: int) -> None:
    """Whatever the loss does: the recipe overfits, and would stop two epochs after its best one."""
    changes = ("train.epochs=6", "train.learning_rate=0.05", "train.patience=2", "data.source.rows=3000")
    run, recipe, registry = start(plugin, "run", *changes, f"model.embedding={{use: aiming, dim: 16, steps: {steps}}}")
    run_stages(run, recipe, registry)
    told = history(run)
    assert told["best_epoch"] == len(told["epochs"]) == epochs
    losses = [epoch["valid/logloss"] for epoch in told["epochs"]]
    assert run.scores["valid"]["logloss"] == losses[-1]
    assert epochs == 2 or losses[-1] > min(losses)


def test_the_labels_of_validation_teach_the_architecture(plugin: Path) -> None:
    """One step with other labels in validation, from the same weights."""
    run, _, _ = start(plugin, "run")
    _, valid = batches(run)
    first = copy.deepcopy(run.model.state_dict())

    def alpha(flip: bool) -> Tensor:
        run.model.load_state_dict(first)
        label = {task: 1 - y for task, y in valid.label.items()} if flip else valid.label
        search(run).move_architecture(copy.copy(valid).__class__(**{**vars(valid), "label": label}))
        return run.model.embedding.alpha.detach().clone()

    assert torch.equal(alpha(False), alpha(False))
    assert not torch.equal(alpha(False), alpha(True))


def test_what_cannot_be_searched_is_told(plugin: Path) -> None:
    run, _, _ = start(plugin, "run", "model.embedding={use: table, dim: 4}")
    with pytest.raises(RecipeError, match="no part of the model has an architecture to search"):
        BilevelFit().run(run)
    run, _, _ = start(plugin, "run", "model.embedding={use: aiming, steps: -1}")  # its options leave nothing to search
    with pytest.raises(RecipeError, match="no part of the model has an architecture to search"):
        BilevelFit().run(run)
    run, _, _ = start(plugin, "run")
    run.splits = {"train": run.splits["train"]}
    with pytest.raises(RecipeError, match="no split 'valid'"):
        BilevelFit().run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss={use: dla, positions: 10}", "data.context={group: user, position: hour}"], "weights of its own"),
        (["loss=lists", "data.context={group: user}"], "compares the rows of a group"),
        (["loss=snips", "propensity=popularity"], r"keeps a state over the batches \(mean, total\)"),
        (["loss=bpr", "sampling={item: item}", "data.context={group: user}"], "remove the block `sampling:`"),
    ],
)
def test_losses_that_need_more_than_a_batch_are_refused_before_anything_is_trained(
    plugin: Path, changes: list[str], message: str
) -> None:
    """Catches validation batches that teach a loss, and lists that are compared in pieces."""
    run, recipe, registry = start(plugin, "run", *changes)
    with pytest.raises(RecipeError, match=message):
        run_stages(run, recipe, registry)
    assert not run.state["stages"]


def test_a_second_order_of_several_processes_is_refused(plugin: Path) -> None:
    run, _, _ = start(plugin, "run")
    run.world = World(0, 2)
    with pytest.raises(RecipeError, match="second_order needs a single process"):
        BilevelFit(second_order=True).run(run)


@pytest.mark.ddp
def test_two_processes_search_as_one(plugin: Path) -> None:
    made, told = [], []
    for devices in (1, 2):
        out = plugin.parent / str(devices)
        # Without batch norm, whose statistics are each process's own; plain descent shows every wrong weight of a row.
        changes = ["model.interaction=[{use: cross, layers: 1}]", f"train.devices={devices}", "train.batch_size=451"]
        changes += ["train.optimizer=sgd", "train.learning_rate=0.5", "train.threads=1"]
        command = [sys.executable, "-m", "recsys.cli", "train", "quickstart", *BASE, STAGES.format(""), *changes]
        done = subprocess.run(
            [*command, "--plugin", str(plugin), "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        made.append(load_file(out / "1-bilevel_fit" / "model.safetensors"))
        told.append(json.loads((out / "1-bilevel_fit" / "history.json").read_text())["epochs"])
    for name, tensor in made[0].items():
        assert float((tensor - made[1][name]).abs().max()) <= 2e-6, name
    assert not torch.equal(made[0]["embedding.alpha"], torch.full_like(made[0]["embedding.alpha"], 0.5))
    for alone, together in zip(*told, strict=True):
        assert together == pytest.approx(alone, abs=1e-5)
