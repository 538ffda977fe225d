"""Estimates of what a ranking is worth on everything, against the planted truth and against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot
from recsys.errors import DataError
from recsys.testing import contract
from recsys.train.metrics import AUC
from recsys_unbiased import dr_auc, dr_ndcg, dr_recall, snips_auc, snips_ndcg, snips_recall

ALL = [snips_auc, snips_ndcg, snips_recall, dr_auc, dr_ndcg, dr_recall]
REPEATS = 60


def value(metric, z, y, theta, group=None, observed=None):
    theta = torch.as_tensor(np.asarray(theta, dtype=np.float64).copy())
    columns = {"propensity": theta, "group": group, "observed": observed}
    given = {
        name: torch.as_tensor(np.asarray(columns[name]).copy()) if name != "propensity" else theta
        for name in metric.needs
    }
    metric.update(torch.as_tensor(z, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64), **given)
    return metric.compute().item()


# The definitions, as loops.


def loop_auc(z, relevant, irrelevant):
    won = whole = 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            if i != j:
                pair = relevant[i] * irrelevant[j]
                whole += pair
                won += pair * (1.0 if z[i] > z[j] else 0.5 if z[i] == z[j] else 0.0)
    return won / whole if whole > 0 else math.nan


def loop_gain(z, group, relevant, weight, average="all"):
    """Equal scores share the mean weight of their ranks."""
    parts = []
    for g in sorted(set(group)):
        mine = [i for i in range(len(z)) if group[i] == g]
        got = 0.0
        for i in mine:
            above, equal = sum(z[j] > z[i] for j in mine), sum(z[j] == z[i] for j in mine)
            got += relevant[i] * sum(weight(above + n + 1) for n in range(equal)) / equal
        parts.append((got, sum(relevant[i] for i in mine)))
    if average == "groups":
        known = [a / b for a, b in parts if b > 0]
        return sum(known) / len(known) if known else math.nan
    got, most = (sum(column) for column in zip(*parts, strict=True))
    return got / most if most > 0 else math.nan


def same(got, want):
    return math.isnan(got) if math.isnan(want) else got == pytest.approx(want, rel=1e-9, abs=1e-9)


ROWS = st.lists(
    st.tuples(
        st.integers(-2, 2).map(lambda i: i / 2),
        st.sampled_from([0, 0, 1]),
        st.sampled_from([0.05, 0.2, 0.5, 1.0]),
        st.integers(-1, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.1, 0.6]), st.integers(1, 4), st.sampled_from(["all", "groups"]))
def test_each_is_its_definition(rows, floor, k, average):
    z, y, theta, g, shown = (list(c) for c in zip(*rows, strict=True))
    observed = [int(o or label == 1) for o, label in zip(shown, y, strict=True)]
    clipped = [max(t, floor) for t in theta]
    ips = [a / t for a, t in zip(y, clipped, strict=True)]
    p = [1 / (1 + math.exp(-v)) for v in z]
    dr = [q + o / t * (a - q) for q, o, t, a in zip(p, observed, clipped, y, strict=True)]

    def first(rank):
        return float(rank <= k)

    def log(rank):
        return first(rank) / math.log2(rank + 1)

    cases = [
        (snips_auc, {}, lambda: loop_auc(z, ips, [1 - r for r in ips]), y),
        (
            snips_auc,
            {"feedback": "explicit"},
            lambda: loop_auc(z, ips, [(1 - a) / t for a, t in zip(y, clipped, strict=True)]),
            [1] * len(y),
        ),
        (snips_ndcg, {"k": k, "average": average}, lambda: loop_gain(z, g, ips, log, average), y),
        (snips_recall, {"k": k, "average": average}, lambda: loop_gain(z, g, ips, first, average), y),
        (dr_auc, {}, lambda: loop_auc(z, dr, [1 - r for r in dr]), observed),
        (dr_ndcg, {"k": k}, lambda: loop_gain(z, g, dr, log), observed),
        (dr_recall, {"k": k}, lambda: loop_gain(z, g, dr, first), observed),
    ]
    for make, options, want, weighted in cases:
        metric = make(floor=floor, least_ess=0.0, **options)
        at = [t for t, w in zip(theta, weighted, strict=True) if w]
        if at and all(t < floor for t in at):
            with pytest.raises(DataError, match=f"all {len(at)} propensities of weighted rows lie below `floor`"):
                value(metric, z, y, theta, g, observed)
        else:
            got = value(metric, z, y, theta, g, observed)
            whole = want()
            # A sum of weights that is nought but for rounding has no sign to agree on.
            assert same(got, whole) or abs(sum(dr)) < 1e-9 or abs(got) > 1e6, (make.__name__, got, whole)


# The planted truth.


@pytest.fixture(scope="module")
def world():
    """Rows of a log that shows the popular and relevant ones, their truth, and scores that favour the popular."""
    source = Simulated(DataRoot(()), rows=250_000, seed=5, preset="mnar", users=100, items=400)
    truth = source.truth("test").collect()
    log = source.scan("test").collect()
    gamma, theta = truth["gamma"].to_numpy(), np.maximum(truth["theta"].to_numpy(), 0.03)
    noise = np.random.default_rng(0).normal(size=len(gamma))
    score = 0.5 * truth["rho"].to_numpy() + 0.5 * noise + 0.3 * np.log(truth["pop"].to_numpy())
    return score, gamma, theta, log["user"].to_numpy()


def draws(gamma, theta, repeats=REPEATS):
    for seed in range(repeats):
        generator = np.random.default_rng(1000 + seed)
        shown = generator.random(len(gamma)) < theta
        yield (generator.random(len(gamma)) < gamma) & shown, shown


def planted(score, gamma, group, k):
    """The value for the true relevance: AUC by sorting, and gains by ranks inside the groups."""
    order = np.argsort(score, kind="stable")
    g = gamma[order]
    below = np.cumsum(1 - g) - (1 - g)
    whole = g.sum() * (1 - g).sum() - (g * (1 - g)).sum()
    auc = (g * below).sum() / whole
    place = np.empty(len(score), dtype=int)
    for user in np.unique(group):
        mine = np.flatnonzero(group == user)
        place[mine[np.argsort(-score[mine], kind="stable")]] = np.arange(len(mine))
    first = place < k
    return auc, (gamma * first / np.log2(place + 2)).sum() / gamma.sum(), (gamma * first).sum() / gamma.sum()


def z_score(values, truth):
    values = np.array(values)
    return (values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values)))


def test_snips_finds_the_truth_that_naive_metrics_miss(world):
    score, gamma, theta, user = world
    k = 20
    truths = planted(score, gamma, user, k)
    ones = np.ones_like(theta)
    found = {name: [] for name in ("auc", "ndcg", "recall", "naive_auc", "naive_ndcg", "naive_recall")}
    for clicked, _ in draws(gamma, theta):
        found["auc"].append(value(snips_auc(), score, clicked, theta))
        found["ndcg"].append(value(snips_ndcg(k=k), score, clicked, theta, user))
        found["recall"].append(value(snips_recall(k=k), score, clicked, theta, user))
        naive = AUC()
        naive.update(torch.from_numpy(score), torch.from_numpy(clicked))
        found["naive_auc"].append(naive.compute().item())
        found["naive_ndcg"].append(value(snips_ndcg(k=k), score, clicked, ones, user))
        found["naive_recall"].append(value(snips_recall(k=k), score, clicked, ones, user))
    for name, truth in zip(("auc", "ndcg", "recall"), truths, strict=True):
        assert abs(z_score(found[name], truth)) < 4, name
        assert abs(z_score(found[f"naive_{name}"], truth)) > 10, name


def test_explicit_labels_of_shown_rows_are_weighted_on_both_sides(world):
    score, gamma, theta, user = world
    truth = planted(score, gamma, user, 1)[0]
    right, half = [], []
    for clicked, shown in draws(gamma, theta):
        z, y, t = score[shown], clicked[shown], theta[shown]
        right.append(value(snips_auc(feedback="explicit"), z, y, t))
        # Clicks weighted and the others not: what the implicit form would make of shown rows alone.
        half.append(value(snips_auc(least_ess=0.0), z, y, np.where(y, t, 1.0)))
    assert abs(z_score(right, truth)) < 4
    assert abs(z_score(half, truth)) > 10


def test_double_robustness(world):
    score, gamma, theta, user = world
    k, reverse = 20, np.clip(0.05 / theta, 0.05, 1)
    exact = np.log(gamma / (1 - gamma))
    cases = {
        "propensities right": (score, theta, (True, True, True)),
        "model right": (exact, reverse, (True, True, True)),
        "both wrong, one way": (score, reverse, (None, False, False)),
        "both wrong, another way": (score, np.full_like(theta, 0.9), (False, None, None)),
    }
    makes = (dr_auc, lambda: dr_ndcg(k=k), lambda: dr_recall(k=k))
    for name, (z, propensity, expected) in cases.items():
        repeats = 30 if all(expected) else REPEATS  # to be sure that something is off takes more
        for make, truth, holds in zip(makes, planted(z, gamma, user, k), expected, strict=True):
            if holds is None:
                continue
            drawn = draws(gamma, theta, repeats)
            off = abs(z_score([value(make(), z, y, propensity, user, shown * 1) for y, shown in drawn], truth))
            assert off < 4 if holds else off > 10, (name, off)


def test_a_good_model_takes_variance_off(world):
    _, gamma, theta, user = world
    exact = np.log(gamma / (1 - gamma))
    snips, dr = [], []
    for clicked, shown in draws(gamma, theta, 40):
        snips.append(value(snips_recall(k=20), exact, clicked, theta, user))
        dr.append(value(dr_recall(k=20), exact, clicked, theta, user, shown.astype(int)))
    assert np.std(dr) < 0.95 * np.std(snips)


def test_unit_propensities_change_nothing():
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 30, (500,), generator=generator).double()
    y = (torch.rand(500, generator=generator) < 0.3).double()
    ones = torch.ones(500)
    plain = AUC()
    plain.update(z, y)
    for metric in (snips_auc(), snips_auc(feedback="explicit")):
        assert value(metric, z, y, ones) == pytest.approx(plain.compute().item(), abs=1e-12)
    assert value(dr_auc(), z, y, ones, observed=ones) == pytest.approx(plain.compute().item(), abs=1e-12)


def test_weights_of_explicit_labels_only_count_relative_to_each_other():
    z, y, theta = [0.1, 0.7, 0.3, 0.3, 0.9], [0, 1, 1, 0, 0], torch.tensor([0.8, 0.4, 0.2, 0.6, 0.9])
    a, b = (value(snips_auc(feedback="explicit", floor=0), z, y, theta * c) for c in (1.0, 0.25))
    assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_the_contract(make):
    contract("metric", make)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_an_impossible_propensity_is_an_error_with_its_row(make, bad):
    theta = [0.5, bad, 0.5]
    with pytest.raises(DataError, match=r"propensity of evaluated row 2 is .*, expected a number in \(0, 1\] \(1 of 3"):
        value(make(), [0.1, 0.2, 0.3], [0, 1, 0], theta, [0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("make", [dr_auc, dr_ndcg, dr_recall])
def test_labels_and_observations_must_fit(make):
    with pytest.raises(DataError, match="observed of evaluated row 1 is 2, expected 0 or 1"):
        value(make(), [0.1, 0.2], [0, 1], [0.5, 0.5], [0, 0], [2, 1])
    with pytest.raises(DataError, match="label of evaluated row 2 is 1, expected 0 where the row was not observed"):
        value(make(), [0.1, 0.2], [0, 1], [0.5, 0.5], [0, 0], [1, 0])


def test_a_few_rows_with_all_the_weight_are_refused_with_numbers():
    theta = [0.0001, *[1.0] * 999]
    z, y = list(range(1000)), [1] * 1000
    with pytest.raises(DataError, match=r"effective sample size is 1\.2 of 1000 weighted rows \(0\.12%\), below"):
        value(snips_recall(floor=0), z, y, theta, [0] * 1000)
    assert value(snips_recall(k=10, floor=0, least_ess=0), z, y, theta, [0] * 1000) == pytest.approx(10 / 10999)


@pytest.mark.parametrize("make", [snips_auc, snips_ndcg, snips_recall])
def test_without_clicks_it_is_undefined(make):
    assert math.isnan(value(make(), [0.1, 0.2], [0, 0], [0.5, 0.5], [0, 0]))


def test_groups_without_clicks_do_not_count():
    z, y, g = [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0], [0, 0, 1, 1]
    assert value(snips_recall(k=1, average="groups"), z, y, [0.5] * 4, g) == 0.0
    assert value(snips_recall(k=2, average="groups"), z, y, [0.5] * 4, g) == 1.0
