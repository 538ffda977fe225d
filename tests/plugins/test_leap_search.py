"""LeAP in whole runs: from the search to the smaller model, in one level and two, by one process and two."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from recsys.data.prepare import prepare
from recsys.errors import RecipeError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train.distributed import World


def start(tmp_path, *changes):
    registry = load_registry()
    base = ("data.source.rows=6000", "train.batch_size=256", "model.selector.use=leap", "model.head.wide=false")
    more = ("train.epochs=2", "train.learning_rate=1e-2", "train.patience=1", "train.accelerator=cpu")
    recipe = load_recipe(find_recipe("quickstart"), registry, [*base, *more, *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")
    console = Console(file=(tmp_path / "log.txt").open("a"), width=200)
    folder = tmp_path / "run"
    run = build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)
    return run, recipe, registry


STAGES = "[{use: bilevel_fit, epochs: 4, rate: 0.1}, {use: reset}, {use: prune}, {use: fit}, {use: evaluate}]"


def test_its_stages_from_the_search_to_the_smaller_model(tmp_path):
    run, recipe, registry = start(tmp_path, f"stages={STAGES}", "model.selector.strength=0.3")
    fresh = {name: t.clone() for name, t in run.model.state_dict().items()}
    whole = run.model.embedding.weight.nbytes
    run_stages(run, recipe, registry)
    folder = tmp_path / "run"
    history = json.loads((folder / "1-bilevel_fit" / "history.json").read_text())
    assert history["best_epoch"] == len(history["epochs"]) == 4, "the last epoch, without patience"
    searched, reset = (load_file(folder / s / "model.safetensors") for s in ("1-bilevel_fit", "2-reset"))
    assert not torch.equal(searched["selector.theta"], fresh["selector.theta"])
    for name, tensor in reset.items():
        assert torch.equal(tensor, (searched if name.startswith("selector.") else fresh)[name]), name
    told = json.loads((folder / "1-bilevel_fit" / "gates.json").read_text())
    assert not (folder / "2-reset" / "gates.json").exists()
    theta = searched["selector.theta"].flatten()
    assert [f["gate"] for f in told["fields"].values()] == pytest.approx(torch.sigmoid(5 * theta).tolist())
    assert told["polarisation"] == pytest.approx(float((2 * torch.sigmoid(5 * theta) - 1).abs().mean()))
    gates = [f["gate"] for f in told["fields"].values()]
    assert told["gates_above"] == {str(least): sum(g > least for g in gates) for least in (0.3, 0.5, 0.7)}
    dim = run.model.embedding.fields.dim
    for found in told["fields"].values():
        assert found["divergence"] == pytest.approx(found["changed"] * dim**0.5 * found["spread"])
        assert found["width"] == dim
    kept = [name for name, found in told["fields"].items() if found["kept"]]
    assert 0 < len(kept) < len(told["fields"])
    assert 0.4 < told["without_the_rest"]["auc"] < 1
    assert f"leap keeps {len(kept)} of {len(told['fields'])} fields" in (tmp_path / "log.txt").read_text()
    assert sum(t.nbytes for t in run.model.embedding.export_tables().values()) < whole
    scores = json.loads((folder / "3-prune" / "scores.json").read_text())
    value = {n: f["benefit"] * (2 * f["gate"] - 1 if f["gate"] > 0.5 else 1) for n, f in told["fields"].items()}
    wanted = {n: (told["fields"][n]["gate"] > 0.5) + v / (1 + 2 * abs(v)) for n, v in value.items()}
    assert scores == pytest.approx(wanted)
    assert len(set(scores.values())) == len(scores)
    assert (told["steps_held"], told["steps"]) == (38, 38), "held for half of 76"
    batch = run.splits["valid"].read(0, 50)
    e = run.model.embedding(batch.ids, batch.values)
    gone = [i for i, name in enumerate(told["fields"]) if name not in kept]
    assert not e[:, gone].any()
    assert e[:, [i for i in range(e.shape[1]) if i not in gone]].any()


def test_in_one_level_a_fit_stage_moves_the_gates_and_bilevel_finds_nothing_to_search(tmp_path):
    stages = "[{use: fit, epochs: 3, patience: 1}, {use: reset}, {use: prune}]"
    run, recipe, registry = start(tmp_path, f"stages={stages}", "model.selector.one_level=0.05")
    run_stages(run, recipe, registry)
    history = json.loads((tmp_path / "run" / "1-fit" / "history.json").read_text())
    assert history["best_epoch"] == len(history["epochs"]) == 3
    told = json.loads((tmp_path / "run" / "1-fit" / "gates.json").read_text())
    assert told["steps"] > 0
    assert min(f["gate"] for f in told["fields"].values()) < 0.9
    other = tmp_path / "other"
    other.mkdir()
    run, recipe, registry = start(other, "stages=[{use: bilevel_fit}]", "model.selector.one_level=0.05")
    with pytest.raises(RecipeError, match="no part of the model has an architecture to search"):
        run_stages(run, recipe, registry)


def test_a_fit_stage_leaves_bilevel_gates_alone_and_chooses_its_best_epoch(tmp_path):
    run, recipe, registry = start(tmp_path, "stages=[{use: fit, epochs: 2}]")
    run_stages(run, recipe, registry)
    assert (run.model.selector.theta == 1).all()
    assert not (tmp_path / "run" / "1-fit" / "gates.json").exists()


def test_the_same_seed_gives_the_same_gates(tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run, recipe, registry = start(tmp_path / name, "stages=[{use: bilevel_fit, epochs: 1, rate: 0.1}]")
        torch.manual_seed(len(found))  # whatever was drawn before
        run_stages(run, recipe, registry)
        found.append(run.model.selector.theta.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("selector", "wide", "told"),
    [("leap", "true", True), ("optfs", "true", True), ("leap", "false", False), ("keep_all", "true", False)],
)
def test_first_order_weights_that_pass_the_gates_by_are_told_once(selector, wide, told, tmp_path):
    stages = "stages=[{use: fit, name: one, epochs: 1}, {use: fit, name: two, epochs: 1}]"
    changes = (stages, f"model.selector={{use: {selector}}}", f"model.head.wide={wide}")
    run, recipe, registry = start(tmp_path, *changes)
    run_stages(run, recipe, registry)
    run.console.file.flush()
    assert (tmp_path / "log.txt").read_text().count("do not pass the selector") == int(told)


@pytest.mark.ddp
@pytest.mark.parametrize(
    "first", ["{use: bilevel_fit, rate: 0.1}", pytest.param("{use: fit, name: search}", marks=pytest.mark.slow)]
)
def test_two_processes_find_one_set_of_gates_and_train_what_is_left(tmp_path, first):
    level = "null" if "bilevel" in first else "0.1"
    changes = ("data.source.rows=3000", "train.batch_size=250", "train.epochs=2", "train.devices=2", "train.threads=1")
    changes += (f"model.selector={{use: leap, one_level: {level}}}", "train.accelerator=cpu", "model.head.wide=false")
    stages = f"stages=[{first}, {{use: reset}}, {{use: prune}}, {{use: fit, epochs: 1}}, {{use: evaluate}}]"
    command = [
        sys.executable,
        "-m",
        "recsys.cli",
        "train",
        "quickstart",
        *changes,
        stages,
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (told,) = (json.loads(path.read_text()) for path in (tmp_path / "run").glob("1-*/gates.json"))
    assert len({found["gate"] for found in told["fields"].values()}) > 1
    assert 0.4 < told["without_the_rest"]["auc"] < 1
    trained = load_file(tmp_path / "run" / "4-fit" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in trained.values() if t.is_floating_point())
