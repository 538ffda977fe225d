"""The planted structure is really there, and nothing else is. S numbers name the simulator's self-tests."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recsys.data import simulate_world
from recsys.data.simulate_config import Exposure, Items, Pair, SimulatedField, WorldConfig
from recsys.data.simulate_entities import frequencies
from recsys.data.simulate_presets import PRESETS, make_config, plain_fields, preset
from recsys.data.simulate_random import Draws, Region, Stream
from recsys.data.simulate_truth import auc
from recsys.data.simulate_world import World
from recsys.errors import RecipeError

ROWS = 200_000
FIELDS = (
    SimulatedField("u", "user", 12, strength=0.5, gate=(1.0, 0.5, 0.0, 2.0)),
    SimulatedField("i", "item", 9, strength=0.5, gate=(0.0, 0.0, 1.0, 1.0)),
    SimulatedField("c", "context", 20, strength=0.6),
    SimulatedField("g", "context", 20, strength=0.6, gate=(1.0, 1.0, 0.0, 0.0)),
    SimulatedField("n", "noise", 20),
    SimulatedField("again", "copy", of="c", error=0.2),
    SimulatedField("decile", "proxy", 10, error=0.1),
    SimulatedField("told", "leak", error=0.05),
)
EVERYTHING = WorldConfig(
    rows=ROWS,
    seed=3,
    users=3000,
    items=500,
    dim=4,
    target_ctr=0.1,
    confounder=0.4,
    attribute_leak=0.3,
    fields=FIELDS,
    pairs=(Pair("u", "i", 0.7), Pair("c", "i", 0.5, rank=3)),
    item=Items(season=0.3, jump=0.5, drift=1 / 30),
    exposure=Exposure(popularity=0.8, relevance=0.4, confounder=0.3, attribute=0.5),
    log=("observed", "propensity", "popularity", "uniform", "attribute"),
    pilot_rows=1 << 17,
)


@pytest.fixture(scope="module")
def world():
    return World(EVERYTHING)


@pytest.fixture(scope="module")
def frames(world):
    return world.rows(0, ROWS)


def z(values, target=0.0):
    return (np.mean(values) - target) / (np.std(values) / np.sqrt(len(values)))


def mnar(**changes):
    config = make_config("mnar", rows=ROWS, seed=5, users=4000, items=800)
    return World(replace(config, pilot_rows=1 << 17, target_ctr=0.1, **changes))


def test_chunks_cannot_change_a_value(world, frames, monkeypatch):
    """S2: catches state, and vector code whose last bits depend on the length or alignment of the array."""
    for side in (0, 1):
        whole = frames[side]
        for row in (0, 1, 777, 65_535, 65_536, 131_073):
            assert_frame_equal(world.rows(row, row + 1)[side], whole[row : row + 1], check_exact=True)
    monkeypatch.setattr(simulate_world, "CHUNK", 777)
    for side, frame in enumerate(world.rows(60_001, 70_000)):
        assert_frame_equal(frame, frames[side][60_001:70_000], check_exact=True)


def test_click_rate_and_exposure_probabilities(frames):
    """S3: catches an intercept set on something other than mean γ·θ, and a θ that is not P(O = 1)."""
    log, truth = frames
    assert abs(z(log["y"].to_numpy(), EVERYTHING.target_ctr)) < 4
    assert abs(z((truth["O"] / truth["theta"]).to_numpy(), 1.0)) < 4
    assert abs(z((truth["R"] - truth["gamma"]).to_numpy())) < 4
    assert truth["theta"].min() >= 0.01
    assert truth["theta"].max() <= 0.95
    assert log["y"].equals((truth["R"] * truth["O"]).alias("y"), check_names=True)
    assert log["observed"].equals(truth["O"].alias("observed"))


def by_value(residual, value, size):
    """χ² of a residual's mean by value, as a deviation from its expectation in standard deviations."""
    count = np.bincount(value, minlength=size)
    total = np.bincount(value, weights=residual, minlength=size)
    chi2 = (total**2 / np.maximum(count, 1)).sum() / residual.var()
    return (chi2 - (count > 0).sum()) / np.sqrt(2 * (count > 0).sum())


def test_noise_says_nothing_and_gates_close(world, frames):
    """S4: catches noise that moves the click, a gate that is ignored, and one that is closed everywhere."""
    log, truth = frames
    segment = world.tables.users.segment[log["user"].to_numpy()]
    relevant = truth["R"].to_numpy().astype(float)
    for g in range(4):
        inside = segment == g
        residual = relevant[inside] - relevant[inside].mean()
        spread = {name: by_value(residual, log[name].to_numpy()[inside], 20) for name in ("n", "c", "g")}
        assert abs(spread["n"]) < 4
        assert spread["c"] > 10
        assert (spread["g"] > 10) if g < 2 else (abs(spread["g"]) < 4)


def test_label_is_exposure_times_relevance(frames):
    """S5: catches O and R drawn from one stream, which leaves both margins right and their product wrong."""
    _, truth = frames
    theta, gamma = truth["theta"].to_numpy(), truth["gamma"].to_numpy()
    cell = 10 * decile(theta) + decile(gamma)

    def worst(label):
        error = np.bincount(cell, weights=label - theta * gamma, minlength=100)
        return np.abs(error / np.sqrt(np.bincount(cell, weights=theta * gamma * (1 - theta * gamma)))).max()

    assert worst((truth["R"] * truth["O"]).to_numpy()) < 4.5
    same = Draws.span(EVERYTHING.seed, 0, ROWS).uniform(Stream.RELEVANCE)
    assert worst(((same < theta) & (same < gamma)).astype(float)) > 10


def decile(values):
    return np.searchsorted(np.quantile(values, np.arange(0.1, 1.0, 0.1)), values)


def test_uniform_slice_does_not_follow_popularity(world):
    """S6: catches exposure that survives in the uniform slice, and a slice that repeats the log's draws."""
    shown_by = {}
    for region in (Region.LOG, Region.UNIFORM):
        _, truth = world.rows(0, 50_000, region)
        shown_by[region] = truth
        pop = np.log(truth["pop"].to_numpy())
        if region is Region.LOG:
            assert np.corrcoef(pop, truth["O"])[0, 1] > 10 / np.sqrt(50_000)
        else:
            assert truth["O"].min() == 1
            assert truth["theta"].min() == 1.0
    same = (shown_by[Region.LOG]["h"] == shown_by[Region.UNIFORM]["h"]).mean()
    assert same < 0.01


@pytest.mark.parametrize(("name", "gains"), [("popular", True), ("mnar", False)])
def test_in_a_popular_world_alone_popular_items_are_hardly_better(name, gains):
    """Catches a world where whoever divides clicks by the item's clicks has nothing to gain, and one where all have."""
    config = replace(make_config(name, rows=ROWS, seed=5, users=200, items=100), pilot_rows=1 << 16)
    log, truth = World(config).rows(0, ROWS)
    item, relevant, chance = log["item"].to_numpy(), truth["R"].to_numpy(), truth["chance"].to_numpy()
    clicked = np.bincount(item, chance, 100) / np.bincount(item, minlength=100)
    gain = auc(chance / clicked[item], relevant) - auc(chance, relevant)
    assert gain > 0.005 if gains else gain < -0.005


def losses(world):
    """Ideal, naive and inverse-propensity log-losses by row of one fixed, imperfect predictor."""
    log, truth = world.rows(0, ROWS)
    rho, gamma, y = truth["rho"].to_numpy(), truth["gamma"].to_numpy(), log["y"].to_numpy()
    x = 0.7 * rho
    one, zero = np.logaddexp(0, -x), np.logaddexp(0, x)

    def mixed(t):
        return t * one + (1 - t) * zero

    return truth, y, mixed, mixed(gamma)


def test_naive_loss_fails_and_inverse_propensity_does_not():
    """S7, S8: catches a world whose exposure is too mild to tell a debiased method from a naive one."""
    truth, y, mixed, ideal = losses(mnar())
    assert z(mixed(y) - ideal) < -50
    assert abs(z(mixed(y / truth["theta"].to_numpy()) - ideal)) < 4


def test_an_unlogged_trait_defeats_propensities_without_it():
    """S8: catches a confounder that only enters exposure or only the click, and so confounds nothing."""
    exposure = Exposure(confounder=0.8, relevance=0.0, popularity=0.5)
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)

    def bias(confounder):
        truth, y, mixed, ideal = losses(mnar(exposure=exposure, confounder=confounder))
        theta, h = truth["theta"].to_numpy(), truth["h"].to_numpy()
        base = np.log(theta / (1 - theta)) - exposure.confounder * h
        without_h = sum(w / (1 + np.exp(-base - 0.8 * n)) for n, w in zip(nodes, weights / weights.sum(), strict=True))
        assert abs(z(mixed(y / theta) - ideal)) < 4
        return z(mixed(y / without_h) - ideal)

    assert abs(bias(0.0)) < 4
    assert abs(bias(0.8)) > 10


@pytest.mark.parametrize("name", PRESETS)
def test_truth_is_not_in_the_log(name):
    """S9: catches a truth column that a model could be trained on, and a column that a loss would miss."""
    config = replace(make_config(name, rows=1000, seed=1, users=300, items=200), pilot_rows=1 << 12, randomised=0.2)
    log, truth = World(config).rows(0, 1000)
    assert set(log.columns) & set(truth.columns) == {"row_id"}
    lists = ["request", "position"] if config.slate else []
    later = ["click", "conversion", "delay", "elapsed"] if config.conversion else []
    ids, fields = ["row_id", "ts", *lists, "user", "item"], [f.name for f in config.fields]
    assert log.columns == [*ids, *fields, "y", *config.log, *later]
    assert (log["row_id"] == truth["row_id"]).all()
    # Names apart, no column may say the truth under another one; a propensity is what its policy itself knows.
    for told in log.drop("row_id", "propensity", strict=False).iter_columns():
        for true in truth.select("rho", "gamma", "chance").iter_columns():
            assert not np.allclose(told.to_numpy().astype(float), true.to_numpy())


def test_nothing_beats_the_true_probability():
    """S10: catches labels that are drawn from something other than γ."""
    world = World(preset("quickstart"))
    log, truth = world.rows(0, 50_000)
    y, gamma, rho = log["y"].to_numpy(), truth["gamma"].to_numpy(), truth["rho"].to_numpy()
    loss = -np.where(y == 1, np.log(gamma), np.log1p(-gamma))
    entropy = -(gamma * np.log(gamma) + (1 - gamma) * np.log1p(-gamma))
    assert abs(z(loss - entropy)) < 4
    assert truth["theta"].min() == 1.0
    first = world.tables.user_offset[log["user"].to_numpy()] + world.tables.item_offset[log["item"].to_numpy()]
    for fake in (0.8 * rho, 1.25 * rho, rho + 0.2, first - 1.5):
        assert (np.logaddexp(0, fake) - y * fake).mean() > loss.mean()
    noisy = rho + 0.3 * np.random.default_rng(0).normal(size=len(rho))
    assert auc(rho, y) > auc(noisy, y) > auc(first, y) + 0.05


def test_rho_and_theta_follow_the_formula(world, frames):
    """Catches a term left out, folded twice, taken at the wrong time, or gathered from a neighbour's entry."""
    log, truth = frames
    cal, x = world.calibration, EVERYTHING.exposure
    for row in [0, 5, 99_999, 100_001, *range(150_000, 150_020)]:
        r, t = log.row(row, named=True), truth.row(row, named=True)
        u, i, day = r["user"], r["item"], row / ROWS * EVERYTHING.days
        w = world.tables.items.speed[i] * day
        q = np.cos(w) * world.tables.items.taste[i] + np.sin(w) * world.tables.items.taste_later[i]
        score = (
            world.tables.users.bias[u]
            + world.tables.items.bias[i]
            + 0.5 * np.sqrt(4) * (world.tables.users.taste[u] @ q)
        )
        g = int(world.tables.users.segment[u])
        for spec in FIELDS[:4]:
            table = world.tables.fields[spec.name].effect
            score += table[g * spec.cardinality + r[spec.name]] if spec.gate else table[r[spec.name]]
        for pair, (a, b) in world.tables.pairs:
            score += sum(a[r[pair.left], k] * b[r[pair.right], k] for k in range(pair.rank))
        score += 0.4 * t["h"]
        assert t["rho"] == pytest.approx(score + cal.intercept, abs=1e-12)
        level = -0.8 * np.log(world.tables.items.rank[i] + 1)
        level += (
            0.3 * np.sin(2 * np.pi * (day / 7 + world.tables.items.phase[i]))
            + (day >= 30) * 0.5 * world.tables.items.jump[i]
        )
        assert np.log(t["pop"]) == pytest.approx(level, abs=1e-12)
        logit = x.bias + 0.8 * (level - cal.log_popularity_mean) + 0.4 * (score - cal.score_mean) / cal.score_sd
        logit += 0.3 * t["h"] + 0.5 * (t["attr"] == 1)
        assert t["theta"] == pytest.approx(min(max(1 / (1 + np.exp(-logit)), 0.01), 0.95), abs=1e-12)
        assert r["ts"] == simulate_world.START + round(day * 86_400)


def test_effects_are_centred_and_as_strong_as_asked(world):
    """Catches a pair that leaks into a main effect, and a strength that depends on the luck of a small field."""
    for spec in FIELDS[:4]:
        table = world.tables.fields[spec.name]
        weight = frequencies(table.cdf, table.entity)
        assert weight.sum() == pytest.approx(1.0)
        factor = spec.gate or (1.0,)
        for g, row in zip(factor, table.effect.reshape(len(factor), -1), strict=True):
            assert weight @ row == pytest.approx(0.0, abs=1e-12)
            assert np.sqrt(weight @ row**2) == pytest.approx(spec.strength * g)
    for pair, (a, b) in world.tables.pairs:
        effect = a @ b.T
        left, right = (
            frequencies(world.tables.fields[n].cdf, world.tables.fields[n].entity) for n in (pair.left, pair.right)
        )
        np.testing.assert_allclose(left @ effect, 0.0, atol=1e-12)
        np.testing.assert_allclose(effect @ right, 0.0, atol=1e-12)
        assert np.sqrt(left @ effect**2 @ right) == pytest.approx(pair.strength)
        assert np.linalg.matrix_rank(effect) == pair.rank


def test_copy_proxy_and_leak_err_as_often_as_asked(world, frames):
    """Catches a copy that is not one-to-one, a decile of the wrong item, and errors at the wrong rate."""
    log, _ = frames
    order = world.tables.fields["again"].order
    assert sorted(order.tolist()) == list(range(20))
    assert (order != np.arange(20)).any()
    same = (log["again"].to_numpy() == order[log["c"].to_numpy()]).astype(float)
    assert abs(z(same, 0.8 + 0.2 / 20)) < 4
    decile_of = world.tables.items.rank[log["item"].to_numpy()] // 50
    assert abs(z((log["decile"].to_numpy() == decile_of).astype(float), 0.9 + 0.1 / 10)) < 4
    assert abs(z((log["told"] != log["y"]).to_numpy().astype(float), 0.05)) < 4


def test_row_values_follow_their_zipf_law(frames):
    """Catches a distribution function that is off by one value."""
    weight = np.arange(1, 21) ** -0.8
    count = np.bincount(frames[0]["c"].to_numpy(), minlength=20)
    expected = ROWS * weight / weight.sum()
    assert ((count - expected) ** 2 / expected).sum() < 19 + 4 * np.sqrt(38)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"target_ctr": 1.0}, "target_ctr is 1.0"),
        ({"fields": (SimulatedField("y", "noise"),)}, "used twice: y"),
        ({"fields": plain_fields(181)}, "at most 180"),
        ({"fields": (SimulatedField("a", "context", gate=(1.0,)),)}, "1 factors for 4 segments"),
        ({"fields": (SimulatedField("a", "copy", of="a"),)}, "no such field 'a'"),
        ({"pairs": (Pair("hour", "devices", 1.0),)}, "Did you mean 'device'"),
        ({"pairs": (Pair("hour", "noise_row", 1.0),)}, "no such field 'noise_row'"),
    ],
)
def test_impossible_worlds_are_refused(changes, text):
    with pytest.raises(RecipeError, match=text):
        replace(preset("quickstart"), **changes)


def test_unknown_world_and_unreachable_click_rate():
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        preset("quikstart")
    with pytest.raises(RecipeError, match="cannot be reached"):
        mnar(exposure=Exposure(bias=-6.0))


def test_rows_of_nothing_keep_their_columns(world, frames):
    """Catches an empty range that loses the schema that readers are promised."""
    for side, frame in enumerate(world.rows(5, 5)):
        assert frame.schema == frames[side].schema
        assert isinstance(frame, pl.DataFrame)
        assert frame.is_empty()
