"""AutoInt and AutoInt+: multi-head self-attention between the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.api import AttentionSizes, Component, Fields, MLPBlock, RecipeError, attend, hookimpl

Preset = Literal["paper", "official", "fuxictr", "deepctr"]
Residual = Literal["projected", "identity", "none"]
Share = Annotated[float, Limits(ge=0, lt=1)]


@dataclass(frozen=True)
class Variant:
    """What the published implementations disagree on.

    Args:
        scale: divide the attention scores by √d', d' the width of a head.
        residual: projected (always W_Res e), identity (e itself where the widths agree, else W_Res e), none.
        layer_norm: normalise each field's output.
        norm_last: normalise after the ReLU instead of before it.
        eps: of the normalisation.
        activated: the projections have biases and a ReLU.
        width: total width of the heads; None for the embedding dimension.
        normal_init: standard deviation of a normal initialisation of the projections; None for xavier.
    """

    scale: bool = False
    residual: Residual = "projected"
    layer_norm: bool = False
    norm_last: bool = False
    eps: float = 1e-5
    activated: bool = False
    width: int | None = 64
    normal_init: float | None = None


VARIANTS: dict[Preset, Variant] = {
    "paper": Variant(),
    "official": Variant(scale=True, layer_norm=True, norm_last=True, eps=1e-8, activated=True),
    "fuxictr": Variant(residual="identity"),
    "deepctr": Variant(width=None, normal_init=0.05),
}


class InteractingLayer(nn.Module):
    """One layer of AutoInt: every field looks at every field.

    a^h_{mk} = softmax_k(⟨W_Q^h e_m, W_K^h e_k⟩),  ẽ_m = [Σ_k a^1_{mk} W_V^1 e_k; …],  out_m = ReLU(ẽ_m + W_Res e_m)

    Args:
        in_width: D of the input.
        width: total width of the heads, the D of the output.
        heads: number of heads, each `width / heads` wide.
        variant: scale, residual, normalisation, activation.
        dropout: share of the attention weights that is dropped in training.
    """

    def __init__(self, in_width: int, width: int, heads: int, variant: Variant, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"width {width} cannot be split over {heads} heads")
        self.width, self.heads, self.variant, self.dropout = width, heads, variant, dropout
        projected = variant.residual == "projected" or (variant.residual == "identity" and in_width != width)
        self.parts = 4 if projected else 3  # Q, K, V and, where it is learned, the residual
        self.scale = (width // heads) ** -0.5 if variant.scale else 1.0
        # One matrix holds all projections, stacked.
        self.weight = nn.Parameter(torch.empty(self.parts * width, in_width))
        self.bias = nn.Parameter(torch.zeros(self.parts * width)) if variant.activated else None
        self.norm = nn.LayerNorm(width, eps=variant.eps) if variant.layer_norm else None
        for part in self.weight.detach().chunk(self.parts):
            if variant.normal_init is None:
                nn.init.xavier_normal_(part)
            else:
                nn.init.normal_(part, std=variant.normal_init)

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, F, width]`."""
        identity = self.variant.residual == "identity" and self.parts == 3
        norm_first = self.norm is not None and not self.variant.norm_last
        rectified = not identity and not norm_first
        sizes = AttentionSizes(self.width, self.heads, self.scale, rectified)
        out = attend(e, self.weight, self.bias, sizes, dropout=self.dropout if self.training else 0.0)
        out = out + e if identity else out
        out = self.norm(out) if self.norm is not None and norm_first else out
        out = out if rectified else out.relu()
        return self.norm(out) if self.norm is not None and not norm_first else out

    def attention(self, e: Tensor) -> Tensor:
        """Who looks at whom, `[B, F, D] -> [B, heads, F, F]`; rows add up to one."""
        q, k = (e @ part.t() for part in self.weight.chunk(self.parts)[:2])
        if self.bias is not None:
            q, k = ((x + b).relu() for x, b in zip((q, k), self.bias.chunk(self.parts), strict=False))
        q, k = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (q, k))
        return torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1)


class AutoInt(nn.Module):
    """Self-attention over the fields, layer on layer, then one linear layer on all of it.

    a^h_{mk} = softmax_k(⟨W_Q^h e_m, W_K^h e_k⟩),  e_m ← ReLU([Σ_k a^1_{mk} W_V^1 e_k; …; heads] + W_Res e_m),
    logit = wᵀ [e_1; …; e_F] + b.

    Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
    CIKM 2019, arXiv 1810.11921.

    Args:
        preset: whose variant. paper: plain projections, W_Res, no scale. official: the authors' code: biases and
            ReLU on all projections, scaled scores, layer norm after the ReLU. fuxictr: as the FuxiCTR library,
            W_Res only where the widths differ. deepctr: as DeepCTR-Torch, total width = embedding dimension.
        layers: number of attention layers; 0 leaves a linear model.
        heads: number of heads.
        width: total width of the heads, so that each is width / heads wide (the paper's d' is 32 with 2 heads: 64).
            null: 64; for the preset deepctr, the embedding dimension.
        dropout: share of the attention weights that is dropped in training.
        scale: divide the scores by √(width / heads). null: as the preset has it.
        residual: projected, identity (projected only where widths differ) or none. null: as the preset has it.
        layer_norm: normalise each field's output. null: as the preset has it.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        preset: Preset = "paper",
        layers: NonNegativeInt = 3,
        heads: PositiveInt = 2,
        width: PositiveInt | None = None,
        dropout: Share = 0.0,
        scale: bool | None = None,
        residual: Residual | None = None,
        layer_norm: bool | None = None,
    ) -> None:
        super().__init__()
        variant = _variant(preset, scale, residual, layer_norm)
        total = width or variant.width or fields.dim
        widths = [fields.dim, *[total] * layers]
        self.layers = nn.ModuleList(InteractingLayer(before, total, heads, variant, dropout) for before in widths[:-1])
        self.width = len(fields) * widths[-1]
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = F · width."""
        for layer in self.layers:
            e = layer(e)
        return e.flatten(1)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`attention.<layer> [B, heads, F, F]`: the share that field m (row) takes from field k (column)."""
        shares: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, InteractingLayer)
            shares[f"attention.{i}"] = layer.attention(e)
            e = layer(e)
        return shares


class AutoIntPlus(nn.Module):
    """AutoInt with a multilayer perceptron beside it, trained jointly; their logits are added.

    logit = w₁ᵀ AutoInt(e) + w₂ᵀ MLP(flatten(e)) + b; both read the same embeddings. One linear layer on the
    concatenation is this sum, and is also how DeepCTR-Torch writes it.

    Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
    CIKM 2019, arXiv 1810.11921.

    Args:
        preset: whose variant; see autoint.
        layers: number of attention layers.
        heads: number of heads.
        width: total width of the heads. null: 64; for the preset deepctr, the embedding dimension.
        dropout: share of the attention weights that is dropped in training.
        scale: divide the scores by √(width / heads). null: as the preset has it.
        residual: projected, identity (projected only where widths differ) or none. null: as the preset has it.
        layer_norm: normalise each field's output. null: as the preset has it.
        hidden: width of each layer of the perceptron.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        mlp_dropout: share of the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        preset: Preset = "paper",
        layers: NonNegativeInt = 3,
        heads: PositiveInt = 2,
        width: PositiveInt | None = None,
        dropout: Share = 0.0,
        scale: bool | None = None,
        residual: Residual | None = None,
        layer_norm: bool | None = None,
        hidden: tuple[PositiveInt, ...] = (400, 400),
        batch_norm: bool = False,
        mlp_dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.attention = AutoInt(
            fields,
            preset=preset,
            layers=layers,
            heads=heads,
            width=width,
            dropout=dropout,
            scale=scale,
            residual=residual,
            layer_norm=layer_norm,
        )
        self.network = MLPBlock(len(fields) * fields.dim, hidden, batch_norm=batch_norm, dropout=mlp_dropout)
        self.width = self.attention.width + self.network.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = F · width + hidden[-1]."""
        return torch.cat([self.attention(e), self.network(e.flatten(1))], 1)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """As AutoInt."""
        return self.attention.explain(e)


def _variant(preset: Preset, scale: bool | None, residual: Residual | None, layer_norm: bool | None) -> Variant:
    """The preset with what the recipe sets itself."""
    v = VARIANTS[preset]
    return Variant(
        scale=v.scale if scale is None else scale,
        residual=v.residual if residual is None else residual,
        layer_norm=v.layer_norm if layer_norm is None else layer_norm,
        norm_last=v.norm_last,
        eps=v.eps,
        activated=v.activated,
        width=v.width,
        normal_init=v.normal_init,
    )


@hookimpl
def recsys_components() -> list[Component]:
    """Return both interactions."""
    return [Component("interaction", "autoint", AutoInt), Component("interaction", "autoint_plus", AutoIntPlus)]
