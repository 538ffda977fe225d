"""NFM: a perceptron on the pooled pairs of a factorisation machine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Dropout, Fields, MLPBlock, Share, hookimpl


class NFM(nn.Module):
    """Neural factorisation machine: all pairs of fields pooled to one vector, then a perceptron.

    h = MLP(p), p = Σ_{i<j} e_i ∘ e_j = ½ [(Σ_f e_f)² − Σ_f e_f²], in O(F·D). With a first-order term,
    `model.head: {wide: true}`, it is the paper's model; without hidden layers, a weighted factorisation machine.

    He and Chua, "Neural Factorization Machines for Sparse Predictive Analytics", SIGIR 2017, arXiv 1708.05027.

    Args:
        hidden: width of each layer of the perceptron.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
        pooled_dropout: share of p that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        hidden: tuple[PositiveInt, ...] = (64,),
        batch_norm: bool = False,
        dropout: Share = 0.0,
        pooled_dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = Dropout(pooled_dropout)
        self.stack = MLPBlock(fields.dim, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] or D."""
        h: Tensor = self.stack(self.dropout(_pool(e)))
        return h

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`pooled [B, D]`: p."""
        return {"pooled": _pool(e)}


def _pool(e: Tensor) -> Tensor:
    """Σ_{i<j} e_i ∘ e_j, `[B, F, D] -> [B, D]`, in float32 at least."""
    e = e if e.dtype == torch.float64 else e.float()  # squares of half precision lose too much
    return 0.5 * (e.sum(1).square() - e.square().sum(1))


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "nfm", NFM)]
