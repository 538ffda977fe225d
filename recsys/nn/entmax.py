"""α-entmax: a softmax whose small shares are exactly zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys.errors import RecipeError

BLOCK = 1 << 17
"""On a CPU, entmax works on about so many numbers at a time: the passes over them then stay in the core's cache."""
NEWTON_STEPS = 100
"""A bound that no input has come near: five steps are usual, and each one can only come closer."""


def entmax(scores: Tensor, alpha: float, dim: int = -1) -> Tensor:
    """α-entmax: a softmax that gives exact zeros for α > 1.

    p_j = [(α−1)·s_j − τ]₊^{1/(α−1)}, τ such that Σ_j p_j = 1; α = 1 is softmax and α = 2 sparsemax. Half precision is
    computed, and returned, in float32.

    Peters et al., "Sparse Sequence-to-Sequence Models", ACL 2019, arXiv 1905.05702; the backward pass is that of
    their Proposition 2: with g_j = p_j^{2−α} on the support and 0 elsewhere, ds = g ∘ dp − g·⟨g, dp⟩ / Σg.

    Args:
        scores: any shape.
        alpha: from 1 to 3.
        dim: the dimension whose entries add up to one.

    Raises:
        RecipeError: α is out of range.
    """
    if not 1 <= alpha <= 3:
        raise RecipeError(f"alpha is {alpha}, must be from 1 (softmax) to 3")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if alpha == 1:
        return torch.softmax(scores, dim)
    dim %= scores.dim()
    rows = scores.flatten(dim + 1) if dim + 1 < scores.dim() else scores.unsqueeze(-1)
    rows = rows.flatten(0, dim - 1) if dim else rows.unsqueeze(0)  # [outer, F, inner]
    p: Tensor = _Entmax.apply(rows, float(alpha))  # type: ignore[no-untyped-call]
    return p.view(scores.shape)


class _Entmax(torch.autograd.Function):
    """`[n, F, m] -> [n, F, m]`, along F; only the result is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        if torch.compiler.is_compiling() or scores.device.type != "cpu":
            p = _power(scores, alpha, _sorted if alpha in (1.5, 2.0) else _bisected)
        else:
            p = torch.empty(scores.shape, dtype=scores.dtype)
            solve = _newton if alpha <= 2 else _bisected
            for part, out in zip(_blocks(scores), _blocks(p), strict=True):
                out.copy_(_power(part, alpha, solve))
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        if dp.device.type != "cpu":
            return _gradient(p, dp, ctx.alpha), None
        ds = torch.empty_like(p)
        for part, above, out in zip(_blocks(p), _blocks(dp), _blocks(ds), strict=True):
            out.copy_(_gradient(part, above, ctx.alpha))
        return ds, None


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, max(1, BLOCK // max(1, x.shape[1] * x.shape[2])))


def _power(scores: Tensor, alpha: float, solve: Callable[[Tensor, float], Tensor]) -> Tensor:
    """From scores to p `[n, F, m]`, with a function that finds τ."""
    # Below −1 nothing has a share, for τ ≥ −1 once the largest score is 0; cut off there, sums lose no digits.
    x = ((scores - scores.amax(1, keepdim=True)) * (alpha - 1)).clamp_(min=-1)
    p = (x - solve(x, alpha)).clamp_(min=0)
    if alpha == 1.5:
        p = p.square()
    elif alpha != 2:
        p = p.pow(1 / (alpha - 1))
    shares: Tensor = p.div_(p.sum(1, keepdim=True))
    return shares


def _newton(x: Tensor, alpha: float) -> Tensor:
    """τ `[n, 1, m]` for 1 < α ≤ 2, by Newton's method on ‖[x − τ]₊‖ = 1, the norm of order r = 1/(α−1) ≥ 1.

    The norm is convex and falls with τ, so steps from the left never pass the root: convergence needs no bracket.
    It is also nearly linear, so that few steps are needed; for α = 2 the last one is exact.
    """
    r = 1 / (alpha - 1)
    enough = 64 * torch.finfo(x.dtype).eps
    tau = x.new_full((x.shape[0], 1, x.shape[2]), -1.0)
    t = torch.empty_like(x)
    for _ in range(NEWTON_STEPS):
        torch.sub(x, tau, out=t).clamp_(min=0)
        if alpha == 2:
            total = t.sum(1, keepdim=True)
            slope = t.sign_().sum(1, keepdim=True)
        elif alpha == 1.5:
            slope = t.sum(1, keepdim=True)
            total = t.square_().sum(1, keepdim=True)
        else:
            low = t.pow(r - 1)
            slope = low.sum(1, keepdim=True)
            total = t.mul_(low).sum(1, keepdim=True)
        step = (total - total.pow(2 - alpha)).div_(slope)
        tau.add_(step)
        if not bool((step > enough).any()):
            break
    return tau


def _bisected(x: Tensor, alpha: float) -> Tensor:
    """τ `[n, 1, m]` for any α > 1, to the last digit by halving: as many steps whatever the values are."""
    low = x.new_full((x.shape[0], 1, x.shape[2]), -1.0)
    width = 1.0 - float(x.shape[1]) ** (1 - alpha)
    eps = torch.finfo(x.dtype).eps
    while width > eps / 4:
        width /= 2
        middle = low + width
        total = (x - middle).clamp_(min=0).pow(1 / (alpha - 1)).sum(1, keepdim=True)
        low = torch.where(total >= 1, middle, low)
    return low


def _sorted(x: Tensor, alpha: float) -> Tensor:
    """τ `[n, 1, m]` for α = 1.5 and 2, in closed form for each size of the support, the largest valid one chosen."""
    u = x.sort(1, descending=True).values
    size = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
    mean = u.cumsum(1) / size
    if alpha == 2:
        tau = mean - 1 / size
    else:
        spread = u.square().cumsum(1) / size - mean.square()
        tau = mean - (1 / size - spread).clamp(min=0).sqrt()
    count = (tau < u).sum(1, keepdim=True)
    return tau.gather(1, count.clamp(min=1) - 1)


def _gradient(p: Tensor, dp: Tensor, alpha: float) -> Tensor:
    """Gradient of the scores `[n, F, m]`."""
    if alpha == 2:
        g = p.sign()
    elif alpha == 1.5:
        g = p.sqrt()
    else:
        g = torch.where(p > 0, p, 1).pow(2 - alpha).mul_(p > 0)
    ds = g * dp
    return ds.sub_(g.mul_(ds.sum(1, keepdim=True) / g.sum(1, keepdim=True)))
