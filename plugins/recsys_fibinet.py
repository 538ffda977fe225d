"""FiBiNET: fields weighed by their importance, pairs of fields crossed by bilinear forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, RecipeError, Share, hookimpl, linear

Bilinear = Literal["all", "each", "pair"]


class FiBiNET(nn.Module):
    """Squeeze-and-excitation over the fields, bilinear crosses of all pairs, then a perceptron.

    a = ReLU(W₂ ReLU(W₁ z)), z_f = mean_d e_fd, v_f = a_f e_f;  p_ij = (e_i W) ∘ e_j, q_ij = (v_i W') ∘ v_j for i < j;
    h = MLP([p; q]). With a first-order term, `model.head: {wide: true}`, it is the paper's model.

    The vectors are multiplied by W once per field, and pairs picked after (`pair`: picked before, a matrix for each);
    p and q are `[B, F (F-1) / 2, D]` each, which is what the perceptron reads: the width grows with F². W₂ starts
    without negative numbers: a row of them would keep the field's importance at zero, and without gradient, for ever.

    Huang et al., "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for Click-Through Rate
    Prediction", RecSys 2019, arXiv 1905.09433.

    Args:
        bilinear: one W for all pairs, one for each left field, or one for each pair.
        reduction: the excitation's inner width is F / reduction, at least 1.
        hidden: width of each layer of the perceptron.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        bilinear: Bilinear = "pair",
        reduction: PositiveInt = 3,
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        count = len(fields)
        if count < 2:
            raise RecipeError("fibinet crosses pairs of fields: it needs at least two")
        inner = max(1, count // reduction)
        self.squeeze = linear(count, inner, bias=False)
        self.excite = linear(inner, count, bias=False)
        with torch.no_grad():
            self.excite.weight.abs_()
        self.plain = PairCross(count, fields.dim, bilinear)
        self.weighed = PairCross(count, fields.dim, bilinear)
        width = count * (count - 1) * fields.dim
        self.stack = MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1]."""
        v = e * self.importance(e).unsqueeze(2).to(e.dtype)  # [B, F, D]
        crosses = torch.cat([self.plain(e).flatten(1), self.weighed(v).flatten(1)], 1)  # [B, F (F-1) D]
        h: Tensor = self.stack(crosses)
        return h

    def importance(self, e: Tensor) -> Tensor:
        """The a of each field, `[B, F, D] -> [B, F]`, not negative."""
        a: Tensor = self.excite(self.squeeze(e.mean(2)).relu()).relu()
        return a

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`importance [B, F]`."""
        return {"importance": self.importance(e)}


class PairCross(nn.Module):
    """(e_i W) ∘ e_j for every i < j.

    Args:
        count: number of fields F.
        dim: D.
        bilinear: how many matrices W there are: one, one for each left field, one for each pair.
    """

    left: Tensor
    right: Tensor

    def __init__(self, count: int, dim: int, bilinear: Bilinear) -> None:
        super().__init__()
        self.bilinear = bilinear
        pairs = torch.triu_indices(count, count, offset=1)
        self.register_buffer("left", pairs[0], persistent=False)
        self.register_buffer("right", pairs[1], persistent=False)
        matrices = {"all": 1, "each": count - 1, "pair": count * (count - 1) // 2}[bilinear]
        self.weight = nn.Parameter(torch.empty(matrices, dim, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)  # xavier, for each matrix

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, F (F-1) / 2, D]`."""
        weight = self.weight.to(e.dtype)
        if self.bilinear == "all":
            left = (e @ weight[0]).index_select(1, self.left)
        elif self.bilinear == "each":
            mixed = (e[:, :-1].transpose(0, 1) @ weight).transpose(0, 1)  # [B, F-1, D]
            left = mixed.index_select(1, self.left)
        else:
            left = (e.transpose(0, 1).index_select(0, self.left) @ weight).transpose(0, 1)
        return left * e.index_select(1, self.right)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "fibinet", FiBiNET)]
