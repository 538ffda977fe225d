"""Clicks that are known only where an old retriever had them judged: what CET's weights tell, and what they gain.

    python tests/plugins/pooling.py [--seeds 5] [--steps 300]

prints NDCG@10 against the true probability of relevance of the unweighted loss, what CET adds to it with the standard
error over the worlds, and how well the weights tell irrelevant negatives from relevant ones that nobody judged.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass

import torch
from flips import auc
from torch import Tensor, nn

from recsys.api import Batch, EncodedSchema, Field
from recsys_cet import CET

USERS, ITEMS, DIM, RANK = 300, 200, 8, 4
SCHEMA = EncodedSchema((Field("user", USERS), Field("item", ITEMS)), (), ("label",))


@dataclass(frozen=True)
class World:
    """What is true of every pair, each `[U, I]`: the chance of relevance, relevance, and relevance that was judged."""

    chance: Tensor
    truth: Tensor
    seen: Tensor


def world(slope: float, seed: int, follow: float = 1.0) -> World:
    """γ = σ(ρ), a judgement with σ(slope ρ_old + const) of mean .4; ρ_old = follow ρ' + √(1 − follow²) ρ''.

    ρ' is the standardised ρ, ρ'' another product of the same rank: `follow` 1 is a retriever that ranks by relevance.
    """
    random = torch.Generator().manual_seed(seed)

    def product() -> Tensor:
        left, right = (torch.randn(n, RANK, generator=random) for n in (USERS, ITEMS))
        found = left @ right.T / math.sqrt(RANK) + torch.randn(ITEMS, generator=random)
        return (found - found.mean()) / found.std()

    score, other = product(), product()
    old = follow * score + math.sqrt(1 - follow**2) * other
    chance = (1.5 * score - 1.5).sigmoid()
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if float((slope * old + middle).sigmoid().mean()) > 0.4 else (middle, high)
    truth = torch.rand(USERS, ITEMS, generator=random) < chance
    judged = torch.rand(USERS, ITEMS, generator=random) < (slope * old + low).sigmoid()
    return World(chance, truth, truth & judged)


class Ranker(nn.Module):
    """r_ui = U_u·V_i + b_i."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Parameter(0.1 * torch.randn(USERS, DIM))
        self.item = nn.Parameter(0.1 * torch.randn(ITEMS, DIM))
        self.bias = nn.Parameter(torch.zeros(ITEMS))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """`[B], [B] -> [B]`."""
        return (self.user[user] * self.item[item]).sum(1) + self.bias[item]


def trained(of: World, tau: float, seed: int, steps: int, l2: float = 3e-4) -> tuple[Tensor, Tensor]:
    """Scores and weights of all pairs, `[U, I]`, after training on clicks and the harder of drawn negatives."""
    torch.manual_seed(seed)
    model, loss = Ranker(), CET(("label",), SCHEMA, tau=tau, dim=DIM)
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    random = torch.Generator().manual_seed(seed)
    users, items = of.seen.nonzero(as_tuple=True)
    n, m, candidates = 512, 2, 4
    label = torch.cat([torch.ones(n), torch.zeros(n * m)])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        at = torch.randint(0, len(users), (n,), generator=random)
        unseen = (~of.seen[users[at]]).float()
        drawn = torch.multinomial(unseen, m * candidates, generator=random).view(n * m, candidates)
        each = users[at].repeat_interleave(m)
        with torch.no_grad():  # the harder ones, by a softmax of the scores
            score = model(each.repeat_interleave(candidates), drawn.flatten()).view(n * m, candidates)
            chosen = torch.multinomial(score.softmax(1), 1, generator=random)
        user, item = torch.cat([users[at], each]), torch.cat([items[at], drawn.gather(1, chosen)[:, 0]])
        batch = Batch(torch.stack([user, item], 1), label={"label": label}, negatives=m)
        decay = 0.5 * l2 * sum(p.square().sum() for p in parameters)
        optimizer.zero_grad()
        (loss({"label": model(user, item)}, batch) + decay).backward()
        optimizer.step()
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS))
        observed = loss.observer(Batch(pairs))["label"]
        return model(pairs[:, 0], pairs[:, 1]).view(USERS, ITEMS), loss.weight(observed).view(USERS, ITEMS)


def ndcg(score: Tensor, gain: Tensor, k: int = 10) -> float:
    """Mean over users."""
    discount = 1 / torch.log2(torch.arange(k) + 2.0)
    best = (gain.sort(1, descending=True).values[:, :k] * discount).sum(1)
    return float(((gain.gather(1, score.topk(k, 1).indices) * discount).sum(1) / best).mean())


def told(weight: Tensor, score: Tensor, of: World, hard: int = 50) -> float:
    """AUC of the weights between irrelevant and relevant among each user's `hard` best unlabelled items."""
    place = score.masked_fill(of.seen, -torch.inf).topk(hard, 1).indices
    return auc(weight.gather(1, place), ~of.truth.gather(1, place))


@dataclass(frozen=True)
class Result:
    """By world: NDCG@10 unweighted and of CET, and the AUC of CET's weights."""

    plain: list[float]
    cet: list[float]
    weights: list[float]

    def gain(self) -> tuple[float, float]:
        """Mean and standard error over the worlds."""
        gaps = [a - b for a, b in zip(self.cet, self.plain, strict=True)]
        return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def study(slope: float, seeds: int, steps: int, tau: float = 10.0, follow: float = 1.0) -> Result:
    """Train with and without weights on the same worlds and batches."""
    found = Result([], [], [])
    for seed in range(seeds):
        of = world(slope, seed, follow)
        score, _ = trained(of, 1e9, seed, steps)
        found.plain.append(ndcg(score, of.chance))
        score, weight = trained(of, tau, seed, steps)
        found.cet.append(ndcg(score, of.chance))
        found.weights.append(told(weight, score, of))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    print("| judged by | unweighted | CET | AUC of the weights |\n|---|---|---|---|")
    for name, slope in (("chance", 0.0), ("relevance", 3.0), ("relevance, above a threshold", 8.0)):
        result = study(slope, given.seeds, given.steps)
        plain, mean, error = statistics.mean(result.plain), *result.gain()
        print(f"| {name} | {plain:.4f} | {mean:+.4f} ± {error:.4f} | {statistics.mean(result.weights):.3f} |")


if __name__ == "__main__":
    main()
