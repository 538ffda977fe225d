"""Pairs of clicked and other items, weighted so that the loss does not depend on what was exposed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, EncodedSchema, hookimpl, make_weight, pairs, second_model


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class UBPR(nn.Module):
    """Unbiased pairwise ranking: clicks over their propensities, against items of the user that are likely irrelevant.

    loss = (1/P) Σ_{i,j} max(−β, (Y_i/θ_i)·(1 − Y_j/θ_j)·softplus(−(x_i − x_j))), averaged over the tasks

    i are the logged rows and j the rows sampled for them, P = N·m; its expectation over exposure and relevance is that
    with γ_i(1 − γ_j) as weight, γ the probability of relevance. Pairs of an item with itself would be biased: they
    count in P and add nothing. Draw j from all items of the user, clicked ones included, and give each its label:
    `sampling: {sampler: uniform, positives: label, rows: positives}`. θ is not learned through this loss.

    Saito, "Unbiased pairwise learning from biased implicit feedback", ICTIR 2020.

    Args:
        beta: β, how far below zero the loss of a pair may go, without a gradient there; null: as far as it will. Less
            variance for some bias upwards: 0 drops all that clicked j take off.
        floor: least propensity; smaller ones count as this.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        *,
        beta: float | None = 0.005,
        floor: float = 0.0,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.beta = beta
        self.floor = floor
        self.allow_low_ess = allow_low_ess
        self.needs: tuple[str, ...] = ("positive", "item", "propensity")

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        item_i, item_j = pairs(batch.context["item"], batch)  # [N], [N, m]
        other = item_j != item_i[:, None]
        losses = []
        for task in self.tasks:
            x_i, x_j = pairs(_float(logits[task]), batch)
            theta = batch.context["propensity"].detach().to(x_i.dtype).clamp_min(self.floor)
            ratio_i, ratio_j = pairs(batch.label[task].to(x_i.dtype) / theta, batch)
            pair = ratio_i[:, None] * (1.0 - ratio_j) * nn.functional.softplus(x_j - x_i[:, None])
            if self.beta is not None:
                pair = pair.clamp_min(-self.beta)
            losses.append(torch.where(other, pair, 0.0).mean())
        return torch.stack(losses).mean()

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Y/θ of the first task, logged and sampled rows alike, before and after the floor, each `[B]`."""
        return _weights(batch, self.tasks[0], self.floor)


class UPL(nn.Module):
    """Unbiased pairwise ranking with weights that are never negative, from an estimate of relevance of its own.

    loss = (1/P) Σ_{i,j} (Y_i/θ_i)·(1 − Y_j)·(1 − ĝ_j)/(1 − θ_j ĝ_j)·softplus(−(x_i − x_j))
           + (1/P) Σ_j [softplus(x'_j) − (Y_j/θ_j) x'_j],  ĝ = σ(x'), averaged over the tasks

    i are the logged rows, j the rows sampled for them, P = N·m; (1 − ĝ_j)/(1 − θ_j ĝ_j) is the probability that an item
    without a click is irrelevant. x' is a second model of this loss: a factorisation machine on all fields, taught by
    the second term alone, which ĝ in the weights does not change. Unbiased where ĝ is right. Sample as for `ubpr`;
    pairs of an item with itself have Y_i = Y_j = 1 and weigh nothing.

    Ren et al., "Unbiased pairwise learning from implicit feedback for recommender systems without biased variance
    control", SIGIR 2023; the second term is that of Rel-MF (Saito et al., WSDM 2020).

    Args:
        dim: width of the second model's embedding.
        floor: least propensity; smaller ones count as this.
        limit: largest |x'| in the second term, which has no least value where Y/θ > 1; there it gives no gradient.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        dim: int = 16,
        floor: float = 0.0,
        limit: float = 15.0,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.floor = floor
        self.limit = limit
        self.allow_low_ess = allow_low_ess
        self.head = second_model(schema, dim)
        self.needs: tuple[str, ...] = ("positive", "propensity")

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        pointwise = self.head(batch)
        losses = []
        for task in self.tasks:
            x_i, x_j = pairs(_float(logits[task]), batch)  # [N], [N, m]
            _, head = pairs(pointwise[task].to(x_i.dtype), batch)
            theta_i, theta_j = pairs(batch.context["propensity"].detach().to(x_i.dtype).clamp_min(self.floor), batch)
            y_i, y_j = pairs(batch.label[task].to(x_i.dtype), batch)
            relevant = head.detach().sigmoid()
            weight = (y_i / theta_i)[:, None] * (1.0 - y_j) * (1.0 - relevant) / (1.0 - theta_j * relevant + 1e-5)
            ranking = weight * nn.functional.softplus(x_j - x_i[:, None])
            bounded = head.clamp(-self.limit, self.limit)
            teaching = nn.functional.softplus(bounded) - y_j / theta_j * bounded
            losses.append(ranking.mean() + teaching.mean())
        return torch.stack(losses).mean()

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Y/θ of the first task, logged and sampled rows alike, before and after the floor, each `[B]`."""
        return _weights(batch, self.tasks[0], self.floor)


def _weights(batch: Batch, task: str, floor: float) -> tuple[Tensor, Tensor]:
    """Y/θ before and after θ was given a floor, each `[B]`; 0 for rows without a click, which have no weight."""
    theta, clicked = batch.context["propensity"], batch.label[task]
    return make_weight(theta, rows=clicked), make_weight(theta.clamp(min=floor), rows=clicked)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the losses."""
    return [Component("loss", "ubpr", UBPR), Component("loss", "upl", UPL)]
