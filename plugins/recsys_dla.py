"""DLA: a ranker and the positions' chance of a look, each learned from clicks that the other one has weighed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field as Limits
from pydantic import PositiveFloat
from torch import Tensor, nn

from recsys.api import Batch, Component, full, hookimpl, row_mean

Several = Annotated[int, Limits(ge=2)]


class DLA(nn.Module):
    """The dual learning algorithm: unbiased ranking of slates and the chance of a look at each position, together.

    Of a slate with logits f_k and position scores g_k, p = softmax(f), v = softmax(g), sg no gradient, c the clicks:
    L = (1/B) Σ over the rows of all slates of c_k [sg(v_0/v_k) (−log p_k) + sg(p_0/p_k) (−log v_k)], where v_0 is the
    first position's and p_0 that of the row shown first in the slate. The first part moves the model alone and the
    second one g alone. A slate without a click adds nothing. The divisor is the number of rows, as everywhere here and
    much like the paper's mean over slates; the authors' code divides by the sum of the weights of a batch instead,
    which only scales a step, but not by the same number on every device.

    Slates are the rows of equal `group`; they come whole, as the loss says that it compares the rows of a group. A
    served logit orders items and is no click probability. g learns in the fit stages and is not exported; the stage
    `positions` tells v_k/v_0. Every epoch tells of the weights v_0/v_k of clicks: look_mean, and look_ess_share,
    (Σw)²/Σw² as a share of the clicks.

    Ai et al., "Unbiased Learning to Rank with Unbiased Propensity Estimation", SIGIR 2018.

    Args:
        positions: how many positions there are; those behind count as the last one.
        first: number of the first position in the logs.
        cap: largest weight of a click.
    """

    compares_groups = True

    def __init__(
        self, tasks: tuple[str, ...], *, positions: Several = 10, first: int = 0, cap: PositiveFloat = 100.0
    ) -> None:
        super().__init__()
        self.tasks, self.first, self.cap = tasks, first, cap
        self.scores = nn.Parameter(torch.zeros(positions - 1))  # g_0 is 0: a softmax knows differences only
        self.needs: tuple[str, ...] = ("group", "position")
        self._sums = torch.zeros(3, dtype=torch.float64)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast; rows of a slate stand side by side."""
        slate = _slates(batch.context["group"])
        position = (batch.context["position"] - self.first).clamp(0, len(self.scores))
        losses = [row_mean(self._rows(full(logits[t]), batch.label[t], slate, position), batch) for t in self.tasks]
        return torch.stack(losses).mean()

    def _rows(self, f: Tensor, click: Tensor, slate: Tensor, position: Tensor) -> Tensor:
        """`[B], [B], [B], [B] -> [B]`."""
        scores = self.scores.to(f.dtype)
        g = torch.cat([scores.new_zeros(1), scores]).index_select(0, position)
        top = _top(f.detach(), slate, position)
        by_look = torch.exp(-g.detach()).clamp(max=self.cap)  # v_0 / v_k
        clicked = click.to(f.dtype)
        weighed = clicked * by_look
        self._sums = torch.stack([clicked.sum(), weighed.sum(), (weighed * by_look).sum()]).double()
        by_liking = torch.exp(top - f.detach()).clamp(max=self.cap)  # p_0 / p_k
        return -clicked * (by_look * _log_softmax(f, slate) + by_liking * _log_softmax(g, slate))

    def sums(self) -> Tensor:
        """Of the batch and the task seen last, `[3]` float64, for `facts`."""
        return self._sums

    def facts(self, sums: Tensor) -> dict[str, float]:
        """What the sums of an epoch say of the weights of clicks; NaN without a click."""
        clicks, total, squares = sums.tolist()
        known = (total / clicks, total**2 / squares / clicks) if clicks else (math.nan, math.nan)
        return {"look_mean": known[0], "look_ess_share": known[1]}

    def examination(self) -> Tensor:
        """v_k / v_0 of each position, `[K]`; the first is 1."""
        scores = self.scores.detach()
        return torch.cat([scores.new_zeros(1), scores]).exp()


def _slates(group: Tensor) -> Tensor:
    """The number of the slate that each row is of, counted from 0: `[B] -> [B]`."""
    return torch.cat([group.new_zeros(1), (group[1:] != group[:-1]).cumsum(0)])


def _log_softmax(x: Tensor, slate: Tensor) -> Tensor:
    """The logarithm of the softmax of x within each slate, `[B], [B] -> [B]`."""
    # No more slates than rows: how many there are need not be asked of the device.
    largest = torch.full_like(x, -torch.inf).scatter_reduce(0, slate, x.detach(), "amax").index_select(0, slate)
    total = torch.zeros_like(x).index_add(0, slate, torch.exp(x - largest)).index_select(0, slate)
    return x - largest - total.log()


def _top(f: Tensor, slate: Tensor, position: Tensor) -> Tensor:
    """The mean of f over the rows of each slate that were shown first, given to all of its rows: `[B] -> [B]`."""
    far = torch.full_like(position, torch.iinfo(position.dtype).max)
    is_first = position == far.scatter_reduce(0, slate, position, "amin").index_select(0, slate)
    summed = torch.zeros_like(f).index_add(0, slate, f * is_first)
    count = torch.zeros_like(f).index_add(0, slate, is_first.to(f.dtype))
    return (summed / count.clamp(min=1)).index_select(0, slate)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "dla", DLA)]
