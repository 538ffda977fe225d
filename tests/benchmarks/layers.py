"""Medians of the layers' training steps beside the textbook way of writing them: CPU time, or wall time on a GPU.

    python tests/benchmarks/layers.py [--rows 4096] [--repeats 7] [--device cpu]

Nothing here asserts a time; figures depend on the machine, ratios much less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Field, Fields, Selection
from recsys.nn.entmax import entmax
from recsys.nn.interaction import CrossNet
from recsys.nn.table import Table
from recsys.train.memory import keep_freed_memory
from recsys_armnet import ExponentialNeurons
from recsys_autoint import AutoInt, InteractingLayer, Variant
from recsys_din import DIN


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


class Products(nn.Module):
    """The matrix products of one AutoInt layer's projections, and nothing else, as one product."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 4 * width, bias=False)

    def forward(self, e: Tensor) -> Tensor:
        return self.linear(e)


class AllProducts(nn.Module):
    """All matrix products of one AutoInt layer, those of its attention too, without anything between them."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(0.1 * torch.randn(3 * heads, dim, width // heads))
        self.residual = nn.Linear(dim, width, bias=False)

    def forward(self, e: Tensor) -> Tensor:
        flat = e.flatten(0, 1)
        q, k, v = torch.bmm(flat.expand(len(self.inner), -1, -1), self.inner).view(
            3, -1, e.shape[1], self.inner.shape[2]
        )
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
        return torch.cat([mixed.flatten(), self.residual(flat).flatten()])


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


class TextbookEntmax(nn.Module):
    """Fields last; α = 1.5 and 2 by sorting under autograd, others by 50 halvings and one step that autograd sees."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, scores: Tensor) -> Tensor:
        alpha, count = self.alpha, scores.shape[-1]
        x = (scores - scores.max(-1, keepdim=True).values) * (alpha - 1)
        if alpha in (1.5, 2.0):
            u = x.sort(-1, descending=True).values
            size = torch.arange(1, count + 1, dtype=x.dtype, device=x.device)
            mean = u.cumsum(-1) / size
            spread = (u**2).cumsum(-1) / size - mean**2
            tau = mean - 1 / size if alpha == 2 else mean - (1 / size - spread).clamp(min=1e-12).sqrt()
            tau = tau.gather(-1, (tau < u).sum(-1, keepdim=True) - 1)
            return (x - tau).clamp(min=0) ** (1 / (alpha - 1))
        r = 1 / (alpha - 1)
        with torch.no_grad():
            low, width = torch.full_like(x[..., :1], -1.0), 1.0
            for _ in range(50):
                width /= 2
                total = ((x - low - width).clamp(min=0) ** r).sum(-1, keepdim=True)
                low = torch.where(total >= 1, low + width, low)
            slope = (r * (x - low).clamp(min=0) ** (r - 1)).sum(-1, keepdim=True)
        tau = low + (((x - low).clamp(min=0) ** r).sum(-1, keepdim=True) - 1) / slope
        return (x - tau).clamp(min=0) ** r


class FieldsFirst(nn.Module):
    """Our entmax over the fields, where ARM-Net has them."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, scores: Tensor) -> Tensor:
        return entmax(scores, self.alpha, dim=1)


class TextbookNeurons(nn.Module):
    """ARM-Net's exponential neurons, keys, gates `[B, K, o, F]` and products spelled out."""

    def __init__(self, fields: int, dim: int, heads: int, neurons: int, alpha: float) -> None:
        super().__init__()
        self.attention = nn.Parameter(0.3 * torch.randn(heads, dim, dim))
        self.query = nn.Parameter(0.3 * torch.randn(heads, neurons, dim))
        self.value = nn.Parameter(torch.randn(heads, neurons, fields))
        self.entmax = TextbookEntmax(alpha)

    def forward(self, e: Tensor) -> Tensor:
        keys = torch.einsum("bfe,ked->bkfd", e, self.attention)
        gates = self.entmax(torch.einsum("kod,bkfd->bkof", self.query, keys))
        return torch.einsum("bkof,bfe->bkoe", gates * self.value, e).exp()


class TextbookDice(nn.Module):
    """Batch norm over all positions, and the rectifier as the paper writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, s: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(s.flatten(0, 1)).view_as(s))
        return p * s + (1 - p) * self.alpha * s


class TextbookDIN(nn.Module):
    """The input of the first layer written out for every position, padding included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(4 * width, 80), TextbookDice(80), nn.Linear(80, 40), TextbookDice(40), nn.Linear(40, 1)
        )

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        q = target.unsqueeze(1).expand_as(history)
        weight = self.network(torch.cat([q, history, q - history, q * history], -1))
        valid = torch.arange(history.shape[1], device=history.device) < length.unsqueeze(1)
        return (weight * valid.unsqueeze(-1) * history).sum(1)


class TextbookTable(nn.Module):
    """One embedding per field, stacked."""

    def __init__(self, schema: EncodedSchema, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(f.rows, dim) for f in schema.fields)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)


def medians(steps: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Milliseconds of each, taken in turn after two rounds to warm up; on a CPU of processor time.

    Other programs disturb that less than wall time, and taken in turn all steps suffer alike.
    """
    times: list[list[float]] = [[] for _ in steps]
    clock = time.process_time if device == "cpu" else time.perf_counter
    for i in range(repeats + 2):
        for step, found in zip(steps, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                found.append(1000 * (clock() - start))
    return [statistics.median(found) for found in times]


def dense_step(module: nn.Module, e: Tensor) -> Callable[[], object]:
    """Forward and backward, gradients of the input too."""

    def step() -> None:
        module.zero_grad()
        module(e.detach().requires_grad_()).sum().backward()

    return step


def given_step(module: nn.Module, e: Tensor) -> Callable[[], object]:
    """Forward and backward, gradients of the input too, from a gradient that is there."""
    with torch.no_grad():
        above = torch.randn_like(module(e))

    def step() -> None:
        module.zero_grad()
        module(e.detach().requires_grad_()).backward(above)

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


def sequence_step(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """Forward and backward of a sequence encoder, gradients of target and history too."""
    target, history, length = inputs

    def step() -> None:
        module.zero_grad()
        module(target.detach().requires_grad_(), history.detach().requires_grad_(), length).sum().backward()

    return step


def din(rows: int, device: str, compare: Callable[..., None]) -> None:
    """Compare DIN's unit on histories of up to 50 events, of different mean lengths."""
    for width in (16, 32, 64):
        target, history = (
            0.1 * torch.randn(rows, width, device=device),
            0.1 * torch.randn(rows, 50, width, device=device),
        )
        for mean in (5, 10, 20, 50):
            length = torch.full((rows,), 50.0) if mean == 50 else torch.empty(rows).exponential_(1 / mean).clamp(0, 50)
            name = f"din, W {width}, {float(length.long().float().mean()):.1f} of 50 events, {rows} rows"
            inputs = (target, history, length.long().to(device))
            compare(name, sequence_step, DIN(width), TextbookDIN(width), inputs)


def armnet(rows: int, device: str, compare: Callable[..., None]) -> None:
    """Compare α-entmax alone, and in the neurons, for the shapes of Frappe and Criteo."""
    for fields, count in ((10, 256), (39, 64)):
        for alpha in (1.5, 1.7, 2.0, 2.5):
            # The textbook has the fields last: it sorts and adds up along them there.
            scores = torch.randn(rows // 4, fields, count, device=device)
            name = f"entmax {alpha}, {fields} fields, {count} neurons, {rows // 4} rows"
            ours, textbook = FieldsFirst(alpha), TextbookEntmax(alpha)
            compare(name, dense_step, ours, textbook, scores, scores.transpose(1, 2).contiguous())
    for alpha in (1.5, 2.0):
        e = torch.randn(rows // 4, 10, 10, device=device)
        neurons = ExponentialNeurons(10, 10, 8, 32, alpha, scale=False, limit=None)
        name = f"exponential neurons, α {alpha}, 10 fields, 8 heads of 32, {rows // 4} rows"
        compare(name, dense_step, neurons, TextbookNeurons(10, 10, 8, 32, alpha), e)


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
        name: str,
        make: Callable[..., Callable[[], object]],
        ours: nn.Module,
        other: nn.Module,
        x: Tensor,
        other_x: Tensor | None = None,
    ) -> None:
        steps = make(ours.to(device), x), make(other.to(device), x if other_x is None else other_x)
        report(name, *medians(steps, args.repeats, device))

    print(f"rows {rows}, threads {torch.get_num_threads()}, device {device}, median of {args.repeats}")
    for fields, dim, width, heads, layers in ((10, 10, 128, 4, 5), (39, 16, 64, 2, 3)):
        seen = Fields(tuple(f"f{i}" for i in range(fields)), (10,) * fields, dim)
        # As small as embeddings are: attention on large ones saturates, and denormal numbers are slow.
        e = 0.1 * torch.randn(rows, fields, dim, device=device)
        ours = AutoInt(seen, layers=layers, heads=heads, width=width)
        name = f"autoint {fields} fields, {layers} layers, {heads} heads, width {width}"
        compare(name, dense_step, ours, TextbookAutoInt(dim, width, heads, layers), e)
        # One layer as all but the first are, less the same products for both.
        e_inside = 0.1 * torch.randn(rows, fields, width, device=device)
        modules = (
            InteractingLayer(width, width, heads, Variant()),
            TextbookAutoInt(width, width, heads, 1),
            Products(width, width),
            AllProducts(width, width, heads),
        )
        steps = [given_step(m.to(device), e_inside) for m in modules]
        one, other, products, bound = medians(steps, args.repeats, device)
        report(f"one layer, {fields} fields, {heads} heads, width {width}", one, other)
        report(f"  beyond its projections' products, {products:.1f} ms", one - products, other - products)
        report("  all its products and nothing else", bound, other)
        cross = CrossNet(seen, layers=3)
        compare(f"cross {fields} fields x {dim}, 3 layers", dense_step, cross, TextbookCross(fields * dim, 3), e)

    armnet(rows, device, compare)
    din(rows // 4, device, compare)

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
