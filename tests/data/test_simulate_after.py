"""What becomes of simulated clicks: flips, judgements, conversions; and what holds in every named world."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recsys.data import simulate_world
from recsys.data.simulate_config import Conversion, Exposure, Flip, Pooling
from recsys.data.simulate_presets import ABOUT, PRESETS, make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_world import World
from recsys.errors import RecipeError

ROWS = 100_000


def small(name, rows=ROWS, **changes):
    config = make_config(name, rows=rows, seed=5, users=3000, items=500)
    return World(replace(config, pilot_rows=1 << 16, **changes))


def z(values, target=0.0):
    return (np.mean(values) - target) / (np.std(values) / np.sqrt(len(values)))


def worst_cell(error, variance, by, cells=20):
    cell = np.searchsorted(np.quantile(by, np.arange(1, cells) / cells), by)
    total = np.bincount(cell, weights=error, minlength=cells)
    return np.abs(total / np.sqrt(np.maximum(np.bincount(cell, weights=variance, minlength=cells), 1e-9))).max()


@pytest.mark.parametrize("name", PRESETS)
def test_labels_are_drawn_with_the_chance_that_is_told(name):
    """S5, S10: catches a chance that leaves out a step between relevance and label, in log or uniform slice."""
    world = small(name, rows=40_000, randomised=0.2)
    for region in (Region.LOG, Region.UNIFORM):
        log, truth = world.rows(0, 40_000, region)
        p, y = truth["chance"].to_numpy(), log["y"].to_numpy()
        assert worst_cell(y - p, p * (1 - p), p) < 4.5
        if region is Region.UNIFORM and name not in ("delayed", "conversion"):
            assert log["y"].equals(truth["R"].alias("y"))


@pytest.mark.parametrize("name", PRESETS)
def test_pieces_cannot_change_a_value_of_any_world(name, monkeypatch):
    """S2: catches state between rows, in every world."""
    world = small(name, rows=5000, randomised=0.1)
    whole = world.rows(0, 5000)
    monkeypatch.setattr(simulate_world, "CHUNK", 97)
    for start, stop in ((0, 1), (1234, 1567), (4999, 5000)):
        for side, frame in enumerate(world.rows(start, stop)):
            assert_frame_equal(frame, whole[side][start:stop], check_exact=True)


def test_every_world_says_what_it_is_for():
    assert list(ABOUT) == list(PRESETS)


def test_the_logged_propensity_knows_all_but_the_trait():
    """S8: catches a propensity that tells the unlogged trait, and one that is not P(O = 1 | what is known)."""
    world = small("confounded")
    log, truth = world.rows(0, ROWS)
    told, theta, shown = log["propensity"].to_numpy(), truth["theta"].to_numpy(), truth["O"].to_numpy()
    assert worst_cell(shown - told, told * (1 - told), told) < 4.5
    left = np.log(theta / (1 - theta)) - np.log(told / (1 - told))
    assert np.corrcoef(left, truth["h"])[0, 1] > 0.9
    assert abs(z(told * truth["h"].to_numpy())) < 4
    plain, true = small("mnar").rows(0, 1000)
    np.testing.assert_allclose(plain["propensity"], true["theta"], rtol=1e-6)


def test_randomised_rows_are_shown_whatever_they_are_worth():
    """Catches rows that are called uniform and were chosen all the same."""
    log, truth = small("mnar", randomised=0.3).rows(0, ROWS)
    uniform = log["uniform"].to_numpy() == 1
    assert abs(z(uniform, 0.3)) < 4
    assert truth["theta"].to_numpy()[uniform].min() == log["propensity"].to_numpy()[uniform].min() == 1.0
    pop = np.log(truth["pop"].to_numpy())
    assert np.corrcoef(pop, truth["O"])[0, 1] > 0.1
    assert abs(np.corrcoef(pop, uniform)[0, 1]) < 4 / np.sqrt(ROWS)


def test_popularity_is_a_share_of_the_days_most_popular_item():
    """Catches popularity of another day, and truth under the name of a log column."""
    world = small("drift")
    log, _ = world.rows(0, ROWS)
    assert log["popularity"].max() == 1.0
    for row in [3, 49_990, 50_010, 99_000]:
        day = int(row / ROWS * 60)
        level = world.tables.items.log_popularity + (day >= 30) * world.tables.items.jump
        expected = np.exp(level[log["item"][row]] - level.max())
        assert log["popularity"][row] == pytest.approx(expected, rel=1e-6)


def test_attributes_are_told_for_a_share_of_the_users():
    """Catches an attribute that is told for some rows of a user and not for others."""
    log, truth = small("fair", attribute_known=0.6).rows(0, ROWS)
    told = log["attribute"].to_numpy()
    assert (told[told >= 0] == truth["attr"].to_numpy()[told >= 0]).all()
    users = log.group_by("user").agg(pl.col("attribute").n_unique(), (pl.col("attribute") >= 0).first().alias("known"))
    assert users["attribute"].max() == 1
    assert abs(z(users["known"].to_numpy(), 0.6)) < 4


@pytest.mark.parametrize("model", ["lowrank", "uniform"])
def test_flips_lose_the_share_of_clicks_asked_for(model):
    """Catches flips of what was no click, a rate over all rows, and vectors that all users share."""
    world = small("flip20", flip=Flip(0.2, model=model, false_positive=0.05))
    log, truth = world.rows(0, ROWS)
    y, phi = log["y"].to_numpy(), truth["phi"].to_numpy()
    clicked = (truth["R"] * truth["O"]).to_numpy() == 1
    assert abs(z(1 - y[clicked], 0.2)) < 4
    assert abs(z(y[~clicked], 0.05)) < 4
    assert worst_cell((1 - y - phi)[clicked], (phi * (1 - phi))[clicked], phi[clicked]) < 4.5
    if model == "uniform":
        assert phi.min() == phi.max()
        return
    users, items = world.afterwards._flip
    for row in range(30):
        u, i = log["user"][row], log["item"][row]
        logit = world.calibration.flip + 2.0 * np.sqrt(4) * sum(users[u, k] * items[i, k] for k in range(4))
        assert phi[row] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-9)
    assert 1.8 < np.log(phi / (1 - phi)).std() < 2.2


def test_only_what_the_old_retriever_likes_is_judged():
    """Catches judgements that ignore the score, and labels of what was never judged."""
    world = small("pooled", randomised=0.2)
    log, truth = world.rows(0, ROWS)
    y, judged, relevant = log["y"].to_numpy(), truth["lambda_sel"].to_numpy(), truth["R"].to_numpy() == 1
    assert y[~relevant].max() == 0
    chosen = judged < 1.0
    mine = relevant & chosen
    assert worst_cell(y[mine] - judged[mine], (judged * (1 - judged))[mine], judged[mine]) < 4.5
    assert y[relevant & ~chosen].min() == 1
    old = np.log(judged[chosen] / (1 - judged[chosen]))
    standard = truth["rho"].to_numpy()[chosen] - world.calibration.intercept - world.calibration.score_mean
    error = (old + 0.5) / 1.5 - standard / world.calibration.score_sd
    assert abs(z(error)) < 4
    assert error.std() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(error, truth["rho"].to_numpy()[chosen])[0, 1]) < 4 / np.sqrt(chosen.sum())
    assert y[relevant].mean() < 0.7, "S7: a world without missing judgements has no power"


def test_conversions_are_known_when_they_have_come():
    """Catches labels from the future, windows that do not close, and delays that do not follow their segment."""
    world = small("delayed")
    log, truth = world.rows(0, ROWS)
    conversion = world.config.conversion
    segment = world.tables.users.segment[log["user"].to_numpy()]
    late = 0
    for row in [*range(60), *range(79_900, 80_100), *range(99_000, 99_050)]:
        r, t = log.row(row, named=True), truth.row(row, named=True)
        day = row / ROWS * 60
        waited = min(48 - day, 30) if day < 48 else 30
        known = r["click"] == 1 and t["Z"] == 1 and t["true_delay"] <= waited
        late += r["click"] == 1 and t["Z"] == 1 and not known
        assert r["y"] == r["conversion"] == known
        assert r["delay"] == pytest.approx(t["true_delay"] if known else 0.0, rel=1e-6)
        assert r["elapsed"] == pytest.approx(waited, rel=1e-5)
    assert late > 5
    for g in range(4):
        mean = np.exp(-(conversion.log_rate + conversion.log_rate_by_segment * g))
        assert abs(z(truth["true_delay"].to_numpy()[segment == g], mean)) < 4
    clicked = log["click"].to_numpy() == 1
    assert log["click"].equals((truth["R"] * truth["O"]).alias("click"))
    assert abs(z(truth["Z"].to_numpy()[clicked], conversion.rate)) < 4
    p = 1 / (1 + np.exp(-truth["zeta"].to_numpy()))
    assert worst_cell(truth["Z"].to_numpy() - p, p * (1 - p), p) < 4.5
    r = np.corrcoef(truth["zeta"], truth["rho"])[0, 1]
    assert r == pytest.approx(conversion.correlation, abs=0.05)


def test_weibull_delays_have_their_shape():
    """Catches a shape that scales the delay: E[d^k] = λ^-k for every shape k."""
    conversion = Conversion(shape=2.0, log_rate=-1.0, log_rate_by_segment=0.0, window=1.5)
    world = small("delayed", conversion=conversion)
    log, truth = world.rows(0, ROWS)
    assert abs(z(truth["true_delay"].to_numpy() ** 2, np.exp(2.0))) < 4
    p, y = truth["chance"].to_numpy(), log["y"].to_numpy()
    assert worst_cell(y - p, p * (1 - p), p) < 4.5


def test_what_is_known_of_conversions_misleads():
    """S7: catches a world in which clicked rows are like all rows, and what is late is not missed."""
    world = small("delayed")
    log, truth = world.rows(0, 80_000)
    clicked = log["click"].to_numpy() == 1
    true = 1 / (1 + np.exp(-truth["zeta"].to_numpy()))
    assert z(log["conversion"].to_numpy()[clicked] - true[clicked]) < -10
    assert true[clicked].mean() > 1.05 * true.mean()
    free, free_truth = world.rows(0, 20_000, Region.UNIFORM)
    due = 1 / (1 + np.exp(-free_truth["zeta"].to_numpy()))
    assert free["click"].min() == 1
    assert free["conversion"].to_numpy().mean() < due.mean()
    assert ((free["conversion"] == 1) == ((free_truth["Z"] == 1) & (free_truth["true_delay"] <= 30))).all()


def test_flips_and_pools_compose_with_exposure():
    """Catches a step that takes the place of another one."""
    world = small("mnar", flip=Flip(0.3), pooling=Pooling())
    log, truth = world.rows(0, ROWS)
    p = (truth["gamma"] * truth["theta"] * (1 - truth["phi"]) * truth["lambda_sel"]).to_numpy()
    np.testing.assert_allclose(truth["chance"].to_numpy(), p)
    assert worst_cell(log["y"].to_numpy() - p, p * (1 - p), p) < 4.5


def test_a_log_of_clicks_needs_conversions():
    with pytest.raises(RecipeError, match="clicks alone"):
        make_config("mnar", rows=10, seed=0, clicks_only=True)
    assert not make_config("quickstart", rows=10, seed=0).selective
    assert replace(make_config("quickstart", rows=10, seed=0), exposure=Exposure()).selective


def test_clicked_rows_convert_more_easily_and_nothing_is_late():
    """S7: catches a world in which what clicked rows tell holds for all rows, or one that mixes in late conversions."""
    world = small("conversion")
    log, truth = world.rows(0, ROWS)
    clicked = log["click"].to_numpy() == 1
    assert ((log["conversion"] == 1) == ((log["click"] == 1) & (truth["Z"] == 1))).mean() > 1 - 1e-4
    due = 1 / (1 + np.exp(-truth["zeta"].to_numpy()))
    assert abs(z(truth["Z"].to_numpy()[clicked], 0.3)) < 4
    assert due[clicked].mean() > 1.5 * due.mean()
    free, free_truth = world.rows(0, 20_000, Region.UNIFORM)
    assert free["click"].min() == 1
    assert abs(z(free["conversion"].to_numpy() - 1 / (1 + np.exp(-free_truth["zeta"].to_numpy())))) < 4
