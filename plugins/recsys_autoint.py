"""AutoInt and AutoInt+: multi-head self-attention between the fields of a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field as Limits
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Component, Fields, MLPBlock, RecipeError, hookimpl

Preset = Literal["paper", "official", "fuxictr", "deepctr"]
Residual = Literal["projected", "identity", "none"]
Share = Annotated[float, Limits(ge=0, lt=1)]

SMALL = 40
"""Up to so many fields, on a CPU, `_Layer` is faster than the blockwise kernel of attention. It keeps the shares
`[heads, B, F, F]` for the gradient, which are then about as large as the projections."""

SCORES = 2**17
"""Number of scores that `_Layer` works on at a time: with what belongs to their rows they fit a core's cache."""

ROWS = 256
"""Rows at a time where nobody asks for gradients."""


class Sizes(NamedTuple):
    """What `_Layer` has to know beside its tensors: total width and number of heads, factor of the scores, ReLU."""

    width: int
    heads: int
    scale: float
    rectified: bool

    def parts(self, *projected: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """`[n, F, width]` each; for every head, its part `[n, F, d']` of all of them."""
        return zip(*(torch.split(x, self.width // self.heads, 2) for x in projected), strict=True)

    def rows(self, count: int) -> int:
        """How many rows of `count` fields to work on at a time."""
        return max(1, SCORES // (self.heads * max(count * count, self.width)))


def _projected(e: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All projections side by side, with a ReLU where they have a bias, `[B, F, D] -> [B, F, parts · width]`."""
    return F.linear(e, weight) if bias is None else F.linear(e, weight, bias).relu_()


def _shares_(scores: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`softmax(scale · q kᵀ)` in the memory of `scores`, `q, k [n, F, d'] -> [n, F, F]`."""
    # Step by step: the kernel of softmax takes up to five times as long for rows as short as these. The largest score
    # is taken off first only where the sums show that it has to be.
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores).exp_()
    total = scores.sum(2, keepdim=True)
    if not bool(((total > 1e-15) & (total < 1e15)).all()):  # a sum that is NaN too
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        scores.sub_(scores.amax(2, keepdim=True)).exp_()
        total = scores.sum(2, keepdim=True)
    return scores.mul_(total.reciprocal_())


def _head_gradients(parts: tuple[Tensor, ...], shares: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v and the gradient above of one head, each `[n, F, d']`, to the gradients of q, k, v, as `_Layer` says."""
    q, k, v, above = parts
    ds = torch.bmm(above, v.transpose(1, 2))  # dP
    if shares.shape[2] < 16:  # shorter than a vector, which the kernel is slow for
        ds = ds.mul_(shares)
        ds.addcmul_(shares, ds.sum(2, keepdim=True), value=-1)
    else:
        ds = torch.ops.aten._softmax_backward_data(ds, shares, 2, ds.dtype)
    if scale != 1:
        ds.mul_(scale)
    return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), above)


class _Layer(torch.autograd.Function):
    """Projections, attention, projected residual and ReLU, `[B, F, D] -> [B, F, width]`, the gradient in closed form.

    With P the shares of a head, v its values and G the gradient above: dP = G vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)) ·
    scale, and then dq = dS k, dk = dSᵀ q, dv = Pᵀ G. All of it happens for some rows of the batch at a time, so that
    what one step writes is in the cache when the next one reads it.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        out, shares, kept = _in_blocks(e, weight, bias, sizes, keep=True)
        ctx.save_for_backward(e, weight, bias, shares, out, *kept)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        e, weight, bias, shares, out, *kept = saved = ctx.saved_tensors
        sizes, needs = ctx.sizes, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # somebody wants gradients of these gradients
            # Of views, so that what one of them owes to another is not counted here.
            given: list[Any] = [x.view_as(x) if needed else x for x, needed in zip(saved[:3], needs, strict=True)]
            leaves = [x for x, needed in zip(given, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(_plain(sizes, *given), leaves, above, create_graph=True))
            return *(next(found) if needed else None for needed in needs), None
        d_e, d_weight = e.new_empty(e.shape), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        step = sizes.rows(e.shape[1])
        blocks = (torch.split(x, step) for x in (e, shares.transpose(0, 1), out, above, d_e))
        for x, p, y, g, d_x, projected in zip(*blocks, kept, strict=True):
            g = torch.ops.aten.threshold_backward(g, y, 0) if sizes.rectified else g
            heads = zip(sizes.parts(*torch.split(projected, sizes.width, 2)[:3], g), p.unbind(1), strict=True)
            d = zip(*(_head_gradients(parts, s, sizes.scale) for parts, s in heads), strict=True)
            residual = [g] if len(weight) > 3 * sizes.width else []
            d_parts = torch.cat([*itertools.chain(*d), *residual], 2)
            if d_bias is not None:
                d_parts = torch.ops.aten.threshold_backward(d_parts, projected, 0)
                d_bias.add_(d_parts.sum((0, 1)))
            flat = d_parts.flatten(0, 1)
            torch.mm(flat, weight, out=d_x.flatten(0, 1))
            d_weight.addmm_(flat.t(), x.flatten(0, 1))
        return d_e, d_weight, d_bias, None


def _in_blocks(
    e: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes, *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, the shares of attention and the projections; the last two of the last rows alone unless kept."""
    rows, count, _ = e.shape
    step = sizes.rows(count) if keep else ROWS
    out = e.new_empty(rows, count, sizes.width)
    shares = e.new_empty(sizes.heads, rows if keep else min(rows, step), count, count)
    kept: list[Tensor] = []
    for x, y in zip(torch.split(e, step), torch.split(out, step), strict=True):
        p = shares[:, len(kept) * step :][:, : len(x)]
        projected = _projected(x, weight, bias)
        q, k, v, *residual = torch.split(projected, sizes.width, 2)
        heads = zip(p.unbind(0), sizes.parts(q, k, v), strict=True)
        torch.cat([torch.bmm(_shares_(s, q, k, sizes.scale), v) for s, (q, k, v) in heads], 2, out=y)
        if residual:
            y.add_(residual[0])
        if sizes.rectified:
            y.relu_()
        if keep:
            kept.append(projected)
    return out, shares, kept


def _plain(sizes: Sizes, e: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `_Layer` computes, of operations that torch can differentiate as often as it likes."""
    q, k, v, *residual = _projected(e, weight, bias).chunk(len(weight) // sizes.width, 2)
    mixed = [torch.softmax(sizes.scale * q @ k.mT, 2) @ v for q, k, v in sizes.parts(q, k, v)]
    out = sum(residual, torch.cat(mixed, 2))
    return out.relu() if sizes.rectified else out


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
        if _by_hand(e) and not (self.training and self.dropout):
            sizes = Sizes(self.width, self.heads, self.scale, rectified)
            if torch.is_grad_enabled() and (e.requires_grad or self.weight.requires_grad):
                out: Tensor = _Layer.apply(e, self.weight, self.bias, sizes)  # type: ignore[no-untyped-call]
            else:
                out = _in_blocks(e, self.weight, self.bias, sizes, keep=False)[0]
        else:
            out = self._by_parts(e) if torch.compiler.is_exporting() else self._mixed(e)
            out = out.relu() if rectified else out
        out = out + e if identity else out
        out = self.norm(out) if self.norm is not None and norm_first else out
        out = out if rectified else out.relu()
        return self.norm(out) if self.norm is not None and not norm_first else out

    def attention(self, e: Tensor) -> Tensor:
        """Who looks at whom, `[B, F, D] -> [B, heads, F, F]`; rows add up to one."""
        q, k = (self._by_head(x) for x in self._project(e)[:2])
        return torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1)

    def _mixed(self, e: Tensor) -> Tensor:
        """What each field takes from all, and the projected residual, `[B, F, D] -> [B, F, width]`."""
        q, k, v, *residual = self._project(e)
        q, k, v = (self._by_head(x) for x in (q, k, v))
        # The scale is always given: left out, attention would divide by √d' whatever the variant says.
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return sum(residual, mixed.transpose(1, 2).flatten(2))

    def _by_parts(self, e: Tensor) -> Tensor:
        """What `_mixed` gives, each part of each head projected alone: a graph need not cut or turn it afterwards."""
        head, last = self.width // self.heads, 3 * self.width
        q, k, v = ([self._part(e, p * self.width + h * head, head) for h in range(self.heads)] for p in range(3))
        shares = [torch.softmax(q * self.scale @ k.mT, -1) for q, k in zip(q, k, strict=True)]
        mixed = torch.cat([s @ v for s, v in zip(shares, v, strict=True)], 2)
        return mixed if self.parts == 3 else mixed + self._part(e, last, self.width)

    def _part(self, e: Tensor, first: int, width: int) -> Tensor:
        """`width` of the projections alone, `[B, F, D] -> [B, F, width]`."""
        own = slice(first, first + width)
        return _projected(e, self.weight[own], None if self.bias is None else self.bias[own])

    def _by_head(self, x: Tensor) -> Tensor:
        """`[B, F, width] -> [B, heads, F, d']`."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _project(self, e: Tensor) -> tuple[Tensor, ...]:
        """`[B, F, D] -> q, k, v` and, where it is learned, the residual, each `[B, F, width]`."""
        return _projected(e, self.weight, self.bias).chunk(self.parts, 2)


def _by_hand(e: Tensor) -> bool:
    """Whether `_Layer` is the fastest for `e [B, F, D]`: few fields on a CPU, outside of exports.

    Half precision is left to the kernel, which adds up in single precision.
    """
    exact = e.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return e.device.type == "cpu" and exact and 0 < e.shape[1] <= SMALL and not torch.compiler.is_compiling()


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
