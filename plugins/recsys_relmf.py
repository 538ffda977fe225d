"""Rel-MF: an unbiased loss for clicks that were only possible where an item was shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from torch import Tensor, nn
from torch.nn.functional import softplus

from recsys.api import Batch, Component, hookimpl, make_weight

Share = Annotated[float, Limits(gt=0, le=1)]
LIMIT = 15.0
"""Largest logit of a row whose soft label exceeds 1: without it the loss has no least value."""
TINY = 1e-6


class RelMF(nn.Module):
    """Relevance from clicks and propensities: rows without a click are unlabelled, not negative.

    loss = Σ_b [(Y/θ) δ¹(z) + c (1 − Y/θ) δ⁰(z)] / Σ_b [Y + c (1 − Y)], over all rows of the log, with θ at least
    `floor` and c = `unlabelled`; of c = 1 the divisor is the number of rows. With δ the cross-entropy that is then
    softplus(z) − (Y/θ) z, whose gradient is σ(z) − Y/θ. If a click Y is "shown and relevant", and θ the chance to be
    shown, its mean over all that might have been shown is the loss for the unknown relevance.

    A row with Y/θ > 1 has a loss without a least value: its logit counts as at most 15. `squared` has one.

    Saito et al., "Unbiased Recommender Learning from Missing-Not-At-Random Implicit Feedback", WSDM 2020,
    arXiv 1909.03601. The rows are to be all pairs, or a uniform sample of them; where positives were sampled more often
    than others, weigh them back with a column `weight`.

    Args:
        error: δ: `bce`, or `squared` errors of σ(z), (1 − σ)² and σ².
        floor: M, the least propensity. It bounds the variance, and brings the bias (θ/M − 1) where θ < M.
        unlabelled: c, the weight of what is not clicked; with a propensity of 1 the loss is that of weighted matrix
            factorisation.
        non_negative: β: where Σ c (1 − Y/θ) δ⁰ of a batch is less than −β times the divisor, it is left out.
        dual_unbiased: the HEURISTIC (Y/θ) δ¹ + (1 − Y)/(1 − θ)^power δ⁰ of Lee et al., SIGIR 2021. In spite of its
            name it is biased when a click needs both exposure and relevance: its negative part has the mean
            (1 − θγ)/(1 − θ) δ⁰, more than δ⁰.
        power: of the heuristic.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        *,
        error: Literal["bce", "squared"] = "bce",
        floor: Share = 0.01,
        unlabelled: Annotated[float, Limits(gt=0)] = 1.0,
        non_negative: Annotated[float, Limits(ge=0)] | None = None,
        dual_unbiased: bool = False,
        power: Annotated[float, Limits(ge=0)] = 1.0,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.error, self.floor, self.unlabelled = tasks, error, floor, unlabelled
        self.non_negative, self.dual_unbiased, self.power = non_negative, dual_unbiased, power
        self.allow_low_ess = allow_low_ess
        self.needs: tuple[str, ...] = ("propensity",)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        losses = []
        for task in self.tasks:
            z = logits[task] if logits[task].dtype == torch.float64 else logits[task].float()
            losses.append(self._loss(z, batch.label[task].to(z.dtype), batch))
        return torch.stack(losses).mean()

    def _loss(self, z: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """`[B], [B] -> []`."""
        soft = y * make_weight(batch.context["propensity"].to(z.dtype), "floor", self.floor)  # Y/θ, [B]
        z = torch.where(soft > 1, z.clamp(max=LIMIT), z)
        one, zero = self._errors(z)
        rest = 1 - soft
        if self.dual_unbiased:
            theta = batch.context["propensity"].detach().to(z.dtype).clamp(min=self.floor)
            rest = (1 - y) / ((1 - theta) ** self.power + TINY)
        positive, negative = soft * one, self.unlabelled * rest * zero
        divisor = y + self.unlabelled * (1 - y)
        if "weight" in batch.context:
            weight = batch.context["weight"].to(z.dtype)
            positive, negative = weight * positive, weight * negative
        below = negative.sum() / divisor.sum()
        if self.non_negative is not None:
            below = torch.where(below < -self.non_negative, 0.0, below)
        return positive.sum() / divisor.sum() + below

    def _errors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """δ¹ and δ⁰, `[B] -> [B], [B]`."""
        if self.error == "bce":
            return softplus(-z), softplus(z)
        return torch.sigmoid(-z) ** 2, torch.sigmoid(z) ** 2

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Y/θ of the first task, before and after θ was given a floor, each `[B]`."""
        theta, y = batch.context["propensity"], batch.label[self.tasks[0]]
        return make_weight(theta, rows=y), make_weight(theta, "floor", self.floor, rows=y)


@hookimpl
def recsys_components() -> list[Component]:
    """Return what this plugin brings."""
    return [Component("loss", "relmf", RelMF)]
