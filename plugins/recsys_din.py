"""DIN, the deep interest network: how much each past event says about this target."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Literal

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
            y, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, self.eps)
            self._remember(mean, inverse.pow(-2) - self.eps, None)
        else:
            y = self._standardised(x, valid)
        p = torch.sigmoid(y if self.beta is None else self.beta * y)
        return (x * torch.addcmul(self.alpha, 1 - self.alpha, p)).to(s.dtype)

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
        if not _packs(history) or (self.training and self.pad_in_stats):
            history = history.masked_fill(~valid.unsqueeze(-1), 0.0)
            return torch.bmm(self._dense(target, history, valid).unsqueeze(1).to(history.dtype), history).squeeze(1)
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

    def _dense(self, target: Tensor, history: Tensor, valid: Tensor) -> Tensor:
        """`[B, W], [B, L, W] with zeros in the padding, [B, L] -> [B, L]`."""
        w_q, w_k, w_d, w_p = self.first.weight.chunk(4, 1)  # each [H, W]
        query = F.linear(target, w_q + w_d, self.first.bias).unsqueeze(1)  # [B, 1, H]
        if self.width <= NARROW:
            own = (w_k - w_d) + w_p * target.unsqueeze(1)  # [B, H, W]
            x = torch.bmm(history, own.transpose(1, 2)) + query  # [B, L, H]
        else:
            x = F.linear(history, w_k - w_d) + F.linear(history * target.unsqueeze(1), w_p) + query
        counted = None if self.pad_in_stats else valid
        return self._normalised(self.last(self.layers(x, counted)).squeeze(-1), valid)

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

    def _normalised(self, score: Tensor, valid: Tensor) -> Tensor:
        """Scores to weights, `[B, L], [B, L] -> [B, L]`; zeros where there is no event."""
        if self.softmax:
            lowest = torch.finfo(score.dtype).min
            score = torch.softmax((score * self.width**-0.5).masked_fill(~valid, lowest), 1)
        return score.masked_fill(~valid, 0.0)


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
