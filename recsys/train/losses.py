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
        return _bce({task: logits[task].float() for task in self.tasks}, batch)


def label_bce(logit: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of one logit per row against the labels of a batch, as the loss `bce` has it.

    (1/B) Σ_b w_b [softplus(z_b) − y_b z_b], averaged over the tasks that the batch has labels of. For the `auxiliary`
    loss of a part: `[B], Batch -> []`, float32 also under autocast; float64 stays.
    """
    logit = logit if logit.dtype == torch.float64 else logit.float()
    return _bce(dict.fromkeys(batch.label, logit), batch)


def _bce(logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """`{task: [B]}, Batch -> []`, in the type of the logits."""
    given = batch.context.get("weight")
    losses = []
    for task, z in logits.items():
        weight = None if given is None else given.to(z.dtype)
        losses.append(F.binary_cross_entropy_with_logits(z, batch.label[task].to(z.dtype), weight))
    return torch.stack(losses).mean()
