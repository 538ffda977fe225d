"""A small world in which relevance and exposure of every pair of user and item are known, to test losses on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.data.simulate_random import Draws

USERS, ITEMS, SEED = 400, 300, 11


@dataclass(frozen=True)
class World:
    """Probabilities of relevance γ and exposure θ, and a fixed predictor x, each `[U, I]`."""

    gamma: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    seed: int = SEED

    def labels(self, repetition: int, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Y = O·R of some pairs in one repetition, `[n]` bool; a pair has one label however often it is asked for."""
        exposed = Draws(self.seed, users * ITEMS + items).uniform(101 + 2 * repetition) < self.theta[users, items]
        return self.relevant(repetition, users, items) & exposed

    def relevant(self, repetition: int, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """R of the same, `[n]` bool."""
        return Draws(self.seed, users * ITEMS + items).uniform(100 + 2 * repetition) < self.gamma[users, items]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def pairs_world(seed: int = SEED) -> World:
    def taste(stream: int, rows: int) -> np.ndarray:
        return Draws(seed, np.arange(rows * 8)).normal(stream).reshape(rows, 8) / 8**0.25

    product = taste(1, USERS) @ taste(2, ITEMS).T
    rho = product - 1.2
    popularity = -0.7 * np.log(np.arange(ITEMS) + 1.0)
    theta = np.clip(sigmoid(1.0 + 1.2 * popularity + 0.5 * product), 0.01, 0.95)
    noise = np.random.default_rng(0).normal(size=(USERS, ITEMS))
    return World(sigmoid(rho), theta, 0.7 * rho + 0.3 * noise, seed)
