"""Hard negatives: of several drawn items, one that the model scores high."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.api import Component, Draws, Items, RecipeError, hookimpl


class DynamicNegatives:
    """Of several drawn items, the one that the model scores highest, or one drawn by a softmax of the scores.

    j = argmax_k x_uk over n candidates k ~ q, q_k ∝ rows_k^power; with a temperature T, the probability of candidate k
    is exp(x_uk/T) / Σ_l exp(x_ul/T).

    Zhang, Chen, Wang, Yu, "Optimizing top-n collaborative filtering via dynamic negative item sampling", SIGIR 2013
    (the hardest of n); the softmax as in Sun et al., "RotatE", ICLR 2019, who weight by it what is drawn by it here.

    The scores are those of the model at that step, without dropout and without gradients: a step passes n·m rows
    forward besides its own. There is no state: the choice is a function of the weights, the seed and the step. `log_q`
    is that of the candidates, since the probability after the choice is not known.

    Args:
        candidates: n; 1 draws from q alone.
        temperature: T; 0 takes the highest score.
        power: of the candidates' popularity; 0 draws them uniformly.
    """

    def __init__(self, items: Items, *, candidates: int = 5, temperature: float = 0.0, power: float = 0.0) -> None:
        if candidates < 1:
            raise RecipeError(f"sampling.sampler.candidates is {candidates}, must be at least 1")
        if temperature < 0:
            raise RecipeError(f"sampling.sampler.temperature is {temperature}, must not be negative")
        self.candidates = candidates
        self._temperature = temperature
        weight = items.rows.astype(np.float64) ** power
        self._q = weight / weight.sum()
        self._ends = np.cumsum(self._q)

    def draw(self, draws: Draws, count: int) -> Any:
        """`Draws -> [B, count]` item numbers."""
        found = np.searchsorted(self._ends, draws.uniform(count) * self._ends[-1], side="right")
        return np.minimum(found, len(self._q) - 1).astype(np.int64)

    def log_q(self) -> Any:
        """`[I]`, of one candidate."""
        return np.log(self._q)

    def choose(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """`[N, m, n], [N, m, n] -> [N, m]`: the Gumbel trick draws from the softmax by an argmax."""
        if not self._temperature:
            return scores.argmax(2)
        tiny = torch.finfo(torch.float32).tiny
        gumbel = -(-uniform.float().clamp(tiny, 1 - 2**-24).log()).log()
        return (scores.float() / self._temperature + gumbel).argmax(2)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sampler."""
    return [Component("sampler", "dns", DynamicNegatives)]
