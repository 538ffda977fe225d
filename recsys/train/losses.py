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


def product_bce(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of the product of two probabilities that are given as logits, row by row.

    −y [lσ(a) + lσ(b)] − (1 − y) log(σ(−a) + σ(a) σ(−b)), with lσ the logarithm of σ: the second term is
    1 − σ(a) σ(b), and is never a difference of numbers close to 1. `[B], [B], [B] -> [B]`, in the type of the logits.
    """
    seen = F.logsigmoid(first)
    both = seen + F.logsigmoid(second)
    neither = torch.logaddexp(F.logsigmoid(-first), seen + F.logsigmoid(-second))
    return -torch.lerp(neither, both, label.to(both.dtype))


def row_mean(losses: Tensor, batch: Batch) -> Tensor:
    """The mean of a loss per row, each times the batch's `weight` where there is one: `[B], Batch -> []`.

    The divisor is the number of rows, as in the loss `bce`.
    """
    weight = batch.context.get("weight")
    return losses.mean() if weight is None else (losses * weight.to(losses.dtype)).mean()


def _bce(logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """`{task: [B]}, Batch -> []`, in the type of the logits."""
    given = batch.context.get("weight")
    losses = []
    for task, z in logits.items():
        weight = None if given is None else given.to(z.dtype)
        losses.append(F.binary_cross_entropy_with_logits(z, batch.label[task].to(z.dtype), weight))
    return torch.stack(losses).mean()
