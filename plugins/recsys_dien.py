"""DIEN: how an interest evolves, by recurrent units whose second layer follows what the target asks for."""

from __future__ import annotations

from typing import cast

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch._higher_order_ops import scan  # the one loop that a graph of any length can have
from torch.nn import functional as F

from recsys.api import Component, hookimpl, linear


class Gates(nn.Module):
    """The weights of a gated recurrent unit of W inputs and W states.

    u = σ(W_u x + U_u h + b_u),  r = σ(W_r x + U_r h + b_r),  n = tanh(W_n x + r ∘ (U_n h) + b_n),
    h ← (1 − a u) ∘ h + a u ∘ n, with a one for a plain unit.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(width, 3 * width)
        self.state = nn.Linear(width, 3 * width, bias=False)
        for p in self.parameters():
            nn.init.uniform_(p, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """All states, oldest first: `[L, B, W], [L, B, 1] or None -> [L, B, W]`; `share` is a."""
        # Only what needs the state before stays in the loop.
        projected = self.input(x)  # [L, B, 3W]
        start = x.new_zeros(x.shape[1:])
        share = torch.ones_like(x[:, :, :1]) if share is None else share
        if torch.compiler.is_compiling():  # a graph's loop, for histories of any length
            return cast("Tensor", scan(self._step, start, (projected, share))[1])
        states, h = [], start
        for now in zip(projected, share, strict=True):
            h, _ = self._step(h, now)
            states.append(h)
        return torch.stack(states)

    def _step(self, h: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next state, twice: to go on with, and to keep."""
        projected, share = now
        known = F.linear(h, self.state.weight)
        update, reset = torch.sigmoid(projected[:, : -self.width] + known[:, : -self.width]).chunk(2, 1)
        new = torch.tanh(projected[:, -self.width :] + reset * known[:, -self.width :])
        h = h + share * update * (new - h)
        return h, h.clone()


class DIEN(nn.Module):
    """Deep interest evolution: interests drawn from the events in order, then followed as far as the target cares.

    h_t = GRU(e_t, h_{t−1}),  a_t = softmax_t(h_tᵀ W q),  h'_t = AUGRU(h_t, h'_{t−1}), whose update gate is a_t u_t;
    the result is the last h'. In training, a perceptron on [h_t; e_{t+1}] also learns to tell the event that came next
    from another, the event that the next row of the batch has at that place:
    L_aux = −mean_t log σ(h_t, e_{t+1}) − mean_t log(1 − σ(h_t, ê_{t+1})), over the steps that exist. The authors'
    code draws the other event from the user's unseen items; here it costs no draw, and popular events are more often
    the other one, as they are more often the next. An empty history gives zeros.

    Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019, arXiv 1809.03672,
    equations 2 to 7 and 10 to 16.

    Args:
        auxiliary: weight of L_aux in the loss; 0 for none.
        auxiliary_hidden: width of each hidden layer of its perceptron, with sigmoids between, as in the authors' code.
    """

    def __init__(
        self,
        width: int,
        *,
        auxiliary: NonNegativeFloat = 1.0,
        auxiliary_hidden: tuple[PositiveInt, ...] = (100, 50),
    ) -> None:
        super().__init__()
        self.width, self.strength = width, auxiliary
        self.extractor, self.evolution = Gates(width), Gates(width)
        self.attention = linear(width, width, bias=False)
        self.judge: nn.Sequential | None = None
        if auxiliary:
            layers: list[nn.Module] = []
            for before, after in zip((2 * width, *auxiliary_hidden), (*auxiliary_hidden, 1), strict=True):
                layers += [linear(before, after), nn.Sigmoid()]
            self.judge = nn.Sequential(*layers[:-1])
        self._last: tuple[Tensor, ...] = ()

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        valid = torch.arange(history.shape[1], device=history.device) < length.unsqueeze(1)  # [B, L]
        history = history.masked_fill(~valid.unsqueeze(-1), 0.0)
        states = self.extractor(history.transpose(0, 1).contiguous())  # [L, B, W]: each step reads one block
        interests = states.transpose(0, 1)
        shares = self.weights(target, interests, valid).transpose(0, 1).unsqueeze(2)  # [L, B, 1]
        # Padding has no share, and so leaves the state of the second layer as it is: its last one is the newest.
        out: Tensor = self.evolution(states, shares)[-1]
        if not torch.compiler.is_compiling():
            self._last = (interests, history, valid) if self.training and self.strength else ()
        return out

    def weights(self, target: Tensor, interests: Tensor, valid: Tensor) -> Tensor:
        """How much each event counts, `[B, W], [B, L, W], [B, L] bool -> [B, L]`; zero for padding."""
        score = torch.bmm(interests, self.attention(target).unsqueeze(2)).squeeze(2)  # [B, L]
        shares = torch.softmax(score.masked_fill(~valid, torch.finfo(score.dtype).min), 1)
        return shares.masked_fill(~valid, 0.0)

    def penalty(self) -> Tensor:
        """Return the weighted L_aux of the batch seen last in training, `[]`."""
        if not self._last or self.judge is None:
            return self.attention.weight.new_zeros(())
        interests, events, valid = self._last
        seen, following, steps = interests[:, :-1], events[:, 1:], valid[:, 1:]  # [B, L − 1, …]
        # In a batch of one row there is no other row.
        others = steps & steps.roll(-1, 0) if len(steps) > 1 else torch.zeros_like(steps)
        came = F.softplus(-self._judged(seen, following))
        did_not = F.softplus(self._judged(seen, following.roll(-1, 0)))
        return self.strength * (_mean(came, steps) + _mean(did_not, others))

    def _judged(self, interests: Tensor, events: Tensor) -> Tensor:
        """The perceptron's logits, `2 × [B, L − 1, W] -> [B, L − 1]`."""
        assert self.judge is not None
        logit: Tensor = self.judge(torch.cat([interests, events], 2)).squeeze(2)
        return logit


def _mean(x: Tensor, chosen: Tensor) -> Tensor:
    """The mean of what is chosen, zero where nothing is, `[B, L], [B, L] bool -> []`."""
    return x.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp(min=1)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoder."""
    return [Component("sequence", "dien", DIEN)]
