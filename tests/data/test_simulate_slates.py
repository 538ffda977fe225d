"""Simulated lists: a policy with known propensities, and clicks that depend on the place. S numbers as elsewhere."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys.data import simulate_world
from recsys.data.simulate_config import Items, Pair, SimulatedField, Slate, WorldConfig
from recsys.data.simulate_presets import make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_slates import _candidates, _numbers, _popularity, plackett_luce
from recsys.data.simulate_world import World
from recsys.errors import RecipeError

ROWS = 60_000
DECAY = (0.5, 1.0, 1.5)
FIELDS = (
    SimulatedField("u", "user", 12, strength=0.5),
    SimulatedField("i", "item", 9, strength=0.5, gate=(0.0, 0.0, 1.0, 1.0)),
    SimulatedField("device", "context", 3, strength=0.4),
    SimulatedField("n", "noise", 20),
    SimulatedField("again", "copy", of="i", error=0.2),
)
PBM = WorldConfig(
    rows=ROWS,
    seed=3,
    users=2000,
    items=200,
    dim=4,
    target_ctr=0.1,
    fields=FIELDS,
    pairs=(Pair("u", "i", 0.7),),
    item=Items(season=0.3, jump=0.5, drift=1 / 30),
    slate=Slate("pbm", length=6, candidates=20, popularity=1.0, decay=DECAY, device="device"),
    randomised=0.25,
    log=("propensity", "popularity", "uniform"),
    pilot_rows=1 << 16,
)
CASCADE = replace(PBM, slate=Slate("cascade", length=6, candidates=20, popularity=1.0, trust=0.0, stop=0.6))


@pytest.fixture(scope="module", params=["pbm", "cascade"])
def drawn(request):
    world = World(PBM if request.param == "pbm" else CASCADE)
    return world, *world.rows(0, ROWS)


def z(values, target=0.0):
    return (np.mean(values) - target) / (np.std(values) / np.sqrt(len(values)))


def per_request(values, length=6):
    return np.asarray(values).reshape(-1, length)


def test_pieces_cannot_change_a_value(drawn, monkeypatch):
    """S2: catches requests that are cut where rows are, and draws that depend on the requests drawn beside them."""
    world, *frames = drawn
    for chunk in (1, 777):
        monkeypatch.setattr(simulate_world, "CHUNK", chunk)
        for start, stop in ((0, 1), (5, 8), (31_003, 31_100)):
            for side, frame in enumerate(world.rows(start, stop)):
                assert_frame_equal(frame, frames[side][start:stop], check_exact=True)
    empty = world.rows(7, 7)
    for side in (0, 1):
        assert empty[side].is_empty()
        assert empty[side].schema == frames[side].schema


def test_a_request_is_one_list(drawn):
    """Catches places out of order, an item twice in a list, and context that is drawn for each row."""
    _, log, _ = drawn
    assert log["position"].to_list() == [k % 6 for k in range(ROWS)]
    assert log["request"].to_list() == [k // 6 for k in range(ROWS)]
    same = log.group_by("request").agg(
        pl.col("user", "ts", "device", "u", "uniform").n_unique(), pl.col("item").n_unique()
    )
    assert same.select(pl.col("user", "ts", "device", "u", "uniform").max()).row(0) == (1, 1, 1, 1, 1)
    assert same["item"].min() == 6
    assert log.group_by("request").agg(pl.col("n").n_unique())["n"].max() > 1


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=7), st.integers(1, 7), st.integers(0, 10_000))
def test_plackett_luce_is_drawing_without_replacement(score, length, seed):
    """Catches probabilities of the whole list, of the wrong item, or with what was shown still in the denominator."""
    length = min(length, len(score))
    noise = np.random.default_rng(seed).gumbel(size=len(score))
    place, chance = plackett_luce(np.asarray([score]), noise[None], length)
    left = list(range(len(score)))
    for k in range(length):
        best = max(left, key=lambda j: score[j] + noise[j])
        assert place[0, k] == best
        assert chance[0, k] == pytest.approx(np.exp(score[best]) / sum(np.exp(score[j]) for j in left))
        left.remove(best)


def test_propensities_are_those_of_the_policy(drawn):
    """Catches a policy that chooses by something else than it logs: Σ_j 1[j shown]/π_j counts what was left."""
    _, log, truth = drawn
    pi = per_request(truth["pi_k"])
    np.testing.assert_allclose(log["propensity"].to_numpy(), truth["pi_k"].to_numpy(), rtol=1e-6)
    for k in range(6):
        assert abs(z(1 / pi[:, k], 20 - k)) < 4
    by_chance = per_request(log["uniform"])[:, 0] == 1
    np.testing.assert_allclose(pi[by_chance], np.tile(1 / np.arange(20, 14, -1), (by_chance.sum(), 1)))
    assert abs(z(by_chance, 0.25)) < 4
    assert pi[~by_chance, 0].std() > 0.02


def test_a_cold_policy_without_error_sorts_by_what_it_wants():
    """Catches a policy that looks at another item's relevance, another day's popularity, or the intercept."""
    slate = Slate("pbm", length=5, candidates=20, noise=0.0, temperature=1e-3, relevance=0.7, popularity=0.4)
    _, truth = World(replace(PBM, slate=slate, randomised=0.0)).rows(0, 5000)
    wanted = per_request(0.7 * truth["rho"] + 0.4 * np.log(truth["pop"]), 5)
    assert (np.diff(wanted, axis=1) < 0.02).all()
    assert per_request(truth["pi_k"], 5).mean() > 0.98


def test_candidates_follow_the_days_popularity():
    """Catches a distribution of another day, and candidates that are drawn again where nothing was wrong."""
    world = World(PBM)
    request = np.arange(20_000)
    nobody = np.zeros(20_000, dtype=bool)
    for day in (3, 40):
        found = _candidates(world.tables, PBM.slate, request, np.full(20_000, day + 0.5), nobody, Region.LOG)
        assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
        expected = 20_000 * np.diff(_popularity(world.tables, day), prepend=0.0)
        count = np.bincount(found[:, 0], minlength=200)
        assert ((count - expected) ** 2 / expected).sum() < 199 + 4 * np.sqrt(2 * 199)
        other = 20_000 * np.diff(_popularity(world.tables, 43 - day), prepend=0.0)
        assert ((count - other) ** 2 / other).sum() > 1000
    assert _numbers(PBM.slate, request[-1:]).max() < 1 << 36


def test_few_items_are_all_candidates():
    """Catches collisions that go on for ever."""
    config = replace(PBM, rows=600, items=20, pilot_rows=1 << 10)
    _, truth = World(config).rows(0, 600)
    assert truth["pi_k"].is_not_nan().all()
    tables = World(config).tables
    time, chance = np.zeros(100), np.zeros(100, dtype=bool)
    found = _candidates(tables, config.slate, np.arange(100), time, chance, Region.LOG)
    assert (np.sort(found, axis=1) == np.arange(20)).all()


def test_examination_follows_its_model(drawn):
    """Catches the wrong device's decay, a cascade that counts its own place, and places that revive."""
    world, log, truth = drawn
    theta, seen, click = (per_request(v) for v in (truth["theta"], truth["O"], log["y"]))
    slate, gamma = world.config.slate, per_request(truth["gamma"])
    for r in [*range(50), *range(9_950, 10_000)]:
        goes_on = 1.0
        for k in range(6):
            trust = slate.trust / (k + 1)
            attracts = gamma[r, k] + (1 - gamma[r, k]) * trust
            expected = goes_on if slate.click == "cascade" else (k + 1) ** -DECAY[log["device"][6 * r]]
            assert theta[r, k] == pytest.approx(expected, rel=1e-12)
            assert truth["chance"][6 * r + k] == pytest.approx(expected * attracts, rel=1e-12)
            goes_on *= 1 - slate.stop * attracts
    assert (click <= seen).all()
    if slate.click == "cascade":
        ended = seen[:, :-1] > seen[:, 1:]
        assert (seen[:, :-1] >= seen[:, 1:]).all()
        assert click[:, :-1][ended].all()
        assert abs(z(ended[(click[:, :-1] == 1)], 0.6)) < 4
        assert log["y"].to_numpy()[truth["R"].to_numpy() == 0].max() == 0
    else:
        irrelevant = (per_request(truth["R"]) == 0) & (seen == 1)
        for k in range(6):
            assert abs(z(click[irrelevant[:, k], k], 0.1 / (k + 1))) < 4


def test_rates_are_those_asked_for(drawn):
    """S3, S5: catches an intercept that forgets the places, and clicks that are not drawn from `chance`."""
    _, log, truth = drawn
    assert abs(z(per_request(log["y"]).mean(axis=1), 0.1)) < 4
    chance, y = truth["chance"].to_numpy(), log["y"].to_numpy()
    cell = 10 * (np.arange(ROWS) % 6) + np.searchsorted(np.quantile(chance, np.arange(0.1, 1.0, 0.1)), chance)
    error = np.bincount(cell, weights=y - chance, minlength=60)
    spread = np.sqrt(np.bincount(cell, weights=chance * (1 - chance), minlength=60))
    assert np.abs(error / np.maximum(spread, 1e-9)).max() < 4.5


def test_the_uniform_slice_is_blind_to_popularity_and_place(drawn):
    """S6: catches policy or examination that survives in the uniform slice."""
    world, log, _ = drawn
    free, free_truth = world.rows(0, 30_000, Region.UNIFORM)
    assert free["y"].equals(free_truth["R"].alias("y"))
    assert free_truth["theta"].min() == 1.0
    assert free["uniform"].min() == 1
    count = np.bincount(free["item"], minlength=200)
    assert ((count - 150) ** 2 / 150).sum() < 199 + 4 * np.sqrt(2 * 199)
    for frame, far in ((free, False), (log.filter(pl.col("uniform") == 0), True)):
        r = np.corrcoef(frame["popularity"], frame["position"])[0, 1] * np.sqrt(len(frame))
        assert (r < -10) if far else (abs(r) < 4)


def test_click_rates_by_place_mislead_unless_places_are_given_by_chance():
    """S7: catches a policy so close to chance that nothing needs to be corrected."""
    world = World(
        replace(
            PBM, slate=Slate("pbm", length=6, candidates=20, decay=(1.0,), trust=0.0, temperature=0.3), randomised=0.5
        )
    )
    log, _ = world.rows(0, 2 * ROWS)
    rate = {}
    for by_chance in (0, 1):
        y = per_request(log.filter(pl.col("uniform") == by_chance)["y"])
        rate[by_chance] = y.mean(axis=0) / y[:, 0].mean()
    true = 1 / np.arange(1, 7)
    assert (rate[0][1:] < 0.95 * true[1:]).all()
    np.testing.assert_allclose(rate[1], true, rtol=0.25)
    assert np.abs(rate[1] - true)[1:].mean() < 0.5 * np.abs(rate[0] - true)[1:].mean()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slate": Slate(length=30, candidates=20)}, "30 places for 20 candidates"),
        ({"slate": Slate(candidates=201)}, "201 candidates of 200 items"),
        ({"slate": Slate(device="devise")}, "Did you mean 'device'"),
        ({"slate": Slate(decay=(1.0, 2.0), device="device")}, "has 2 numbers"),
        ({"slate": Slate(decay=(1.0, 2.0))}, "has 2 numbers"),
        ({"exposure": make_config("mnar", rows=10, seed=0).exposure}, "leave out exposure"),
        ({"randomised": 1.5}, "randomised is 1.5"),
        ({"clicks_only": True}, "clicks alone"),
    ],
)
def test_impossible_lists_are_refused(changes, text):
    with pytest.raises(RecipeError, match=text):
        replace(PBM, **changes)
