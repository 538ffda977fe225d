"""DIN, the deep interest network: how much each past event says about this target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Limits
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Component, Fields, hookimpl, linear

Preset = Literal["paper", "official"]
Activation = Literal["dice", "official_dice", "prelu", "sigmoid", "relu"]
Hidden = Annotated[tuple[PositiveInt, ...], Limits(min_length=1)]

NARROW = 64
"""Up to this W the first layer uses one matrix `[H, W]` per row: they are no larger than the `[B, L, H]` that follows
for L ≥ W, and save a second product over all events."""

BLOCK = 2**17
"""Number of values that `_Dice` and `_First` work on at a time; they stay in a core's cache."""


def _dice(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor | None) -> Tensor:
    """Dice of `x [..., H]` whose standardised values are `y`."""
    p = torch.sigmoid(y if beta is None else beta * y)
    return x * torch.addcmul(alpha, 1 - alpha, p)


def _dice_of_rows(x: Tensor, alpha: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Dice` computes, of operations that torch can differentiate."""
    y, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
    return _dice(x, y, alpha, beta), mean, inverse


class _Dice(torch.autograd.Function):
    """Dice by the statistics of the rows, `[N, H] -> [N, H], mean [H], 1 / √(variance + ε) [H]`.

    With y = (s − mean) / √(variance + ε), p = σ(β y), g the gradient above, u = g s p (1 − p) and c = (1 − α) β /
    √(variance + ε): ds = g (α + (1 − α) p) + c (u − E[u] − y E[u y]), dα = Σ g s (1 − p), dβ = (1 − α) Σ u y. Only s
    is kept; y and p are made again, for some rows at a time, so that they stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)  # y, as yet
        slope = 1 - alpha
        for part, y in zip(*(torch.split(t, _rows(x)) for t in (x, out)), strict=True):
            p = torch.sigmoid(y if beta is None else beta * y)
            torch.mul(part, torch.addcmul(alpha, slope, p, out=p), out=y)
        ctx.save_for_backward(x, alpha, beta, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, inverse)
        return out, mean, inverse

    @staticmethod
    def backward(ctx: Any, above: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, beta, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of these gradients
            return *_gradients(lambda x, a, b: _dice_of_rows(x, a, b, ctx.eps)[0], (x, alpha, beta), above), None
        dx = torch.empty_like(x)
        slope, shift = 1 - alpha, -mean * inverse
        c = slope * inverse if beta is None else slope * inverse * beta
        sums = x.new_zeros(4, x.shape[1])  # of g s, g s p, u, u y
        for part, g, d in zip(*(torch.split(t, _rows(x)) for t in (x, above, dx)), strict=True):
            y = torch.addcmul(shift, part, inverse)
            p = torch.sigmoid(y if beta is None else beta * y)
            torch.mul(g, torch.addcmul(alpha, slope, p), out=d)
            sums[0] += _total(through := g * part)
            sums[1] += _total(through.mul_(p))
            u = through.addcmul_(through, p, value=-1)
            sums[2] += _total(u)
            d.addcmul_(u, c)
            sums[3] += _total(u.mul_(y))
        mean_u, mean_uy = sums[2:] / len(x)
        tilt = -c * inverse * mean_uy
        offset = -c * mean_u - mean * tilt
        for part, d in zip(*(torch.split(t, _rows(x)) for t in (x, dx)), strict=True):
            d.addcmul_(part, tilt).add_(offset)
        return dx, sums[0] - sums[1], None if beta is None else slope * sums[3], None


def _rows(x: Tensor, size: int | None = None) -> int:
    """How many rows of `x [N, H]` to work on at a time, of `size` values each if not of H."""
    return min(max(len(x), 1), max(1, BLOCK // (size or x.shape[1])))


def _total(x: Tensor) -> Tensor:
    """Sum over the rows, `[N, H] -> [H]`; a product is faster than `sum`."""
    return torch.mv(x.t(), x.new_ones(len(x)))


def _first(target: Tensor, history: Tensor, query: Tensor, base: Tensor, product: Tensor) -> Tensor:
    """What `_First` computes, of operations that torch can differentiate."""
    return torch.bmm(history, (base + product * target.unsqueeze(1)).mT) + query.unsqueeze(1)


class _First(torch.autograd.Function):
    """The first layer, `target [B, W], history [B, L, W], query [B, H], base, product [H, W] -> [B, L, H]`.

    x_t = query + (base + product diag(target)) k_t, with one matrix per row, which is made for some rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, history: Tensor, query: Tensor, base: Tensor, product: Tensor) -> Tensor:
        out = history.new_empty(*history.shape[:2], len(base))
        blocks = (torch.split(x, _rows(target, base.numel())) for x in (target, history, query, out))
        for q, k, x, o in zip(*blocks, strict=True):
            torch.bmm(k, torch.addcmul(base, product, q.unsqueeze(1)).transpose(1, 2), out=o)
            o.add_(x.unsqueeze(1))
        ctx.save_for_backward(target, history, query, base, product)
        return out

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        target, history, query, base, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of these gradients
            return _gradients(_first, ctx.saved_tensors, above)
        d_target, d_history, d_query = (x.new_empty(x.shape) for x in (target, history, query))
        d_base, d_product = torch.zeros_like(base).flatten(), torch.zeros_like(product).flatten()
        tensors = target, history, above, d_target, d_history, d_query
        for q, k, g, dq, dk, dx in zip(*(torch.split(x, _rows(target, base.numel())) for x in tensors), strict=True):
            torch.bmm(g, torch.addcmul(base, product, q.unsqueeze(1)), out=dk)
            torch.sum(g, 1, out=dx)
            d_own = torch.bmm(g.transpose(1, 2), k)  # [n, H, W]
            d_base += _total(d_own.flatten(1))
            torch.sum(d_own * product, 1, out=dq)
            d_product += _total(d_own.mul_(q.unsqueeze(1)).flatten(1))
        return d_target, d_history, d_query, d_base.view_as(base), d_product.view_as(product)


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], above: Tensor) -> tuple[Any, ...]:
    """Gradients that can be differentiated again; None for an input that needs none."""
    # Of views, so that what one input owes to another is not counted here.
    views = [None if x is None else x.view_as(x) for x in inputs]
    given = [x for x in views if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*views), given, above, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in views)


class Dice(nn.Module):
    """A rectifier whose corner adapts to the data.

    f(s) = p(s) s + (1 − p(s)) α s,  p(s) = σ((s − E[s]) / √(Var[s] + ε)), for each unit; E and Var (divided by n) are
    those of the batch in training, and their running means afterwards. Positions that are padding are no part of
    them. The gradient flows through E and Var.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978, §5.3.

    Args:
        width: number of units.
        learned_scale: multiply the argument of σ by a learned β per unit that starts at 0, as the authors' code does.
        eps: ε.
        momentum: weight of the newest batch in the running means, which begin as plain means of the batches so far.
    """

    def __init__(self, width: int, *, learned_scale: bool = False, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width)) if learned_scale else None
        self.mean: Tensor
        self.variance: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, s: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[..., H], [...] bool -> [..., H]`; without `valid`, every position counts."""
        x = s if s.dtype == torch.float64 else s.float()
        if not self.training:
            y = (x - self.mean) * torch.rsqrt(self.variance + self.eps)
        elif valid is None and x.dim() == 2 and x.shape[0]:
            of_rows: Callable[..., tuple[Tensor, ...]] = _Dice.apply if _by_hand(x, self.alpha) else _dice_of_rows
            out, mean, inverse = of_rows(x, self.alpha, self.beta, self.eps)
            self._remember(mean, inverse.pow(-2) - self.eps, None)
            return out.to(s.dtype)
        else:
            y = self._standardised(x, valid)
        return _dice(x, y, self.alpha, self.beta).to(s.dtype)

    def _standardised(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """`[..., H], [...] -> [..., H]` by the statistics of the valid positions."""
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
        weight = valid.unsqueeze(-1).to(x.dtype)  # [..., 1]
        axes = tuple(range(x.dim() - 1))
        total = weight.sum()
        count = total.clamp(min=1)
        mean = (x * weight).sum(axes) / count  # [H]
        centred = x - mean
        variance = (centred.square() * weight).sum(axes) / count  # [H]
        self._remember(mean, variance, total > 0)
        return centred * torch.rsqrt(variance + self.eps)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, some: Tensor | None) -> None:
        """Move the running means; `some` `[]` is False when the batch had no event at all."""
        self.batches.add_(1 if some is None else some)
        share = (1 / self.batches.clamp(min=1)).clamp(min=self.momentum).to(mean.dtype)
        share = share if some is None else share * some
        self.mean.lerp_(mean.to(self.mean.dtype), share.to(self.mean.dtype))
        self.variance.lerp_(variance.clamp(min=0).to(self.variance.dtype), share.to(self.variance.dtype))


class PReLU(nn.Module):
    """f(s) = max(0, s) + α min(0, s), α learned per unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, s: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`."""
        return torch.where(s > 0, s, self.alpha * s)


class Layers(nn.Module):
    """Activation, then (linear, activation) for each further width; `[..., widths[0]] -> [..., widths[-1]]`."""

    def __init__(self, widths: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self.activations = nn.ModuleList(_activation(activation, width) for width in widths)
        pairs = itertools.pairwise(widths)
        self.linears = nn.ModuleList(linear(before, after) for before, after in pairs)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[..., widths[0]], [...] bool -> [..., widths[-1]]`."""
        for i, activation in enumerate(self.activations):
            x = self.linears[i - 1](x) if i else x
            x = activation(x, valid) if isinstance(activation, Dice) else activation(x)
        return x


class DIN(nn.Module):
    """The local activation unit: past events, weighted by how much each says about the target.

    a_t = MLP([q; k_t; q − k_t; q ∘ k_t]),  out = Σ_{t < length} a_t k_t, with q the target and k_t the events. In the
    paper the weights are not normalised, so that their sum tells the strength of the interest; the authors' code
    takes their softmax. An empty history gives zeros.

    The first layer is computed without its input: W [q; k; q − k; q ∘ k] = (W_q + W_d) q + (W_k − W_d + W_p diag(q)) k.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.

    Args:
        preset: paper: plain sum, Dice. official: softmax(a_t / √W) and sigmoid layers, as the authors' code.
        hidden: width of each layer of the MLP before its one output.
        activation: dice, official_dice (with a learned scale that starts at zero, ε = 1e-3), prelu, sigmoid or relu.
            null: as the preset has it.
        softmax: weights are softmax(a_t / √W) over the events. null: as the preset has it.
        pad_in_stats: let the padding enter the statistics of Dice in training, as other libraries do; outputs then
            depend on how far a batch is padded.
    """

    def __init__(
        self,
        width: int,
        *,
        preset: Preset = "paper",
        hidden: Hidden = (80, 40),
        activation: Activation | None = None,
        softmax: bool | None = None,
        pad_in_stats: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.softmax = preset == "official" if softmax is None else softmax
        self.pad_in_stats = pad_in_stats
        self.first = linear(4 * width, hidden[0])
        self.layers = Layers(hidden, activation or ("dice" if preset == "paper" else "sigmoid"))
        # A constant added to all scores is nothing to a softmax. For plain weights it starts at one: all events then
        # count alike at first, and the small vectors of an untrained table get a gradient that is not their product.
        self.last = linear(hidden[-1], 1, bias=not self.softmax)
        if self.last.bias is not None:
            nn.init.ones_(self.last.bias)

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        valid = _valid(history, length)
        full = _packs(history) and bool(valid.all())
        if full or not _packs(history) or (self.training and self.pad_in_stats):
            history = history if full else history.masked_fill(~valid.unsqueeze(-1), 0.0)
            weight = self._dense(target, history, None if full else valid)
            return torch.bmm(weight.unsqueeze(1).to(history.dtype), history).squeeze(1)
        at = valid.flatten().nonzero().squeeze(1)  # [N] where the events are in [B · L]
        events = history.flatten(0, 1).index_select(0, at)  # [N, W]
        row = at // history.shape[1]
        weight = self._packed(target, events, row, at, valid)
        weighted = (weight.unsqueeze(1) * events).to(history.dtype)
        return history.new_zeros(target.shape).index_add(0, row, weighted)

    def weights(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """How much each event counts, `[B, W], [B, L, W], [B] -> [B, L]`; zero for padding."""
        valid = _valid(history, length)
        return self._dense(target, history.masked_fill(~valid.unsqueeze(-1), 0.0), valid)

    def _entered(self, target: Tensor, history: Tensor) -> Tensor:
        """The first layer, `[B, W], [B, L, W] -> [B, L, H]`."""
        w_q, w_k, w_d, w_p = self.first.weight.chunk(4, 1)  # each [H, W]
        query = F.linear(target, w_q + w_d, self.first.bias).unsqueeze(1)  # [B, 1, H]
        if self.width <= NARROW:
            by_hand = _by_hand(target, history, self.first.weight)
            first: Callable[..., Tensor] = _First.apply if by_hand else _first
            return first(target, history, query.squeeze(1), w_k - w_d, w_p)
        return F.linear(history, w_k - w_d) + F.linear(history * target.unsqueeze(1), w_p) + query

    def _dense(self, target: Tensor, history: Tensor, valid: Tensor | None) -> Tensor:
        """`[B, W], [B, L, W] with zeros in the padding, [B, L] or None where there is none -> [B, L]`."""
        x = self._entered(target, history)
        x = self.layers(x.flatten(0, 1) if valid is None else x, None if self.pad_in_stats else valid)
        return self._normalised(self.last(x).view(history.shape[:2]), valid)

    def _packed(self, target: Tensor, events: Tensor, row: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        """`[B, W], [N, W], [N] row of each event, [N] position, [B, L] -> [N]`."""
        w_q, w_k, w_d, w_p = self.first.weight.chunk(4, 1)
        x = F.linear(target, w_q + w_d, self.first.bias).index_select(0, row)  # [N, H]
        x = x + F.linear(events, w_k - w_d)
        x = x + F.linear(events * target.index_select(0, row), w_p)
        score: Tensor = self.last(self.layers(x)).squeeze(-1)  # [N]
        if not self.softmax:
            return score
        spread = score.new_zeros(valid.numel()).index_copy(0, at, score).view(valid.shape)  # [B, L]
        return self._normalised(spread, valid).flatten().index_select(0, at)

    def _normalised(self, score: Tensor, valid: Tensor | None) -> Tensor:
        """Scores to weights, `[B, L], [B, L] -> [B, L]`; zeros where there is no event."""
        if self.softmax:
            score = score * self.width**-0.5
            score = score if valid is None else score.masked_fill(~valid, torch.finfo(score.dtype).min)
            score = torch.softmax(score, 1)
        return score if valid is None else score.masked_fill(~valid, 0.0)


class DiceMLP(nn.Module):
    """The perceptron on top of DIN: linear → Dice, layer on layer, on the concatenated embeddings.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.

    Args:
        hidden: width of each layer.
        activation: dice, official_dice, prelu, sigmoid or relu; see din.
    """

    def __init__(self, fields: Fields, *, hidden: Hidden = (200, 80), activation: Activation = "dice") -> None:
        super().__init__()
        self.first = linear(len(fields) * fields.dim, hidden[0])
        self.layers = Layers(hidden, activation)
        self.width = hidden[-1]
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`."""
        y: Tensor = self.layers(self.first(e.flatten(1)))
        return y

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """Nothing: a perceptron shows no parts."""
        return {}


def _packs(history: Tensor) -> bool:
    """Whether to leave the padding out.

    A GPU would have to wait until the number of events is known, and a graph must not depend on it.
    """
    return history.device.type == "cpu" and not torch.compiler.is_compiling()


def _by_hand(*tensors: Tensor) -> bool:
    """Whether the gradients in closed form serve: on a CPU, outside of exports, all in one precision."""
    one = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.float32, torch.float64)
    return one and _packs(tensors[0]) and not torch.is_autocast_enabled("cpu")


def _valid(history: Tensor, length: Tensor) -> Tensor:
    """`[B, L, W], [B] -> [B, L]` bool: which positions hold an event."""
    return torch.arange(history.shape[1], device=history.device) < length.unsqueeze(1)


def _activation(name: Activation, width: int) -> nn.Module:
    if name == "dice":
        return Dice(width)
    if name == "official_dice":
        return Dice(width, learned_scale=True, eps=1e-3)
    if name == "prelu":
        return PReLU(width)
    return nn.Sigmoid() if name == "sigmoid" else nn.ReLU()


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoder and the perceptron."""
    return [Component("sequence", "din", DIN), Component("interaction", "dice_mlp", DiceMLP)]
