"""DCN-V2 with a mixture of low-rank crosses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, Share, hookimpl


class MixCross(nn.Module):
    """One cross layer of low-rank experts.

    y = x_0 ∘ (Σ_i G_i(x) U_i tanh(C_i tanh(V_iᵀ x)) + b) + x. This is the paper's Σ_i G_i x_0 ∘ (U_i … + b), as the
    gates add up to one; so all experts end in one product, and no expert has an output `[B, F·D]` of its own.

    Args:
        width: of the input and the output.
        rank: of each expert.
        experts: their number K.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.rank, self.experts = rank, experts
        self.down = nn.Parameter(torch.empty(experts, rank, width))  # V_iᵀ
        self.core = nn.Parameter(torch.empty(experts, rank, rank))  # C_i
        self.up = nn.Parameter(torch.empty(experts, rank, width))  # U_iᵀ
        self.bias = nn.Parameter(torch.zeros(width))
        for p in (self.down, self.core, self.up):
            nn.init.normal_(p, std=(2.0 / (p.shape[1] + p.shape[2])) ** 0.5)  # xavier, for each expert

    def forward(self, x0: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """`x0, x [B, width], gates [B, K] -> [B, width]`."""
        inner = nn.functional.linear(x, self.down.flatten(0, 1)).tanh()  # [B, K · rank]
        inner = inner.view(-1, self.experts, self.rank).transpose(0, 1)  # [K, B, rank]
        inner = (inner @ self.core.transpose(1, 2).to(inner.dtype)).tanh().transpose(0, 1)  # [B, K, rank]
        inner = (inner * gates.unsqueeze(2)).flatten(1)
        outer = nn.functional.linear(inner, self.up.flatten(0, 1).T, self.bias)  # [B, width]
        return torch.addcmul(x, x0, outer.to(x.dtype))


class DCNv2Mix(nn.Module):
    """Cross network of DCN-V2 with a mixture of low-rank experts.

    x_0 = flatten(e), x_{l+1} = Σ_i G_i(x_l) x_0 ∘ (U_i tanh(C_i tanh(V_iᵀ x_l)) + b) + x_l,
    G(x) = softmax(g_1ᵀ x, g_2ᵀ x, …).
    Beside a perceptron it is the parallel DCN-V2: `[dcnv2_mix, mlp]`. Full matrices: `cross`.

    Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021, arXiv 2008.13535.

    Args:
        layers: number of cross layers.
        rank: rank of each expert.
        experts: number of experts.
        hidden: width of each layer of a perceptron on top of the crosses (stacked); none: the crosses alone.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        layers: NonNegativeInt = 3,
        rank: PositiveInt = 32,
        experts: PositiveInt = 4,
        hidden: tuple[PositiveInt, ...] = (),
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        width = len(fields) * fields.dim
        self.layers = nn.ModuleList(MixCross(width, rank, experts) for _ in range(layers))
        # One expert has nothing to choose from; its gate is 1 whatever the weights.
        gated = layers > 0 and experts > 1
        self.gate = nn.Parameter(torch.empty(experts, width)) if gated else None  # g_i, the same in every layer
        if self.gate is not None:
            nn.init.normal_(self.gate, std=(2.0 / (width + 1)) ** 0.5)
        self.stack = MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] or F · D."""
        y: Tensor = self.stack(self._states(e)[-1])
        return y

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`gates.<layer> [B, experts]`: the share of each expert."""
        return {f"gates.{i}": self._gates(x) for i, x in enumerate(self._states(e)[:-1])}

    def _states(self, e: Tensor) -> list[Tensor]:
        """x_0, x_1, …, each `[B, F·D]`."""
        states = [e.flatten(1)]
        for layer in self.layers:
            states.append(layer(states[0], states[-1], self._gates(states[-1])))
        return states

    def _gates(self, x: Tensor) -> Tensor:
        """`[B, F·D] -> [B, experts]`."""
        return torch.ones_like(x[:, :1]) if self.gate is None else nn.functional.linear(x, self.gate).softmax(1)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "dcnv2_mix", DCNv2Mix)]
