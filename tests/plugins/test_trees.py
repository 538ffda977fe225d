"""Fields ranked by models of scikit-learn: against these models called here, on arrays made here."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import Lasso

import recsys_trees
from recsys.api import Fields, RecipeError
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.shards import write_shards
from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot
from recsys.nn.selection import load_selection
from recsys.plugin.registry import load_registry
from recsys.testing import contract
from recsys.train.distributed import World

SEED = 11
SELECTORS = {
    "gbdt": (recsys_trees.gbdt, {"trees": 20}),
    "random_forest": (recsys_trees.random_forest, {"trees": 4}),
    "rf_permutation": (recsys_trees.rf_permutation, {"trees": 3, "repeats": 2}),
    "lasso": (recsys_trees.lasso, {"alpha": 1e-3}),
}


def logs(rows=1500, seed=0):
    """`a` and `x` say something of the labels, `b` does not; every raw integer is its rank by frequency already."""
    rng = np.random.default_rng(seed)
    a = np.minimum(rng.geometric(0.3, rows), 9)
    b = np.minimum(rng.geometric(0.1, rows), 25)
    x = rng.normal(size=rows)
    logit = np.where(a % 2, 1.0, -1.0) + x
    frame = pl.DataFrame({"a": a, "b": b, "x": x, "w": rng.integers(0, 3, rows).astype(float)})
    labels = {
        name: (rng.random(rows) < 1 / (1 + np.exp(-sign * logit))).astype(int) for name, sign in (("y", 1), ("z", -1))
    }
    return frame.with_columns(**labels, x=pl.when(pl.int_range(rows) % 10 > 0).then("x"))


def the_run(folder: Path, frame: pl.DataFrame, fields=("a", "b", "x"), world=None, seed=lambda *purpose: SEED, **block):
    """A run over encoded logs, without a model that could be trained."""
    given = {"categorical": ["a", "b"], "numeric": ["x"], "label": "y", **block}
    config = DataConfig.model_validate({"source": {}, **given})
    encoder = Encoder.fit(frame.lazy(), config)
    shards = write_shards(encoder, frame.lazy(), folder / "rows")
    return types.SimpleNamespace(
        split={"train": shards}.__getitem__,
        schema=encoder.schema,
        model=types.SimpleNamespace(embedding=types.SimpleNamespace(fields=of(*fields))),
        world=world or World(),
        device=torch.device("cpu"),
        seed=seed,
        stage="1-rank_fields",
    ), encoder


def of(*names):
    return Fields(names, (30,) * len(names), 4)


def array(encoder: Encoder, frame: pl.DataFrame):
    """The inputs, one value at a time: the rank of a value by frequency plus 2, or the scaled number."""
    rows = []
    known = {name: encoder.lookups[name].values.to_list() for name in ("a", "b")}
    numbers = [x for x in frame["x"] if x is not None]
    mean, scale = float(np.mean(numbers)), float(np.std(numbers))
    for a, b, x in frame.select("a", "b", "x").iter_rows():
        rows.append(
            [2 + known["a"].index(a), 2 + known["b"].index(b), 0.0 if x is None else np.float32((x - mean) / scale)]
        )
    return np.array(rows, np.float64)


def direct(name: str, x, y, weight=None):
    """What scikit-learn says."""
    match name:
        case "gbdt":
            model = GradientBoostingClassifier(n_estimators=20, learning_rate=0.1, max_depth=3, random_state=SEED)
            return model.fit(x, y, sample_weight=weight).feature_importances_
        case "lasso":
            return np.abs(Lasso(alpha=1e-3).fit(x, y, sample_weight=weight).coef_)
        case "random_forest":
            model = RandomForestClassifier(n_estimators=4, random_state=SEED)
            return model.fit(x, y, sample_weight=weight).feature_importances_
    model = RandomForestClassifier(n_estimators=3, random_state=SEED).fit(x, y, sample_weight=weight)
    return permutation_importance(model, x, y, n_repeats=2, random_state=SEED, sample_weight=weight).importances_mean


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_scores_are_those_of_scikit_learn_on_the_same_arrays(name, weighted, tmp_path):
    frame = logs()
    run, encoder = the_run(tmp_path, frame, **({"context": {"weight": "w"}} if weighted else {}))
    factory, options = SELECTORS[name]
    selector = factory(of("a", "b", "x"), rows=None, keep=1, **options)
    found = selector.rank(run)
    wanted = direct(name, array(encoder, frame), frame["y"].to_numpy(), frame["w"].to_numpy() if weighted else None)
    assert list(found.scores) == ["a", "b", "x"]
    np.testing.assert_allclose(list(found.scores.values()), wanted, rtol=1e-5, atol=1e-9)
    assert selector.kept().fields == (("a", "b", "x")[int(np.argmax(wanted))],)
    assert found.passes == 0, "no model is asked"


@pytest.mark.parametrize("name", SELECTORS)
def test_defaults_are_those_of_the_benchmark(name):
    defaults = {o.name: o.default for o in load_registry().get("selector", name).options}
    published = {
        "gbdt": {"trees": 100, "learning_rate": 0.1, "depth": 3},
        "random_forest": {"trees": 10},
        "rf_permutation": {"trees": 10},
        "lasso": {"alpha": 1e-3},
    }[name]
    assert published.items() <= defaults.items()
    assert defaults["inputs"] == "ids"
    assert len(defaults) <= 6


def test_the_order_of_the_models_fields_is_not_that_of_the_columns(tmp_path):
    run, _ = the_run(tmp_path, logs(), fields=("x", "b", "a"))
    found = recsys_trees.lasso(of("x", "b", "a"), rows=None).rank(run).scores
    (tmp_path / "other").mkdir()
    other, _ = the_run(tmp_path / "other", logs())
    assert list(found) == ["x", "b", "a"]
    assert found == recsys_trees.lasso(of("a", "b", "x"), rows=None).rank(other).scores


def test_of_several_tasks_the_mean(tmp_path):
    frame = logs()
    run, encoder = the_run(tmp_path, frame, label={"y": "y", "z": "z"})
    found = recsys_trees.gbdt(of("a", "b", "x"), trees=20, rows=None).rank(run)
    x = array(encoder, frame)
    wanted = [(p + q) / 2 for p, q in zip(direct("gbdt", x, frame["y"]), direct("gbdt", x, frame["z"]), strict=True)]
    np.testing.assert_allclose(list(found.scores.values()), wanted, rtol=1e-5)


def spied(run, inputs="ids", rows=None):
    """What the model of scikit-learn is given."""
    given = []

    def importance(x, y, weight, seed):
        given.append((x.copy(), y.copy(), weight, seed))
        return np.zeros(x.shape[1])

    recsys_trees.Shallow(importance, inputs, rows)(run)
    return given[0]


def test_rows_are_drawn_by_the_seed_each_once_and_equally_often(tmp_path):
    frame = logs(400).with_columns(a=pl.int_range(1, 401))  # the row's number
    taken = np.zeros(402)
    for seed in range(120):
        run, _ = the_run(tmp_path / str(seed), frame, seed=lambda *purpose, seed=seed: seed, context={"weight": "w"})
        x, y, weight, _ = spied(run, rows=50)
        ids = x[:, 0].astype(int)
        assert len(set(ids)) == 50
        assert (np.diff(ids) > 0).all()
        assert y.tolist() == frame["y"].gather(ids - 2).to_list()
        assert weight.tolist() == frame["w"].gather(ids - 2).to_list()
        taken[ids] += 1
        if seed < 2:
            again = spied(run, rows=50)[0]
            assert np.array_equal(again, x)
    assert taken[:2].sum() == 0
    wanted = 120 * 50 / 400
    assert abs(((taken[2:] - wanted) ** 2 / (wanted * (1 - 50 / 400))).sum() - 400) < 5 * np.sqrt(2 * 400)
    assert len(spied(run, rows=400)[0]) == len(spied(run, rows=10**9)[0]) == 400


@pytest.mark.parametrize("weighted", [False, True])
def test_click_rates_are_those_of_the_other_folds_drawn_towards_the_mean(weighted, tmp_path):
    frame = logs(600)
    run, encoder = the_run(tmp_path, frame, **({"context": {"weight": "w"}} if weighted else {}))
    found, *_ = spied(run, inputs="target")
    x, y = array(encoder, frame), frame["y"].to_list()
    w = frame["w"].to_list() if weighted else [1.0] * 600
    mean = sum(v * k for v, k in zip(y, w, strict=True)) / sum(w)
    fold = np.random.default_rng(SEED).permutation(600) % 5
    assert np.bincount(fold).tolist() == [120] * 5
    for i in range(600):
        for f in (0, 1):
            ones = rows = 0.0
            for j in range(600):
                if x[j, f] == x[i, f] and fold[j] != fold[i]:
                    ones, rows = ones + w[j] * y[j], rows + w[j]
            assert found[i, f] == pytest.approx((ones + 10 * mean) / (rows + 10), rel=1e-9)
    np.testing.assert_array_equal(found[:, 2], x[:, 2])


def test_a_field_that_names_the_row_is_believed_with_ids_and_not_with_click_rates(tmp_path):
    frame = logs(1000).with_columns(b=pl.int_range(1000))
    run, _ = the_run(tmp_path, frame)
    by = {i: recsys_trees.random_forest(of("a", "b", "x"), inputs=i).rank(run).scores for i in ("ids", "target")}
    assert by["ids"]["b"] > by["ids"]["a"]
    assert by["target"]["b"] < 1e-6 < by["target"]["a"]


def test_lasso_finds_a_linear_world_and_no_more(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 5))
    chance = np.clip(0.5 + x @ np.array([0.1, 0.0, -0.06, 0.0, 0.03]), 0, 1)
    names = [f"x{i}" for i in range(5)]
    frame = pl.DataFrame(dict(zip(names, x.T, strict=True))).with_columns(y=(rng.random(20_000) < chance).astype(int))
    run, _ = the_run(tmp_path, frame, fields=names, categorical={}, numeric=names)
    scores = recsys_trees.lasso(of(*names), alpha=1e-2, rows=None, keep=3).rank(run).scores
    assert scores["x1"] == scores["x3"] == 0
    # On standardised inputs a weight is what it is without the penalty, less alpha.
    for name, weight in (("x0", 0.1), ("x2", 0.06), ("x4", 0.03)):
        assert scores[name] == pytest.approx(weight - 1e-2, abs=0.012)
    assert scores["x0"] > scores["x2"] > scores["x4"] > 0


@pytest.mark.parametrize("name", ["gbdt", "rf_permutation"])
def test_noise_ranks_below_what_tells_something(name, tmp_path):
    run, _ = the_run(tmp_path, logs(6000))
    for inputs in ("ids", "target"):
        scores = SELECTORS[name][0](of("a", "b", "x"), inputs=inputs, keep=2).rank(run).scores
        assert scores["b"] < min(scores["a"], scores["x"]), inputs


def test_a_sample_without_one_of_the_labels(tmp_path):
    frame = logs(300).with_columns(y=(pl.int_range(300) == 4).cast(pl.Int64))
    run, _ = the_run(tmp_path, frame)
    wanted = "1-rank_fields: label 'label' is 0 in all 10 training rows that fields are ranked by; take more `rows`"
    with pytest.raises(RecipeError, match=wanted):
        recsys_trees.gbdt(of("a", "b", "x"), rows=10).rank(run)


@pytest.mark.parametrize("name", SELECTORS)
def test_without_scikit_learn_nothing_is_trained_and_the_extra_is_named(name, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == "sklearn" else found(module, *rest)
    )
    wanted = rf"the selector '{name}' needs scikit-learn; install it with `pip install \"recsys\[trees\]\"`"
    with pytest.raises(RecipeError, match=wanted):
        SELECTORS[name][0](of("a", "b"))


def test_scikit_learn_is_loaded_when_fields_are_ranked_and_not_before():
    code = (
        "import sys, recsys_trees\nfrom recsys.api import Fields\n"
        "[f(Fields(('a',), (3,), 2)) for f in (recsys_trees.gbdt, recsys_trees.lasso)]\nprint('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", SELECTORS)
def test_contract(name):
    contract("selector", SELECTORS[name][0])


NOISE = {"copies": 10, "random": 8, "flags": 2, "vectors": 1, "width": 4, "seed": 1}
REAL = ("user", "item", "age", "city", "category", "brand", "hour", "device")
"""Fields of the quickstart that tell something; `noise_row` and `noise_user` are there too, and do not."""


def quickstart(folder, rows=20_000):
    """The quickstart's logs, with noise planted beside them."""
    frame = Simulated(DataRoot((folder,)), rows=rows, seed=7).scan("train").collect()
    names = [*REAL, "noise_row", "noise_user"]
    config = DataConfig.model_validate({"source": {}, "label": "y", "categorical": names, "noise": NOISE})
    names += config.planted
    return the_run(folder, frame, fields=names, categorical=names[:10], numeric=[], noise=NOISE)[0], of(*names)


def informative_above_noise(scores):
    """The share of pairs of a real field and one that is noise that are in the right order."""
    noise = [s for name, s in scores.items() if name not in REAL]
    pairs = [(scores[name] > s) + (scores[name] == s) / 2 for name in REAL for s in noise]
    return sum(pairs) / len(pairs)


def test_a_forest_on_ids_ranks_by_the_number_of_values_and_click_rates_mend_a_part(tmp_path):
    """What is known of impurity, and is to be seen before anybody believes such a ranking."""
    run, fields = quickstart(tmp_path)
    ids, rates = (recsys_trees.random_forest(fields, inputs=i).rank(run).scores for i in ("ids", "target"))
    assert len(ids) == 34
    assert min(s for n, s in ids.items() if n.startswith("noise_vector")) > max(ids[n] for n in REAL)
    assert {n for n, s in ids.items() if s < min(ids[n] for n in REAL) / 5} == {"noise_flag_1", "noise_flag_2"}
    assert ids["noise_random_user"] > max(ids[n] for n in ("age", "category", "brand", "city", "device"))
    assert 0.35 < informative_above_noise(ids) < 0.65, "real fields among noise as if by lot"
    assert informative_above_noise(rates) > informative_above_noise(ids) + 0.1


@pytest.mark.parametrize(("name", "least"), [("gbdt", 0.95), ("rf_permutation", 0.85), ("lasso", 0.6)])
def test_the_others_find_planted_noise_more_or_less(name, least, tmp_path):
    run, fields = quickstart(tmp_path, 12_000)
    scores = SELECTORS[name][0](fields, inputs="target").rank(run).scores
    assert informative_above_noise(scores) > least
    assert max(scores["noise_flag_1"], scores["noise_flag_2"]) < min(scores["item"], scores["user"]) / 5


def train(folder, *more):
    small = ("train.threads=1", "train.epochs=1", "model.embedding.dim=4", "data.source.rows=6000")
    command = [sys.executable, "-m", "recsys.cli", "train", "quickstart", *small]
    done = subprocess.run([*command, *more, "--out", folder, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ranked_pruned_trained_and_exported(tmp_path):
    run, noise = tmp_path / "run", f"data.noise={json.dumps(NOISE)}"
    result = train(run, "model.selector={use: gbdt, trees: 20, inputs: target, keep: 6}", noise, "stages=null")
    scores = json.loads((run / "1-rank_fields" / "scores.json").read_text())
    best = sorted(scores, key=scores.get)[-6:]
    assert {"item", "user", "hour"} <= set(best)
    assert set(load_selection(run / "2-prune" / "selection.safetensors").fields) == set(best)
    assert json.loads((run / "1-rank_fields" / "cost.json").read_text())["row_passes"] == 0
    assert sorted(p.name for p in run.iterdir() if p.name[0].isdigit()) == [
        "1-rank_fields",
        "2-prune",
        "3-fit",
        "4-evaluate",
    ]
    assert (run / "export" / "model.safetensors").exists()
    assert 0.55 < result["metrics"]["test"]["auc"] < 0.8


@pytest.mark.ddp
def test_two_processes_rank_alike(tmp_path):
    options = (
        "model.selector={use: random_forest, rows: 1000, keep: 5}",
        "stages=[{use: rank_fields}]",
    )
    train(tmp_path / "one", *options)
    train(tmp_path / "two", *options, "train.devices=2", "train.accelerator=cpu")
    one, two = ((tmp_path / n / "1-rank_fields" / "scores.json").read_text() for n in ("one", "two"))
    assert one == two
