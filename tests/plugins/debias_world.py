"""A small world of users and items whose relevance and exposure are known, and the losses' means in it.

The numbers are those of 400 users and 300 items, seed 11: relevance γ = σ(P·Q − 1.2), exposure by popularity and by
relevance, and a fixed imperfect predictor. Relevance R and exposure O of a repetition are drawn from counted streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from recsys.data.simulate_random import Draws

Floats = npt.NDArray[np.float64]
USERS, ITEMS, DIM, SEED = 400, 300, 8, 11
IDEAL = 0.52635
REPEATS = 100


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True)
class World:
    """All arrays are `[N]`, a user's items one after the other.

    Args:
        p: vectors of the users, `[U, d]`.
        q: vectors of the items, `[I, d]`.
        gamma: P(relevant).
        theta: P(shown).
        logit: of the predictor.
    """

    p: Floats
    q: Floats
    gamma: Floats
    theta: Floats
    logit: Floats

    @property
    def one(self) -> Floats:
        """Loss of the predictor where the label is 1."""
        return np.logaddexp(0, -self.logit)

    @property
    def zero(self) -> Floats:
        """Loss of the predictor where the label is 0."""
        return np.logaddexp(0, self.logit)

    @property
    def error(self) -> Floats:
        """Mean loss of a pair."""
        return self.gamma * self.one + (1 - self.gamma) * self.zero

    def draws(self) -> Iterator[tuple[Floats, Floats]]:
        """Yield (R, O) of each repetition."""
        index = Draws.span(SEED, 0, USERS * ITEMS)
        for r in range(REPEATS):
            yield (
                (index.uniform(100 + 2 * r) < self.gamma).astype(np.float64),
                (index.uniform(101 + 2 * r) < self.theta).astype(np.float64),
            )


@cache
def world() -> World:
    scale = DIM**-0.25
    p = Draws.span(SEED, 0, USERS * DIM).normal(1).reshape(USERS, DIM) * scale
    q = Draws.span(SEED, 0, ITEMS * DIM).normal(2).reshape(ITEMS, DIM) * scale
    product = p @ q.T
    rho = product - 1.2
    popularity = -0.7 * np.log(np.arange(ITEMS) + 1)
    theta = sigmoid(1 + 1.2 * popularity + 0.5 * product).clip(0.01, 0.95)
    logit = 0.7 * rho + 0.3 * np.random.default_rng(0).normal(size=(USERS, ITEMS))
    return World(p, q, sigmoid(rho).ravel(), theta.ravel(), logit.ravel())


def ids() -> torch.Tensor:
    """Users and items of all pairs, `[N, 2]`, counting from 2."""
    pair = torch.arange(USERS * ITEMS)
    return torch.stack([pair // ITEMS, pair % ITEMS], 1) + 2


def z_score(values: list[float], wanted: float) -> float:
    """How many standard errors the mean of the values lies from what is wanted."""
    found = np.asarray(values)
    return float((found.mean() - wanted) / (found.std(ddof=1) / len(found) ** 0.5))
