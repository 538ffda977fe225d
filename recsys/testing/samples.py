"""Small inputs for tests of components: the same values at every call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recsys.contracts import FIRST_ID, NUMERIC_VALUE_ID, Batch, EncodedSchema, Field, Fields, History
from recsys.data.schema import CONTEXT

DIM = 8
"""D of `fields`."""
LENGTH = 5
"""L of the histories."""


def generator(seed: int) -> torch.Generator:
    """Return random numbers of their own, apart from the global ones."""
    return torch.Generator().manual_seed(seed)


def fields(count: int = 3, dim: int = DIM) -> Fields:
    """Return `count` fields with 5, 6, 7 … rows."""
    return Fields(tuple(f"f{i}" for i in range(count)), tuple(5 + i for i in range(count)), dim)


def vectors(rows: int, count: int = 3, dim: int = DIM, seed: int = 0) -> Tensor:
    """Return `e [B, F, D]`, standard normal."""
    return torch.randn(rows, count, dim, generator=generator(seed))


def ids(rows: int, of: Fields | tuple[int, ...], seed: int = 0) -> Tensor:
    """Return `ids [B, F]`, each in its field's range."""
    sizes = torch.tensor(of.rows if isinstance(of, Fields) else of)
    return (torch.rand(rows, len(sizes), generator=generator(seed)) * sizes).long()


def schema(categorical: int = 2, numeric: int = 1) -> EncodedSchema:
    """Return `f0, f1, …`, then `x0, …`, and the history `clicks` of one column that shares the rows of `f0`."""
    columns = [Field(f"f{i}", 5 + i) for i in range(categorical)]
    columns += [Field(f"x{i}", NUMERIC_VALUE_ID + 1, numeric=True) for i in range(numeric)]
    clicks = History("clicks", (Field("click", columns[0].rows, shares="f0"),), LENGTH, ("f0",))
    return EncodedSchema(tuple(columns), (clicks,), ("label",), CONTEXT)


def batch(rows: int = 6, of: EncodedSchema | None = None, seed: int = 0) -> Batch:
    """Return a batch of `of`, by default of `schema()`, with every context column; weight and propensity are 1."""
    of = of or schema()
    numeric = torch.tensor([f.numeric for f in of.fields])
    where = ids(rows, tuple(f.rows for f in of.fields), seed).where(~numeric, torch.tensor(NUMERIC_VALUE_ID))
    values = torch.randn(rows, len(of.fields), generator=generator(seed + 1)).where(numeric, torch.tensor(1.0))
    return Batch(
        ids=where,
        values=values if of.has_numeric else None,
        history={h.name: _events(h, rows, seed) for h in of.histories},
        label={task: (torch.arange(rows) % (2 + i) == 0).float() for i, task in enumerate(of.tasks)},
        context=context(rows),
    )


def context(rows: int) -> Mapping[str, Tensor]:
    """Return every context column, with unit weights and propensities, every row observed."""
    place = torch.arange(rows)
    return {
        "weight": torch.ones(rows),
        "propensity": torch.ones(rows),
        "popularity": 1.0 / (1 + place % 4),
        "delay": place % 3 + 0.5,
        "elapsed": place % 3 + 1.5,
        "grade": place % 5 + 0.0,
        "position": place % 3,
        "group": place % 2,
        "time": place,
        "attribute": place % 3 - 1,
        "observed": torch.ones(rows, dtype=torch.int64),
        "uniform": (place % 4 < 2).long(),
    }


def lengths(rows: int) -> Tensor:
    """Return `length [B]`: full, then shorter ones, at least 1."""
    return LENGTH - torch.arange(rows) % LENGTH


def _events(history: History, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    length = lengths(rows)
    sizes = torch.tensor([column.rows for column in history.columns])
    uniform = torch.rand(rows, LENGTH, len(sizes), generator=generator(seed + 2))
    events = FIRST_ID + (uniform * (sizes - FIRST_ID)).long()  # [B, L, K]
    return events * (torch.arange(LENGTH) < length[:, None]).unsqueeze(-1), length
