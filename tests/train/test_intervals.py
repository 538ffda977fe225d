"""Bounds of scores: they hold the truth as often as they say, and rows of a group are drawn together."""

import math

import pytest
import torch

from recsys.train.intervals import Clusters, intervals, taken
from recsys.train.metrics import AUC
from recsys.train.ranking_metrics import MRR
from recsys.train.score import Predictions, measure

METRIC = {"auc": AUC()}


def rows(groups, size, spread, seed):
    """Groups with tastes of their own, in the score and in the label alike: rows of a group tell the same story."""
    generator = torch.Generator().manual_seed(seed)
    taste = spread * torch.randn(groups, 2, generator=generator, dtype=torch.float64).repeat_interleave(size, 0)
    z = torch.randn(groups * size, generator=generator, dtype=torch.float64) + taste[:, 0]
    logit = 0.8 * z + taste[:, 1]
    y = (torch.rand(len(z), generator=generator, dtype=torch.float64) < torch.sigmoid(logit)).double()
    group = torch.arange(groups).repeat_interleave(size) * 7919 - 11
    order = torch.randperm(len(z), generator=generator)
    return Predictions({"y": z[order]}, {"y": y[order]}, {"group": group[order]})


def ungrouped(predictions):
    return Predictions(predictions.logit, predictions.label, {})


def bounds(predictions, draws=100, seed=0, level=0.9):
    def score(drawn, _):
        return {"all": measure(drawn, METRIC)}

    found = intervals(score, predictions, level, draws, seed)["all"]
    return found["auc.low"], found["auc.high"]


def test_they_hold_the_truth_as_often_as_they_say_and_rows_drawn_apart_are_too_certain():
    truth = measure(rows(30_000, 15, 1.5, 10**6), METRIC)["auc"]
    held = {"group": 0, "row": 0}
    worlds = 120
    for seed in range(worlds):
        drawn = rows(40, 15, 1.5, seed)
        for name, predictions in (("group", drawn), ("row", ungrouped(drawn))):
            low, high = bounds(predictions, draws=80, seed=seed)
            held[name] += low <= truth <= high
    # Of 120 worlds at 90 %, 4 standard deviations are 13; the percentile bootstrap of 40 groups is a little narrow.

    assert 90 <= held["group"] <= 119, held
    assert held["row"] < 85, held


def delong(z, y):
    """Standard deviation of an AUC by DeLong, DeLong and Clarke-Pearson (Biometrics 1988), as loops over pairs."""
    positive = [a for a, b in zip(z, y, strict=True) if b]
    negative = [a for a, b in zip(z, y, strict=True) if not b]

    def won(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    v10 = [sum(won(a, b) for b in negative) / len(negative) for a in positive]
    v01 = [sum(won(a, b) for a in positive) / len(positive) for b in negative]

    def variance(values):
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - 1)

    return math.sqrt(variance(v10) / len(v10) + variance(v01) / len(v01))


def test_of_independent_rows_they_are_delongs():
    predictions = ungrouped(rows(500, 1, 0.0, 3))
    low, high = bounds(predictions, draws=2000, level=0.95)
    sd = delong(predictions.logit["y"].tolist(), predictions.label["y"].tolist())
    assert (high - low) / (2 * 1.96) == pytest.approx(sd, rel=0.08)
    assert (low + high) / 2 == pytest.approx(measure(predictions, METRIC)["auc"], abs=0.2 * sd)


def test_a_seed_says_all():
    predictions = rows(20, 5, 1.0, 1)
    assert bounds(predictions, seed=4) == bounds(predictions, seed=4)
    assert bounds(predictions, seed=4) != bounds(predictions, seed=5)


def test_a_draw_is_whole_groups_each_with_a_number_of_its_own():
    predictions = rows(9, 4, 1.0, 2)
    group = predictions.context["group"]
    clusters = Clusters.of(predictions)
    generator = torch.Generator().manual_seed(0)
    repeated = 0
    for _ in range(20):
        drawn, owner = clusters.draw(generator)
        chosen = []
        for number in range(9):
            mine = drawn[owner == number]
            whole = (group == group[mine[0]]).nonzero().flatten()
            assert sorted(mine.tolist()) == whole.tolist()
            chosen.append(int(group[mine[0]]))
        repeated += len(set(chosen)) < 9
        # Ranked among its own rows alone, a group drawn twice counts twice.
        got = measure(taken(predictions, drawn, owner), {"mrr": MRR(empty="zero")})["mrr"]
        each = {g: one_mrr(predictions, g) for g in set(chosen)}
        assert got == pytest.approx(sum(each[g] for g in chosen) / 9)
    assert repeated > 15


def one_mrr(predictions, group):
    mine = (predictions.context["group"] == group).nonzero().flatten().tolist()
    best = sorted(mine, key=lambda i: -float(predictions.logit["y"][i]))
    return next((1 / (n + 1) for n, i in enumerate(best) if predictions.label["y"][i]), 0.0)


def test_where_most_draws_have_no_score_there_are_no_bounds():
    z, y = torch.arange(60.0, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    y[3:6] = 1
    # Three clicks, of one group in twenty: a draw leaves it out with 36 %.
    few = Predictions({"y": z}, {"y": y}, {"group": torch.arange(60) // 3})
    assert not any(math.isnan(bound) for bound in bounds(few))
    # Every click, and nothing else, in one group of two: half of the draws have one class only.
    two = Predictions({"y": z}, {"y": y}, {"group": y.long()})
    assert all(math.isnan(bound) for bound in bounds(two, draws=41, seed=1))
