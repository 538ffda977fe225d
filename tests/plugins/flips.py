"""Clicks of which some are recorded as none, by user and item: what NBPO recovers of the truth, and BPO beside it.

    python tests/plugins/flips.py [--seeds 5] [--steps 500]

prints the AUC of BPO's scores against the true labels, what the other forms gain, with the standard error over the
seeds, and Spearman's correlation of the learned and the planted probability of a flip.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.api import Batch, EncodedSchema, Field
from recsys_nbpo import NBPO

USERS, ITEMS, DIM = 300, 200, 8
SPREAD, FLIP_SPREAD, RANK = 2.5, 2.0, 3
SCHEMA = EncodedSchema((Field("user", USERS), Field("item", ITEMS)), (), ("label",))


@dataclass(frozen=True)
class World:
    """What is true of every pair, each `[U, I]`: the label, the probability that it is lost, and the label recorded."""

    truth: Tensor
    flip: Tensor
    seen: Tensor


def world(rate: float, seed: int) -> World:
    """A pair is positive with probability σ(ρ) and then lost with probability φ of mean `rate`, both of low rank."""
    random = torch.Generator().manual_seed(seed)

    def product(spread: float) -> Tensor:
        left, right = (torch.randn(n, RANK, generator=random) for n in (USERS, ITEMS))
        return spread * left @ right.T / math.sqrt(RANK)

    truth = torch.rand(USERS, ITEMS, generator=random) < (product(SPREAD) - 1.5).sigmoid()
    logit = product(FLIP_SPREAD)
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if float((logit + middle).sigmoid()[truth].mean()) > rate else (middle, high)
    flip = (logit + low).sigmoid() if rate else torch.zeros_like(logit)
    lost = torch.rand(USERS, ITEMS, generator=random) < flip
    return World(truth, flip, truth & ~lost)


def auc(score: Tensor, label: Tensor) -> float:
    rank = score.flatten().argsort().argsort().double() + 1
    label = label.flatten()
    n = int(label.sum())
    return float((rank[label].sum() - n * (n + 1) / 2) / (n * (len(rank) - n)))


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


class Preference(nn.Module):
    """x_ui = U_u·V_i + b."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Parameter(torch.rand(USERS, DIM) / math.sqrt(DIM))
        self.item = nn.Parameter(torch.rand(ITEMS, DIM) / math.sqrt(DIM))
        self.bias = nn.Parameter(torch.zeros(()))


def trained(
    of: World, form: str, seed: int, steps: int, l2: float = 1e-4, l2_flip: float = 0.0, slow: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Scores and flip probabilities of all pairs, `[U, I]`, after training on positives and uniform negatives."""
    torch.manual_seed(seed)
    model, loss = Preference(), NBPO(("label",), SCHEMA, dim=DIM, form=form, l2=l2_flip)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    if form != "bpo":
        optimizer.add_param_group({"params": list(loss.parameters()), "lr": 0.02 * slow})
    start = [group["lr"] for group in optimizer.param_groups]
    random = torch.Generator().manual_seed(seed)  # of the batches, which are the same for all forms
    users, items = of.seen.nonzero(as_tuple=True)
    n, m = 1024, 4
    label = torch.cat([torch.ones(n), torch.zeros(n * m)])
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * (1 - step / steps)
        at = torch.randint(0, len(users), (n,), generator=random)
        user = torch.cat([users[at], users[at].repeat_interleave(m)])
        other = torch.randint(0, ITEMS, (n * m,), generator=random)
        for _ in range(20):  # uniform over what has not been seen
            again = of.seen[user[n:], other]
            other = torch.where(again, torch.randint(0, ITEMS, (n * m,), generator=random), other)
        item = torch.cat([items[at], other])
        batch = Batch(torch.stack([user, item], 1), label={"label": label}, negatives=m)
        x = (model.user[user] * model.item[item]).sum(1) + model.bias
        decay = 0.5 * l2 * (model.user.square().sum() + model.item.square().sum())
        optimizer.zero_grad()
        (loss({"label": x}, batch) + decay).backward()
        optimizer.step()
    with torch.no_grad():
        score = model.user @ model.item.T
        flip = torch.zeros_like(score) if form == "bpo" else (loss.flips[0] @ loss.flips[1].T).sigmoid()
    return score, flip


@dataclass(frozen=True)
class Result:
    """AUC against the truth, by form and seed, and Spearman's correlation of the flips that `nbpo` learned."""

    auc: dict[str, list[float]]
    flips: list[float]

    def gain(self, form: str) -> tuple[float, float]:
        """Mean gain over `bpo` and its standard error over the seeds; a seed is one world."""
        gaps = [a - b for a, b in zip(self.auc[form], self.auc["bpo"], strict=True)]
        return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def study(rate: float, seeds: int, steps: int, forms: tuple[str, ...] = ("bpo", "nbpo", "exact")) -> Result:
    """Train all forms on the same worlds and batches."""
    found: dict[str, list[float]] = {form: [] for form in forms}
    flips = []
    for seed in range(seeds):
        of = world(rate, seed)
        for form, values in found.items():
            score, flip = trained(of, form, seed, steps)
            values.append(auc(score, of.truth))
            if form == "nbpo" and rate:
                flips.append(spearman(flip, of.flip))
    return Result(found, flips)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    print("| flip rate | bpo | nbpo | exact | Spearman of φ |\n|---|---|---|---|---|")
    for rate in (0.0, 0.2, 0.4):
        result = study(rate, given.seeds, given.steps)
        cells = [f"{statistics.mean(result.auc['bpo']):.4f}"]
        cells += ["{:+.4f} ± {:.4f}".format(*result.gain(form)) for form in ("nbpo", "exact")]
        flips = f"{statistics.mean(result.flips):.2f}" if result.flips else ""
        print(f"| {rate} | {' | '.join(cells)} | {flips} |", flush=True)


if __name__ == "__main__":
    main()
