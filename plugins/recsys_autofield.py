"""AutoField: for every field the probability of keeping it, found on validation rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from recsys.api import Best, Component, Fields, OwnAdam, Selection, chosen, hookimpl, how_many, passing

START = 0.5
"""Both logits of every field at the beginning."""


class AutoField(nn.Module):
    """One probability of keeping each field, from Gumbel-softmax draws that validation rows teach.

    e'_bf = p_f e_bf with (p_f, 1 − p_f) = softmax((log softmax(a_f) + G_f) / τ), a_f two logits, both ½ at first, G_f
    two standard Gumbel numbers, drawn for each field and batch, τ = max(`coldest`, `temperature` − `cooling` · t) after
    t training batches. The weights learn on a training batch and the logits, by Adam, on a validation batch in turn, in
    the stage `bilevel_fit`: after every step of the weights, where the code of ERASE waits for ten of them. In any
    other stage the logits stay. The stage runs all its epochs and keeps the last.

    A field's score is softmax(a_f)'s first part, and the best of them are kept. In the search, evaluation sees the mean
    of the gates, which is this score, or without `gumbel` the gates themselves; after it what is kept, and zeros
    elsewhere. A factor can be made up for by the weights behind it, so the scores rank fields and are no shares of what
    they are worth; the model is trained again, without gates, on what is left.

    First-order weights and histories do not pass the gates.

    Wang et al., "AutoField: Automating Feature Selection in Deep Recommender Systems", WWW 2022, arXiv 2204.09078;
    Jia et al., "ERASE: Benchmarking Feature Selection Methods for Deep Recommender Systems", KDD 2024, arXiv
    2403.12660.

    Args:
        keep: how many of the fields are kept, a number or a share.
        gumbel: false: no draws, p = softmax(a / τ), as in the public code by other authors (AutoFS-in-CTR).
        temperature: τ at the beginning.
        cooling: what τ loses with every training batch; at the published value it takes 19,800 to the end.
        coldest: the least τ.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        keep: Best = 0.5,
        gumbel: bool = True,
        temperature: PositiveFloat = 1.0,
        cooling: NonNegativeFloat = 5e-5,
        coldest: PositiveFloat = 0.01,
    ) -> None:
        super().__init__()
        how_many(fields, keep)
        self.fields, self.keep, self.gumbel = fields, keep, gumbel
        self.temperature, self.cooling, self.coldest = temperature, cooling, coldest
        self.logits = nn.Parameter(torch.full((len(fields), 2), START))  # keep, drop
        self.adam = OwnAdam(self.architecture())
        self.progress: Tensor
        self.batches: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        if self.training:
            gate = self.drawn()[:, 0]
            self.batches.add_(1)
        else:
            gate = torch.where(self.progress < 1, self.expected()[:, 0], self._passes())
        return e * gate.to(e.dtype).unsqueeze(1)

    def heat(self) -> Tensor:
        """τ, `[]`."""
        return (self.temperature - self.cooling * self.batches).clamp(min=self.coldest)

    def drawn(self) -> Tensor:
        """The gates of one batch, p and 1 − p, `[F, 2]`."""
        if not self.gumbel:
            return self.expected()
        noise = -torch.empty_like(self.logits).exponential_().log()
        return ((self.logits.log_softmax(1) + noise) / self.heat()).softmax(1)

    def expected(self) -> Tensor:
        """What evaluation sees in the search, `[F, 2]`."""
        return self.logits.softmax(1) if self.gumbel else (self.logits / self.heat()).softmax(1)

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return torch.zeros((), device=self.progress.device)

    def anneal(self, progress: float) -> None:
        """Note how far the stage is; at 1 the search is over."""
        self.progress.fill_(progress)

    def architecture(self) -> tuple[nn.Parameter, ...]:
        """The logits."""
        return (self.logits,)

    def search_step(self, rate: float) -> None:
        """Move the logits by Adam."""
        self.adam.step(self.architecture(), rate)

    def reached(self) -> bool | None:
        """None before the logits move, then False: a stage that moves them keeps its last epoch."""
        return False if self.adam.taken() else None

    def kept(self) -> Selection:
        """The fields with the largest probabilities; all of them before the search."""
        return chosen(self.fields.names, self._passes())

    def scores(self) -> Mapping[str, Tensor]:
        """The probability of keeping each field, `[]`."""
        return dict(zip(self.fields.names, self._chance().clone(), strict=True))

    def _chance(self) -> Tensor:
        return self.logits.detach().softmax(1)[:, 0]

    def _passes(self) -> Tensor:
        """`[F]` bool."""
        return passing(self.fields, self._chance(), self.keep)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "bilevel_fit", "rate": 1e-3},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "autofield", AutoField, stages)]
