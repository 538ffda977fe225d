"""What a ranking would be worth if everything had been shown, estimated from logs in which only some of it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from recsys.api import Component, DataError, Discount, discounts, hookimpl, rank_rows

Floor = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Average = Literal["all", "groups"]


@dataclass(frozen=True)
class Logged:
    """Evaluated rows, `[N]` each: logit float64, label 0 or 1, and the columns that were asked for."""

    logit: Tensor
    label: Tensor
    propensity: Tensor
    group: Tensor
    observed: Tensor


@dataclass(frozen=True)
class Estimated:
    """Rows with an estimate of their relevance and irrelevance, of which the expectation is right; `[N]` each."""

    logit: Tensor
    group: Tensor
    relevant: Tensor
    irrelevant: Tensor


Estimator = Callable[[Logged], Estimated]
Value = Callable[[Estimated], Tensor]


class Unbiased(Metric):
    """Keeps all rows, estimates the relevance of each, and then measures.

    Args:
        needs: context columns besides the propensity.
        estimator: logged rows to estimates of their relevance.
        value: estimates to the metric, `[]` float64.
        floor: least propensity; smaller ones count as this.
        least_ess: least effective sample size, as a share of the rows that have a weight.
        weighted: which rows have a weight, for that check.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    logit: list[Tensor]
    label: list[Tensor]
    propensity: list[Tensor]
    group: list[Tensor]
    observed: list[Tensor]

    def __init__(
        self,
        needs: tuple[str, ...],
        estimator: Estimator,
        value: Value,
        floor: float,
        least_ess: float,
        weighted: Callable[[Logged], Tensor],
    ) -> None:
        super().__init__()
        self.needs = ("propensity", *needs)
        self.estimator, self.value, self.weighted = estimator, value, weighted
        self.floor, self.least_ess = floor, least_ess
        for name in ("logit", "label", *self.needs):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]`, label `[B]` in {0, 1}, and the columns of `needs`, `[B]` each."""
        if logit.shape != label.shape or logit.dim() != 1:
            raise ValueError(f"expected logit and label [B], got {tuple(logit.shape)} and {tuple(label.shape)}")
        self.logit.append(logit.detach().double())
        self.label.append(label.detach().double())
        for name in self.needs:
            states: list[Tensor] = getattr(self, name)
            states.append(context[name].detach())

    def compute(self) -> Tensor:
        """`[]` float64; NaN where no row tells anything.

        Raises:
            DataError: a value is impossible, every weight is cut off, or a few rows have nearly all of the weight.
        """
        if not len(self.logit):
            return torch.tensor(torch.nan, dtype=torch.float64)
        rows = self._rows()
        theta = rows.propensity
        check_weights(theta[self.weighted(rows)], self.floor, self.least_ess)
        return self.value(self.estimator(replace(rows, propensity=theta.clamp(min=self.floor))))

    def _rows(self) -> Logged:
        logit, label = dim_zero_cat(self.logit), dim_zero_cat(self.label)
        theta = dim_zero_cat(self.propensity).double()
        refuse(~torch.isfinite(logit), logit, "prediction", "a finite number")
        refuse((label != 0) & (label != 1), label, "label", "0 or 1")
        refuse(~((theta > 0) & (theta <= 1)), theta, "propensity", "a number in (0, 1]")
        none = torch.zeros_like(label)
        observed = dim_zero_cat(self.observed).double() if "observed" in self.needs else none
        refuse((observed != 0) & (observed != 1), observed, "observed", "0 or 1")
        if "observed" in self.needs:
            refuse((observed == 0) & (label == 1), label, "label", "0 where the row was not observed")
        group = dim_zero_cat(self.group) if "group" in self.needs else none.long()
        return Logged(logit, label, theta, group, observed)


def refuse(bad: Tensor, values: Tensor, what: str, expected: str) -> None:
    """Raise a `DataError` with the first of the bad rows, if there are any."""
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{what} of evaluated row {row + 1} is {float(values[row]):g}, expected {expected} "
            f"({int(bad.sum())} of {len(bad)} rows are not)"
        )


def check_weights(theta: Tensor, floor: float, least_ess: float) -> None:
    """Refuse weights 1/θ of some rows that correct nothing, or of which a few rows have nearly all.

    Raises:
        DataError: every propensity lies below the floor; or (Σw)²/Σw² of the raw weights is too small a share.
    """
    if not len(theta):
        return
    if bool((theta < floor).all()):
        raise DataError(
            f"all {len(theta)} propensities of weighted rows lie below `floor` {floor:g} (the largest is "
            f"{float(theta.max()):.3g}): every weight is cut off at {1 / floor:g}, and corrects nothing; lower `floor`"
        )
    weight = 1 / theta.sort().values
    ess = float(weight.sum().square() / weight.square().sum())
    if ess < least_ess * len(theta):
        top = float(weight[0] / weight.sum())
        raise DataError(
            f"the effective sample size is {ess:.1f} of {len(theta)} weighted rows ({ess / len(theta):.2%}), below "
            f"`least_ess` {least_ess:.2%}; the row with the largest weight has {top:.1%} of all. A higher `floor` does "
            "not mend this: take logs that show more, or lower `least_ess` if you must"
        )


def by_propensity(rows: Logged) -> Estimated:
    """A click counts 1/θ, and any row one minus that: E = γ and 1 − γ over all rows, shown or not."""
    relevant = rows.label / rows.propensity
    return Estimated(rows.logit, rows.group, relevant, 1 - relevant)


def of_observed(rows: Logged) -> Estimated:
    """Every row was observed, and stands for 1/θ rows of its kind."""
    return Estimated(rows.logit, rows.group, rows.label / rows.propensity, (1 - rows.label) / rows.propensity)


def doubly_robust(rows: Logged) -> Estimated:
    """The model's probability, corrected where a row was observed by how far it was off, times 1/θ."""
    imputed = torch.sigmoid(rows.logit)
    relevant = imputed + rows.observed / rows.propensity * (rows.label - imputed)
    return Estimated(rows.logit, rows.group, relevant, 1 - relevant)


def auc(rows: Estimated) -> Tensor:
    """Σ_{i≠j} r_i n_j [z_i > z_j] / Σ_{i≠j} r_i n_j, ties one half; `[]`."""
    ranks = rank_rows(rows.logit, torch.zeros_like(rows.group), rows.relevant, rows.irrelevant)
    relevant, irrelevant = ranks.per_tie(rows.relevant), ranks.per_tie(rows.irrelevant)
    own = (rows.relevant * rows.irrelevant)[ranks.order].sum()  # a row is no pair with itself
    all_irrelevant = irrelevant.sum()
    below = all_irrelevant - irrelevant.cumsum(0)
    won = (relevant * (below + irrelevant / 2)).sum() - own / 2
    return _ratio(won, relevant.sum() * all_irrelevant - own)


def gained(rows: Estimated, discount: Callable[[Tensor], Tensor], average: Average) -> Tensor:
    """Σ r_i discount(place_i) / Σ r_i, over all rows or in each group; `[]`."""
    ranks = rank_rows(rows.logit, rows.group, rows.relevant)
    in_tie = ranks.per_tie(rows.relevant)
    share = (in_tie / ranks.size)[ranks.tie]
    got = ranks.per_group(share * discount(ranks.place))
    most = torch.zeros_like(got).index_add_(0, ranks.owner, in_tie)
    if average == "all":
        return _ratio(got.sort().values.sum(), most.sort().values.sum())
    each = (got / most)[most > 0].sort().values
    return each.mean() if len(each) else torch.tensor(torch.nan, dtype=torch.float64)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), torch.nan)


def _clicked(rows: Logged) -> Tensor:
    return rows.label == 1


def _all(rows: Logged) -> Tensor:
    return torch.ones_like(rows.label, dtype=torch.bool)


def _observed(rows: Logged) -> Tensor:
    return rows.observed == 1


def snips_auc(
    *, feedback: Literal["implicit", "explicit"] = "implicit", floor: Floor = 0.01, least_ess: Share = 0.01
) -> Unbiased:
    """AUC between all relevant and irrelevant rows, from labels that only rows which were shown can have.

    implicit: a row without a click was not shown or is not relevant. With γ the chance of relevance and y = 1 with
    chance θγ, Σ_{i≠j} (y_i/θ_i)(1 − y_j/θ_j) [z_i > z_j] / Σ_{i≠j} (y_i/θ_i)(1 − y_j/θ_j), ties one half, goes to
    Σ γ_i (1 − γ_j) [z_i > z_j] / Σ γ_i (1 − γ_j). Other than AUC it may leave [0, 1] by chance.
    explicit: every row was observed, and the weights are 1/θ for both labels.

    Undefined without a weight on both sides. Ratios of sums are consistent, their bias is of order 1/rows.

    Schnabel et al., "Recommendations as Treatments", ICML 2016; Saito et al., "Unbiased Recommender Learning from
    Missing-Not-At-Random Implicit Feedback", WSDM 2020, whose propensity weights are put into the AUC here.

    Args:
        feedback: what a label of 0 means.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the weighted rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    if feedback == "explicit":
        return Unbiased((), of_observed, auc, floor, least_ess, _all)
    return Unbiased((), by_propensity, auc, floor, least_ess, _clicked)


def snips_ndcg(
    *,
    k: PositiveInt | None = None,
    discount: Discount = "rank_plus_one",
    average: Average = "all",
    floor: Floor = 0.01,
    least_ess: Share = 0.01,
) -> Unbiased:
    """Discounted gain of each unit of relevance, from clicks that only what was shown can have.

    Σ (y/θ) discount(rank) / Σ y/θ, which goes to Σ γ discount(rank) / Σ γ: SNIPS-DCG. The rank is that among all rows
    of the group, so let the rows be all candidates, shown or not. It is not divided by the best possible DCG, of which
    no unbiased estimate exists: compare models by it, but not with `ndcg`.

    Saito et al., "Unbiased Recommender Learning from Missing-Not-At-Random Implicit Feedback", WSDM 2020.

    Args:
        k: ranks that count. null: all.
        discount: rank_plus_one: 1/log2(rank + 1). rank: 1/log2(rank), and 1 for the first.
        average: all: one ratio over all groups. groups: the mean of a ratio for each group with a click, as published,
            which is biased where a group has few clicks.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the weighted rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    return Unbiased(("group",), by_propensity, _Dcg(k, discount, average), floor, least_ess, _clicked)


def snips_recall(
    *, k: PositiveInt = 10, average: Average = "all", floor: Floor = 0.01, least_ess: Share = 0.01
) -> Unbiased:
    """Share of relevance among the k highest scores of its group, from clicks that only what was shown can have.

    Σ (y/θ) [rank ≤ k] / Σ y/θ, which goes to Σ γ [rank ≤ k] / Σ γ. The rank is that among all rows of the group.

    Yang et al., "Unbiased Offline Recommender Evaluation for Missing-Not-At-Random Implicit Feedback", RecSys 2018.

    Args:
        k: ranks that count.
        average: all: one ratio over all groups. groups: the mean of a ratio for each group with a click, which is
            biased where a group has few clicks.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the weighted rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    return Unbiased(("group",), by_propensity, _First(k, average), floor, least_ess, _clicked)


def dr_auc(*, floor: Floor = 0.01, least_ess: Share = 0.01) -> Unbiased:
    """AUC between all relevant and irrelevant rows, right if the propensities or the model's probabilities are.

    r = p + (o/θ)(y − p), p = σ(z) of the evaluated model, o whether the row was observed;
    Σ_{i≠j} r_i (1 − r_j) [z_i > z_j] / Σ_{i≠j} r_i (1 − r_j), ties one half.

    Wang et al., "Doubly Robust Joint Learning for Recommendation on Data Missing Not at Random", ICML 2019, whose
    estimator is put into the AUC here.

    Args:
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the observed rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    return Unbiased(("observed",), doubly_robust, auc, floor, least_ess, _observed)


def dr_ndcg(
    *,
    k: PositiveInt | None = None,
    discount: Discount = "rank_plus_one",
    floor: Floor = 0.01,
    least_ess: Share = 0.01,
) -> Unbiased:
    """Discounted gain of each unit of relevance, right if the propensities or the model's probabilities are.

    Σ r discount(rank) / Σ r, r = p + (o/θ)(y − p), p = σ(z) of the evaluated model, o whether the row was observed;
    one ratio over all groups, and otherwise as `snips_ndcg`.

    Wang et al., "Doubly Robust Joint Learning for Recommendation on Data Missing Not at Random", ICML 2019, whose
    estimator is put into the gain here.

    Args:
        k: ranks that count. null: all.
        discount: rank_plus_one: 1/log2(rank + 1). rank: 1/log2(rank), and 1 for the first.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the observed rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    value = _Dcg(k, discount, "all")
    return Unbiased(("observed", "group"), doubly_robust, value, floor, least_ess, _observed)


def dr_recall(*, k: PositiveInt = 10, floor: Floor = 0.01, least_ess: Share = 0.01) -> Unbiased:
    """Share of relevance among the k highest scores, right if the propensities or the model's probabilities are.

    Σ r [rank ≤ k] / Σ r, r = p + (o/θ)(y − p), p = σ(z) of the evaluated model, o whether the row was observed; one
    ratio over all groups.

    Wang et al., "Doubly Robust Joint Learning for Recommendation on Data Missing Not at Random", ICML 2019, whose
    estimator is put into the recall here.

    Args:
        k: ranks that count.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        least_ess: an effective sample size below this share of the observed rows is an error; 0 allows any.

    Raises:
        DataError: when it is computed: see `least_ess`; or all propensities lie below the floor.
    """
    return Unbiased(("observed", "group"), doubly_robust, _First(k, "all"), floor, least_ess, _observed)


@dataclass(frozen=True)
class _Dcg:
    k: int | None
    discount: Discount
    average: Average

    def __call__(self, rows: Estimated) -> Tensor:
        return gained(rows, lambda place: discounts(place, self.discount, self.k), self.average)


@dataclass(frozen=True)
class _First:
    k: int
    average: Average

    def __call__(self, rows: Estimated) -> Tensor:
        return gained(rows, lambda place: (place < self.k).double(), self.average)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the metrics."""
    return [
        Component("metric", "snips_auc", snips_auc),
        Component("metric", "snips_ndcg", snips_ndcg),
        Component("metric", "snips_recall", snips_recall),
        Component("metric", "dr_auc", dr_auc),
        Component("metric", "dr_ndcg", dr_ndcg),
        Component("metric", "dr_recall", dr_recall),
    ]
