"""GDCN: the cross network of DCN-V2 with gates that let only some crosses pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, Share, hookimpl, linear


class GDCN(nn.Module):
    """Gated cross network: crosses of degree up to layers + 1, each of which passes a gate.

    x_0 = flatten(e), x_{l+1} = x_0 ∘ (W_l x_l + b_l) ∘ σ(V_l x_l) + x_l. With a perceptron on top (`hidden`) it is
    GDCN-S, beside one GDCN-P: `[gdcn, mlp]`.

    Wang et al., "Towards Deeper, Lighter and Interpretable Cross Network for CTR Prediction", CIKM 2023,
    arXiv 2311.04635.

    Args:
        layers: number of gated cross layers.
        bias: how b starts; uniform in [0, 1) is the FuxiCTR library's start.
        hidden: width of each layer of a perceptron on top of the crosses (stacked); none: the crosses alone.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        layers: NonNegativeInt = 3,
        bias: Literal["zeros", "uniform"] = "zeros",
        hidden: tuple[PositiveInt, ...] = (),
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.fields = fields
        width = len(fields) * fields.dim
        self.crosses = nn.ModuleList(linear(width, width) for _ in range(layers))
        self.gates = nn.ModuleList(linear(width, width, bias=False) for _ in range(layers))
        if bias == "uniform":
            for cross in self.crosses:
                nn.init.uniform_(cross.get_parameter("bias"))
        self.stack = MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] or F · D."""
        x0 = x = e.flatten(1)  # [B, F·D]
        for cross, gate in zip(self.crosses, self.gates, strict=True):
            x = torch.addcmul(x, x0 * cross(x).to(x.dtype), torch.sigmoid(gate(x)).to(x.dtype))
        y: Tensor = self.stack(x)
        return y

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`cross [layers, F, F]`: norm of the block of W_l that crosses field i (of x_0) with field j."""
        f, d = len(self.fields), self.fields.dim
        weights = [cross.get_parameter("weight").detach().view(f, d, f, d) for cross in self.crosses]
        return {"cross": torch.stack([w.square().sum((1, 3)).sqrt() for w in weights])} if weights else {}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "gdcn", GDCN)]
