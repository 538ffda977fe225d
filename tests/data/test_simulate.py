"""Simulated logs as a source: the splits of one log, and the best values that a model can reach on them."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from recsys.data import simulate
from recsys.data.simulate import Simulated
from recsys.data.simulate_presets import PRESETS, make_config
from recsys.data.simulate_truth import Tally, auc
from recsys.data.simulate_world import World
from recsys.data.simulate_write import write
from recsys.data.sources import DataRoot
from recsys.errors import DataError, RecipeError
from recsys.plugin.registry import load_registry

ROOT = DataRoot(())


def test_splits_are_disjoint_parts_of_one_log():
    """Catches rows that are in two splits or in none, and a log that depends on which split is read first."""
    source = Simulated(ROOT, rows=10_001)
    parts = {split: source.scan(split).collect() for split in ("test", "valid", "train")}
    assert [len(parts[split]) for split in ("train", "valid", "test")] == [8001, 1000, 1000]
    whole, truth = World(source.config).rows(0, 10_001)
    assert_frame_equal(pl.concat([parts["train"], parts["valid"], parts["test"]]), whole, check_exact=True)
    assert_frame_equal(Simulated(ROOT, rows=10_001).scan("valid").collect(), parts["valid"], check_exact=True)
    assert_frame_equal(source.truth("valid").collect(), truth[8001:9001], check_exact=True)
    uniform = source.scan("uniform").collect()
    assert uniform["row_id"].equals(parts["test"]["row_id"])
    assert not uniform["user"].equals(parts["test"]["user"])
    with pytest.raises(DataError, match="Did you mean 'valid'"):
        source.scan("vald")


def test_a_large_log_is_streamed_and_equal(monkeypatch):
    """Catches blocks that lose rows, and a filter, selection or limit that the reader pushes down wrongly."""
    held = Simulated(ROOT, rows=20_000, preset="mnar", users=500, items=100)
    whole = held.scan("train").collect()
    monkeypatch.setattr(simulate, "BLOCK", 1500)
    lazy = Simulated(ROOT, rows=20_000, preset="mnar", users=500, items=100).scan("train")
    assert lazy.collect_schema() == whole.schema
    assert_frame_equal(lazy.collect(), whole, check_exact=True)
    assert_frame_equal(lazy.head(2000).collect(), whole.head(2000), check_exact=True)
    clicked = pl.col("y") == 1
    asked = lazy.filter(clicked).select("user", "row_id")
    expected = whole.filter(clicked).select("user", "row_id")
    assert_frame_equal(asked.collect(), expected, check_exact=True)
    assert_frame_equal(asked.collect(engine="streaming"), expected, check_exact=True)
    assert_frame_equal(asked.head(30).collect(), expected.head(30), check_exact=True)
    late = lazy.head(2000).filter(clicked).select("item")
    assert_frame_equal(late.collect(), whole.head(2000).filter(clicked).select("item"), check_exact=True)
    assert lazy.select(pl.len()).collect().item() == len(whole)


def test_splits_drawn_from_uniform_traffic():
    """Catches a uniform test split with the log's rows, a reference of other rows, and one that moves train."""
    plain = Simulated(ROOT, rows=20_000, preset="mnar", users=300, items=100)
    asked = Simulated(ROOT, rows=20_000, preset="mnar", users=300, items=100, uniform=("test",))
    for split in ("train", "valid"):
        assert_frame_equal(asked.scan(split).collect(), plain.scan(split).collect(), check_exact=True)
    assert_frame_equal(asked.scan("test").collect(), plain.scan("uniform").collect(), check_exact=True)
    assert asked.reference("test") == plain.reference("uniform") != plain.reference("test")
    assert asked.scan("test").select(pl.col("uniform", "observed").min()).collect().row(0) == (1, 1)


def test_a_log_of_clicks_is_streamed_and_equal(monkeypatch):
    """Catches a limit that counts rows which are then left out."""
    options = {"rows": 20_000, "preset": "delayed", "users": 500, "items": 100, "fields": 2}
    whole = Simulated(ROOT, **options).scan("train").collect()
    clicks = Simulated(ROOT, **options, clicks_only=True).scan("train").collect()
    assert_frame_equal(clicks, whole.filter(pl.col("click") == 1), check_exact=True)
    monkeypatch.setattr(simulate, "BLOCK", 4000)
    lazy = Simulated(ROOT, **options, clicks_only=True).scan("train")
    assert_frame_equal(lazy.head(1000).collect(), clicks.head(1000), check_exact=True)
    assert_frame_equal(lazy.collect(), clicks, check_exact=True)


@pytest.mark.parametrize("clicks_only", [False, True])
def test_what_train_rows_know_of_conversions(clicks_only, monkeypatch):
    """Catches a stream without its negatives, one that knows the future, and a final form that does not."""
    options = {"rows": 12_000, "preset": "delayed", "users": 500, "items": 100, "clicks_only": clicks_only}
    known, stream, final = (Simulated(ROOT, **options, form=form) for form in ("snapshot", "stream", "final"))
    now = known.scan("train").collect()
    want = [row | {"y": 0, "conversion": 0, "delay": 0.0} for row in now.iter_rows(named=True)]
    want += [row | {"ts": row["ts"] + round(row["delay"] * 86_400)} for row in now.iter_rows(named=True) if row["y"]]
    got = stream.scan("train").collect()
    assert got.to_dicts() == sorted(want, key=lambda row: (row["ts"], row["y"]))
    assert got.schema == now.schema
    assert (got["row_id"] == stream.truth("train").collect()["row_id"]).all()
    assert got["ts"].max() <= known.scan("valid").collect()["ts"].min(), "of the past"
    due = final.truth("train").collect()
    due = due.with_columns(y=pl.col("Z") * (pl.col("true_delay") <= 30) * final.scan("train").collect()["click"])
    assert final.scan("train").collect()["y"].to_list() == due["y"].to_list()
    assert due["y"].sum() > 1.1 * now["y"].sum()
    for split in ("valid", "test"):
        for other in (stream, final):
            assert_frame_equal(other.scan(split).collect(), known.scan(split).collect(), check_exact=True)
    monkeypatch.setattr(simulate, "BLOCK", 4000)
    pieces = Simulated(ROOT, **options, form="stream").scan("train")
    order = ["row_id", "y"]
    assert_frame_equal(pieces.collect().sort(order), got.sort(order), check_exact=True)
    assert_frame_equal(pieces.head(700).collect(), pieces.collect().head(700), check_exact=True)
    assert got["y"].head(700).sum() > 0
    with pytest.raises(RecipeError, match="no conversion comes late in the world 'mnar'"):
        Simulated(ROOT, preset="mnar", form="stream")


@pytest.mark.parametrize("name", ["confounded", "slate-pbm", "flip20"])
def test_a_true_propensity_is_the_chance_of_being_seen(name, monkeypatch):
    """Catches what the policy knows in the place of θ, in whole logs and in those that are read in pieces."""
    plain = Simulated(ROOT, rows=20_000, preset=name, users=300, items=100)
    true = Simulated(ROOT, rows=20_000, preset=name, users=300, items=100, true_propensity=True)
    for split in ("train", "uniform"):
        log, truth = true.scan(split).collect(), true.truth(split).collect()
        np.testing.assert_array_equal(log["propensity"], truth["theta"].cast(pl.Float32))
        assert_frame_equal(log.drop("propensity"), plain.scan(split).collect().drop("propensity", strict=False))
    log, truth = true.scan("train").collect(), true.truth("train").collect()
    if name != "flip20":  # whose rows are all shown
        assert np.abs(log["propensity"] - plain.scan("train").collect()["propensity"]).max() > 0.1
        ratio = truth["O"].to_numpy() / log["propensity"].to_numpy()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))
    monkeypatch.setattr(simulate, "BLOCK", 4000)
    assert_frame_equal(
        Simulated(ROOT, rows=20_000, preset=name, users=300, items=100, true_propensity=True).scan("train").collect(),
        log,
    )


def test_no_other_source_has_a_true_propensity():
    with pytest.raises(RecipeError, match="'files' has no option 'true_propensity'"):
        load_registry().check("source", {"use": "files", "path": "log.parquet", "true_propensity": True}, "data.source")


def test_identity_follows_every_option():
    """Catches a cache that serves one world's rows for another."""
    options = [
        {},
        {"rows": 60_000},
        {"seed": 8},
        {"preset": "easy"},
        {"users": 199},
        {"items": 99},
        {"fields": 3},
        {"uniform": ("test",)},
        {"randomised": 0.1},
        {"preset": "delayed"},
        {"preset": "delayed", "clicks_only": True},
        {"preset": "delayed", "form": "stream"},
        {"preset": "delayed", "form": "final"},
        {"preset": "conversion"},
        {"true_propensity": True},
    ]
    names = [Simulated(ROOT, **o).identity() for o in options]
    assert len(set(names)) == len(options)
    assert names[0] == Simulated(ROOT, rows=50_000, seed=7, preset="quickstart").identity()


@pytest.mark.parametrize("option", ["rows", "users", "items"])
def test_sizes_of_nothing_are_refused(option):
    """Catches a 0 that is taken for "not given", and splits without a row."""
    with pytest.raises(RecipeError, match=f"{option} is 0"):
        Simulated(ROOT, **{option: 0})
    smallest = Simulated(ROOT, rows=10)
    assert [smallest.scan(s).collect().height for s in ("train", "valid", "test")] == [8, 1, 1]
    assert np.isnan(smallest.best_auc("test"))


@pytest.mark.parametrize("name", ["quickstart", "mnar", "flip20", "delayed", "conversion", "slate-pbm"])
def test_reference_is_the_metric_of_the_true_probability(name):
    """Catches a reference of γ where exposure hides clicks, of other rows, or of the click's expectation."""
    source = Simulated(ROOT, rows=20_000, preset=name, users=300, items=100)
    for split in ("train", "test", "uniform"):
        truth, y = source.truth(split).collect(), source.scan(split).collect()["y"].to_numpy()
        p = truth["chance"].to_numpy()
        if name in ("quickstart", "mnar"):
            np.testing.assert_array_equal(p, (truth["gamma"] * truth["theta"]).to_numpy())
        reference = source.reference(split)
        assert reference["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
        assert reference["logloss"] == pytest.approx(log_loss(y, p), abs=1e-12)
        assert source.best_auc(split) == reference["auc"]


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60))
def test_auc_counts_pairs(rows):
    """Catches ties that count for or against, and an off-by-one in the ranks."""
    score = np.asarray([s for s, _ in rows], dtype=np.float64) / 7
    label = np.asarray([y for _, y in rows], dtype=np.int8)
    wins = [(a > b) + 0.5 * (a == b) for a in score[label == 1] for b in score[label == 0]]
    tally = Tally()
    tally.add(score[:20], label[:20])
    tally.add(score[20:], label[20:])
    assert tally.rate == pytest.approx(label.mean())
    if wins:
        assert auc(score, label) == pytest.approx(np.mean(wins), abs=1e-12)
        assert tally.auc == pytest.approx(np.mean(wins), abs=1e-12)
    else:
        assert np.isnan(auc(score, label))
        assert np.isnan(tally.auc)


def test_the_quickstart_world_rewards_interactions():
    """Catches a default world that a linear model solves, that none can learn, or whose ceiling is far from 0.8."""
    source = Simulated(ROOT)
    train, test = (source.scan(split).collect() for split in ("train", "test"))
    best = source.best_auc("test")
    assert 0.78 < best < 0.83
    assert 0.2 < train["y"].mean() < 0.3

    def logistic(crosses):
        def columns(frame):
            names = ["user", "item", *(f.name for f in source.config.fields)]
            crossed = [pl.concat_str([pl.col(a), pl.col(b)], separator="x").alias(a + b) for a, b in crosses]
            return frame.select(*(pl.col(n).cast(pl.String) for n in names), *crossed).to_numpy()

        encoder = OneHotEncoder(handle_unknown="ignore").fit(columns(train))
        model = LogisticRegression(C=0.1, max_iter=100).fit(encoder.transform(columns(train)), train["y"])
        return roc_auc_score(test["y"], model.decision_function(encoder.transform(columns(test))))

    linear = logistic([])
    assert 0.62 < linear < best - 0.08
    assert logistic([(p.left, p.right) for p in source.config.pairs]) > linear + 0.06


PINNED = {
    "quickstart": "d3a904556f7cc677",
    "easy": "7cf617c794d83bff",
    "mnar": "a5dfe66a7ac8dd76",
    "popular": "f1d9cafeebe8558c",
    "confounded": "7da3d995562c14a6",
    "drift": "8ce3c39b6e3f2e6a",
    "fair": "6f8a0ce50f7cb9cb",
    "leaky": "bf4ca323587dabc8",
}


@pytest.mark.parametrize("name", sorted(PINNED))
def test_presets_draw_the_same_clicks_for_ever(name):
    """Catches a change of a preset or of the simulator that does not raise its VERSION."""
    config = small(name)
    log, _ = World(config).rows(0, 2000)
    kept = ["row_id", "ts", "user", "item", *(f.name for f in config.fields), "y", "observed"]
    log = log.select(c for c in kept if c in log.columns)
    digest = hashlib.sha256(log.to_numpy(order="c").astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == PINNED[name]


MANIFESTS = {
    "quickstart": "ff736bd927c457e7",
    "easy": "1d840350f4a4e571",
    "mnar": "c5d02343af6b0920",
    "popular": "34f8f35f933e50a8",
    "confounded": "51f9e813f8104679",
    "drift": "676c0f5ace835122",
    "slate-plain": "780aacb44a10ab03",
    "slate-pbm": "42440eafb63a4b57",
    "slate-cascade": "5cf0ec8443ad3028",
    "delayed": "edd97cec1c8e51b8",
    "conversion": "a07b7998d3c17ab8",
    "flip20": "2802b5bde1818ed6",
    "pooled": "4cfce63c671d760e",
    "fair": "8d3a4a4a326320b4",
    "leaky": "2e530d50e4aae877",
}


@pytest.mark.parametrize("name", PRESETS)
def test_manifests_of_the_presets_are_the_same_for_ever(name, tmp_path):
    """Catches a change of any column of a log or of its uniform slice that does not raise the simulator's VERSION."""
    write(World(small(name)), tmp_path, 0, 2000, uniform=True)
    assert json.loads((tmp_path / "manifest.json").read_text())["log_sha256"][:16] == MANIFESTS[name]


def small(name):
    return replace(make_config(name, rows=2000, seed=1, users=3000, items=500), pilot_rows=1 << 12)
