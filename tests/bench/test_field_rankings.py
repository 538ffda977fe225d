"""Numbers about rankings of fields, against loops, integrals and scipy."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from recsys.bench.ranking import aukc, jaccard, order, precision, rank_auc, ranks, spearman, stability

NAMES = "abcdefghij"
SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=10)


def named(values: list[float]) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=False))


@pytest.mark.parametrize(("auc", "area"), [(1.0, 1.0), (0.5, 0.0), (0.75, 0.5), (0.0, -1.0)])
def test_a_flat_curve_has_the_area_of_its_height(auc: float, area: float) -> None:
    assert aukc({1: auc, 4: auc, 5: auc, 39: auc}) == pytest.approx(area)


def test_a_curve_by_hand() -> None:
    """From one field to three, then to ten: (.6 + .8 - 1) · 2 and (.8 + .7 - 1) · 7, by 9."""
    assert aukc({10: 0.7, 1: 0.6, 3: 0.8}) == pytest.approx((0.4 * 2 + 0.5 * 7) / 9)
    assert aukc({k: v for k, v in enumerate([0.6, 0.8, 0.7, 0.9], 1)}) == pytest.approx((0.4 + 0.5 + 0.6) / 3)
    assert math.isnan(aukc({3: 0.9}))


@given(st.dictionaries(st.integers(1, 40), st.floats(0, 1), min_size=2, max_size=10))
def test_the_area_is_the_integral_of_the_straight_lines(curve: dict[int, float]) -> None:
    first, last = min(curve), max(curve)
    fine = np.linspace(first, last, (last - first) * 50 + 1)
    known = sorted(curve)
    height = np.interp(fine, known, [2 * curve[n] - 1 for n in known])
    assert aukc(curve) == pytest.approx(float(np.mean((height[1:] + height[:-1]) / 2)), abs=1e-9)


def test_sets_by_hand() -> None:
    assert jaccard("abc", "bcd") == 2 / 4
    assert jaccard("ab", "ab") == 1
    assert jaccard("ab", "cd") == 0
    assert stability(["abc", "bcd", "abc"]) == pytest.approx((2 / 4 + 1 + 2 / 4) / 3)
    assert math.isnan(stability(["abc"]))


@given(SCORES, st.randoms())
def test_ranks_and_their_correlation_are_those_of_scipy(values: list[float], random) -> None:
    assert ranks(values).tolist() == scipy.stats.rankdata(values).tolist()
    other = [random.choice([0.0, 0.1, 0.2]) for _ in values]
    one, two = named(values), named(other)
    shuffled = dict(reversed(two.items()))  # by name, not by place
    found = spearman(one, shuffled)
    if len(set(values)) == 1 or len(set(other)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(values, other).statistic)


@given(SCORES, st.sets(st.sampled_from(NAMES), max_size=6), st.sets(st.sampled_from(NAMES), max_size=3))
def test_noise_is_found_as_often_as_pairs_say(values: list[float], noise: set[str], neither: set[str]) -> None:
    scores = named(values)
    good = [n for n in scores if n not in noise and n not in neither]
    bad = [n for n in scores if n in noise]
    wins = [1.0 if scores[g] > scores[b] else 0.5 if scores[g] == scores[b] else 0.0 for g in good for b in bad]
    found = rank_auc(scores, good, noise)
    assert math.isnan(found) if not wins else found == pytest.approx(sum(wins) / len(wins))
    assume(good)
    ordered = order(scores, 7)
    first = [name for name in ordered if name in good or name in bad][: len(good)]
    assert precision(ordered, good, noise) == sum(1 for name in first if name in good) / len(good)


@given(SCORES, st.integers(0, 10**6))
def test_the_best_come_first_whatever_the_order_of_the_fields(values: list[float], seed: int) -> None:
    scores = named(values)
    ordered = order(scores, seed)
    assert [scores[name] for name in ordered] == sorted(values, reverse=True)
    assert order(dict(reversed(scores.items())), seed) == ordered


def test_the_lot_of_equals_favours_none_and_is_the_same_for_all_rankings() -> None:
    first = Counter(order(dict.fromkeys("abcd", 0.0), seed)[0] for seed in range(2000))
    assert set(first) == set("abcd")
    assert scipy.stats.chisquare(list(first.values())).pvalue > 1e-4
    one, other = order({"x": 1.0, "a": 0.0, "b": 0.0, "c": 0.0}, 3), order({"a": 5.0, "b": 5.0, "c": 5.0, "x": 0.0}, 3)
    assert one[1:] == other[:3]
