"""Self-attention among the few vectors of a row, such as the embeddings of its fields, with all its projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 40
"""Up to so many vectors, on a CPU, `_Layer` is faster than the blockwise kernel of attention. It keeps the shares
`[heads, B, F, F]` for the gradient, which are then about as large as the projections."""

ROOM = 160_000
"""Numbers of one projection that `_Layer` works on at a time: with what belongs to them they fit a core's cache."""

ROWS = 256
"""Rows at a time where nobody asks for gradients."""


class AttentionSizes(NamedTuple):
    """What `_Layer` has to know beside its tensors: total width and number of heads, factor of the scores, ReLU."""

    width: int
    heads: int
    scale: float
    rectified: bool

    def rows(self, count: int) -> int:
        """How many rows of `count` fields to work on at a time."""
        return max(1, ROOM // (count * max(self.width, self.heads * count)))

    def by_head(self, x: Tensor) -> Tensor:
        """`[n, F, width] -> [heads, n, F, d']`, a view."""
        return x.view(*x.shape[:2], self.heads, self.width // self.heads).permute(2, 0, 1, 3)

    def stacked(self, x: Tensor, count: int) -> Tensor:
        """`[3 · heads, n · F, d'] -> [3, heads · n, F, d']`, a view: of q, k and v the matrices of all heads."""
        return x.view(3, x.shape[0] // 3 * (x.shape[1] // count), count, self.width // self.heads)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights or biases of all projections: `[3 · heads, d', …]` of q, k, v, and `[width, …]` of the residual."""
        inner, rest = x[: 3 * self.width], x[3 * self.width :]
        return inner.view(3 * self.heads, -1, *x.shape[1:]), rest if len(rest) else None


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


class _Layer(torch.autograd.Function):
    """Projections, attention, projected residual and ReLU, `[B, F, D] -> [B, F, width]`, the gradient in closed form.

    With P the shares of a head, v its values and G the gradient above: dP = G vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)) ·
    scale, and then dq = dS k, dk = dSᵀ q, dv = Pᵀ G. All of it happens for some rows of the batch at a time, so that
    what one step writes is in the cache when the next one reads it. Each head's q, k and v are matrices of their own,
    next to each other: nothing is cut out of, or put together to, wider ones.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes) -> Tensor:
        kept: list[Tensor] = []
        out = _in_blocks(e, weight, bias, sizes, kept)
        ctx.save_for_backward(e, weight, bias, out, *kept)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        e, weight, bias, out, *kept = saved = ctx.saved_tensors
        sizes, needs = ctx.sizes, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # somebody wants gradients of these gradients
            # Of views, so that what one of them owes to another is not counted here.
            given: list[Any] = [x.view_as(x) if needed else x for x, needed in zip(saved[:3], needs, strict=True)]
            leaves = [x for x, needed in zip(given, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(_plain(sizes, *given), leaves, above, create_graph=True))
            return *(next(found) if needed else None for needed in needs), None
        e = e.contiguous()
        d_e, d_weight = torch.empty_like(e), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        blocks = (torch.split(x, sizes.rows(e.shape[1])) for x in (e, out, above, d_e))
        for (x, y, g, d_x), own in zip(zip(*blocks, strict=True), _by(kept, 3), strict=True):
            g = torch.ops.aten.threshold_backward(g, y, 0) if sizes.rectified else g
            _gradients((x, g.contiguous(), *own), weight, sizes, (d_x.flatten(0, 1), d_weight, d_bias))
        return d_e, d_weight, d_bias, None


def _by(items: list[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """So many of them at a time."""
    return zip(*[iter(items)] * size, strict=True)


def _in_blocks(
    e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes, kept: list[Tensor] | None = None
) -> Tensor:
    """The output; `kept` gets of every block of rows the projections, the shares and the residual, as `_gradients`."""
    e = e.contiguous()
    out = e.new_empty(*e.shape[:2], sizes.width)
    step = ROWS if kept is None else sizes.rows(e.shape[1])
    for x, y in zip(torch.split(e, step), torch.split(out, step), strict=True):
        own = _block(x, y, weight, bias, sizes)
        if kept is not None:
            kept.extend(own)
    return out


def _block(
    x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows `[n, F, D]` to `out [n, F, width]`; what `_gradients` needs of them.

    That is q, k, v `[3 · heads, n · F, d']`, shares `[heads · n, F, F]` and, if it is rectified, the residual.
    """
    count, flat = x.shape[1], x.flatten(0, 1)
    inner, last = sizes.split(weight)
    each = flat.expand(3 * sizes.heads, -1, -1)
    if bias is None:
        projected = torch.bmm(each, inner.mT)
    else:
        projected = torch.baddbmm(sizes.split(bias)[0].unsqueeze(1), each, inner.mT).relu_()
    q, k, v = sizes.stacked(projected, count)
    shares = _shares_(q.new_empty(len(q), count, count), q, k, sizes.scale)
    mixed = torch.bmm(shares, v).view(sizes.heads, *x.shape[:2], v.shape[2])
    own = sizes.by_head(out)
    residual = out.new_empty(0)
    if last is None:
        own.copy_(mixed)
    elif bias is None:
        torch.mm(flat, last.t(), out=out.flatten(0, 1))
        own.add_(mixed)
    else:
        residual = _projected(x, last, bias[3 * sizes.width :])
        torch.add(sizes.by_head(residual), mixed, out=own)
    if sizes.rectified:
        out.relu_()
    return projected, shares, residual


def _gradients(
    parts: tuple[Tensor, ...], weight: Tensor, sizes: AttentionSizes, sums: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    """Write or add what some rows owe to `sums`: `d_x [n · F, D]`, `d_weight`, `d_bias`.

    `parts`: the rows `[n, F, D]`, the gradient above `[n, F, width]`, and what `_block` gave.
    """
    x, above, projected, shares, residual = parts
    d_x, d_weight, d_bias = sums
    count, flat = x.shape[1], x.flatten(0, 1)
    q, k, v = sizes.stacked(projected, count)
    g = sizes.by_head(above).contiguous().view(q.shape)
    ds = torch.bmm(g, v.transpose(1, 2))  # dP
    if count < 16:  # shorter than a vector, which the kernel is slow for
        ds = ds.mul_(shares)
        ds.addcmul_(shares, ds.sum(2, keepdim=True), value=-1)
    else:
        ds = torch.ops.aten._softmax_backward_data(ds, shares, 2, ds.dtype)
    if sizes.scale != 1:
        ds.mul_(sizes.scale)
    d = torch.empty_like(projected)
    d_q, d_k, d_v = sizes.stacked(d, count)
    torch.bmm(ds, k, out=d_q)
    torch.bmm(ds.transpose(1, 2), q, out=d_k)
    torch.bmm(shares.transpose(1, 2), g, out=d_v)
    if d_bias is not None:
        d = torch.ops.aten.threshold_backward(d, projected, 0)
        above = torch.ops.aten.threshold_backward(above, residual, 0) if len(residual) else above
        sizes.split(d_bias)[0].add_(d.sum(1))
    (inner, last), (d_inner, d_last) = sizes.split(weight), sizes.split(d_weight)
    if last is None or d_last is None:
        d_x.zero_()
    else:
        above = above.flatten(0, 1)
        torch.mm(above, last, out=d_x)
        d_last.addmm_(above.t(), flat)
        if d_bias is not None:
            d_bias[3 * sizes.width :].add_(above.sum(0))
    for one, w in zip(d, inner, strict=True):
        d_x.addmm_(one, w)
    d_inner.baddbmm_(d.mT, flat.expand(len(d), -1, -1))


def _plain(sizes: AttentionSizes, e: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `_Layer` computes, of operations that torch can differentiate as often as it likes."""
    q, k, v, *residual = _projected(e, weight, bias).chunk(len(weight) // sizes.width, 2)
    heads = zip(*(torch.split(x, sizes.width // sizes.heads, 2) for x in (q, k, v)), strict=True)
    mixed = [torch.softmax(sizes.scale * q @ k.mT, 2) @ v for q, k, v in heads]
    out = sum(residual, torch.cat(mixed, 2))
    return out.relu() if sizes.rectified else out


def attend(e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes, *, dropout: float = 0.0) -> Tensor:
    """Every vector of a row takes from all of them: `[B, F, D] -> [B, F, width]`.

    a^h = softmax(scale · (e W_Q^h)(e W_K^h)ᵀ),  out = [a^1 (e W_V^1); …; a^H (e W_V^H)] + e W_Res, with a ReLU on it if
    `sizes.rectified`. With a bias, every projection has a ReLU of its own. On a CPU and for few vectors, outside of
    half precision, it takes one pass over the rows with its gradient in closed form; else it is the kernel of torch.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762; the projected residual: Song et al.,
    "AutoInt", CIKM 2019, arXiv 1810.11921.

    Args:
        e: the vectors.
        weight: Q, K, V and, where there is one, the residual, stacked: `[3 · width or 4 · width, D]`.
        bias: `[3 · width or 4 · width]`, or None.
        sizes: width, heads, scale, ReLU.
        dropout: share of a^h that is dropped.
    """
    if _by_hand(e) and not dropout:
        if torch.is_grad_enabled() and (e.requires_grad or weight.requires_grad):
            out: Tensor = _Layer.apply(e, weight, bias, sizes)  # type: ignore[no-untyped-call]
            return out
        return _in_blocks(e, weight, bias, sizes)
    exporting = torch.compiler.is_exporting()
    out = _by_parts(e, weight, bias, sizes) if exporting else _by_kernel(e, weight, bias, sizes, dropout)
    return out.relu() if sizes.rectified else out


def _by_hand(e: Tensor) -> bool:
    """Whether `_Layer` is the fastest for `e [B, F, D]`: few vectors on a CPU, outside of exports.

    Half precision is left to the kernel, which adds up in single precision.
    """
    exact = e.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return e.device.type == "cpu" and exact and 0 < e.shape[1] <= SMALL and not torch.compiler.is_compiling()


def _by_kernel(e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes, dropout: float) -> Tensor:
    """The output before its ReLU."""
    projected = _projected(e, weight, bias).chunk(len(weight) // sizes.width, 2)
    q, k, v = (x.view(*x.shape[:2], sizes.heads, -1).transpose(1, 2) for x in projected[:3])
    # The scale is always given: left out, attention would divide by √d' whatever `sizes` says.
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=sizes.scale)
    return sum(projected[3:], mixed.transpose(1, 2).flatten(2))


def _by_parts(e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes) -> Tensor:
    """What `_by_kernel` gives, each part of each head projected alone: a graph need not cut or turn it afterwards."""
    head, last = sizes.width // sizes.heads, 3 * sizes.width
    if bias is None and e.shape[2] < head:
        return _by_narrow_parts(e, weight, sizes)

    def part(first: int, width: int) -> Tensor:
        own = slice(first, first + width)
        return _projected(e, weight[own], None if bias is None else bias[own])

    q, k, v = ([part(p * sizes.width + h * head, head) for h in range(sizes.heads)] for p in range(3))
    shares = [torch.softmax(q * sizes.scale @ k.mT, -1) for q, k in zip(q, k, strict=True)]
    mixed = torch.cat([s @ v for s, v in zip(shares, v, strict=True)], 2)
    return mixed if len(weight) == last else mixed + part(last, sizes.width)


def _by_narrow_parts(e: Tensor, weight: Tensor, sizes: AttentionSizes) -> Tensor:
    """The same for vectors narrower than a head, which are projected last, all at once.

    (e W_Q) (e W_K)ᵀ = e (W_Q W_Kᵀ) eᵀ and P (e W_V) = (P e) W_V; products of weights a runtime takes once.
    """
    head, dim, heads = sizes.width // sizes.heads, e.shape[2], range(sizes.heads)

    def part(p: int, h: int) -> Tensor:
        return weight[p * sizes.width + h * head : p * sizes.width + (h + 1) * head]

    inner = [sizes.scale * part(0, h).t() @ part(1, h) for h in heads]
    mixed = [torch.softmax(e @ w @ e.mT, -1) @ e for w in inner]
    last = torch.cat([F.pad(part(2, h), (h * dim, (sizes.heads - 1 - h) * dim)) for h in heads])  # [width, heads · D]
    if len(weight) > 3 * sizes.width:
        mixed, last = [*mixed, e], torch.cat([last, weight[3 * sizes.width :]], 1)
    return F.linear(torch.cat(mixed, 2), last)
