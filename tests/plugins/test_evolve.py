"""Evolution of widths: the search itself, scores against one candidate at a time, budgets, and whole runs."""

import copy
import itertools
import json
import random

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from recsys.cli import app
from recsys.data.batches import TrainBatches
from recsys.data.prepare import prepare
from recsys.errors import RecipeError
from recsys.nn.quantize import quantized
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.testing import contract
from recsys.train.distributed import World
from recsys_evolve import Cost, Evolve, Scorer, Search

FAST = (
    "model.embedding.dim=8",
    "model.embedding.pressure=5e-2",
    "model.embedding.threshold_rate=2e-1",
    "data.source.rows=6000",
    "train.batch_size=256",
)


def search(length=5, dim=8, seed=0, allowed=lambda c: True, **options):
    given = {"parents": 15, "mutants": 10, "crossovers": 10, "mutation": 0.1} | options
    return Search(length=length, dim=dim, random=random.Random(seed), allowed=allowed, **given)


def evolve(found, score, generations, population=20):
    """The best score after each generation, and all generations."""
    best, all_of_them = [], []
    for g in range(generations + 1):
        candidates = found.children() if g else found.first(population)
        found.scores |= {c: score(c) for c in candidates}
        all_of_them.append(candidates)
        best.append(max(found.scores.values()))
    return best, all_of_them


def test_contract():
    contract("stage", Evolve)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 7), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_candidates_are_new_in_range_and_the_same_for_the_same_seed(length, dim, seed):
    goal = [random.Random(seed + 1).randint(1, dim) for _ in range(length)]

    def score(c):
        return -sum(abs(a - b) for a, b in zip(c, goal, strict=True))

    runs = [evolve(search(length, dim, seed), score, 4) for _ in range(2)]
    assert runs[0] == runs[1]
    best, generations = runs[0]
    every = [c for candidates in generations for c in candidates]
    assert generations[0][0] == (dim,) * length
    assert len(set(every)) == len(every)
    assert all(len(c) == length and all(1 <= d <= dim for d in c) for c in every)
    assert best == sorted(best)
    assert all(len(g) <= 21 for g in generations)


def test_evolution_comes_closer_than_as_many_random_candidates():
    goal = (3, 1, 8, 2, 6, 5, 7, 4, 1, 2)

    def score(c):
        return -sum((a - b) ** 2 for a, b in zip(c, goal, strict=True))

    evolved = [evolve(search(10, seed=s), score, 15)[0][-1] for s in range(5)]
    chance = [evolve(search(10, seed=s), score, 0, population=320)[0][-1] for s in range(5)]
    assert sum(evolved) > sum(chance) / 2, (evolved, chance)  # both are negative


def test_children_come_from_the_best_and_mutate_as_often_as_asked():
    found = search(40, 50, parents=2, mutants=200, crossovers=200, mutation=0.1)
    one, other = (10,) * 40, (20,) * 40
    found.scores |= {one: 1.0, other: 0.9, (30,) * 40: 0.1}
    children = found.children()
    mutants, crossed = children[:200], children[200:]
    changed = [sum(d != max(set(c), key=c.count) for d in c) for c in mutants]
    assert {max(set(c), key=c.count) for c in mutants} == {10, 20}
    assert 0.085 < sum(changed) / (200 * 40) < 0.11  # 0.1 × 49/50, and clones are drawn again
    assert any(1 in c for c in mutants)
    assert any(50 in c for c in mutants)
    assert crossed
    for c in crossed:
        cuts = sum(a != b for a, b in itertools.pairwise(c))
        assert cuts == 1
        assert set(c) == {10, 20}
    assert len({c.index(20) if c[0] == 10 else c.index(10) for c in crossed}) > 30, "every cut is tried"
    assert found.scores[one] == 1.0


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_nothing_above_the_budget_is_chosen_and_something_always_is(sizes, share, seed):
    cost = Cost(tuple(sizes), 100, 10_000)
    low, high = cost((1,) * len(sizes)), cost((6,) * len(sizes))
    budget = low + share * (high - low)
    found = search(len(sizes), 6, seed, allowed=lambda c: cost(c) <= budget)
    _, generations = evolve(found, sum, 4)  # the larger the better
    assert all(cost(c) <= budget for g in generations for c in g if c != (6,) * len(sizes))
    assert cost(found.best(1)[0]) <= budget


def test_what_is_undefined_is_never_the_best():
    found = search(2, 3)
    found.scores |= {(1, 1): float("nan"), (2, 1): -5.0}
    assert found.best(2) == [(2, 1)]


def start(tmp_path, stages, *changes, source="quickstart"):
    registry = load_registry()
    base = ["model.embedding.use=optembed", *FAST, "train.epochs=1", f"stages={stages}"]
    recipe = load_recipe(find_recipe(source), registry, [*base, *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build():
        console = Console(file=(tmp_path / "log.txt").open("a"))
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    return build, recipe, registry


def auc_of(run, candidate):
    """The validation AUC of one candidate, by a model that has decided for it."""
    model = copy.deepcopy(run.model).eval()
    model.embedding.decide(candidate)
    valid = run.splits["valid"]
    batch = valid.read(0, len(valid))
    with torch.no_grad():
        return roc_auc_score(batch.label["label"].numpy(), model(batch)["label"].double().numpy())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evolve")
    changes = ("model.interaction.1.batch_norm=true", "train.eval_batch_size=97")
    build, recipe, registry = start(folder, "[{use: fit}]", *changes)
    run = build()
    run_stages(run, recipe, registry)
    return run


def test_scores_are_those_of_models_that_have_decided(trained):
    made = random.Random(5)
    candidates = [tuple(made.randint(1, 8) for _ in range(10)) for _ in range(9)] + [(8,) * 10]
    before = copy.deepcopy(trained.model.state_dict())
    scores = Scorer(trained, 0)(candidates)
    assert scores == pytest.approx([auc_of(trained, c) for c in candidates], abs=1e-9)
    assert len(set(scores)) == 10
    after = trained.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_rows_of_a_batch_are_looked_up_once_for_all_candidates(trained, monkeypatch):
    table, seen = type(trained.model.embedding), []
    look_up = table._look_up
    monkeypatch.setattr(table, "_look_up", lambda self, rows: seen.append(len(rows)) or look_up(self, rows))
    monkeypatch.setattr("recsys_evolve.TOGETHER", 3 * 97 * 10 * 8)
    candidates = [(d,) * 10 for d in range(1, 9)]
    scores = Scorer(trained, 0)(candidates)
    assert sum(seen) == len(trained.splits["valid"])
    monkeypatch.undo()
    assert scores == pytest.approx(Scorer(trained, 0)(candidates), abs=1e-9)


def test_with_recalibration_each_candidate_has_the_statistics_of_its_own_rows(trained):
    candidates = [(1,) * 10, (8, 1) * 5]
    before = copy.deepcopy(trained.model.state_dict())
    got = Scorer(trained, 2)(candidates)
    after = trained.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    batches = TrainBatches(
        trained.splits["train"], trained.train.batch_size, seed=trained.seed("1-fit", "recalibration")
    )
    first = [batch for _, batch in zip(range(2), batches.epoch(0), strict=False)]
    for candidate, score in zip(candidates, got, strict=True):
        other = copy.copy(trained)
        other.model = copy.deepcopy(trained.model)
        other.model.embedding.decide(candidate)
        norms = [m for m in other.model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
        assert norms
        inputs = {id(m): [] for m in norms}
        # One layer after the other, as each sees the batch's own statistics of those before it.
        other.model.eval()
        for norm in norms:
            norm.train()
            norm.register_forward_pre_hook(lambda m, x, inputs=inputs: inputs[id(m)].append(x[0].detach().clone()))
        with torch.no_grad():
            for batch in first:
                other.model(batch)
        for norm in norms:
            norm._forward_pre_hooks.clear()
            norm.running_mean.copy_(torch.stack([x.mean(0) for x in inputs[id(norm)]]).mean(0))
            norm.running_var.copy_(torch.stack([x.var(0) for x in inputs[id(norm)]]).mean(0))
        assert score == pytest.approx(auc_of(other, candidate), abs=2e-5)
        assert score != pytest.approx(auc_of(trained, candidate), abs=1e-6)


@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_the_bytes_of_a_candidate_are_those_of_the_pruned_table(trained, stored):
    embedding = copy.deepcopy(trained.model.embedding)
    embedding.check_budget(stored)
    cost = Cost.of(embedding)
    assert cost.whole == embedding.weight.nbytes
    for candidate in ((8,) * 10, (1,) * 10, (*range(1, 9), 3, 5)):
        decided = copy.deepcopy(embedding)
        decided.decide(candidate)
        smaller = decided.prune(decided.kept())
        if stored != "float32":
            smaller = quantized(trained.model.schema, smaller, stored)
        assert cost(candidate) == sum(t.nbytes for t in smaller.export_tables().values())


def test_an_embedding_without_widths_is_refused(tmp_path):
    build, recipe, registry = start(tmp_path, "[{use: evolve}]")
    recipe = load_recipe(find_recipe("quickstart"), registry, ["data.source.rows=2000", "stages=[{use: evolve}]"])
    run = build()
    run.model.embedding = torch.nn.Embedding(3, 2)
    with pytest.raises(RecipeError, match="no widths to choose"):
        run_stages(run, recipe, registry)


STAGES = (
    "[{use: fit, name: supernet}, {use: evolve, generations: 2, population: 5, mutants: 3, crossovers: 2%s}, "
    "{use: reset}, {use: prune}, {use: fit, name: retrain}, {use: evaluate}, {use: export}]"
)


def test_from_supernet_to_the_retrained_table(tmp_path):
    build, recipe, registry = start(tmp_path, STAGES % "", "train.learning_rate=1e-2")
    run = build()
    initial = run.model.embedding.weight.detach().clone()
    run_stages(run, recipe, registry)
    folder = tmp_path / "run"
    log = json.loads((folder / "2-evolve" / "search.json").read_text())
    every = [entry for generation in log["generations"] for entry in generation]
    best = max(every, key=lambda entry: entry["score"])
    assert (log["best"], log["score"], log["bytes"]) == (best["widths"], best["score"], best["bytes"])

    # The best is the best still when it is scored alone, in the state that the stage left behind.
    searched = build()
    searched.model.load_state_dict(load_file(folder / "2-evolve" / "model.safetensors"))
    assert auc_of(searched, log["best"]) == pytest.approx(log["score"], abs=1e-9)
    kept = searched.model.embedding.kept()
    assert [int(kept.dims[name].sum()) for name in log["vocabularies"]] == log["best"]
    assert 0 < sum(log["vocabularies"].values()) < len(initial), "some rows are dropped, not all"

    # Retraining starts from the initial weights where something is left, and from nothing else.
    pruned = build()
    pruned.model = pruned.model.prune(kept)
    pruned.model.load_state_dict(load_file(folder / "4-prune" / "model.safetensors"))
    numbers = pruned.model.embedding.flat[8:]
    masks = [kept.rows[c.name].unsqueeze(1) & kept.dims[c.name] for c in searched.model.embedding.layout.fields]
    parts = torch.split(initial, [len(m) for m in masks])
    want = torch.cat([part[m] for part, m in zip(parts, masks, strict=True)])
    assert torch.equal(numbers, want)
    assert sum(t.nbytes for t in run.model.embedding.export_tables().values()) == log["bytes"]
    assert log["bytes"] < every[0]["bytes"] <= initial.nbytes * 1.2

    again = build()
    again.restore()
    valid = run.splits["valid"].read(0, 200)
    with torch.no_grad():
        assert torch.equal(again.model.eval()(valid)["label"], run.model.eval()(valid)["label"])


def test_the_same_seed_finds_the_same_and_a_budget_is_kept(tmp_path):
    logs = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        stages = STAGES % (", budget: 0.35" if name == "c" else "")
        build, recipe, registry = start(tmp_path / name, stages)
        run = build()
        run_stages(run, recipe, registry)
        logs.append((tmp_path / name / "run" / "2-evolve" / "search.json").read_text())
    assert logs[0] == logs[1]
    log = json.loads(logs[2])
    limit = 0.35 * run.build_model(0).embedding.weight.nbytes
    assert log["bytes"] <= limit < log["generations"][0][0]["bytes"]
    assert sum(t.nbytes for t in run.model.embedding.export_tables().values()) == log["bytes"]
    (tmp_path / "d").mkdir()
    build, recipe, registry = start(tmp_path / "d", STAGES % ", budget: 0.01")
    with pytest.raises(RecipeError, match=r"a budget of 0\.01 is "):
        run_stages(build(), recipe, registry)


def test_the_budget_counts_numbers_as_they_are_stored_in_the_end(tmp_path):
    stages = STAGES.replace("{use: evaluate}", "{use: quantize, to: int8}, {use: evaluate}") % ", budget: 0.15"
    build, recipe, registry = start(tmp_path, stages)
    run = build()
    run_stages(run, recipe, registry)
    found = json.loads((tmp_path / "run" / "2-evolve" / "search.json").read_text())
    stored = sum(t.nbytes for t in run.model.embedding.export_tables().values())
    assert stored == found["bytes"] <= 0.15 * run.build_model(0).embedding.weight.nbytes
    assert sum(found["best"]) > len(found["best"]), "a budget in float32 has room for one dimension of each"


def test_a_sample_of_one_class_is_named_in_the_error(tmp_path):
    build, recipe, registry = start(tmp_path, "[{use: evolve, generations: 0, population: 1, rows: 1}]")
    with pytest.raises(RecipeError, match="'auc' is undefined on 1 of the rows of the validation split"):
        run_stages(build(), recipe, registry)


def test_train_resume_and_predict(tmp_path):
    """A run that was stopped after the search goes on to the same bits, and scores raw rows."""
    runner = CliRunner()
    command = ["train", "quickstart", "model.embedding.use=optembed", *FAST, "train.epochs=1", f"stages={STAGES % ''}"]
    for name in ("whole", "part"):
        done = runner.invoke(app, [*command, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert "warning: optembed" not in done.output
    part = tmp_path / "part"
    state = json.loads((part / "state.json").read_text())
    state |= {"stages": state["stages"][:3], "weights": "3-reset/model.safetensors", "selections": [], "scores": {}}
    (part / "state.json").write_text(json.dumps(state))
    assert runner.invoke(app, ["train", "--resume", str(part)]).exit_code == 0
    ends = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    logs, scores = tmp_path / "logs", tmp_path / "scores.parquet"
    assert runner.invoke(app, ["simulate", "--rows", "500", "--out", str(logs)]).exit_code == 0
    scored = runner.invoke(app, ["predict", str(part), "--data", f"{logs}/log/*.parquet", "--out", str(scores)])
    assert scored.exit_code == 0, scored.output
    assert pl.read_parquet(scores)["score"].is_between(0, 1, closed="none").sum() == 500


def test_without_decay_it_warns(tmp_path):
    build, recipe, registry = start(tmp_path, "[{use: fit}]", "train.embedding_l2=0", "data.source.rows=2000")
    run_stages(build(), recipe, registry)
    assert "optembed drops rare values through" in (tmp_path / "log.txt").read_text()


def test_on_some_rows_the_best_five_are_compared_on_all(tmp_path):
    build, recipe, registry = start(tmp_path, STAGES % ", rows: 150", "train.learning_rate=1e-2")
    run = build()
    run_stages(run, recipe, registry)
    log = json.loads((tmp_path / "run" / "2-evolve" / "search.json").read_text())
    valid = run.splits["valid"]
    assert log["rows"] == 150 < len(valid)
    every = {tuple(e["widths"]): e["score"] for generation in log["generations"] for e in generation}
    ranked = sorted(every, key=lambda c: -every[c])
    finalists = {tuple(e["widths"]): e["score"] for e in log["finalists"]}
    assert list(finalists) == ranked[:5]
    assert (log["score"], tuple(log["best"])) == max((score, c) for c, score in finalists.items())
    searched = build()
    searched.model.load_state_dict(load_file(tmp_path / "run" / "2-evolve" / "model.safetensors"))
    for candidate, score in finalists.items():
        assert auc_of(searched, candidate) == pytest.approx(score, abs=1e-9)

    # What the search saw is the score of 150 of the rows, the same for every candidate.
    scorer = Scorer(run_at(searched, "2-evolve"), 0, 150)
    assert len(set(scorer.rows.tolist())) == 150
    batch = valid.gather(scorer.rows)
    for candidate in ranked:
        decided = copy.deepcopy(searched.model)
        decided.embedding.decide(candidate)
        with torch.no_grad():
            logit = decided.eval()(batch)["label"]
        assert roc_auc_score(batch.label["label"], logit) == pytest.approx(every[candidate], abs=1e-6)


def run_at(run, stage):
    """The run as it is in a stage, whose name seeds what the stage draws."""
    run.stage = stage
    return run
