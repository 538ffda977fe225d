"""Slates with a planted chance of a look at each position, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys.contracts import FIRST_ID, Batch, EncodedSchema, Field

ITEMS, SHOWN, CANDIDATES = 60, 6, 8
LOOK = 1 / np.arange(1, SHOWN + 1)
SCHEMA = EncodedSchema((Field("item", FIRST_ID + ITEMS),), (), ("label",), ("group", "position", "uniform"))


@dataclass(frozen=True)
class Slates:
    """`[slates, SHOWN]` each."""

    item: Tensor
    click: Tensor
    liked: Tensor

    def batch(self, slates: slice | Tensor = slice(None), uniform: int = 0) -> Batch:
        """Their rows, a slate after the other."""
        item, click = self.item[slates], self.click[slates]
        place = torch.arange(SHOWN).repeat(len(item))
        group = torch.arange(len(item)).repeat_interleave(SHOWN)
        context = {"position": place, "group": group, "uniform": torch.full_like(place, uniform)}
        return Batch(FIRST_ID + item.flatten()[:, None], label={"label": click.flatten()}, context=context)


def draw(slates: int, seed: int = 3, temperature: float = 0.5, look: np.ndarray = LOOK, whim: float = 0.0) -> Slates:
    """Eight of sixty items at random, six of them shown in the order of a noisy guess of how much they are liked.

    A whim is what whoever shows them thinks of each item besides, right or wrong.
    """
    g = np.random.default_rng(seed)
    liking = 0.9 * np.random.default_rng(3).beta(1, 4, ITEMS) + 0.02
    candidates = g.random((slates, ITEMS)).argpartition(CANDIDATES, axis=1)[:, :CANDIDATES]
    thought = np.log(liking) + whim * np.random.default_rng(4).normal(size=ITEMS)
    guess = thought[candidates] / temperature if temperature else np.zeros(candidates.shape)
    best = np.argsort(-(guess + g.gumbel(size=candidates.shape)), axis=1)[:, :SHOWN]
    item = np.take_along_axis(candidates, best, 1)
    click = (g.random(item.shape) < look) & (g.random(item.shape) < liking[item])
    return Slates(torch.from_numpy(item), torch.from_numpy(click).float(), torch.from_numpy(liking))


def naive(slates: Slates) -> np.ndarray:
    """Clicks at each position by those at the first."""
    rate = slates.click.double().mean(0).numpy()
    return rate / rate[0]


def learned(slates: Slates, loss: nn.Module, epochs: int = 12, size: int = 1500) -> Tensor:
    """Train a logit for each item, and the loss itself, by Adam; returns what the items' probabilities became."""
    torch.manual_seed(0)
    logit = torch.full((ITEMS,), -1.5, requires_grad=True)
    optimizer = torch.optim.Adam([logit, *loss.parameters()], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(slates.item) // size)
    for _ in range(epochs):
        for own in torch.randperm(len(slates.item)).split(size):
            optimizer.zero_grad()
            loss({"label": logit[slates.item[own].flatten()]}, slates.batch(own)).backward()
            optimizer.step()
            schedule.step()
    return torch.sigmoid(logit.detach()).double()
