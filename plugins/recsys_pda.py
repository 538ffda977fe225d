"""Popularity as a cause of clicks that training knows of and ranking leaves out, or forecasts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, RecipeError, hookimpl, pairs


class PDA(nn.Module):
    """Popularity deconfounding: in training a score is the match times the item's popularity at that time.

    loss = (1/P) Σ_{i,j} y_i(1 − y_j)·softplus(−(s_i − s_j)),  s = (ELU(x) + 1)·m^γ, averaged over the tasks

    i are the logged rows, j the rows sampled for them, P = N·m, both with the popularity m of their items in the time
    slot of i (context `popularity` in [0, 1]; `sampling.popularity_slots` counts it). ELU + 1 > 0, so that m scales
    the match and never turns its sign. Ranking by the logit x alone is PD, without any influence of popularity; it is
    what evaluation and export do. PDA ranks by `adjusted(x, forecast(…), γ)`, with popularity as it is expected to be.
    The least popular item of a slot has m = 0, hence s = 0 and no gradient.

    Zhang et al., "Causal intervention for leveraging popularity bias in recommendation", SIGIR 2021.

    Args:
        power: γ; published for PD: 0.02, for PDA: 0.16 to 0.22; 0 trains on the match alone.
    """

    def __init__(self, tasks: tuple[str, ...], *, power: float = 0.1) -> None:
        super().__init__()
        if power < 0:
            raise RecipeError(f"loss.power is {power}, must not be negative", path=("loss", "power"))
        self.tasks = tasks
        self.power = power
        self.needs: tuple[str, ...] = ("positive", "popularity")

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        losses = []
        for task in self.tasks:
            x = logits[task]
            s_i, s_j = pairs(adjusted(x, batch.context["popularity"], self.power), batch)
            y_i, y_j = pairs(batch.label[task].to(s_i.dtype), batch)
            losses.append((y_i[:, None] * (1.0 - y_j) * nn.functional.softplus(s_j - s_i[:, None])).mean())
        return torch.stack(losses).mean()


def adjusted(logit: Tensor, popularity: Tensor, power: float) -> Tensor:
    """(ELU(x) + 1)·m^γ, elementwise; m is cut to [0, 1], and 0⁰ is 1."""
    x = logit if logit.dtype == torch.float64 else logit.float()
    m = popularity.detach().to(x.dtype).clamp(0.0, 1.0)
    return (nn.functional.elu(x) + 1.0) * m**power


def forecast(last: Tensor, before: Tensor) -> Tensor:
    """Popularity in the next slot, from the last two: m_T + ½(m_T − m_{T−1}), cut to [10⁻⁹, 1]; elementwise."""
    return (last + 0.5 * (last - before)).clamp(1e-9, 1.0)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "pda", PDA)]
