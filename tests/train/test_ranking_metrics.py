"""Ranking metrics against loops that try every order of equal scores."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from recsys.contracts import metric_name, metric_spec
from recsys.errors import DataError, RecipeError
from recsys.testing import contract
from recsys.train.ranking_metrics import MAP, MRR, NDCG, Hit, Precision, Recall
from recsys.train.stages import Evaluate

# Few scores and groups, so that most draws have ties, in and across groups, and groups without positives.
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(-1, 2)), min_size=1, max_size=14)
GRADED = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(-1, 2)), min_size=1, max_size=14)
ALL = [NDCG, Recall, Precision, Hit, MRR, MAP]


def value(metric, z, y, g):
    metric.update(torch.tensor(z, dtype=torch.float64), torch.tensor(y), group=torch.tensor(g))
    return metric.compute().item()


def orders(scores):
    """Every order of the rows that the scores allow, best first."""
    ties = {s: [i for i, other in enumerate(scores) if other == s] for s in sorted(set(scores), reverse=True)}
    for parts in itertools.product(*(list(itertools.permutations(tie)) for tie in ties.values())):
        yield [i for part in parts for i in part]


def groups(rows):
    for g in sorted({row[2] for row in rows}):
        mine = [row for row in rows if row[2] == g][:6]
        yield [row[0] for row in mine], [row[1] for row in mine]


def cut(rows):
    """At most six rows of each group, so that all orders can be tried."""
    return [row for g in sorted({r[2] for r in rows}) for row in [r for r in rows if r[2] == g][:6]]


def averaged(rows, one, empty, counts=lambda y: sum(y) > 0):
    found = []
    for z, y in groups(rows):
        if counts(y):
            tried = [one([y[i] for i in order]) for order in orders(z)]
            found.append(sum(tried) / len(tried))
        elif empty == "zero":
            found.append(0.0)
    return sum(found) / len(found) if found else math.nan


def same(got, want):
    return got == pytest.approx(want, abs=1e-12) if not math.isnan(want) else math.isnan(got)


def slow_recall(k):
    return lambda y: sum(y[:k]) / sum(y)


def slow_map(k):
    def one(y):
        k_ = k or len(y)
        total = sum(sum(y[: i + 1]) / (i + 1) for i in range(min(k_, len(y))) if y[i])
        return total / min(sum(y), k_)

    return one


def slow_mrr(k):
    return lambda y: next((1 / (i + 1) for i in range(min(k or len(y), len(y))) if y[i]), 0.0)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 6), st.sampled_from(["skip", "zero"]))
def test_each_is_the_mean_over_all_orders_of_equal_scores(rows, k, empty):
    rows = cut(rows)
    columns = tuple(list(c) for c in zip(*rows, strict=True))
    for metric, one in (
        (Recall(k=k, empty=empty), slow_recall(k)),
        (Precision(k=k, empty=empty), lambda y: sum(y[:k]) / k),
        (Hit(k=k, empty=empty), lambda y: float(any(y[:k]))),
        (MRR(k=k, empty=empty), slow_mrr(k)),
        (MRR(empty=empty), slow_mrr(None)),
        (MAP(k=k, empty=empty), slow_map(k)),
        (MAP(empty=empty), slow_map(None)),
    ):
        assert same(value(metric, *columns), averaged(rows, one, empty)), (metric, one)


@settings(max_examples=80, deadline=None)
@given(
    GRADED,
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sampled_from(["rank_plus_one", "rank"]),
    st.sampled_from(["linear", "exponential"]),
    st.sampled_from([0.0, 0.001, 0.3]),
    st.sampled_from(["skip", "zero"]),
)
def test_ndcg_is_the_mean_over_all_orders_of_equal_scores(rows, k, discount, gain, smooth, empty):
    rows = cut(rows)

    def weight(rank):
        if rank > (k or rank):
            return 0.0
        if discount == "rank_plus_one":
            return 1 / math.log2(rank + 1)
        return 1.0 if rank == 1 else 1 / math.log2(rank)

    def gained(y):
        r = smooth + (1 - smooth) * y
        return r if gain == "linear" else 2**r - 1

    def dcg(y):
        return sum(gained(v) * weight(rank) for rank, v in enumerate(y, 1))

    def one(y):
        return dcg(y) / dcg(sorted(y, reverse=True))

    metric = NDCG(k=k, discount=discount, gain=gain, smooth=smooth, empty=empty)
    got = value(metric, *(list(c) for c in zip(*rows, strict=True)))
    assert same(got, averaged(rows, one, empty, counts=lambda y: smooth > 0 or sum(y) > 0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 1)), min_size=2, max_size=30, unique_by=lambda r: r[0]))
def test_without_ties_they_are_sklearns(rows):
    z, y = (list(c) for c in zip(*rows, strict=True))
    if sum(y):
        g = [4] * len(z)
        assert value(MAP(), z, y, g) == pytest.approx(average_precision_score(y, z), abs=1e-12)
        assert value(NDCG(), z, y, g) == pytest.approx(ndcg_score([y], [z]), abs=1e-12)
        assert value(NDCG(k=3), z, y, g) == pytest.approx(ndcg_score([y], [z], k=3), abs=1e-12)


def test_the_two_discounts_by_hand():
    z, y, g = [4.0, 3.0, 2.0], [0, 1, 1], [0, 0, 0]
    assert value(NDCG(), z, y, g) == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))
    assert value(NDCG(discount="rank"), z, y, g) == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert value(NDCG(k=1, discount="rank"), z, y, g) == 0.0


def test_a_constant_score_is_worth_chance_and_large_ties_stay_exact():
    n, p, k = 5000, 7, 10
    y = [1] * p + [0] * (n - p)
    z, g = [0.5] * n, [3] * n
    assert value(Recall(k=k), z, y, g) == pytest.approx(k / n, rel=1e-12)
    assert value(Precision(k=k), z, y, g) == pytest.approx(p / n, rel=1e-12)
    none = math.prod((n - p - i) / (n - i) for i in range(k))
    assert value(Hit(k=k), z, y, g) == pytest.approx(1 - none, rel=1e-9)
    assert value(Hit(k=n), z, y, g) == pytest.approx(1.0, abs=1e-9)


def test_groups_count_the_same_whatever_their_size():
    z = [1.0, 0.0] + [0.0] * 50 + [1.0]
    y = [1, 0] + [0] * 50 + [1]
    g = [1, 1] + [2] * 51
    y[-1], y[2] = 0, 1
    assert value(MRR(k=1), z, y, g) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "metric", [*ALL, lambda: NDCG(k=5, discount="rank"), lambda: NDCG(graded=True), lambda: MAP(k=3), lambda: Hit(k=1)]
)
def test_the_contract(metric):
    contract("metric", metric)


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 100), at=st.integers(0, 14))
def test_neither_order_nor_batches_change_a_bit(make, rows, seed, at):
    z, y, g = (torch.tensor(c) for c in zip(*rows, strict=True))
    z = z.double() / 3
    whole, parts = make(), make()
    whole.update(z, y, group=g)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    for part in (order[:at], order[at:]):
        parts.update(z[part], y[part], group=g[part])
    a, b = whole.compute(), parts.compute()
    assert torch.equal(a, b) or (a.isnan() and b.isnan())


def test_graded_labels_in_another_order_give_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(0, 9, (4000,), generator=generator).double()
    y = torch.rand(4000, generator=generator, dtype=torch.float64)
    g = torch.randint(0, 40, (4000,), generator=generator)
    got = set()
    for seed in range(4):
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))
        metric = NDCG(k=20, gain="exponential")
        metric.update(z[order], y[order], group=g[order])
        got.add(metric.compute().item())
    assert len(got) == 1


def test_a_grade_takes_the_place_of_the_label():
    z, g = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    stars = torch.tensor([0.0, 4.0, 1.5])
    metric = NDCG(k=2, graded=True, gain="exponential")
    assert metric.needs == ("group", "grade")
    assert NDCG().needs == ("group",)
    metric.update(z, torch.tensor([1.0, 0.0, 0.0]), group=g, grade=stars)
    best = 15 + (2**1.5 - 1) / math.log2(3)
    assert metric.compute().item() == pytest.approx(15 / math.log2(3) / best)
    metric.update(z, torch.zeros(3), group=g, grade=torch.tensor([0.0, -1.0, 2.0]))
    with pytest.raises(DataError, match="grade of evaluated row 5 is -1"):
        metric.compute()


@pytest.mark.parametrize("make", ALL)
def test_bad_rows_are_errors_with_their_number(make):
    with pytest.raises(DataError, match="prediction of evaluated row 2 is nan"):
        value(make(), [0.1, math.nan], [0, 1], [0, 0])
    with pytest.raises(DataError, match="label of evaluated row 1 is -1"):
        value(make(), [0.1, 0.2], [-1, 1], [0, 0])


@pytest.mark.parametrize("make", ALL)
def test_no_positive_is_undefined_or_nought(make):
    assert math.isnan(value(make(), [0.1, 0.2], [0, 0], [0, 0]))
    assert value(make(empty="zero"), [0.1, 0.2], [0, 0], [0, 0]) == 0.0


def test_smoothed_groups_without_positives_count_as_one():
    assert value(NDCG(smooth=0.001), [0.1, 0.2, 0.3, 0.1], [0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx(
        (1 + (0.001 + 1 / math.log2(3)) / (1 + 0.001 / math.log2(3))) / 2
    )


def test_names_in_results():
    assert metric_spec("ndcg@5") == {"use": "ndcg", "k": 5}
    assert metric_name("ndcg@5") == metric_name({"use": "ndcg", "k": 5}) == "ndcg@5"
    assert metric_name("auc") == metric_name({"use": "auc"}) == "auc"
    assert metric_name({"use": "ece", "bins": 5}) == "ece"
    assert metric_name({"use": "ndcg", "k": 5, "discount": "rank", "name": "ndcg_wsdm@5"}) == "ndcg_wsdm@5"
    with pytest.raises(RecipeError, match="two metrics are called 'ndcg@5'"):
        Evaluate(metrics=("ndcg@5", {"use": "ndcg", "k": 5, "discount": "rank"}))
