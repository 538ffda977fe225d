"""What a propensity model promises; see `recsys.contracts.Propensity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recsys.contracts import FIRST_ID, Batch
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
        Check("repeatable", "draw random numbers from torch only, which is seeded", lambda: _again(build)),
        Check("any_batches", "add up over the batches; their sizes must not matter", lambda: _batches(build)),
        Check("unseen", "keep a place for every id of the schema, rows or not", lambda: _unseen(build)),
        Check("saved", "keep what was fitted in buffers of shapes that the schema tells", lambda: _saved(build)),
        Check("needs_fit", "raise a RecsysError, or give a constant, before `fit`", lambda: _unfitted(build)),
    ]


def rows(size: int = 16) -> list[Batch]:
    """Return the rows that a model is fitted on, in batches of `size`; a third of them was not shown."""
    whole = _log(ROWS)
    return [_part(whole, slice(low, low + size)) for low in range(0, ROWS, size)]


def _log(count: int) -> Batch:
    whole = samples.batch(count)
    observed = (torch.arange(count) % 3 != 1).long()
    return replace(whole, context={**whole.context, "observed": observed})


def _fitted(build: Callable[..., Any], batches: list[Batch] | None = None) -> Any:
    torch.manual_seed(3)
    model = build(samples.schema())
    model.fit(rows() if batches is None else batches)
    return model


def _part(batch: Batch, own: slice) -> Batch:
    return Batch(
        ids=batch.ids[own],
        values=None if batch.values is None else batch.values[own],
        history={name: (ids[own], length[own]) for name, (ids, length) in batch.history.items()},
        label={name: value[own] for name, value in batch.label.items()},
        context={name: value[own] for name, value in batch.context.items()},
    )


def _check_range(p: Any, count: int) -> None:
    expect(isinstance(p, Tensor) and tuple(p.shape) == (count,), f"estimate must return a tensor [{count}]")
    expect(p.is_floating_point(), f"estimate returned {p.dtype}")
    fine = bool(((p > 0) & (p <= 1)).all())
    expect(fine, f"estimates lie in [{float(p.min())}, {float(p.max())}]")


def _range(build: Callable[..., Any]) -> None:
    model = _fitted(build)
    for count in (1, ROWS):
        _check_range(model.estimate(samples.batch(count)), count)


def _alone(build: Callable[..., Any]) -> None:
    model, batch = _fitted(build), samples.batch(ROWS)
    whole = model.estimate(batch)
    for own in (slice(0, 3), slice(3, ROWS)):
        gap = (model.estimate(_part(batch, own)) - whole[own]).abs().max()
        expect(float(gap) <= 1e-6, f"rows alone and among others differ by {float(gap):.2e}")


def _again(build: Callable[..., Any]) -> None:
    first, second = (_fitted(build).estimate(samples.batch(ROWS)) for _ in range(2))
    expect(torch.equal(first, second), "two fits on the same rows differ")


def _batches(build: Callable[..., Any]) -> None:
    few, many = (_fitted(build, rows(size)).estimate(samples.batch(ROWS)) for size in (ROWS, 7))
    gap = float((few - many).abs().max())
    expect(gap <= 1e-4, f"fits on the same rows in batches of {ROWS} and of 7 differ by {gap:.2e}")


def _unseen(build: Callable[..., Any]) -> None:
    few = [replace(batch, ids=batch.ids.clamp(max=FIRST_ID)) for batch in rows()]
    _check_range(_fitted(build, few).estimate(samples.batch(ROWS)), ROWS)


def _saved(build: Callable[..., Any]) -> None:
    model, fresh = _fitted(build), build(samples.schema())
    state = model.state_dict()
    fine = all(isinstance(value, Tensor) for value in state.values())
    expect(fine, "`state_dict()` must be a mapping from names to tensors")
    fresh.load_state_dict({name: value.clone() for name, value in state.items()})
    batch = samples.batch(ROWS)
    same = torch.equal(fresh.estimate(batch), model.estimate(batch))
    expect(same, "after load_state_dict(state_dict()) a fresh model gives other estimates")


def _unfitted(build: Callable[..., Any]) -> None:
    from recsys.errors import RecsysError

    try:
        p = build(samples.schema()).estimate(samples.batch(ROWS))
    except RecsysError:
        return
    expect(bool((p == p[0]).all()), "it gives estimates that differ without having been fitted")
