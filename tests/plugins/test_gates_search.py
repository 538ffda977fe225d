"""Selectors with gates in whole runs: from the search to the smaller model, by one process and two."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from recsys.data.batches import EvalBatches
from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train.distributed import World

BILEVEL = ("adafs", "autofield")
OPTIONS = {
    "adafs": "{use: adafs}",
    "autofield": "{use: autofield, keep: 4}",
    "group_lasso": "{use: group_lasso, keep: 0.3}",
    "lpfs": "{use: lpfs, rate: 0.1, strength: 0.75}",
    "mvfs": "{use: mvfs, level: 0.1, sharpness: 30.0, keep: 0.6}",
}
KEPT = {"adafs": 5, "autofield": 4, "group_lasso": 3, "mvfs": 6}
EPOCHS, ROWS, BATCH = 3, 6000, 256


def search(name):
    stage = "bilevel_fit, rate: 0.05" if name in BILEVEL else "fit, name: search"
    return f"{{use: {stage}, epochs: {EPOCHS}}}"


def start(tmp_path, name, stages):
    registry = load_registry()
    base = (f"data.source.rows={ROWS}", f"train.batch_size={BATCH}", "train.patience=1", "model.head.wide=false")
    more = ("train.learning_rate=1e-2", "train.accelerator=cpu", f"model.selector={OPTIONS[name]}", f"stages={stages}")
    recipe = load_recipe(find_recipe("quickstart"), registry, [*base, *more])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build():
        console = Console(file=(tmp_path / "log.txt").open("a"), width=200)
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    return build, recipe, registry


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_searches_starts_again_and_prunes_what_is_masked(name, tmp_path):
    stages = f"[{search(name)}, {{use: reset}}, {{use: prune}}, {{use: fit, epochs: 1}}, {{use: evaluate}}]"
    build, recipe, registry = start(tmp_path, name, stages)
    run = build()
    fresh = {key: t.clone() for key, t in run.model.state_dict().items()}
    run_stages(run, recipe, registry)
    folder = tmp_path / "run"
    first = next(folder.glob("1-*"))
    history = json.loads((first / "history.json").read_text())
    if name != "mvfs":  # the last gates count
        assert history["best_epoch"] == len(history["epochs"]) == EPOCHS
    searched, reset = (load_file(f / "model.safetensors") for f in (first, folder / "2-reset"))
    for key, tensor in reset.items():
        assert torch.equal(tensor, (searched if key.startswith("selector.") else fresh)[key]), key

    decided, pruned = build(), build()
    decided.model.load_state_dict(reset)
    scores = {key: float(s) for key, s in decided.model.selector.scores().items()}
    assert json.loads((folder / "3-prune" / "scores.json").read_text()) == pytest.approx(scores)
    decided.model.selector.anneal(1.0)
    kept = decided.model.kept()
    order = sorted(scores, key=scores.get, reverse=True)
    best = [key for key in order if scores[key]] if name == "lpfs" else order[: KEPT[name]]
    assert set(kept.fields) == set(best)
    assert 0 < len(best) < len(order)
    pruned.model = pruned.model.prune(kept)
    pruned.model.load_state_dict(load_file(folder / "3-prune" / "model.safetensors"))
    batch, task = next(iter(EvalBatches(run.splits["test"], 10**6)))[1], run.schema.tasks[0]
    assert torch.equal(pruned.model.eval()(batch)[task], decided.model.eval()(batch)[task])
    assert run.model.bytes() < decided.model.bytes()


def test_batches_of_validation_rows_do_not_count(tmp_path):
    build, recipe, registry = start(tmp_path, "autofield", f"[{search('autofield')}]")
    run = build()
    run_stages(run, recipe, registry)
    steps = len(json.loads((tmp_path / "run" / "1-bilevel_fit" / "history.json").read_text())["epochs"])
    steps *= round(len(run.splits["train"]) / BATCH)
    assert int(run.model.selector.batches) == run.model.selector.adam.taken() == steps


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_seed_gives_the_same_bits(name, tmp_path):
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        build, recipe, registry = start(tmp_path / place, name, f"[{search(name)}]")
        run = build()
        torch.manual_seed(len(found))  # whatever was drawn before
        run_stages(run, recipe, registry)
        found.append(run.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


@pytest.mark.parametrize("name", ["adafs", "autofield"])
def test_a_fit_stage_leaves_alone_what_a_search_moves(name, tmp_path):
    build, recipe, registry = start(tmp_path, name, "[{use: fit, epochs: 2}]")
    run = build()
    before = [p.detach().clone() for p in run.model.selector.parameters()]
    run_stages(run, recipe, registry)
    assert all(torch.equal(p, b) for p, b in zip(run.model.selector.parameters(), before, strict=True))
    assert run.model.selector.kept().fields == run.model.embedding.fields.names


@pytest.mark.parametrize(("strength", "told"), [(0.75, "lpfs has x = 0 for"), (1e-4, "nothing gets there from 1")])
def test_lpfs_tells_what_came_to_zero_and_warns_when_nothing_could(strength, told, tmp_path):
    build, recipe, registry = start(tmp_path, "lpfs", "[{use: fit, epochs: 3}]")
    run = build()
    run.model.selector.strength = strength
    run_stages(run, recipe, registry)
    run.console.file.flush()
    text = (tmp_path / "log.txt").read_text()
    zero = int((run.model.selector.x == 0).sum())
    assert told in text
    assert f"lpfs has x = 0 for {zero} of 10 fields" in text
    assert ("warning: 1-fit: lpfs" in text) is (zero == 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recipe_without_stages_has_those_of_the_method(name, tmp_path):
    registry = load_registry()
    text = find_recipe("quickstart").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text[: text.index("stages:")])
    recipe = load_recipe(own, registry, [f"model.selector={OPTIONS[name]}"])
    uses = [stage.name for stage in recipe.stages]
    assert uses == ["bilevel_fit" if name in BILEVEL else "fit", "reset", "prune", "fit", "evaluate", "export"]


@pytest.mark.ddp
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("lpfs", "adafs", "group_lasso")]
)
def test_two_processes_find_one_set_of_fields_and_train_what_is_left(name, tmp_path):
    changes = ("data.source.rows=3000", "train.batch_size=250", "train.epochs=2", "train.devices=2", "train.threads=1")
    changes += (f"model.selector={OPTIONS[name]}", "train.accelerator=cpu", "model.head.wide=false")
    stages = f"stages=[{search(name)}, {{use: reset}}, {{use: prune}}, {{use: fit, epochs: 1}}, {{use: evaluate}}]"
    command = [sys.executable, "-m", "recsys.cli", "train", "quickstart", *changes, stages]
    command += ["--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "3-prune" / "scores.json").read_text())
    assert len(set(scores.values())) > 3
    trained = load_file(tmp_path / "run" / "4-fit" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in trained.values() if t.is_floating_point())
