"""Stages around fitting: snapshots, rewind, reset and prune, with a selector that drops a field and some rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from recsys import cli
from recsys.contracts import Batch
from recsys.data.batches import EvalBatches
from recsys.data.prepare import prepare
from recsys.errors import RecipeError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root, load_trained
from recsys.recipe.check import Recipe, find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train.distributed import World
from recsys.train.run import Run
from recsys.train.stages import selector_scores

PLUGIN = '''
from __future__ import annotations
import torch
from torch import Tensor, nn
from recsys.api import Component, Fields, Selection, hookimpl

SEEN = []

class Half(nn.Module):
    """Drop the last field and every odd row of the first one."""

    def __init__(self, fields: Fields, *, anneals: bool = True) -> None:
        super().__init__()
        self.fields = fields
        self.gate = nn.Parameter(torch.ones(len(fields)))
        odd = torch.arange(fields.rows[0]) % 2 == 1
        self.register_buffer("odd", odd)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        mask = torch.ones(e.shape[:2], dtype=e.dtype)
        mask[:, -1] = 0
        mask[:, 0] = (~self.odd[ids[:, 0]]).to(e.dtype)
        return e * mask.unsqueeze(2) * (self.gate / self.gate.detach())[:, None]

    def penalty(self) -> Tensor:
        return 0.01 * self.gate.square().sum()

    def anneal(self, progress: float) -> None:
        SEEN.append(progress)

    def kept(self) -> Selection:
        return Selection(self.fields.names[:-1], {self.fields.names[0]: ~self.odd})

    def scores(self) -> dict[str, Tensor]:
        return {name: self.gate[i].detach() for i, name in enumerate(self.fields.names)}

EVENTS = []

@hookimpl
def recsys_components():
    return [Component("selector", "half", Half)]

@hookimpl
def recsys_before_stage(run, stage):
    EVENTS.append(("before", stage))

@hookimpl
def recsys_after_stage(run, stage, metrics):
    EVENTS.append(("after", stage, sorted(metrics)))
'''

BASE = ("data.source.rows=4000", "train.batch_size=512", "train.epochs=2", "train.patience=0", "model.selector=half")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "half_plugin.py"
    path.write_text(PLUGIN)
    return path


def start(plugin: Path, folder: Path, *overrides: str) -> tuple[Run, Recipe, Any]:
    registry = load_registry(files=[plugin])
    recipe = load_recipe(find_recipe("quickstart"), registry, [*BASE, *overrides])
    source = build_source(recipe, registry, data_root(recipe, None))
    prepared = prepare(recipe.data, source, folder / "cache")
    console = Console(file=(folder / "log.txt").open("w"))
    run = build_run(recipe, registry, folder / "run", prepared.encoder, prepared.splits, world=World(), console=console)
    return run, recipe, registry


def module(registry: Any) -> Any:
    entry = registry.get("selector", "half")
    return sys.modules[entry.component.factory.__module__]


def whole(run: Run, split: str = "test") -> Batch:
    return next(iter(EvalBatches(run.splits[split], 10**6)))[1]


def test_prune_leaves_a_smaller_model_with_the_same_predictions(plugin: Path, tmp_path: Path) -> None:
    run, recipe, registry = start(plugin, tmp_path, "stages=[{use: fit}, {use: prune}, {use: evaluate}, {use: export}]")
    before: dict[str, Any] = {}
    original = run.apply_selection

    def watch(selection: Any) -> None:
        run.model.eval()
        before["bytes"] = run.model.bytes()
        before["logit"] = run.model(whole(run))["y" if "y" in run.schema.tasks else run.schema.tasks[0]].detach()
        original(selection)

    run.apply_selection = watch  # type: ignore[method-assign]
    run_stages(run, recipe, registry)
    run.model.eval()
    after = run.model(whole(run))[run.schema.tasks[0]].detach()
    assert torch.equal(after, before["logit"])
    assert run.model.bytes() < before["bytes"]
    told = json.loads((run.folder / "2-prune" / "prune.json").read_text())
    assert (told["bytes_before"], told["bytes_after"]) == (before["bytes"], run.model.bytes())
    assert told["rows_timed"] == min(1024, len(run.split("train")))
    assert 0 < told["milliseconds_after"] < 10_000
    scores = json.loads((run.folder / "2-prune" / "scores.json").read_text())
    gate = load_file(run.folder / "1-fit" / "model.safetensors")["selector.gate"]
    assert scores == {f.name: pytest.approx(float(gate[i])) for i, f in enumerate(run.schema.fields)}
    assert run.model.scores() == {}, "the selector is gone"
    assert selector_scores(run) == scores
    exported = sum(t.nbytes for t in load_file(run.folder / "export" / "model.safetensors").values())
    trained = sum(t.nbytes for t in load_file(run.folder / "1-fit" / "model.safetensors").values())
    assert exported < trained

    # The pruned run opens again from its folder, with the same predictions.
    (run.folder / "recipe.json").write_text(json.dumps(recipe.document.value))
    (run.folder / "run.json").write_text(json.dumps({"recipe": "quickstart", "recipe_folder": str(recipe.folder)}))
    run.encoder.save(run.folder / "encoder")
    _, opened, _ = load_trained(run.folder, registry, Console(quiet=True))
    opened.model.eval()
    assert torch.equal(opened.model(whole(run))[run.schema.tasks[0]].detach(), after)


def test_rewind_gives_the_snapshot_back_but_not_the_selector(plugin: Path, tmp_path: Path) -> None:
    stages = "stages=[{use: fit, name: search, epochs: 3, snapshot_epoch: 1}, {use: rewind, to: search}]"
    run, recipe, registry = start(plugin, tmp_path, stages)
    run_stages(run, recipe, registry)
    fitted = load_file(run.folder / "1-search" / "model.safetensors")
    snapshot = load_file(run.folder / "1-search" / "snapshot.safetensors")
    now = run.model.state_dict()
    for name, tensor in now.items():
        if name.startswith("selector."):
            assert torch.equal(tensor, fitted[name]), name
        else:
            assert torch.equal(tensor, snapshot[name]), name
    assert not torch.equal(fitted["selector.gate"], snapshot["selector.gate"]), "the selector must have learned"
    assert not torch.equal(fitted["embedding.weight"], snapshot["embedding.weight"])


def test_rewind_leaves_alone_what_it_is_told_to_keep(plugin: Path, tmp_path: Path) -> None:
    rewind = "{use: rewind, to: search, keep: ['interactions.*.bias', head.weight]}"
    stages = f"stages=[{{use: fit, name: search, snapshot_epoch: 1}}, {rewind}]"
    run, recipe, registry = start(plugin, tmp_path, stages)
    run_stages(run, recipe, registry)
    fitted = load_file(run.folder / "1-search" / "model.safetensors")
    snapshot = load_file(run.folder / "1-search" / "snapshot.safetensors")
    stayed = set()
    for name, tensor in run.model.state_dict().items():
        stays = name == "head.weight" or (name.startswith("interactions.") and name.endswith(".bias"))
        if not name.startswith("selector."):
            assert torch.equal(tensor, (fitted if stays else snapshot)[name]), name
            stayed |= {name} if stays and not torch.equal(fitted[name], snapshot[name]) else set()
    assert len(stayed) > 1


def test_rewind_knows_the_names_of_parameters(plugin: Path, tmp_path: Path) -> None:
    stages = "stages=[{use: fit, name: a, epochs: 1, snapshot_epoch: 0}, {use: rewind, to: a, keep: [head.wieght]}]"
    run, recipe, registry = start(plugin, tmp_path, stages)
    with pytest.raises(RecipeError, match=r"no parameter is called 'head\.wieght'. Did you mean 'head\.weight'"):
        run_stages(run, recipe, registry)


def test_snapshot_zero_is_the_initial_model_and_reset_goes_back_to_it(plugin: Path, tmp_path: Path) -> None:
    stages = "stages=[{use: fit, name: a, snapshot_epoch: 0}, {use: reset}]"
    run, recipe, registry = start(plugin, tmp_path, stages)
    first = {name: t.clone() for name, t in run.model.state_dict().items()}
    run_stages(run, recipe, registry)
    snapshot = load_file(run.folder / "1-a" / "snapshot.safetensors")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(snapshot[name], first[name]), name
        if not name.startswith("selector."):
            assert torch.equal(tensor, first[name]), name


def test_reseeding_draws_other_weights(plugin: Path, tmp_path: Path) -> None:
    run, recipe, registry = start(plugin, tmp_path, "stages=[{use: fit}, {use: reset, reseed: true}]")
    initial = {name: t.clone() for name, t in run.model.state_dict().items()}
    run_stages(run, recipe, registry)
    assert not torch.equal(run.model.state_dict()["embedding.weight"], initial["embedding.weight"])


@pytest.mark.parametrize("stage", ["{use: rewind, to: fit}", "{use: reset}"])
def test_nothing_silently_undoes_pruning(plugin: Path, tmp_path: Path, stage: str) -> None:
    stages = f"stages=[{{use: fit, snapshot_epoch: 1}}, {{use: prune}}, {stage}]"
    run, recipe, registry = start(plugin, tmp_path, stages)
    with pytest.raises(RecipeError, match="would undo the pruning; put it before"):
        run_stages(run, recipe, registry)


def test_anneal_runs_once_per_step_from_zero_towards_one(plugin: Path, tmp_path: Path) -> None:
    run, recipe, registry = start(plugin, tmp_path, "stages=[{use: fit, epochs: 3}]")
    run_stages(run, recipe, registry)
    steps = 3 * 7  # 3,200 rows in steps of 512, the last one of 128
    assert pytest.approx([i / steps for i in range(steps)]) == module(registry).SEEN


def test_the_penalty_reaches_the_selector(plugin: Path, tmp_path: Path) -> None:
    """The gate's value cancels out of the output; only the penalty can shrink it."""
    update = ("train.optimizer=sgd", "train.learning_rate=0.1")
    run, recipe, registry = start(plugin, tmp_path, "stages=[{use: fit}]", *update)
    run_stages(run, recipe, registry)
    assert bool((run.model.state_dict()["selector.gate"][-1] < 1).all())


def test_observers_hear_of_every_stage(plugin: Path, tmp_path: Path) -> None:
    run, recipe, registry = start(plugin, tmp_path, "stages=[{use: fit}, {use: evaluate, metrics: [auc]}]")
    run_stages(run, recipe, registry)
    assert module(registry).EVENTS == [
        ("before", "1-fit"),
        ("after", "1-fit", []),
        ("before", "2-evaluate"),
        ("after", "2-evaluate", ["test", "valid"]),
    ]


def test_training_leaves_the_choice_of_algorithms_as_it_was(plugin: Path, tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    run, recipe, registry = start(plugin, tmp_path, "train.epochs=1", "stages=[{use: fit}]")
    run_stages(run, recipe, registry)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_best_epoch_is_kept(plugin: Path, tmp_path: Path) -> None:
    """A learning rate so high that later epochs are worse: the kept weights are those of the best one."""
    run, recipe, registry = start(
        plugin, tmp_path, "stages=[{use: fit, epochs: 6}, {use: evaluate, metrics: [auc]}]", "train.learning_rate=0.05"
    )
    run_stages(run, recipe, registry)
    history = json.loads((run.folder / "1-fit" / "history.json").read_text())
    aucs = [epoch["valid/auc"] for epoch in history["epochs"]]
    assert aucs[-1] < max(aucs), "the test needs a last epoch that is not the best"
    assert history["best_epoch"] == aucs.index(max(aucs)) + 1
    assert run.scores["valid"]["auc"] == max(aucs)


@pytest.mark.parametrize(("patience", "every"), [(2, 1), (5, 2)])
def test_plateau_and_patience_are_as_written(plugin: Path, tmp_path: Path, patience: int, every: int) -> None:
    run, recipe, registry = start(
        plugin,
        tmp_path,
        f"stages=[{{use: fit, epochs: 20, patience: {patience}}}]",
        "train.learning_rate=0.05",
        "train.plateau_factor=0.5",
        f"train.plateau_patience={every}",
    )
    run_stages(run, recipe, registry)
    epochs = json.loads((run.folder / "1-fit" / "history.json").read_text())["epochs"]
    best, rate, bad = -1.0, 0.05, 0
    for i, epoch in enumerate(epochs):
        assert epoch["learning_rate"] == pytest.approx(rate)
        if epoch["valid/auc"] > best + 1e-6:
            best, bad = epoch["valid/auc"], 0
        else:
            bad += 1
            rate *= 0.5 if bad % every == 0 else 1
        assert (bad == patience) == (i == len(epochs) - 1)
    assert len(epochs) < 20


def test_bf16_trains_close_to_float32(plugin: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        run, recipe, registry = start(plugin, folder, "stages=[{use: fit}]", f"train.precision='{precision}'")
        run_stages(run, recipe, registry)
        history = json.loads((run.folder / "1-fit" / "history.json").read_text())["epochs"]
        losses[precision] = [epoch["train/loss"] for epoch in history]
        assert all(t.dtype == torch.float32 for t in run.model.state_dict().values() if t.is_floating_point())
    assert losses["bf16"] != losses["32"], "the forward pass must really run in bfloat16"
    assert losses["bf16"] == pytest.approx(losses["32"], rel=2e-2)


def test_a_one_class_validation_split_is_undefined_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pl.DataFrame({"a": [1, 2, 3, 4] * 100, "y": [0, 1] * 200})
    frame.write_parquet(tmp_path / "train.parquet")
    frame.filter(pl.col("y") == 1).write_parquet(tmp_path / "valid.parquet")
    (tmp_path / "r.yaml").write_text(
        "data: {source: {use: files, train: train.parquet, valid: valid.parquet}, label: y, categorical: [a]}\n"
        "model: {interaction: {use: mlp, hidden: [4]}}\ntrain: {epochs: 2, batch_size: 64}\n"
        "stages: [{use: fit}, {use: evaluate}]"
    )
    arguments = ["recsys", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_main: Callable[[], None] = cli.main
    with pytest.raises(SystemExit) as stopped:
        run_main()
    captured = capsys.readouterr()
    assert stopped.value.code in (0, None), captured.err
    told = json.loads(captured.out.splitlines()[-1])
    assert told["metrics"]["valid"]["auc"] is None
    assert told["metrics"]["valid"]["logloss"] > 0
    assert "AUC and other rank metrics are undefined there" in captured.err


def test_clipping_bounds_the_step(plugin: Path, tmp_path: Path) -> None:
    """With plain gradient descent a step is at most the learning rate times the norm that gradients are clipped to."""
    moved = {}
    for clip in (0.0, 0.01):
        folder = tmp_path / str(clip)
        folder.mkdir()
        update = ("train.optimizer=sgd", "train.learning_rate=0.1", "train.batch_size=3200", f"train.clip_norm={clip}")
        run, recipe, registry = start(plugin, folder, "stages=[{use: fit, epochs: 1}]", *update)
        before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
        run_stages(run, recipe, registry)
        moved[clip] = float((torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before).norm())
    assert moved[0.01] == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert moved[0.0] > 10 * moved[0.01]
