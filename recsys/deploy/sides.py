"""A model as two sides, where its logit is a dot product of them: what a row asks for, and what an item offers.

logit(u, i) = c(u) + ⟨p(u), q(i)⟩. Let x_U be what the model makes of everything but the item's fields. Where the logit
is linear in x_U as far as the item takes part in it, q(i) = [∂logit/∂x_U at x_U = 0, the logit there], p(u) = [x_U, 1];
c does not depend on the item, and changes no ranking. That holds for first-order weights, factorisation machines and
other sums of pairs, not for perceptrons. Interactions that are two sides by themselves (`abilities.Divided`), such as
two towers, add theirs to both. Nobody has to say that a model is a dot product: pairs of rows and items are scored both
ways, and compared.

Vectors are shortened to the directions in which items differ: for a factorisation machine, to its dimensions and one.
Rendle, "Factorization Machines", ICDM 2010, §V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys import abilities
from recsys.contracts import NULL_ID, Batch, EncodedSchema
from recsys.errors import ExportError, did_you_mean, listing
from recsys.nn.layout import Guard, Layout
from recsys.nn.model import Model

TOLERANCE = 1e-5
"""Largest difference of a logit, beside what rows have in common, per unit of the largest one."""
_NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue under which a direction is none."""
_CHUNK = 4096


@dataclass(frozen=True)
class Sides:
    """Vectors of items, and what makes those of rows.

    Args:
        items: `[I, W]` float32.
        user: rows to `[B, W]`, from the inputs of the graph.
        gap: largest difference between the model's logits and the products, over the pairs compared.
    """

    items: Tensor
    user: User
    gap: float


@dataclass(frozen=True)
class _Item:
    """Where an item's fields stand.

    Args:
        fields: places among the fields.
        histories: names of its sequences and multi-valued fields.
        columns: places of all of these among the columns of x.
        free: places of all other columns.
    """

    fields: tuple[int, ...]
    histories: tuple[str, ...]
    columns: tuple[int, ...]
    free: tuple[int, ...]

    @classmethod
    def of(cls, schema: EncodedSchema, item: Sequence[str]) -> _Item:
        names = [field.name for field in schema.fields]
        lists = [history.name for history in schema.histories]
        for name in item:
            if name not in names and name not in lists:
                known = [*names, *lists]
                raise ExportError(f"--items: no field {name!r}.{did_you_mean(name, known)} Fields: {listing(known)}")
        owners = [*names, *(history.name for history in schema.histories for _ in history.columns)]
        return cls(
            tuple(f for f, name in enumerate(names) if name in item),
            tuple(name for name in lists if name in item),
            tuple(c for c, owner in enumerate(owners) if owner in item),
            tuple(c for c, owner in enumerate(owners) if owner not in item),
        )


class User(nn.Module):
    """The vector of a row: `[x_U P, 1, p …]`, from the inputs of the graph; the row's own item has no say."""

    def __init__(self, model: Model, item: _Item, directions: Tensor) -> None:
        super().__init__()
        self.model = model
        self.item = item
        layout = Layout.of(model.schema)
        self.guard = Guard(layout.fields)
        self.guards = nn.ModuleList(Guard(columns) for columns in layout.histories.values())
        self.register_buffer("free", torch.tensor(item.free, dtype=torch.int64))
        shown = torch.ones(len(layout.fields), dtype=torch.int64)
        shown[list(item.fields)] = 0
        self.register_buffer("shown", shown)
        self.register_buffer("directions", directions)

    def forward(self, *inputs: Tensor) -> Tensor:
        """`[B, F], … -> [B, W]`."""
        schema, rest = self.model.schema, list(inputs[1:])
        values = rest.pop(0) if schema.has_numeric else None
        histories = {}
        for i, history in enumerate(schema.histories):
            events, length = rest[2 * i], rest[2 * i + 1]
            length = length.clamp(0, events.shape[1])
            if history.name in self.item.histories:  # the events stay an input of the graph, but none is looked at
                length = length * 0
            histories[history.name] = (self.guards[i](events), length)
        ids = self.guard(inputs[0]) * self.get_buffer("shown")  # NULL_ID where the item's are
        x = self.model.represent(ids, values, histories)  # [B, F', D]
        own = x.index_select(1, self.get_buffer("free")).flatten(1)  # [B, |U|·D]
        towers = [part.sides(x)[0] for part in _divided(self.model).values()]
        return torch.cat([own @ self.get_buffer("directions"), torch.ones_like(own[:, :1]), *towers], 1)


def two_sides(model: Model, item: Sequence[str], items: Batch, task: str) -> Sides:
    """Divide a model into two sides.

    Args:
        model: trained; it stays as it is.
        item: names of the item's fields; a sequence or a multi-valued field goes by its own name.
        items: encoded items; of their rows only the item's fields are read.
        task: whose logit.

    Raises:
        ExportError: a name is no field, or the logit is no dot product.
    """
    at = _Item.of(model.schema, item)
    if task not in model.schema.tasks:
        raise ExportError(f"--task: no task {task!r}. Tasks: {listing(model.schema.tasks)}")
    model = model.eval()
    slopes, constant, towers = _items(model, at, items, task)
    directions = _directions(slopes)
    user = User(model, at, directions.float()).eval()
    vectors = torch.cat([slopes @ directions, constant[:, None], towers], 1).float()
    gap, largest = _gap(model, user, at, vectors, items, random_rows(model.schema), task)
    if not gap <= TOLERANCE * max(largest, 1.0):
        raise ExportError(
            f"the logit of {task!r} is no dot product of {', '.join(item)} with the rest: its scores differ by "
            f"{gap:.3g} from one (up to {TOLERANCE * max(largest, 1.0):.1g} is rounding); it needs sums of pairs, "
            "or two towers, without a perceptron on both and without attention of the item to a history"
        )
    return Sides(vectors, user, gap)


def random_rows(schema: EncodedSchema, count: int = 128, seed: int = 1) -> Batch:
    """Return rows of random ids, numbers and lists, to compare with."""
    random = torch.Generator().manual_seed(seed)

    def ids(rows: Sequence[int], *shape: int) -> Tensor:
        return torch.stack([torch.randint(0, n, shape, generator=random) for n in rows], -1)

    values = torch.ones(count, len(schema.fields))
    numeric = [f for f, field in enumerate(schema.fields) if field.numeric]
    values[:, numeric] = torch.randn(count, len(numeric), generator=random)
    history = {
        h.name: (
            ids([column.rows for column in h.columns], count, h.max_length),
            torch.randint(0, h.max_length + 1, (count,), generator=random),
        )
        for h in schema.histories
    }
    return Batch(ids([field.rows for field in schema.fields], count), values if schema.has_numeric else None, history)


def _divided(model: Model) -> dict[int, abilities.Divided]:
    """The interactions that are two sides by themselves, by place; members of an ensemble are not asked."""
    if model.head.members > 1:
        return {}
    return {i: part for i, part in enumerate(model.interactions) if isinstance(part, abilities.Divided)}


def _items(model: Model, at: _Item, items: Batch, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """`(∂logit/∂x_U [I, |U|·D], logit at x_U = 0 [I], the item's sides of the towers [I, Σ W])` float64.

    The first two are of the logit without the towers.
    """
    slopes, constants, sides = [], [], []
    towers = _divided(model)
    for first in range(0, len(items), _CHUNK):
        ids, values, empty = _alone(model, at, items, slice(first, first + _CHUNK))
        with torch.no_grad():
            x = model.represent(ids, values, empty)
        zero = torch.zeros(len(ids), len(at.free), x.shape[2], requires_grad=True)
        whole = x.detach().index_copy(1, torch.tensor(at.free), zero)
        logit = model.decide(whole, ids, values, without=tuple(towers))[task]
        (slope,) = torch.autograd.grad(logit.sum(), zero, allow_unused=True, materialize_grads=True)
        slopes.append(slope.flatten(1).double())
        constants.append(logit.detach().double())
        with torch.no_grad():
            sides.append(torch.cat([x[:, 0, :0], *(part.sides(x)[1] for part in towers.values())], 1).double())
    return torch.cat(slopes), torch.cat(constants), torch.cat(sides)


def _alone(
    model: Model, at: _Item, items: Batch, part: slice
) -> tuple[Tensor, Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """Items with nothing else in their rows."""
    given, own = items.ids[part], list(at.fields)
    ids = torch.full_like(given, NULL_ID)
    ids[:, own] = given[:, own]
    values = None
    if items.values is not None:
        values = torch.ones_like(items.values[part])
        values[:, own] = items.values[part][:, own]
    histories = {}
    for h in model.schema.histories:
        events, length = torch.full((len(ids), 1, len(h.columns)), NULL_ID), torch.zeros(len(ids), dtype=torch.int64)
        if h.name in at.histories:
            events, length = (t[part] for t in items.history[h.name])
        histories[h.name] = (events, length)
    return ids, values, histories


def _directions(slopes: Tensor) -> Tensor:
    """An orthonormal basis of what the slopes span, `[I, N] -> [N, W - 1]`."""
    found, vectors = torch.linalg.eigh(slopes.T @ slopes)
    kept = found > _NEGLIGIBLE * found.max().clamp_min(1e-300)
    basis: Tensor = vectors[:, kept]
    return basis


@torch.no_grad()
def _gap(
    model: Model, user: User, at: _Item, vectors: Tensor, items: Batch, rows: Batch, task: str
) -> tuple[float, float]:
    """`(largest difference, largest logit)` over rows and items, less what each row adds to all items."""
    some = torch.linspace(0, len(items) - 1, min(len(items), 64)).long()
    history = dict(rows.history)
    inputs = [
        rows.ids,
        *([] if rows.values is None else [rows.values]),
        *(t for pair in history.values() for t in pair),
    ]
    products = user(*inputs) @ vectors[some].T  # [B, some]
    logits = []
    own = list(at.fields)
    for i in some.tolist():
        ids = rows.ids.clone()
        ids[:, own] = items.ids[i, own]
        values = rows.values
        if values is not None and items.values is not None:
            values = values.clone()
            values[:, own] = items.values[i, own]
        for name in at.histories:
            events, length = items.history[name]
            history[name] = (events[i].expand(len(rows), -1, -1), length[i].expand(len(rows)))
        logits.append(model.logits(ids, values, history)[task])
    scored = torch.stack(logits, 1)
    difference = scored - products
    spread = difference - difference.mean(1, keepdim=True)
    return float(spread.abs().max()), float(scored.abs().max())
