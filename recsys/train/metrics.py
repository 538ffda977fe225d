"""Exact metrics on float64 logits: ties share their rank, one class is undefined, order never matters."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from recsys.errors import DataError


class Rows(Metric):
    """Keeps all rows; what they come to is computed once, on all of them together.

    Ranks and sums are exact or taken in a fixed order, so the value does not depend on the order of the rows, nor on
    how they were divided into batches or over processes.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool = True
    needs: ClassVar[tuple[str, ...]] = ()

    logit: list[Tensor]
    label: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logit", [], dist_reduce_fx="cat")
        self.add_state("label", [], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]`, label `[B]` in {0, 1}; logits are kept in float64."""
        if logit.shape != label.shape or logit.dim() != 1:
            raise ValueError(f"expected logit and label [B], got {tuple(logit.shape)} and {tuple(label.shape)}")
        self.logit.append(logit.detach().double())
        self.label.append(label.detach())

    def _rows(self) -> tuple[Tensor, Tensor]:
        """All rows: logit `[N]` float64, label `[N]` int64.

        Raises:
            DataError: a prediction is not finite, or a label is neither 0 nor 1.
        """
        if not len(self.logit):
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        logit, label = dim_zero_cat(self.logit), dim_zero_cat(self.label)
        refuse(~torch.isfinite(logit), logit, "prediction", "a finite number")
        refuse((label != 0) & (label != 1), label, "label", "0 or 1")
        return logit, label.long()


def refuse(bad: Tensor, values: Tensor, what: str, expected: str) -> None:
    """Raise a `DataError` with the first of the bad rows, if there are any.

    Args:
        bad: `[N]` bool.
        values: `[N]`, of all rows.
        what: they are.
        expected: of them, in words.
    """
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{what} of evaluated row {row + 1} is {values[row].item()}, expected {expected} "
            f"({int(bad.sum())} of {len(bad)} rows are not)"
        )


def undefined() -> Tensor:
    """`[]` float64, NaN."""
    return torch.tensor(torch.nan, dtype=torch.float64)


def mean(x: Tensor) -> Tensor:
    """Mean that does not depend on the order of the rows, to the last bit."""
    return x.sort().values.sum() / len(x)


def _log_loss(logit: Tensor, label: Tensor) -> Tensor:
    return mean(F.softplus(torch.where(label == 1, -logit, logit)))


def _ties(*keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by the keys (the last one first in importance); returns the order and each row's tie number."""
    order = torch.argsort(keys[0], stable=True)
    for key in keys[1:]:
        order = order[torch.argsort(key[order], stable=True)]
    new = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    for key in keys:
        k = key[order]
        new[1:] |= k[1:] != k[:-1]
    return order, new.long().cumsum(0)


def _count(tie: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each tie, from rows sorted by tie."""
    size = int(tie[-1]) + 1
    positive = torch.zeros(size, dtype=torch.int64, device=tie.device).index_add_(0, tie, label)
    return positive, torch.bincount(tie, minlength=size) - positive


class AUC(Rows):
    """Area under the ROC curve.

    AUC = (pairs in the right order + ½ tied pairs) / (positives · negatives), counted in integers; undefined (NaN)
    when there is only one class.
    """

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        positives = int(label.sum())
        if positives in (0, len(label)):
            return undefined()
        order, tie = _ties(logit)
        positive, negative = _count(tie, label[order])
        twice = positive * (2 * (negative.cumsum(0) - negative) + negative)  # 2 · pairs won, ties count 1
        return twice.sum().double() / (2.0 * positives * (len(label) - positives))


class GAUC(Rows):
    """AUC inside each group (user, request), averaged by the number of impressions.

    gAUC = Σ_g n_g AUC_g / Σ_g n_g over the groups that have both classes; undefined when none has.

    Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017.
    """

    needs: ClassVar[tuple[str, ...]] = ("group",)
    group: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("group", [], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]`, label `[B]` in {0, 1}, group `[B]` int64."""
        super().update(logit, label)
        self.group.append(context["group"].detach())

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        if not len(label):
            return undefined()
        group = dim_zero_cat(self.group)
        order, tie = _ties(logit, group)  # by group, then by logit
        label, group = label[order], group[order]
        positive, negative = _count(tie, label)  # [ties]
        _, member = torch.unique_consecutive(group, return_inverse=True)  # [N]
        first = torch.ones(len(tie), dtype=torch.bool, device=tie.device)
        first[1:] = tie[1:] != tie[:-1]
        owner = member[first]  # [ties] -> group number
        p, n = _add_up(positive, owner), _add_up(negative, owner)  # [groups]
        below = negative.cumsum(0) - negative - (n.cumsum(0) - n)[owner]  # negatives of the same group that rank lower
        twice = _add_up(positive * (2 * below + negative), owner)
        valid = (p > 0) & (n > 0)
        if not bool(valid.any()):
            return undefined()
        p, n, twice = p[valid].double(), n[valid].double(), twice[valid].double()
        return ((p + n) * twice / (2 * p * n)).sum() / (p + n).sum()


def _add_up(x: Tensor, owner: Tensor) -> Tensor:
    return torch.zeros(int(owner[-1]) + 1, dtype=x.dtype, device=x.device).index_add_(0, owner, x)


class LogLoss(Rows):
    """Mean negative log-likelihood, in nats.

    (1/N) Σ softplus(z) − y z, from the logit itself, so that confident rows lose no digits.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        return _log_loss(logit, label) if len(label) else undefined()


class NormalizedEntropy(Rows):
    """Log loss relative to always predicting the base rate.

    NE = LogLoss / −[p log p + (1 − p) log(1 − p)], p the share of positives; undefined when there is one class.

    He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        positives = int(label.sum())
        if positives in (0, len(label)):
            return undefined()
        p = torch.tensor(positives / len(label), dtype=torch.float64, device=logit.device)
        return _log_loss(logit, label) / -(p * p.log() + (1 - p) * torch.log1p(-p))


class PRAUC(Rows):
    """Average precision, the area under the precision–recall curve without interpolation.

    Σ_k (R_k − R_{k−1}) P_k over the distinct scores, highest first; undefined when there is one class.
    """

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        positives = int(label.sum())
        if positives in (0, len(label)):
            return undefined()
        order, tie = _ties(-logit)
        positive, negative = _count(tie, label[order])
        hits = positive.cumsum(0).double()
        precision = hits / (positive + negative).cumsum(0)
        return (positive * precision).sum() / positives


class ECE(Rows):
    """Expected calibration error of the click probability.

    Σ_b (n_b / N) |mean p − mean y| over bins of the predicted probability p. Bins of equal mass hold about as many
    rows each, and rows of one score stay together (in the bin of their middle rank).

    Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.

    Args:
        bins: number of bins.
        binning: mass (equal numbers of rows) or width (equal widths of p).
    """

    higher_is_better = False

    def __init__(self, *, bins: int = 15, binning: Literal["mass", "width"] = "mass") -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins: expected at least 1, got {bins}")
        self.bins = bins
        self.binning = binning

    def compute(self) -> Tensor:
        """`[]` float64."""
        logit, label = self._rows()
        if not len(label):
            return undefined()
        order, tie = _ties(logit)
        p, y = torch.sigmoid(logit[order]), label[order]
        if self.binning == "width":
            where = (p * self.bins).long()
        else:
            size = torch.bincount(tie)
            twice_middle = 2 * (size.cumsum(0) - size) + size  # [ties], in [0, 2N]
            where = (twice_middle * self.bins).div(2 * len(y), rounding_mode="floor")[tie]
        where = where.clamp(max=self.bins - 1)
        # p is sorted and bins follow each other, so each one's sum is taken over a slice, in an order that neither the
        # rows' order nor the deterministic mode changes.
        rows = torch.bincount(where, minlength=self.bins).tolist()
        clicks = torch.zeros(self.bins, dtype=torch.int64, device=p.device).index_add_(0, where, y)
        gap = torch.stack([part.sum() for part in torch.split(p, rows)]) - clicks
        return gap.abs().sum() / len(y)
