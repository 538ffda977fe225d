"""xDeepFM: the compressed interaction network (CIN), crosses of vectors of a degree that is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, RecipeError, hookimpl

ACTIVATIONS = {"identity": nn.Identity, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}


class CIN(nn.Module):
    """Compressed interaction network of xDeepFM: layer k crosses k + 1 fields, dimension by dimension.

    X^0 = e, X^k_h = φ(Σ_{i,j} W^{k,h}_{ij} (X^{k-1}_i ∘ X^0_j)), output [Σ_d X^1; Σ_d X^2; …]. Beside a perceptron,
    with a first-order term, it is xDeepFM: `[cin, mlp]` and `model.head: {wide: true}`.

    Cost of a layer: B · D · H_{k-1} · F · H_k multiplications in one product, on vectors that lie field by field,
    `[H, B·D]`. The first layer crosses the fields with themselves, where i, j and j, i are the same product: it works
    on the two halves of the fields, first × first, last × last and first × last: three quarters of the work and no
    tensor `[B, F, F, D]`. The later ones build `[H_{k-1} · F, B·D]` or, when the layer has fewer maps than the one
    before, mix first and build `[H_k · F, B·D]`.

    Lian et al., "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems", KDD 2018,
    arXiv 1803.05170.

    Args:
        maps: number of feature maps H_k of each layer.
        activation: φ; the paper finds identity best.
        split_half: only the first half of a layer's maps goes on to the next one, and the second half to the output.
        bias: add a learned number to each map before φ, as the FuxiCTR library does.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        maps: tuple[PositiveInt, ...] = (100, 100, 100),
        activation: Literal["identity", "sigmoid", "relu"] = "identity",
        split_half: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not maps:
            raise RecipeError("maps: give the number of maps of at least one layer")
        if split_half and any(m % 2 for m in maps[:-1]):
            raise RecipeError(f"maps: {list(maps)} cannot be split in halves: all but the last must be even")
        self.activation = ACTIVATIONS[activation]()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        before, out = len(fields), []
        for k, width in enumerate(maps):
            last = k == len(maps) - 1
            out.append(width // 2 if split_half and not last else width)
            weight = torch.empty(width, before, len(fields))  # W^k
            nn.init.normal_(weight, std=(2.0 / (width + before * len(fields))) ** 0.5)
            self.weights.append(nn.Parameter(weight))
            if bias:
                self.biases.append(nn.Parameter(torch.zeros(width, 1)))
            before = width - out[-1] if split_half and not last else width
        self.out = tuple(out)
        self.split_half = split_half
        self.width = sum(out)
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = sum of the maps (with `split_half`, of those that go to the output)."""
        rows, _, dim = e.shape
        x0 = e.transpose(0, 1).flatten(1)  # [F, B·D]
        x, pooled = x0, []
        for k, weight in enumerate(self.weights):
            x = _square(weight, x0) if k == 0 else _cross(weight, x, x0)  # [H_k, B·D]
            x = x + self.biases[k].to(x.dtype) if len(self.biases) else x
            x = self.activation(x)
            seen = x[-self.out[k] :] if self.split_half else x
            x = x[: -self.out[k]] if self.split_half and self.out[k] < len(x) else x
            pooled.append(seen.view(-1, rows, dim).sum(2))  # [H_k, B]
        return torch.cat(pooled).T

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`pairs [F, F]`: norm over the first layer's maps of the weight of each pair of fields; symmetric."""
        weight = self.weights[0].detach()
        return {"pairs": (weight + weight.transpose(1, 2)).norm(dim=0)}


def _square(weight: Tensor, x: Tensor) -> Tensor:
    """Σ_ij W_hij x_i ∘ x_j: `[H, F, F], [F, N] -> [H, N]`, in the blocks first × first, last × last, first × last."""
    half = (x.shape[0] + 1) // 2
    first, last = x[:half], x[half:]
    mixed = weight[:, :half, half:] + weight[:, half:, :half].transpose(1, 2)  # the same products twice
    blocks = (weight[:, :half, :half], weight[:, half:, half:], mixed)
    products = [_outer(a, b) for a, b in ((first, first), (last, last), (first, last))]
    return torch.cat([w.flatten(1) for w in blocks], 1) @ torch.cat(products)  # [H, ¾ F²] @ [¾ F², N]


def _cross(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij W_hij a_i ∘ b_j: `[H, I, J], [I, N], [J, N] -> [H, N]`, in the order that builds the smaller tensor."""
    return _mix_first(weight, a, b) if weight.shape[0] < weight.shape[1] else _outer_first(weight, a, b)


def _outer_first(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As `_cross`, by way of `[I·J, N]`."""
    return weight.flatten(1) @ _outer(a, b)


def _mix_first(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As `_cross`, by way of `[H·J, N]`."""
    mixed = weight.transpose(1, 2).flatten(0, 1) @ a  # [H·J, N]
    return (mixed.view(weight.shape[0], weight.shape[2], -1) * b).sum(1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a_i ∘ b_j, `[I, N], [J, N] -> [I·J, N]`."""
    return (a.unsqueeze(1) * b).flatten(0, 1)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "cin", CIN)]
