"""Pairs of a positive row and rows that were sampled for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, hookimpl, pairs


class BPR(nn.Module):
    """Bayesian personalised ranking: a positive row is to have a higher logit than the rows sampled for it.

    loss = (1/P) Σ_{i,j} w_i y_i (1 − y_j) softplus(−(x_i − x_j)), averaged over the tasks

    i are the N logged rows, j the m rows that were sampled for i, and P = N·m. A logged row with label 0 counts in P
    and adds nothing: `sampling.rows: positives` leaves such rows out. w_i is the weight of the logged row, if any.

    Rendle, Freudenthaler, Gantner, Schmidt-Thieme, "BPR: Bayesian personalized ranking from implicit feedback",
    UAI 2009. The logits order the items of one user, and are no probabilities: of the metrics `gauc` and `auc` mean
    something, `logloss` and `ece` do not.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.needs: tuple[str, ...] = ("positive",)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        losses = []
        for task in self.tasks:
            x, y = logits[task], batch.label[task]
            logged, sampled = pairs(x if x.dtype == torch.float64 else x.float(), batch)  # [N], [N, m]
            positive, other = pairs(y.to(logged.dtype), batch)
            if "weight" in batch.context:
                positive = positive * pairs(batch.context["weight"].to(logged.dtype), batch)[0]
            pair = nn.functional.softplus(sampled - logged[:, None])
            losses.append((positive[:, None] * (1.0 - other) * pair).mean())
        return torch.stack(losses).mean()


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "bpr", BPR)]
