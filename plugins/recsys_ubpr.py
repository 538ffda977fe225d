"""Pairs of clicked and other items, weighted so that the loss does not depend on what was exposed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, hookimpl, pairs


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
    """

    def __init__(self, tasks: tuple[str, ...], *, beta: float | None = 0.005, floor: float = 0.0) -> None:
        super().__init__()
        self.tasks = tasks
        self.beta = beta
        self.floor = floor
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


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "ubpr", UBPR)]
