"""Medians of the layers' training steps beside the textbook way of writing them: CPU time, or wall time on a GPU.

    python tests/benchmarks/layers.py [--rows 4096] [--repeats 7] [--device cpu]

Nothing here asserts a time; figures depend on the machine, ratios much less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Field, Fields, Selection
from recsys.nn.interaction import CrossNet
from recsys.nn.table import Table
from recsys.train.memory import keep_freed_memory
from recsys_autoint import AutoInt


class TextbookAutoInt(nn.Module):
    """One linear layer per head and projection, scores and softmax spelled out."""

    def __init__(self, dim: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList()
        for before in [dim, *[width] * (layers - 1)]:
            head = [nn.Linear(before, width // heads, bias=False) for _ in range(3 * heads)]
            self.projections.append(nn.ModuleList([*head, nn.Linear(before, width, bias=False)]))

    def forward(self, e: Tensor) -> Tensor:
        for layer in self.projections:
            outputs = []
            for h in range(self.heads):
                q, k, v = (layer[3 * h + i](e) for i in range(3))
                outputs.append(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
            e = torch.relu(torch.cat(outputs, -1) + layer[-1](e))
        return e.flatten(1)


class TextbookCross(nn.Module):
    """DCNv2's full matrices, one operation after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, e: Tensor) -> Tensor:
        x0 = x = e.flatten(1)
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class TextbookTable(nn.Module):
    """One embedding per field, stacked."""

    def __init__(self, schema: EncodedSchema, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(f.rows, dim) for f in schema.fields)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)


def median(step: Callable[[], object], repeats: int, device: str) -> float:
    """Milliseconds, after two rounds to warm up; on a CPU of processor time, which other programs disturb less."""
    times = []
    clock = time.process_time if device == "cpu" else time.perf_counter
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * (clock() - start))
    return statistics.median(times)


def dense_step(module: nn.Module, e: Tensor) -> Callable[[], object]:
    """Forward and backward, gradients of the input too."""

    def step() -> None:
        module.zero_grad()
        module(e.detach().requires_grad_()).sum().backward()

    return step


def lookup_step(table: nn.Module, ids: Tensor) -> Callable[[], object]:
    """Forward and backward into the table, whose gradient is made anew in every step."""
    above = torch.randn(*ids.shape, 16, device=ids.device)

    def step() -> None:
        table.zero_grad()
        table(ids).backward(above)

    return step


def forward_only(table: nn.Module, ids: Tensor) -> Callable[[], object]:
    """Look up without a gradient, as an evaluation does."""

    def step() -> None:
        with torch.no_grad():
            table(ids)

    return step


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device, rows = args.device, args.rows
    keep_freed_memory()  # as `recsys train` does, for both sides

    def report(name: str, ours: float, theirs: float) -> None:
        print(f"{name:<52} {ours:8.1f} ms   textbook {theirs:8.1f} ms   ratio {theirs / ours:5.2f}")

    def compare(
        name: str, make: Callable[..., Callable[[], object]], ours: nn.Module, other: nn.Module, x: Tensor
    ) -> None:
        report(
            name,
            median(make(ours.to(device), x), args.repeats, device),
            median(make(other.to(device), x), args.repeats, device),
        )

    print(f"rows {rows}, threads {torch.get_num_threads()}, device {device}, median of {args.repeats}")
    for fields, dim, width, heads, layers in ((10, 10, 128, 4, 5), (39, 16, 64, 2, 3)):
        seen = Fields(tuple(f"f{i}" for i in range(fields)), (10,) * fields, dim)
        # As small as embeddings are: attention on large ones saturates, and denormal numbers are slow.
        e = 0.1 * torch.randn(rows, fields, dim, device=device)
        ours = AutoInt(seen, layers=layers, heads=heads, width=width)
        name = f"autoint {fields} fields, {layers} layers, {heads} heads, width {width}"
        compare(name, dense_step, ours, TextbookAutoInt(dim, width, heads, layers), e)
        cross = CrossNet(seen, layers=3)
        compare(f"cross {fields} fields x {dim}, 3 layers", dense_step, cross, TextbookCross(fields * dim, 3), e)

    for size in (128, 2_560, 25_600):
        schema = EncodedSchema(tuple(Field(f"f{i}", size) for i in range(39)))
        ids = torch.randint(0, size, (rows, 39), device=device)
        table, textbook = Table(schema, dim=16), TextbookTable(schema, 16)
        compare(f"table 39 fields x {size:,} rows x 16, forward", forward_only, table, textbook, ids)
        compare(f"table 39 fields x {size:,} rows x 16, both ways", lookup_step, table, textbook, ids)
    names = table.fields.names
    keep = {n: torch.rand(size) < 0.5 for n in names}
    dims = {n: torch.arange(16) < 4 + i % 12 for i, n in enumerate(names)}
    compare("half of the rows pruned", lookup_step, table.cpu().prune(Selection(names, keep)), textbook, ids)
    compare("dimensions pruned too", lookup_step, table.cpu().prune(Selection(names, keep, dims)), textbook, ids)


if __name__ == "__main__":
    main()
