"""How well each group (user, request) is ranked: every group counts the same, and only its own rows are ranked.

A group's rows that have equal scores could stand in any order; each metric is the mean over all these orders, exactly,
so that a model which cannot tell rows apart gains nothing by the order of the file.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from recsys.train.metrics import Rows, mean, refuse, undefined
from recsys.train.ranks import Discount, Ranks, discounts, rank_rows

Empty = Literal["skip", "zero"]


class _Grouped(Rows):
    """Keeps all rows with their groups."""

    needs: ClassVar[tuple[str, ...]] = ("group",)
    group: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("group", [], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]`, label `[B]`, group `[B]` int64."""
        super().update(logit, label)
        self.group.append(context["group"].detach())

    def _ranked(self) -> tuple[Ranks, Tensor, Tensor]:
        """The ranks of all rows, and the positives of each tie and of each group, float64."""
        logit, label = self._rows()
        group = dim_zero_cat(self.group) if len(self.group) else torch.zeros(0, dtype=torch.int64)
        ranks = rank_rows(logit, group)
        positive = ranks.per_tie(label)
        total = positive.new_zeros(ranks.groups).index_add_(0, ranks.owner, positive)
        return ranks, positive.double(), total.double()


def _mean_over(values: Tensor, positives: Tensor, empty: Empty) -> Tensor:
    """Mean over the groups, without those that have no positive, or with 0 for them."""
    values = values[positives > 0] if empty == "skip" else torch.where(positives > 0, values, 0.0)
    return mean(values) if len(values) else undefined()


class NDCG(_Grouped):
    """Gain of each group's ranking, later places discounted, as a share of the best possible one.

    nDCG@k = mean_g DCG_g / ideal DCG_g, DCG = Σ_{rank ≤ k} gain · discount(rank). Rows of equal score share the mean
    discount of their ranks. Relevance is the label, or a grade ≥ 0, such as a number of stars.

    Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 20, 2002; Burges et al.,
    "Learning to Rank Using Gradient Descent", ICML 2005.

    Args:
        k: ranks that count. null: all.
        graded: the relevance is the context column `grade`, not the label.
        discount: rank_plus_one: 1/log2(rank + 1). rank: 1/log2(rank), and 1 for the first, so that ranks 1 and 2
            weigh the same, as in the paper of 2002 and in Saito et al., WSDM 2020.
        gain: linear: the relevance r. exponential: 2^r − 1.
        smooth: s: relevance is s + (1 − s) r, so that groups without positives count too, with 1 (WSDM 2020: 0.001).
        empty: skip: groups without any gain do not count. zero: they count as 0.
    """

    def __init__(
        self,
        *,
        k: PositiveInt | None = None,
        graded: bool = False,
        discount: Discount = "rank_plus_one",
        gain: Literal["linear", "exponential"] = "linear",
        smooth: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        empty: Empty = "skip",
    ) -> None:
        super().__init__()
        self.k, self.discount, self.gain, self.smooth, self.empty = k, discount, gain, smooth, empty
        self.graded = graded
        if graded:
            self.needs = ("group", "grade")  # type: ignore[misc]

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]`, label `[B]`, group `[B]` int64; and grade `[B]`, where it is asked for."""
        super().update(logit, context["grade"] if self.graded else label, group=context["group"])

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, grade = self._graded()
        if not len(grade):
            return undefined()
        gain = self.smooth + (1 - self.smooth) * grade
        if self.gain == "exponential":
            gain = torch.exp2(gain) - 1
        group = dim_zero_cat(self.group)
        got, best = (self._dcg(rank_rows(by, group, gain), gain) for by in (logit, gain))
        return _mean_over(got / torch.where(best > 0, best, 1.0), best, self.empty)

    def _graded(self) -> tuple[Tensor, Tensor]:
        """All rows: logit and relevance `[N]` float64."""
        if not len(self.logit):
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        logit, grade = dim_zero_cat(self.logit), dim_zero_cat(self.label).double()
        refuse(~torch.isfinite(logit), logit, "prediction", "a finite number")
        refuse(
            ~((grade >= 0) & torch.isfinite(grade)),
            grade,
            "grade" if self.graded else "label",
            "a finite number, at least 0",
        )
        return logit, grade

    def _dcg(self, ranks: Ranks, gain: Tensor) -> Tensor:
        """`[groups]` float64."""
        share = ranks.per_tie(gain) / ranks.size
        return ranks.per_group(share[ranks.tie] * discounts(ranks.place, self.discount, self.k))


class Recall(_Grouped):
    """Share of each group's positives among its k highest scores.

    Recall@k = mean_g (positives in the first k) / (positives of g).

    Args:
        k: ranks that count.
        empty: skip: groups without positives do not count. zero: they count as 0.
    """

    def __init__(self, *, k: PositiveInt = 10, empty: Empty = "skip") -> None:
        super().__init__()
        self.k, self.empty = k, empty

    def compute(self) -> Tensor:
        """`[]` float64."""
        ranks, positive, total = self._ranked()
        return _mean_over(_found(ranks, positive, self.k) / total.clamp(min=1), total, self.empty)


class Precision(_Grouped):
    """Share of positives among the k highest scores of each group.

    Precision@k = mean_g (positives in the first k) / k; k, also where a group has fewer rows.

    Args:
        k: ranks that count.
        empty: skip: groups without positives do not count. zero: they count as 0.
    """

    def __init__(self, *, k: PositiveInt = 10, empty: Empty = "skip") -> None:
        super().__init__()
        self.k, self.empty = k, empty

    def compute(self) -> Tensor:
        """`[]` float64."""
        ranks, positive, total = self._ranked()
        return _mean_over(_found(ranks, positive, self.k) / self.k, total, self.empty)


class Hit(_Grouped):
    """Share of groups with at least one positive among their k highest scores.

    Hit@k = mean_g P(the first positive has rank ≤ k).

    Args:
        k: ranks that count.
        empty: skip: groups without positives do not count. zero: they count as 0.
    """

    def __init__(self, *, k: PositiveInt = 10, empty: Empty = "skip") -> None:
        super().__init__()
        self.k, self.empty = k, empty

    def compute(self) -> Tensor:
        """`[]` float64."""
        ranks, positive, total = self._ranked()
        likely = _first_positive(ranks, positive)
        hit = ranks.per_group(torch.where(ranks.place < self.k, likely, 0.0)).clamp(max=1.0)
        return _mean_over(hit, total, self.empty)


class MRR(_Grouped):
    """One over the rank of each group's first positive, averaged.

    MRR = mean_g E[1 / rank of the first positive].

    Voorhees, "The TREC-8 Question Answering Track Report", TREC 1999.

    Args:
        k: ranks that count; a first positive after them gives 0. null: all.
        empty: skip: groups without positives do not count. zero: they count as 0.
    """

    def __init__(self, *, k: PositiveInt | None = None, empty: Empty = "skip") -> None:
        super().__init__()
        self.k, self.empty = k, empty

    def compute(self) -> Tensor:
        """`[]` float64."""
        ranks, positive, total = self._ranked()
        reciprocal = _first_positive(ranks, positive) / (ranks.place + 1)
        if self.k is not None:
            reciprocal = torch.where(ranks.place < self.k, reciprocal, 0.0)
        return _mean_over(ranks.per_group(reciprocal), total, self.empty)


class MAP(_Grouped):
    """Mean over the positives of each group of the precision at their ranks, averaged over groups.

    MAP@k = mean_g (1 / min(positives of g, k)) Σ_{positives with rank ≤ k} precision at their rank.

    Args:
        k: ranks that count. null: all.
        empty: skip: groups without positives do not count. zero: they count as 0.
    """

    def __init__(self, *, k: PositiveInt | None = None, empty: Empty = "skip") -> None:
        super().__init__()
        self.k, self.empty = k, empty

    def compute(self) -> Tensor:
        """`[]` float64."""
        ranks, positive, total = self._ranked()
        before = positive.cumsum(0) - positive - (total.cumsum(0) - total)[ranks.owner]  # [ties] of the same group
        tie, size = ranks.tie, ranks.size.double()
        # Of p positives in n rows, the place j holds one with p/n; each place before it another with (p-1)/(n-1).
        others = ranks.inside * ((positive - 1) / (size - 1).clamp(min=1))[tie]
        hits = (positive / size)[tie] * (before[tie] + 1 + others)
        precision = hits / (ranks.place + 1)
        if self.k is not None:
            precision = torch.where(ranks.place < self.k, precision, 0.0)
        most = total if self.k is None else total.clamp(max=self.k)
        return _mean_over(ranks.per_group(precision) / most.clamp(min=1), total, self.empty)


def _found(ranks: Ranks, positive: Tensor, k: int) -> Tensor:
    """Expected positives in the first k places, `[groups]`."""
    share = (positive / ranks.size)[ranks.tie]
    return ranks.per_group(torch.where(ranks.place < k, share, 0.0))


def _first_positive(ranks: Ranks, positive: Tensor) -> Tensor:
    """Chance that the first positive of its group stands on a place, `[N]`.

    In a tie of n rows with p positives, place j has it with C(n − 1 − j, p − 1) / C(n, p).
    """
    some = positive > 0
    earlier = some.long().cumsum(0) - some.long()  # [ties], of all groups
    new = torch.ones_like(some)
    new[1:] = ranks.owner[1:] != ranks.owner[:-1]
    first = some & (earlier == earlier[new][ranks.owner])  # the group's first tie with a positive
    n, p, j = ranks.size.double()[ranks.tie], positive[ranks.tie], ranks.inside.double()
    fits = first[ranks.tie] & (j <= n - p)
    n, p, j = (torch.where(fits, x, y) for x, y in ((n, 1.0), (p, 1.0), (j, 0.0)))
    log_ways = torch.lgamma(n - j) - torch.lgamma(p) - torch.lgamma(n - j - p + 1)
    log_all = torch.lgamma(n + 1) - torch.lgamma(p + 1) - torch.lgamma(n - p + 1)
    return torch.where(fits, torch.exp(log_ways - log_all), 0.0)
