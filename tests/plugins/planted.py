"""Fields that matter and fields that do not, narrow and wide, dense and 99 % default; LeAP's gates on them by hand.

    python tests/plugins/planted.py [--seeds 3] [--steps 1000] [--strength 0.2]

prints, for the divergence-weighted gates and for their uniform variant, how well gates rank informative fields above
noise. Nothing asserts the difference between the two.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.api import Fields
from recsys_leap import LeAP

DEFAULT = 0.99
"""Share of the rows in which a sparse field is at its default."""


@dataclass(frozen=True)
class Kind:
    """What a field is like."""

    width: int
    sparse: bool
    informative: bool

    def __str__(self) -> str:
        return f"{'sparse' if self.sparse else 'dense'} {self.width} {'signal' if self.informative else 'noise'}"


@dataclass(frozen=True)
class Planted:
    """Rows of vectors `x [N, F, D]`, zeros beyond a field's width, and labels `y [N]`."""

    kinds: tuple[Kind, ...]
    x: Tensor
    y: Tensor

    def fields(self) -> Fields:
        names = tuple(f"f{i}" for i in range(len(self.kinds)))
        return Fields(names, (2,) * len(names), self.x.shape[2])

    def where(self, **wanted: object) -> list[int]:
        """The fields of some kind."""
        return [i for i, k in enumerate(self.kinds) if all(getattr(k, name) == v for name, v in wanted.items())]


def planted(seed: int, rows: int = 30_000, widths: tuple[int, ...] = (1, 8, 32), signal: int = 2, noise: int = 3):
    """Every width, dense and sparse, with some informative fields and more noise."""
    g = torch.Generator().manual_seed(seed)
    kinds = tuple(
        Kind(width, sparse, i < signal) for width in widths for sparse in (False, True) for i in range(signal + noise)
    )
    x = torch.zeros(rows, len(kinds), max(widths))
    logit = torch.zeros(rows)
    for f, kind in enumerate(kinds):
        value = torch.randn(rows, kind.width, generator=g)
        if kind.sparse:
            value *= torch.rand(rows, 1, generator=g) >= DEFAULT
        x[:, f, : kind.width] = value
        direction = torch.randn(kind.width, generator=g)
        if kind.informative:
            logit += (4.0 if kind.sparse else 0.7) * (value @ (direction / direction.norm())).clamp(-3, 3)
    y = (torch.rand(rows, generator=g) < logit.sigmoid()).float()
    return Planted(kinds, x, y)


def search(data: Planted, seed: int, steps: int, rate: float = 1e-2, batch: int = 512, **options) -> LeAP:
    """Weights on one half of the rows and gates on the other, in turn, as `bilevel_fit` does."""
    torch.manual_seed(seed)
    gates = LeAP(data.fields(), **options)
    live = (data.x[:1000] != 0).any(0).flatten().nonzero().flatten()
    net = nn.Sequential(nn.Linear(len(live), 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    half = len(data.y) // 2

    def loss(low: int) -> Tensor:
        rows = low + torch.randint(0, half, (batch,))
        seen = gates(data.x[rows], rows).flatten(1)[:, live]
        return nn.functional.binary_cross_entropy_with_logits(net(seen).squeeze(1), data.y[rows]) + gates.penalty()

    for step in range(steps):
        gates.anneal(step / steps)
        adam.zero_grad()
        loss(0).backward()
        adam.step()
        kept = {name: b.clone() for name, b in gates.named_buffers()}
        (gates.theta.grad,) = torch.autograd.grad(loss(half), gates.theta)
        for name, b in gates.named_buffers():
            b.copy_(kept[name])
        gates.search_step(rate)
    return gates.eval()


def rank_auc(score: Tensor, signal: list[int], noise: list[int]) -> float:
    """How often an informative field is above a useless one; ties count half."""
    above = score[signal].unsqueeze(1) - score[noise].unsqueeze(0)
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


def figures(data: Planted, gates: LeAP) -> dict[str, float]:
    """What the gates say of the planted fields."""
    score = torch.stack(list(gates.scores().values()))
    g = gates.gates().detach().flatten()
    wide = max(k.width for k in data.kinds)
    groups = data.where(informative=True), data.where(informative=False)
    told = {"rank AUC": rank_auc(score, *groups), "rank AUC of the gates": rank_auc(g, *groups)}
    sparse = data.where(sparse=True, informative=True), data.where(sparse=True, informative=False)
    told["rank AUC, sparse"] = rank_auc(score, *sparse)
    right = (g > 0.5) == torch.tensor([k.informative for k in data.kinds])
    told["right at g > ½"] = float(right.double().mean())
    for width in sorted({k.width for k in data.kinds}):
        signal = data.where(width=width, sparse=True, informative=True)
        told[f"sparse {width}-wide signal kept"] = float((g[signal] > 0.5).double().mean())
    told["largest g of wide noise"] = float(g[data.where(width=wide, informative=False)].max())
    return told | {"polarisation": float(gates.polarisation())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--strength", type=float, default=0.2)
    parser.add_argument("--rows", type=int, default=30_000)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"l2": [], "uniform": []}
    for seed in range(given.seeds):
        data = planted(seed, given.rows)
        for weigh, rows in found.items():
            rows.append(figures(data, search(data, seed, given.steps, weigh=weigh, strength=given.strength)))
            print(seed, weigh, *(f"{name} {value:.3f}" for name, value in rows[-1].items()), sep="  ", flush=True)
    for name in found["l2"][0]:
        means = {weigh: statistics.mean(r[name] for r in rows) for weigh, rows in found.items()}
        print(f"{name:32s}", *(f"{weigh} {mean:.3f}" for weigh, mean in means.items()), sep="  ")


if __name__ == "__main__":
    main()
