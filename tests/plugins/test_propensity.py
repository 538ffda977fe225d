"""Propensities: counts against loops, places for all ids, calibration and ranks against planted exposure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from debias_world import ITEMS, USERS, ids, world
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from recsys.api import Batch, DataError, EncodedSchema, Field, RecipeError
from recsys.testing import contract
from recsys_propensity import Logistic, NaiveBayes, Popularity, UserItem

SCHEMA = EncodedSchema((Field("user", 6), Field("item", 7)), (), ("y",), ("observed", "uniform"))
PAIRS = EncodedSchema((Field("user", USERS + 2), Field("item", ITEMS + 2)), (), ("y",), ("observed",))

LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40
)


def batches(log: list[tuple[int, int, int, int]], size: int = 7) -> list[Batch]:
    """(user, item, label, observed) of rows."""
    rows = torch.tensor(log)
    return [
        Batch(part[:, :2], label={"y": part[:, 2].float()}, context={"observed": part[:, 3]})
        for part in rows.split(size)
    ]


def test_contract() -> None:
    contract("propensity", Popularity, item="f0")
    contract("propensity", Popularity, item="f1", count="observed", relative_to="rows", power=1.0)
    contract("propensity", UserItem, user="f0", item="f1")
    contract("propensity", UserItem, user="f0", item="f1", relative_to="max", count="positives", power=0.5)
    contract("propensity", NaiveBayes)
    contract("propensity", NaiveBayes, positive_rate=0.2, exposure=0.1)
    contract("propensity", Logistic)
    contract("propensity", Logistic, fields=["f1", "x0"], l2=0.1)


@given(log=LOGS, power=st.sampled_from([0.0, 0.5, 1.0]))
def test_popularity_against_loops(log, power: float) -> None:
    counts = [sum(1 for _, i, y, _ in log if i == item and y) for item in range(7)]
    model = Popularity(SCHEMA, power=power, least=0.01)
    if not max(counts):
        with pytest.raises(DataError, match=f"counts positives rows: there are none among {len(log)}"):
            model.fit(batches(log))
        return
    model.fit(batches(log))
    every = Batch(torch.tensor([[0, item] for item in range(7)]))
    wanted = [min(max((n / max(counts)) ** power, 0.01), 1.0) for n in counts]
    np.testing.assert_allclose(model.estimate(every), wanted, rtol=1e-6)


def test_an_item_without_positives_keeps_its_place() -> None:
    """A table of the items that occur would give the third item the propensity of the fourth."""
    log = [(2, 2, 1, 1)] * 9 + [(2, 3, 0, 1)] * 5 + [(2, 4, 1, 1)] * 4
    model = Popularity(SCHEMA, power=0.5, least=0.05)
    model.fit(batches(log))
    found = model.estimate(Batch(torch.tensor([[0, 2], [0, 3], [0, 4], [0, 6]])))
    assert found.tolist() == pytest.approx([1.0, 0.05, 2 / 3, 0.05])


@given(log=LOGS)
def test_user_item_against_loops(log) -> None:
    model = UserItem(SCHEMA, least=0.001)
    seen = [row for row in log if row[3]]
    if not seen:
        with pytest.raises(DataError, match="counts observed rows"):
            model.fit(batches(log))
        return
    model.fit(batches(log))
    p = len(seen) / len(log)

    def share(column: int, value: int) -> float:
        whole = [row for row in log if row[column] == value]
        return sum(row[3] for row in whole) / len(whole) if whole else p

    for user, item in [(u, i) for u in range(6) for i in range(7)]:
        wanted = p * (share(0, user) / p) * (share(1, item) / p)
        found = float(model.estimate(Batch(torch.tensor([[user, item]])))[0])
        assert found == pytest.approx(min(max(wanted, 0.001), 1.0), rel=1e-5)


def naive_log(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and which rows are observed: those of label 1 more often."""
    y = (rng.random(rows) < 0.25).astype(int)
    return y, (rng.random(rows) < np.where(y == 1, 0.6, 0.2)).astype(int)


def test_naive_bayes_finds_the_exposure_of_each_label_from_uniform_rows() -> None:
    rng = np.random.default_rng(0)
    y, o = naive_log(rng, 40_000)
    y = np.where(o == 1, y, 0)  # labels of hidden rows are not known
    extra = (rng.random(8000) < 0.25).astype(int)
    label = torch.tensor(np.concatenate([y, extra])).float()
    context = {
        "observed": torch.tensor(np.concatenate([o, np.ones(8000, dtype=int)])),
        "uniform": torch.tensor(np.concatenate([np.zeros(40_000, dtype=int), np.ones(8000, dtype=int)])),
    }
    rows = Batch(torch.zeros(48_000, 2, dtype=torch.int64), label={"y": label}, context=context)
    model = NaiveBayes(SCHEMA)
    model.fit([rows])
    found = model.estimate(Batch(torch.zeros(2, 2, dtype=torch.int64), label={"y": torch.tensor([0.0, 1.0])}))
    assert found.tolist() == pytest.approx([0.2, 0.6], rel=0.05)
    given_rate = NaiveBayes(SCHEMA, positive_rate=0.25, exposure=float(o.mean()))
    given_rate.fit([replace(rows, context={"observed": context["observed"], "uniform": context["uniform"]})])
    assert given_rate.estimate(replace(rows, label={"y": torch.ones(48_000)}))[0] == pytest.approx(0.6, rel=0.05)
    # A fake that takes P(y) from the observed rows themselves finds no difference between the labels.
    flat = seen_rate(y, o)
    assert abs(flat[0] - flat[1]) < 1e-9


def seen_rate(y: np.ndarray, o: np.ndarray) -> list[float]:
    seen = np.bincount(y[o == 1], minlength=2) / o.sum()
    return list(seen * o.mean() / seen)


def test_naive_bayes_says_what_it_lacks() -> None:
    with pytest.raises(DataError, match=r"needs uniform rows of both labels, there are 0 of 0 and 0 of 1"):
        NaiveBayes(SCHEMA).fit(batches([(2, 2, 1, 1), (2, 2, 0, 1)]))
    with pytest.raises(DataError, match=r"of the observed rows, 0 have label 0 and 2 label 1"):
        NaiveBayes(SCHEMA, positive_rate=0.3).fit(batches([(2, 2, 1, 1), (2, 2, 1, 1), (2, 2, 0, 0)]))
    with pytest.raises(RecipeError, match=r"no task 'z'.*Tasks: y"):
        NaiveBayes(SCHEMA, task="z")


def test_logistic_is_the_minimum_that_scikit_learn_finds() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    log = np.stack([rng.integers(0, 6, 900), rng.integers(0, 7, 900), np.zeros(900, dtype=int)], 1)
    rate = 1 / (1 + np.exp(-(log[:, 0] - 2.5) + 0.7 * (log[:, 1] - 3)))
    o = (rng.random(900) < rate).astype(int)
    model = Logistic(SCHEMA, l2=1e-3, least=1e-9)
    model.fit(batches([(*row, int(seen)) for row, seen in zip(log.tolist(), o, strict=True)], 250))
    inputs = np.concatenate([np.eye(6)[log[:, 0]], np.eye(7)[log[:, 1]]], 1)
    other = LogisticRegression(C=1 / (1e-3 * 900), tol=1e-10, max_iter=5000).fit(inputs, o)
    wanted = other.predict_proba(inputs)[:, 1]
    found = model.estimate(Batch(torch.tensor(log[:, :2])))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_logistic_needs_rows_of_both_kinds() -> None:
    with pytest.raises(DataError, match="2 of 2 rows are observed"):
        Logistic(SCHEMA).fit(batches([(2, 2, 1, 1), (3, 2, 0, 1)]))


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no field 'itm'\. Did you mean 'item'\? Fields: user, item"):
        Popularity(SCHEMA, item="itm")


@pytest.fixture(scope="module")
def exposed() -> list[Batch]:
    w = world()
    relevant, shown = next(w.draws())
    rows = Batch(ids(), label={"y": torch.tensor(relevant * shown)}, context={"observed": torch.tensor(shown).long()})
    return [rows]


@pytest.mark.parametrize(
    ("model", "least_rank", "calibrated"),
    [
        (Popularity(PAIRS, count="observed", relative_to="rows", power=1.0), 0.5, True),
        (Popularity(PAIRS), 0.5, False),
        (UserItem(PAIRS), 0.5, True),
        (Logistic(PAIRS, l2=1e-6), 0.5, True),
    ],
)
def test_in_a_world_of_known_exposure(model, least_rank: float, calibrated: bool, exposed: list[Batch]) -> None:
    """Ranks of the planted propensities, and mean(o/θ) = 1 where the method promises that."""
    model.fit(exposed)
    found = model.estimate(exposed[0]).double().numpy()
    assert spearmanr(found, world().theta).statistic > least_rank
    ratio = exposed[0].context["observed"].numpy() / found
    z = (ratio.mean() - 1) / (ratio.std() / len(ratio) ** 0.5)
    assert (abs(z) < 4) == calibrated
