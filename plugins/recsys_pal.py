"""PAL: a click needs a look and a liking; the look depends on the position alone, and is not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Batch, Component, full, hookimpl, product_bce, row_mean

Several = Annotated[int, Limits(ge=2)]


class PAL(nn.Module):
    """The position-aware factorisation: a click is a look times a liking; looks go by position, and are not served.

    P(click) = P(seen | position) · P(click | seen), L = BCE(y, σ(a_k) σ(x)), the mean over all rows, weights honoured,
    tasks averaged; x is the model's logit and a_k a number of the loss for each position k. Only the product can be
    known, so σ(a_0) = 1: what is served is the click probability at the first position. A position is all that a_k may
    depend on: an item or a user in there would take part of the liking away. It learns with the model in the fit
    stages, stands in checkpoints, and is not exported; the stage `positions` tells it. It needs as
    many steps as the model to settle, and a lower rate at the end; what the model cannot tell of why a row stands where
    it stands, a_k takes on.

    form sum is the shallow tower, L = BCE(y, σ(x + a_k)) with a_0 = 0: what a position multiplies is the odds of a
    click then, not its probability.

    Guo et al., "PAL: a position-bias aware learning framework for CTR prediction in live recommender systems",
    RecSys 2019; the sum: Zhao et al., "Recommending what video to watch next", RecSys 2019.

    Args:
        positions: how many positions there are; those behind count as the last one.
        first: number of the first position in the logs.
        form: product or sum.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        *,
        positions: Several = 10,
        first: int = 0,
        form: Literal["product", "sum"] = "product",
    ) -> None:
        super().__init__()
        self.tasks, self.first, self.form = tasks, first, form
        # σ(0) = ½, where it learns fastest: nearer to 1, low positions' lack of clicks is taken for dislike at first.
        self.bias = nn.Parameter(torch.zeros(positions - 1))
        self.needs: tuple[str, ...] = ("position",)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        position = (batch.context["position"] - self.first).clamp(0, len(self.bias))
        losses = [row_mean(self._rows(full(logits[t]), batch.label[t], position), batch) for t in self.tasks]
        return torch.stack(losses).mean()

    def _rows(self, x: Tensor, label: Tensor, position: Tensor) -> Tensor:
        """`[B], [B], [B] -> [B]`."""
        a = self.bias.to(x.dtype)
        if self.form == "sum":
            x = x + torch.cat([a.new_zeros(1), a]).index_select(0, position)
            return _bce(x, label)
        # The first position is certain to be seen; its logit would be infinite.
        at_first = _bce(x, label)
        elsewhere = product_bce(a.index_select(0, (position - 1).clamp(min=0)), x, label)
        return at_first.where(position == 0, elsewhere)

    def examination(self) -> Tensor:
        """How much likelier the first position's look, or with the sum its odds of a click, `[K]`; the first is 1."""
        a = self.bias.detach()
        return torch.cat([a.new_ones(1), torch.sigmoid(a) if self.form == "product" else a.exp()])


def _bce(x: Tensor, label: Tensor) -> Tensor:
    """`[B], [B] -> [B]`, to the last digit: `softplus` is a straight line above 20."""
    return F.binary_cross_entropy_with_logits(x, label.to(x.dtype), reduction="none")


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "pal", PAL)]
