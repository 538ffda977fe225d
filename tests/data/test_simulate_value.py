"""What fields of a simulated world are worth, and predictions against its truth, beside slow loops."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.simulate_entities import frequencies
from recsys.data.simulate_presets import make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_score import (
    excess_by_day,
    expected_auc,
    expected_ndcg,
    propensity_error,
    score_file,
)
from recsys.data.simulate_value import divergence, field_values, told
from recsys.data.simulate_world import World
from recsys.data.simulate_write import write
from recsys.errors import DataError


@pytest.fixture(scope="module")
def world():
    config = make_config("mnar", rows=40_000, seed=5, users=3000, items=500)
    return World(replace(config, pilot_rows=1 << 16))


def kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_a_value_is_the_loss_of_the_best_predictor_without_the_field(world):
    """Catches values drawn from another marginal, pairs left out, and gates of the wrong segment."""
    rows = 600
    found = {r["field"]: r for r in field_values(world, rows).rows(named=True)}
    free, truth = world.rows(0, rows, Region.UNIFORM)
    segment = world.tables.users.segment[free["user"].to_numpy()]
    for name in ("item_0", "user_1", "context_0", "gated"):
        table = world.tables.fields[name]
        spec = next(f for f in world.config.fields if f.name == name)
        weight = frequencies(table.cdf, table.entity)
        lost = []
        for n in range(rows):
            gate = 1.0 if not spec.gate else spec.gate[segment[n]]

            def part(v, n=n, gate=gate, table=table, spec=spec):
                total = gate * table.effect[v]  # of a gated field, the first segment's: its gate is 1
                for pair, (a, b) in world.tables.pairs:
                    if pair.left == spec.name:
                        total += a[v] @ b[free[pair.right][n]]
                    if pair.right == spec.name:
                        total += a[free[pair.left][n]] @ b[v]
                return total

            rest = truth["rho"][n] - part(free[name][n])
            # Exact over all values; the 32 draws of the function add their variance, less than a twentieth.
            without = sum(w / (1 + np.exp(-rest - part(v))) for v, w in enumerate(weight))
            lost.append(kl(truth["gamma"][n], without))
        assert found[name]["value"] == pytest.approx(np.mean(lost), rel=0.12)
        by_segment = [np.mean(np.asarray(lost)[segment == g]) for g in range(4)]
        assert [found[name][f"segment_{g}"] for g in range(4)] == pytest.approx(by_segment, rel=0.25)


def test_a_proxy_looks_dear_in_the_log_and_is_worth_nothing(world):
    """The world's point: catches a proxy of relevance, a copy with a value of its own, and noise that tells."""
    found = {r["field"]: r for r in field_values(world, 40_000).rows(named=True)}
    assert all(found[name]["value"] == 0.0 for name in ("noise_0", "noise_1", "copied", "proxy"))
    assert found["gated"]["segment_0"] > 4e-3
    assert max(found["gated"]["segment_2"], found["gated"]["segment_3"]) < 1e-15
    assert found["proxy"]["log"] > max(found[n]["log"] for n in ("user_0", "item_0", "context_0", "gated"))
    # Fifty items a decile: their own merits do not quite average out.
    assert abs(found["proxy"]["uniform"]) < 0.1 * found["item_0"]["uniform"]
    assert abs(found["noise_0"]["log"]) < 1e-4
    assert found["copied"]["uniform"] > 0.5 * found["gated"]["uniform"]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.05, 0.95)), min_size=2, max_size=30))
def test_what_a_field_tells_is_its_mutual_information_less_luck(rows):
    """Catches another logarithm, means weighted by values and not by rows, and luck that is not taken off."""
    value, p = np.asarray([v for v, _ in rows]), np.asarray([x for _, x in rows])

    def entropy(q):
        return -(q * np.log(q) + (1 - q) * np.log(1 - q))

    def information(values):
        inside = sum((values == v).mean() * entropy(p[values == v].mean()) for v in np.unique(values))
        return entropy(p.mean()) - inside

    luck = information(np.roll(value, len(value) // 2))
    assert told(value, p) == pytest.approx(information(value) - luck, abs=1e-9)


def test_divergence_is_finite_for_certain_predictions():
    assert divergence(np.asarray([0.3]), np.asarray([0.3])) == pytest.approx(0.0)
    assert divergence(np.asarray([0.2]), np.asarray([0.6])) == pytest.approx(kl(0.2, 0.6))
    assert np.isfinite(divergence(np.asarray([0.2, 0.0]), np.asarray([0.0, 1.0]))).all()


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.05, 0.95)), min_size=2, max_size=15))
def test_expected_auc_counts_pairs_by_their_probability(rows):
    """Catches ties that count for or against, and a row that is compared with itself."""
    score, p = np.asarray([float(s) for s, _ in rows]), np.asarray([x for _, x in rows])
    won = total = 0.0
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i != j:
                total += p[i] * (1 - p[j])
                won += p[i] * (1 - p[j]) * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    assert expected_auc(score, p) == pytest.approx(won / total, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=20))
def test_expected_ndcg_ranks_inside_groups(rows):
    """Catches ranks over all rows, a discount off by one rank, and an ideal order that is the found one."""
    group, score, p = (np.asarray([r[k] for r in rows]) for k in range(3))
    found = []
    for g in np.unique(group):
        inside = [(s, x) for h, s, x in rows if h == g]
        by_score = sorted(inside, key=lambda pair: -pair[0])
        best = sorted(inside, key=lambda pair: -pair[1])
        dcg = [sum(x / np.log2(k + 2) for k, (_, x) in enumerate(order[:3])) for order in (by_score, best)]
        found.append(dcg[0] / dcg[1])
    assert expected_ndcg(score, p, group, 3) == pytest.approx(np.mean(found), abs=1e-9)


def test_propensities_are_judged_by_what_was_shown(world):
    """Catches an error that is 0 for a θ̂ of half the size, and a z that a wrong θ̂ passes."""
    log, truth = world.rows(0, 40_000)
    theta, seen = truth["theta"].to_numpy(), log["observed"].to_numpy()
    error, z = propensity_error(theta, theta, seen)
    assert error == 0.0
    assert abs(z) < 4
    error, z = propensity_error(np.full(len(theta), theta.mean()), theta, seen)
    assert error == pytest.approx(np.sqrt(np.mean([(np.log(theta.mean()) - np.log(t)) ** 2 for t in theta])))
    assert abs(propensity_error(0.5 * theta, theta, seen)[1]) > 50


def test_a_file_of_predictions_is_compared_with_the_truth(world, tmp_path):
    """S10: catches rows of the log taken for rows of the uniform slice, and an order that matters."""
    write(world, tmp_path, 0, 40_000, uniform=True)
    truth = pl.read_parquet(tmp_path / "uniform_truth" / "*.parquet")
    assert len(truth) == 4000
    file = tmp_path / "scores.parquet"
    best = truth.select("row_id", score="gamma").sample(fraction=1.0, shuffle=True, seed=1)
    best.write_parquet(file)
    scored = score_file(file, tmp_path)
    assert scored.rows == 4000
    assert scored.excess == pytest.approx(0.0, abs=1e-12)
    assert scored.auc == scored.best_auc
    best.with_columns(pl.col("score") * 0.5).write_parquet(file)
    scored = score_file(file, tmp_path)
    gamma = truth["gamma"].to_numpy()
    assert scored.excess == pytest.approx(np.mean([kl(g, 0.5 * g) for g in gamma]))
    assert scored.auc == pytest.approx(scored.best_auc)
    pl.read_parquet(tmp_path / "truth" / "*.parquet").select("row_id", score="chance").write_parquet(file)
    with pytest.raises(DataError, match="36000 of 40000 rows are not in"):
        score_file(file, tmp_path)
    assert score_file(file, tmp_path, "log").excess == pytest.approx(0.0, abs=1e-12)
    pl.concat([best, best.head(7)]).write_parquet(file)
    with pytest.raises(DataError, match="7 rows are there more than once"):
        score_file(file, tmp_path)
    best.drop("row_id").write_parquet(file)
    with pytest.raises(DataError, match="no column row_id"):
        score_file(file, tmp_path)
    best.write_parquet(file)
    with pytest.raises(DataError, match="no truth to compare with"):
        score_file(file, tmp_path / "elsewhere")


def test_a_jump_shows_in_the_excess_of_its_day(tmp_path):
    """Catches days of the clock of another zone, and predictions that are joined to the rows of other days."""
    config = replace(make_config("drift", rows=30_000, seed=5, users=300, items=100), pilot_rows=1 << 14, days=10.0)
    write(World(config), tmp_path, 0, 30_000)
    log, truth = (pl.read_parquet(tmp_path / t / "*.parquet") for t in ("log", "truth"))
    early = pl.when(pl.col("row_id") < 15_000).then(pl.col("chance")).otherwise(pl.col("chance") * 0.5)
    truth.select("row_id", score=early).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(tmp_path / "s.parquet")
    days = excess_by_day(tmp_path / "s.parquet", tmp_path, "log")
    assert days["day"].to_list() == list(range(10)) or days["day"].to_list() == list(range(11))
    assert days["rows"].sum() == 30_000
    assert days.filter(pl.col("day") < 5)["excess"].max() == pytest.approx(0.0, abs=1e-12)
    for day in (5, 7):
        on = truth.filter((log["ts"] - log["ts"][0]) // 86_400 == day)
        assert days["excess"][day] == pytest.approx(np.mean([kl(p, p / 2) for p in on["chance"]]))
