"""Selectors with gates on planted fields, trained by hand as a fit stage or `bilevel_fit` would.

    python tests/plugins/gates.py [--seeds 3] [--steps 600] [--rows 80000] [SELECTOR …]

prints how well the scores of each rank informative fields above noise.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch
from planted import Planted, planted, rank_auc
from torch import Tensor, nn

from recsys.abilities import Searched, Stepped
from recsys.api import Fields
from recsys.plugin.registry import load_registry

DIM = 8
SHORT = {
    "autofield": ({"cooling": 1e-3}, 1e-2),
    "adafs": ({}, 1e-2),
    "mvfs": ({"level": 1 / 16, "sharpness": 50.0}, None),
    "lpfs": ({"rate": 1e-2}, None),
    "group_lasso": ({"strength": 3e-3}, None),
}
"""Options for sixteen fields and some hundred steps, and the step size of what is searched on validation rows."""


class Net(nn.Module):
    """Vectors of D dimensions, learned from what a field is like, through a selector into a perceptron."""

    def __init__(self, data: Planted, selector: nn.Module, hidden: tuple[int, int] = (64, 32)) -> None:
        super().__init__()
        _, count, width = data.x.shape
        self.vectors = nn.Parameter(0.3 * torch.randn(count, width, DIM))
        self.selector = selector
        sizes = (count * DIM, *hidden)
        steps = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*steps, nn.Linear(hidden[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        e = torch.einsum("bfw,fwd->bfd", x, self.vectors)
        return self.layers(self.selector(e, torch.zeros(e.shape[:2], dtype=torch.int64)).flatten(1)).squeeze(1)


def search(name, data: Planted, seed: int, steps: int, batch: int = 128, lr: float = 2e-3, arch=None, **options):
    """Weights on one half of the rows, and what is searched on the other half, in turn; returns the selector."""
    torch.manual_seed(seed)
    fields = Fields(data.fields().names, data.fields().rows, DIM)
    made = load_registry().get("selector", name).component.factory(fields, **options)
    net = Net(data, made).train()
    own = [*(made.architecture() if isinstance(made, Searched) else ())]
    apart = {id(p) for p in (*own, *(made.own_parameters() if isinstance(made, Stepped) else ()))}
    adam = torch.optim.Adam([p for p in net.parameters() if id(p) not in apart], lr=lr)
    half = len(data.y) // 2

    def loss(low: int) -> Tensor:
        rows = low + torch.randint(0, half, (batch,))
        return nn.functional.binary_cross_entropy_with_logits(net(data.x[rows]), data.y[rows]) + made.penalty()

    for step in range(steps):
        made.anneal(step / steps)
        net.zero_grad()
        loss(0).backward()
        for p in own:
            p.grad = None
        adam.step()
        if isinstance(made, Stepped):
            made.after_step()
        if own:
            kept = {key: b.clone() for key, b in made.named_buffers()}
            found = torch.autograd.grad(loss(half), own, allow_unused=True)
            for key, b in made.named_buffers():
                b.copy_(kept[key])
            for p, gradient in zip(own, found, strict=True):
                p.grad = gradient
            made.search_step(arch)
    return made.eval()


def data_of(seed: int, rows: int = 80_000) -> Planted:
    """Sixteen fields, half of them noise; a search of 600 steps sees no row more than twice."""
    return planted(seed, rows=rows, widths=(1, 8), noise=2)


def found(name, data: Planted, seed: int, steps: int = 600, **changes) -> tuple[float, nn.Module]:
    """How well the scores rank, with the options of `SHORT` and these changes; and the selector."""
    options, arch = SHORT[name]
    made = search(name, data, seed, steps, **({"arch": arch} | options | changes))
    score = torch.stack(list(made.scores().values()))
    return rank_auc(score, data.where(informative=True), data.where(informative=False)), made


def mean_of(name, seeds=(0, 1, 2), **changes) -> float:
    """The mean over some seeds."""
    return statistics.mean(found(name, data_of(seed), seed, **changes)[0] for seed in seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHORT))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=80_000, help="with few, joint training learns them by heart")
    given = parser.parse_args()
    for name in given.names:
        scores = [found(name, data_of(seed, given.rows), seed, given.steps)[0] for seed in range(given.seeds)]
        print(f"{name:12s} mean {statistics.mean(scores):.3f} ", *(f"{s:.3f}" for s in scores), flush=True)


if __name__ == "__main__":
    main()
