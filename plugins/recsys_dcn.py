"""DCN: the cross network whose weights are vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, Share, hookimpl


class CrossVector(nn.Module):
    """Cross network of DCN, the first version: rank-one crosses of degree up to layers + 1.

    x_0 = flatten(e), x_{l+1} = x_0 (w_lᵀ x_l) + b_l + x_l. Beside a perceptron it is DCN: `[dcn, mlp]`.

    Every x_l is s_l x_0 + β_l with one number s_l per row and a vector β_l that all rows share, so that
    s_{l+1} = s_l (1 + w_lᵀ x_0) + w_lᵀ β_l and β_{l+1} = β_l + b_l: one product `[B, F·D] · [F·D, layers]` does
    what the layers would do one after the other.

    Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017, arXiv 1708.05123.

    Args:
        layers: number of cross layers.
        hidden: width of each layer of a perceptron on top of the crosses (stacked); none: the crosses alone.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        layers: NonNegativeInt = 3,
        hidden: tuple[PositiveInt, ...] = (),
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.fields = fields
        width = len(fields) * fields.dim
        self.weight = nn.Parameter(torch.empty(layers, width))
        self.bias = nn.Parameter(torch.zeros(layers, width))
        nn.init.normal_(self.weight, std=(2.0 / (width + 1)) ** 0.5)
        self.stack = MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] or F · D."""
        x0 = e.flatten(1)  # [B, F·D]
        dots = nn.functional.linear(x0, self.weight) + 1.0  # [B, layers], 1 + w_lᵀ x_0
        before = self.bias.cumsum(0) - self.bias  # [layers, F·D], β_l
        shifts = (self.weight * before).sum(1)  # [layers], w_lᵀ β_l
        scale = torch.ones_like(x0[:, 0])  # [B], s_l
        for dot, shift in zip(dots.unbind(1), shifts.unbind(), strict=True):
            scale = scale * dot + shift
        y: Tensor = self.stack(torch.addcmul(self.bias.sum(0), scale.unsqueeze(1), x0))
        return y

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`weights [layers, F]`: the norm of w_l over the dimensions of each field."""
        return {"weights": self.weight.detach().view(-1, len(self.fields), self.fields.dim).norm(dim=2)}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "dcn", CrossVector)]
