"""Clicks and non-clicks whose labels may have been flipped, with a model of the flips."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from recsys.api import Batch, Component, EncodedSchema, RecipeError, hookimpl, pairs

Form = Literal["nbpo", "exact", "sum", "bpo"]


class NBPO(nn.Module):
    """Noisy-label robust optimisation: a second model says which sampled negatives are positives that were missed.

    φ = σ(g), g_ui = P_u·Q_i: probability that a truly positive pair is seen as a negative. With sg the stop of
    gradients, and each logged positive counted once for every row sampled for it,

        positive: −[sg(1 − φ)·lnσ(x) + sg(σ(x))·lnσ(−g)]
        sampled:  −[lnσ(−x) + sg(φ)·lnσ(x) + sg(σ(x))·lnσ(g)]

    is averaged over the P = N·m pairs and the tasks, and (l2/2)·(‖P‖² + ‖Q‖²) over the whole tables is added. The model
    that is served is x alone. Pairs of a logged row with label 0, or of a sampled row with label 1, add nothing.

    Yu, Qin, "Sampler design for implicit feedback data by noisy-label robust learning", SIGIR 2020 (arXiv 2007.07204).
    What φ alone means is not settled by the data: (1 − φ)σ(x) is; low rank and the start divide it into its factors.
    Left free, φ of `nbpo` settles at 1 − p, p the share of positives among a pair's rows, and the ranking suffers. Nor
    is the true φ enough: given it, σ(x)/σ(−x) of `nbpo` settles at [p(1 − φ) + (1 − p)φ]/(1 − p), which is large
    wherever φ is; that of `exact` at the odds of the truth. The paper's sums over a batch are means here, so its
    learning rates have to be scaled.

    Args:
        user: field of the users, which P has a row for each value of.
        item: field of the items, for Q.
        dim: K, width of P and Q.
        form: `nbpo`, the surrogate above; `exact`, the likelihood: −ln σ(x)(1 − φ) and −ln(σ(−x) + φσ(x)); `sum`, the
            same without logarithms; `bpo`, without flips: −lnσ(x) and −lnσ(−x).
        l2: λ of the flip model.
        start: P starts at start·U(0, 1)/√K and Q at −start·U(0, 1)/√K, so that g is about −start²/4: with the
            published 5, φ is 0.002 and training begins as without flips. From 0, φ is ½ and nothing is learned.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        user: str = "user",
        item: str = "item",
        dim: int = 50,
        form: Form = "nbpo",
        l2: float = 0.0,
        start: float = 5.0,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.form = form
        self.l2 = l2
        self.needs: tuple[str, ...] = ("positive",)
        names = [f.name for f in schema.fields]
        for option, name in (("user", user), ("item", item)):
            if name not in names:
                raise RecipeError(
                    f"loss.{option}: no field '{name}'; fields: {', '.join(names)}", path=("loss", option)
                )
        self.columns = (names.index(user), names.index(item))
        rows = [schema.fields[column].rows for column in self.columns]
        # `form: bpo` has no flips, and so nothing that would stay without a gradient.
        self.flips = nn.ParameterList([] if form == "bpo" else (nn.Parameter(torch.rand(n, dim)) for n in rows))
        with torch.no_grad():
            for sign, table in zip((1.0, -1.0), self.flips, strict=False):
                table.mul_(sign * start / math.sqrt(dim))

    def flip_logit(self, batch: Batch) -> Tensor:
        """Flip logits g of every row, `Batch -> [B]`."""
        p, q = (nn.functional.embedding(batch.ids[:, c], t) for c, t in zip(self.columns, self.flips, strict=True))
        return (p * q).sum(1)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        losses = []
        for task in self.tasks:
            given = logits[task]
            x = given if given.dtype == torch.float64 else given.float()
            g = torch.zeros_like(x) if self.form == "bpo" else self.flip_logit(batch).to(x.dtype)
            y_i, y_j = pairs(batch.label[task].to(x.dtype), batch)
            (x_i, x_j), (g_i, g_j) = pairs(x, batch), pairs(g, batch)
            pair = positive_loss(x_i, g_i, self.form)[:, None] + sampled_loss(x_j, g_j, self.form)
            losses.append((y_i[:, None] * (1.0 - y_j) * pair).mean())
        loss = torch.stack(losses).mean()
        if self.l2 and len(self.flips):
            loss = loss + 0.5 * self.l2 * torch.stack([table.square().sum() for table in self.flips]).sum()
        return loss


def positive_loss(x: Tensor, g: Tensor, form: Form) -> Tensor:
    """What a positive row adds, elementwise."""
    if form == "bpo":
        return -logsigmoid(x)
    if form == "exact":
        return -logsigmoid(x) - logsigmoid(-g)
    if form == "sum":
        return -(-g).sigmoid() * x.sigmoid()
    return -((-g).sigmoid().detach() * logsigmoid(x) + x.sigmoid().detach() * logsigmoid(-g))


def sampled_loss(x: Tensor, g: Tensor, form: Form) -> Tensor:
    """What a sampled row adds, elementwise."""
    if form == "bpo":
        return -logsigmoid(-x)
    if form == "exact":
        return -torch.logaddexp(logsigmoid(-x), logsigmoid(g) + logsigmoid(x))
    if form == "sum":
        return -((-x).sigmoid() + g.sigmoid() * x.sigmoid())
    return -(logsigmoid(-x) + g.sigmoid().detach() * logsigmoid(x) + x.sigmoid().detach() * logsigmoid(g))


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "nbpo", NBPO)]
