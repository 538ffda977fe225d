"""A small model over rows in memory, for tests of what ranks its fields; and rows with planted noise."""

from __future__ import annotations

import io
import types
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from recsys.contracts import Batch, EncodedSchema, Field, History
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.nn.table import Table
from recsys.plugin.registry import load_registry
from recsys.train.distributed import World
from recsys.train.options import TrainOptions
from recsys.train.run import derive_seed

REGISTRY = load_registry()
DIM = 4
SCHEMA = EncodedSchema(
    fields=(
        Field("user", 12),
        Field("price", 2, numeric=True),
        Field("always", 6),
        Field("item", 9),
        Field("zero", 2, numeric=True),
    ),
    histories=(
        History("past", (Field("item", 9, shares="item"), Field("shop", 5)), 4, ("item", "user")),
        History("tags", (Field("tag", 7),), 3),
    ),
    tasks=("click", "buy"),
    context=("group", "weight"),
)
NAMES = tuple(f.name for f in SCHEMA.fields)
PLAIN = EncodedSchema((Field("a", 9), Field("b", 5), Field("c", 30)))


class Dot(nn.Module):
    """Weights events by their product with the target: a target field that is lost is lost here too."""

    def forward(self, target, history, length):
        valid = torch.arange(history.shape[1]) < length.unsqueeze(1)
        return (valid.unsqueeze(-1) * history * (history @ target.unsqueeze(-1))).sum(1)


def make_model(schema=SCHEMA, seed=0, members=1, wide=True):
    """In float64, with all weights far from zero."""
    torch.manual_seed(seed)
    table = Table(schema, dim=DIM, init_std=0.7)
    fields = Model.consumer_fields(schema, table, members)
    parts = [part for _ in range(members) for part in (FM(fields), MLP(fields, hidden=(6,), dropout=0.5))]
    head = Head(schema, parts, wide=wide, members=members)
    for p in head.parameters():
        nn.init.normal_(p)
    sequences = {h.name: Dot() for h in schema.histories if h.target}
    return Model(schema, table, KeepAll(table.fields), sequences, parts, head).double()


def make_rows(rows, schema=SCHEMA, seed=0):
    """Numbers are missing in some rows; `always` and `zero` never change."""
    g = torch.Generator().manual_seed(seed)

    def ints(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    ids = torch.stack([ints(f.rows, rows) for f in schema.fields], 1)
    values = torch.ones(rows, len(schema.fields), dtype=torch.float64)
    for f, field in enumerate(schema.fields):
        if field.numeric:
            values[:, f] = torch.where(ids[:, f] == 1, torch.randn(rows, generator=g).double(), 1.0)
        if field.name == "always":
            ids[:, f] = 3
        if field.name == "zero":
            ids[:, f], values[:, f] = 1, 0.25
    history = {
        h.name: (torch.stack([ints(c.rows, rows, h.max_length) for c in h.columns], 2), ints(h.max_length + 1, rows))
        for h in schema.histories
    }
    label = {task: ints(2, rows).double() for task in schema.tasks}
    context = {"group": ints(3, rows), "weight": 0.5 + torch.rand(rows, generator=g).double()}
    known = {name: context[name] for name in schema.context}
    return Batch(ids, values if schema.has_numeric else None, history, label, known)


def taken(batch: Batch, rows) -> Batch:
    """Some rows, in this order."""
    rows = torch.as_tensor(rows)
    return Batch(
        batch.ids[rows],
        None if batch.values is None else batch.values[rows],
        {name: (i[rows], n[rows]) for name, (i, n) in batch.history.items()},
        {task: y[rows] for task, y in batch.label.items()},
        {name: column[rows] for name, column in batch.context.items()},
    )


@dataclass(frozen=True)
class InMemory:
    """What a ranking asks of encoded rows."""

    batch: Batch
    schema: EncodedSchema

    def __len__(self) -> int:
        return len(self.batch)

    def gather(self, rows):
        return taken(self.batch, np.asarray(rows))

    def read(self, low, high):
        return taken(self.batch, torch.arange(low, high))


class Exact(nn.Module):
    """Binary cross-entropy in float64, row weights honoured."""

    def __init__(self, tasks):
        super().__init__()
        self.tasks = tasks

    def forward(self, logits, batch):
        weight = batch.context.get("weight")
        each = [
            nn.functional.binary_cross_entropy_with_logits(logits[task], batch.label[task], weight)
            for task in self.tasks
        ]
        return torch.stack(each).mean()


def make_run(batch: Batch, schema=SCHEMA, model=None, seed=0, loss=Exact, **train):
    """A run whose validation split is the batch, as far as a ranking looks."""
    log = io.StringIO()
    options = TrainOptions(**({"batch_size": 8, "eval_batch_size": 7, "accelerator": "cpu"} | train))
    run = types.SimpleNamespace(
        stage="2-rank_fields",
        schema=schema,
        model=model or make_model(schema),
        loss=loss(schema.tasks),
        train=options,
        world=World(),
        device=torch.device("cpu"),
        console=Console(file=log, width=300),
        log=log,
        split=lambda name: {"valid": InMemory(batch, schema)}[name],
        seed=lambda *purpose: derive_seed(seed, *purpose),
        measuring=lambda spec: REGISTRY.build("metric", spec, where="metric"),
    )
    run.say = lambda text: run.console.print(text)
    return run


INFORMATIVE = ("city", "brand", "hour", "age", "pair_a", "pair_b")
NOISE = ("copy_city", "copy_brand", "random_user", "random_few", "random_number", "flag_a", "flag_b", "flag_c")


def planted(rows: int, seed: int) -> pl.DataFrame:
    """Labels that six columns decide, two of them only together, beside useless ones of many kinds.

    Useless: informative columns in another order of rows, random ids of many and of few values, a random number, and
    flags that are set in one row of a hundred.
    """
    rng = np.random.default_rng(seed)
    sizes = {"city": 40, "brand": 15, "hour": 24, "pair_a": 6, "pair_b": 6}
    columns = {name: rng.integers(0, size, rows) for name, size in sizes.items()}
    logit = sum(rng.normal(0, 0.7, size)[columns[name]] for name, size in sizes.items() if size > 6)
    logit += rng.normal(0, 1.5, (6, 6))[columns["pair_a"], columns["pair_b"]]
    columns["age"] = rng.normal(0, 1, rows)
    logit += 0.6 * columns["age"]
    for name in ("city", "brand"):
        columns[f"copy_{name}"] = rng.permutation(columns[name])
    columns["random_user"] = rng.integers(0, 400, rows)
    columns["random_few"] = rng.integers(0, 4, rows)
    columns["random_number"] = rng.normal(0, 1, rows)
    for name in ("flag_a", "flag_b", "flag_c"):
        columns[name] = (rng.random(rows) < 0.01).astype(int)
    columns["y"] = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    return pl.DataFrame(columns)


def above(scores: dict[str, float]) -> float:
    """How often an informative column is above a useless one; ties count half."""
    pairs = [(scores[s], scores[n]) for s in INFORMATIVE for n in NOISE]
    return sum((s > n) + 0.5 * (s == n) for s, n in pairs) / len(pairs)


def logits_of(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Of the whole model, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(batch)
