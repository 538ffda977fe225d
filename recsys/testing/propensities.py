"""What a propensity model promises; see `recsys.contracts.Propensity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import torch
from torch import Tensor

from recsys.contracts import Batch
from recsys.testing import samples
from recsys.testing.kit import Check, expect

ROWS = 40


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a propensity model."""
    return [
        Check(
            "range", "clip to a small positive floor and to 1: `[B]` floating point in (0, 1]", lambda: _range(build)
        ),
        Check("rows_independent", "estimate each row from its own columns and the fitted state", lambda: _alone(build)),
        Check("repeatable", "draw no random numbers, or from a generator seeded by an option", lambda: _again(build)),
        Check("needs_fit", "raise a RecsysError, or give a constant, before `fit`", lambda: _unfitted(build)),
    ]


def logs(rows: int = ROWS) -> pl.LazyFrame:
    """Return raw rows of `samples.schema()`: its fields, `position`, `label`."""
    batch = samples.batch(rows)
    fields = samples.schema().fields
    columns = {field.name: batch.ids[:, i].tolist() for i, field in enumerate(fields) if not field.numeric}
    position = [int(p) for p in batch.context["position"]]
    return pl.LazyFrame({**columns, "position": position, "label": batch.label["label"].long().tolist()})


def _fitted(build: Callable[..., Any]) -> Any:
    model = build(samples.schema())
    model.fit(logs())
    return model


def _part(batch: Batch, rows: slice) -> Batch:
    return Batch(
        ids=batch.ids[rows],
        values=None if batch.values is None else batch.values[rows],
        history={name: (ids[rows], length[rows]) for name, (ids, length) in batch.history.items()},
        label={name: value[rows] for name, value in batch.label.items()},
        context={name: value[rows] for name, value in batch.context.items()},
    )


def _range(build: Callable[..., Any]) -> None:
    model = _fitted(build)
    for rows in (1, ROWS):
        p = model.estimate(samples.batch(rows))
        expect(isinstance(p, Tensor) and tuple(p.shape) == (rows,), f"estimate must return a tensor [{rows}]")
        expect(p.is_floating_point(), f"estimate returned {p.dtype}")
        fine = bool(((p > 0) & (p <= 1)).all())
        expect(fine, f"estimates lie in [{float(p.min())}, {float(p.max())}]")


def _alone(build: Callable[..., Any]) -> None:
    model, batch = _fitted(build), samples.batch(ROWS)
    whole = model.estimate(batch)
    for rows in (slice(0, 3), slice(3, ROWS)):
        gap = (model.estimate(_part(batch, rows)) - whole[rows]).abs().max()
        expect(float(gap) <= 1e-6, f"rows alone and among others differ by {float(gap):.2e}")


def _again(build: Callable[..., Any]) -> None:
    first, second = (_fitted(build).estimate(samples.batch(ROWS)) for _ in range(2))
    expect(torch.equal(first, second), "two fits on the same rows differ")


def _unfitted(build: Callable[..., Any]) -> None:
    from recsys.errors import RecsysError

    try:
        p = build(samples.schema()).estimate(samples.batch(ROWS))
    except RecsysError:
        return
    expect(bool((p == p[0]).all()), "it gives estimates that differ without having been fitted")
