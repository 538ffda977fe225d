"""What a search with LeAP costs at a fixed total width, whatever the number of fields, beside a permutation test.

    OMP_NUM_THREADS=1 python tests/benchmarks/leap.py [--rows 2048] [--repeats 11] [--width 1024]

A step is the forward and backward pass of the gates and a perceptron of 400 and 400 on given vectors; looking these up
is not part of it. The search takes two such steps for a batch, one for the weights and one for the gates. The
permutation test takes `5 · F` forward passes of the perceptron over validation rows, an eighth as many as the training
rows, after an ordinary training. Nothing here asserts a time; figures depend on the machine, ratios much less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from recsys.contracts import Fields
from recsys.nn.mlp import MLPBlock
from recsys.train.memory import keep_freed_memory
from recsys_leap import LeAP

PASSES = 5
VALID = 1 / 8


def median(step: Callable[[], object], repeats: int) -> float:
    """Milliseconds of processor time, after two rounds to warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.process_time()
        step()
        if i >= 2:
            times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def steps(fields: int, width: int, rows: int) -> tuple[Callable[[], object], ...]:
    """The step of LeAP's gates alone, the plain step, the step with gates, and a forward pass."""
    dim = width // fields
    gates = LeAP(Fields(tuple(f"f{i}" for i in range(fields)), (2,) * fields, dim)).train()
    network = nn.Sequential(MLPBlock(width, (400, 400)), nn.Linear(400, 1))
    e, ids, above = torch.randn(rows, fields, dim), torch.zeros(rows, fields).long(), torch.randn(rows, fields, dim)

    def alone() -> None:
        gates.zero_grad()
        out = gates(e.detach().requires_grad_(), ids)
        torch.autograd.backward([out, gates.penalty()], [above, torch.ones(())])

    def plain() -> None:
        network.zero_grad()
        network(e.detach().requires_grad_().flatten(1)).mean().backward()

    def gated() -> None:
        network.zero_grad()
        gates.zero_grad()
        (network(gates(e.detach().requires_grad_(), ids).flatten(1)).mean() + gates.penalty()).backward()

    def forward() -> None:
        with torch.no_grad():
            network(e.flatten(1))

    return alone, plain, gated, forward


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()
    keep_freed_memory()
    print(f"rows {args.rows}, total width {args.width}, threads {torch.get_num_threads()}, median of {args.repeats}")
    first: tuple[float, ...] | None = None
    for fields in (16, 64, 256, 1024):
        found = tuple(median(step, args.repeats) for step in steps(fields, args.width, args.rows))
        first = first or found
        alone, plain, gated, forward = found
        search, test = 2 * gated - plain, VALID * PASSES * fields * forward
        print(
            f"{fields:5} fields: gates alone {alone:6.1f} ms ({alone / first[0]:.2f} times the first), plain step "
            f"{plain:6.1f} ms, with gates {gated:6.1f} ms ({gated / first[2]:.2f}); the search adds {search:6.1f} ms a "
            f"batch and epoch, {PASSES} permutations take as much as {test / search:6.1f} epochs of it"
        )


if __name__ == "__main__":
    main()
