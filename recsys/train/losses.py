"""Losses: logits and labels to one number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.contracts import Batch


class BCE(nn.Module):
    """Binary cross-entropy on logits.

    loss = (1/B) Σ_b w_b [softplus(z_b) − y_b z_b], averaged over the tasks; w_b is the batch's `weight` column
    where there is one, else 1. The divisor is the number of rows, not the sum of the weights, so that a row's
    part in the gradient does not depend on the rows it shares a batch with.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.needs: tuple[str, ...] = ()

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        weight = batch.context.get("weight")
        weight = None if weight is None else weight.float()
        losses = [
            F.binary_cross_entropy_with_logits(logits[task].float(), batch.label[task].float(), weight)
            for task in self.tasks
        ]
        return torch.stack(losses).mean()
