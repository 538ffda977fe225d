"""Clicks of a world in which exposure follows popularity: what PD and MACR rank where everything is shown alike.

    python tests/plugins/popular.py [--seeds 5] [--steps 2000]

prints the mean AUC within users against the true relevance of every pair, which is balanced over items, with the gain
over the same matrix factorisation trained without, and its standard error over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pairs_world import ITEMS, USERS, pairs_world
from torch import Tensor, nn

from recsys.api import Batch, Fields
from recsys_bpr import BPR
from recsys_macr import MACR
from recsys_pda import PDA

DIM, VISITS = 8, 6
FIELDS = Fields(("user", "item"), (USERS, ITEMS), DIM)


@dataclass(frozen=True)
class Clicks:
    """What was clicked, the popularity of items `[I]`, and the truth, `[U, I]`: relevant or not."""

    users: Tensor
    items: Tensor
    popularity: Tensor
    truth: Tensor


def clicks(seed: int) -> Clicks:
    """Every pair meets six times; exposure and relevance are drawn anew each time, and so is the truth to rank by."""
    of = pairs_world(seed)
    u, i = (part.ravel() for part in np.meshgrid(np.arange(USERS), np.arange(ITEMS), indexing="ij"))
    rows = [np.flatnonzero(of.labels(visit, u, i)) for visit in range(VISITS)]
    found = np.concatenate(rows)
    count = np.bincount(i[found], minlength=ITEMS).astype(np.float64)
    share = (count + 1) / (count.sum() + ITEMS)
    popularity = torch.from_numpy((share - share.min()) / (share.max() - share.min())).float()
    truth = torch.from_numpy(of.relevant(VISITS, u, i).reshape(USERS, ITEMS))
    return Clicks(torch.from_numpy(u[found]), torch.from_numpy(i[found]), popularity, truth)


def user_auc(score: Tensor, truth: Tensor) -> float:
    """Mean over the users of the AUC over their items."""
    rank = score.argsort(1).argsort(1).double() + 1
    n = truth.sum(1).double()
    area = ((rank * truth).sum(1) - n * (n + 1) / 2) / (n * (ITEMS - n))
    return float(area[(n > 0) & (n < ITEMS)].mean())


class Factors(nn.Module):
    """Vectors of users and items, `[2, B] -> [B, 2, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Parameter(0.1 * torch.randn(USERS, DIM))
        self.item = nn.Parameter(0.1 * torch.randn(ITEMS, DIM))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return torch.stack([self.user[user], self.item[item]], 1)


def trained(
    of: Clicks, loss: nn.Module | Callable[..., Tensor], match: MACR, seed: int, steps: int, l2: float = 2e-5
) -> float:
    """The AUC after training on clicks and one uniformly drawn item beside each."""
    torch.manual_seed(seed)
    factors = Factors()
    match = match.train()
    parameters = [*factors.parameters(), *match.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    n = 1024
    label = torch.cat([torch.ones(n), torch.zeros(n)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        at = torch.randint(0, len(of.users), (n,))
        user = of.users[at].repeat(2)
        item = torch.cat([of.items[at], torch.randint(0, ITEMS, (n,))])
        batch = Batch(
            torch.stack([user, item], 1),
            label={"label": label},
            context={"popularity": of.popularity[item]},
            negatives=1,
        )
        logit = match(factors(user, item))[:, 0]
        decay = 0.5 * l2 * sum(p.square().sum() for p in factors.parameters())
        optimizer.zero_grad()
        (loss({"label": logit}, batch) + match.auxiliary(batch) + decay).backward()
        optimizer.step()
    with torch.no_grad():
        user, item = torch.meshgrid(torch.arange(USERS), torch.arange(ITEMS), indexing="ij")
        score = match.eval()(factors(user.flatten(), item.flatten())).reshape(USERS, ITEMS)
    return user_auc(score, of.truth)


def bce(logits: dict[str, Tensor], batch: Batch) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits["label"], batch.label["label"])


def plain() -> MACR:
    return MACR(FIELDS, branches=False)


METHODS: dict[str, Callable[[], tuple[Callable[..., Tensor], MACR]]] = {
    "bpr": lambda: (BPR(("label",)), plain()),
    "pd": lambda: (PDA(("label",), power=0.2), plain()),
    "bce": lambda: (bce, plain()),
    "macr": lambda: (bce, MACR(FIELDS, c=4.0, alpha=1.0)),
}
"""What is trained; PD's power and MACR's c and α were chosen on the world of the seed 101."""
NAIVE = {"pd": "bpr", "macr": "bce"}


def study(seeds: range, steps: int, names: tuple[str, ...] = tuple(METHODS)) -> dict[str, list[float]]:
    """AUC by method and seed; a seed is a world."""
    worlds = {seed: clicks(seed) for seed in seeds}
    return {name: [trained(worlds[s], *METHODS[name](), s, steps) for s in seeds] for name in names}


def gain(found: dict[str, list[float]], name: str) -> tuple[float, float]:
    """Mean gain over the same factorisation without, and its standard error."""
    gaps = [a - b for a, b in zip(found[name], found[NAIVE[name]], strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    found = study(range(1, given.seeds + 1), given.steps)
    print("| trained with | AUC within users | gain |\n|---|---|---|")
    for name, values in found.items():
        told = "{:+.4f} ± {:.4f}".format(*gain(found, name)) if name in NAIVE else ""
        print(f"| {name} | {statistics.mean(values):.4f} | {told} |")


if __name__ == "__main__":
    main()
