"""PNN: a perceptron that also reads products of the fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, Share, hookimpl


class PNN(nn.Module):
    """Product-based network: a perceptron on the embeddings and their inner or outer products.

    inner (IPNN): h = MLP([flatten(e); ⟨e_i, e_j⟩ for i < j]), all of them from one product e eᵀ `[B, F, F]`.
    outer (OPNN): h = MLP([flatten(e); flatten(s sᵀ)]), s = Σ_f e_f: the sum over all pairs of e_i e_jᵀ, `[B, D, D]`.

    Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016, arXiv 1611.00144.

    Args:
        product: inner, outer, or both (PNN*).
        hidden: width of each layer of the perceptron.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
    """

    pairs: Tensor

    def __init__(
        self,
        fields: Fields,
        *,
        product: Literal["inner", "outer", "both"] = "inner",
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        count, dim = len(fields), fields.dim
        self.inner, self.outer = product != "outer", product != "inner"
        rows, columns = torch.triu_indices(count, count, offset=1)
        self.register_buffer("pairs", rows * count + columns, persistent=False)
        width = count * dim + self.inner * (count * (count - 1) // 2) + self.outer * dim * dim
        self.stack = MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1]."""
        parts = [e.flatten(1)]
        if self.inner:
            parts.append((e @ e.transpose(1, 2)).flatten(1).index_select(1, self.pairs).to(e.dtype))
        if self.outer:
            s = e.sum(1)  # [B, D]
            parts.append((s.unsqueeze(2) * s.unsqueeze(1)).flatten(1))  # [B, D²]
        h: Tensor = self.stack(torch.cat(parts, 1))
        return h

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`inner [B, F, F]`: the inner products, where the perceptron reads them."""
        return {"inner": e @ e.transpose(1, 2)} if self.inner else {}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "pnn", PNN)]
