"""Numbers about rankings of fields: area under the curve of AUC, agreement, and how well planted noise is found."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from recsys.train.run import derive_seed

AUKC = "Σ_k (AUC_k + AUC_{k+1} − 1) · (n_{k+1} − n_k) / (n_max − n_min)"
"""Area under AUC over the number n of fields that are kept, above that of guessing: 1 for AUC = 1, 0 for AUC = ½."""


def aukc(curve: Mapping[int, float]) -> float:
    """The area under number of fields → AUC, by the formula `AUKC`; NaN for fewer than two points."""
    points = sorted(curve.items())
    if len(points) < 2:
        return math.nan
    area = sum((a + b - 1) * (more - few) for (few, a), (more, b) in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])


def order(scores: Mapping[str, float], seed: int) -> tuple[str, ...]:
    """The fields from the best to the worst; equals by lot, the same lot for every ranking of a seed.

    By their place in the recipe they would be favoured or not by something that no selector has found.
    """
    return tuple(sorted(scores, key=lambda name: (-scores[name], derive_seed(seed, "equals", name))))


def jaccard(one: Collection[str], other: Collection[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b)


def stability(sets: Sequence[Collection[str]]) -> float:
    """The mean `jaccard` of all pairs; NaN for fewer than two sets."""
    found = [jaccard(a, b) for a, b in itertools.combinations(sets, 2)]
    return statistics.fmean(found) if found else math.nan


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """1 for the smallest; equals share their mean rank."""
    _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean: NDArray[np.float64] = (last - (count - 1) / 2)[place.ravel()]
    return mean


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The correlation of the ranks of two scores of the same fields; NaN where all are equal."""
    names = list(one)
    a, b = (ranks([scores[name] for name in names]) for scores in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def rank_auc(scores: Mapping[str, float], informative: Collection[str], noise: Collection[str]) -> float:
    """How likely an informative field has a larger score than a planted one, equals counting one half.

    Fields that are neither do not count; NaN where there is none of one kind.
    """
    good = [name in informative for name in scores if name in informative or name in noise]
    many, others = sum(good), len(good) - sum(good)
    if not many or not others:
        return math.nan
    values = [score for name, score in scores.items() if name in informative or name in noise]
    total = float(ranks(values)[np.asarray(good)].sum())
    return (total - many * (many + 1) / 2) / (many * others)


def precision(ordered: Sequence[str], informative: Collection[str], noise: Collection[str]) -> float:
    """Share of informative fields among the first k of them and the planted, k being how many they are; or NaN."""
    judged = [name in informative for name in ordered if name in informative or name in noise]
    return sum(judged[: sum(judged)]) / sum(judged) if any(judged) else math.nan
