"""What a sampler promises; see `recsys.contracts.Sampler`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recsys.abilities import Choosing
from recsys.contracts import FIRST_ID, Items
from recsys.data.sampling import RowDraws
from recsys.testing import samples
from recsys.testing.kit import Check, expect

SIZE = 12
ROWS = 4096
COUNT = 3
DEVIATIONS = 5.0
"""How far a frequency may be from its probability, in standard deviations."""


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a sampler."""
    return [
        Check("numbers", "return int64 item numbers `[B, count]` in `[0, I)`", lambda: _numbers(build)),
        Check("log_q", "return the log-probabilities of all items, `[I]` float64", lambda: _log_q(build)),
        Check("as_told", "let `log_q` be the probability with which one draw gives an item", lambda: _often(build)),
        Check(
            "repeatable",
            "draw no random numbers but `draws.uniform`, and keep no state between draws",
            lambda: _again(build),
        ),
        Check(
            "rows_independent",
            "draw for each row from its own random numbers, whatever rows it shares a batch with",
            lambda: _alone(build),
        ),
        Check("choice", "`choose` returns places in `[0, candidates)`, row by row", lambda: _choice(build)),
    ]


def items() -> Items:
    """Return twelve items, the first ones the most frequent; every third one has no positive row."""
    rows = 60 // (1 + np.arange(SIZE))
    return Items(FIRST_ID + np.arange(SIZE), rows, np.where(np.arange(SIZE) % 3 == 2, 0, rows // 2))


def draws(rows: slice = slice(0, ROWS)) -> RowDraws:
    """Return some rows of one step, whose items are as frequent as in `items()`."""
    of = items()
    step = np.repeat(np.arange(SIZE), of.rows)
    step = np.resize(step, ROWS // len(step) * len(step))
    places = np.arange(len(step))[rows]
    return RowDraws(7, places.astype(np.int64), step[rows], places, lambda: step)


def _numbers(build: Callable[..., Any]) -> None:
    for rows in (1, 100):
        drawn = build(items()).draw(draws(slice(0, rows)), COUNT)
        fine = isinstance(drawn, np.ndarray) and drawn.shape == (rows, COUNT) and drawn.dtype == np.int64
        expect(fine, f"it returns {getattr(drawn, 'dtype', type(drawn))} {getattr(drawn, 'shape', '')}")
        expect(((drawn >= 0) & (drawn < SIZE)).all(), f"numbers lie in [{drawn.min()}, {drawn.max()}], I is {SIZE}")


def _log_q(build: Callable[..., Any]) -> None:
    q = build(items()).log_q()
    expect(isinstance(q, np.ndarray) and q.shape == (SIZE,), f"it returns {getattr(q, 'shape', type(q))}")
    expect(abs(np.exp(q).sum() - 1.0) < 1e-9, f"the probabilities add up to {np.exp(q).sum()}")


def _often(build: Callable[..., Any]) -> None:
    sampler = build(items())
    drawn = sampler.draw(draws(), COUNT)
    n, q = drawn.size, np.exp(sampler.log_q())
    found = np.bincount(drawn.ravel(), minlength=SIZE) / n
    off = np.abs(found - q) / np.sqrt(np.maximum(q * (1 - q), 1e-12) / n)
    worst = int(off.argmax())
    expect(
        off[worst] < DEVIATIONS,
        f"item {worst} is drawn with frequency {found[worst]:.4f}, but q is {q[worst]:.4f} "
        f"({off[worst]:.1f} standard deviations)",
    )


def _again(build: Callable[..., Any]) -> None:
    sampler, other = build(items()), build(items())
    first = sampler.draw(draws(), COUNT)
    expect((first == sampler.draw(draws(), COUNT)).all(), "two draws of the same rows differ")
    other.draw(draws(slice(5, 50)), COUNT)
    expect((first == other.draw(draws(), COUNT)).all(), "earlier draws change later ones")


def _alone(build: Callable[..., Any]) -> None:
    sampler = build(items())
    whole = sampler.draw(draws(), COUNT)
    for rows in (slice(0, 3), slice(3, 200)):
        expect((sampler.draw(draws(rows), COUNT) == whole[rows]).all(), "rows alone and among others differ")


def _choice(build: Callable[..., Any]) -> None:
    sampler = build(items())
    if not isinstance(sampler, Choosing):
        return
    shape = (50, COUNT, sampler.candidates)
    random = samples.generator(3)
    scores, uniform = torch.randn(shape, generator=random), torch.rand(shape, generator=random)
    chosen = sampler.choose(scores, uniform)
    fine = chosen.dtype == torch.int64 and tuple(chosen.shape) == shape[:2]
    expect(fine, f"choose returns {chosen.dtype} {tuple(chosen.shape)}")
    expect(bool(((chosen >= 0) & (chosen < sampler.candidates)).all()), "choose returns places outside [0, candidates)")
    part = sampler.choose(scores[:5], uniform[:5])
    expect(torch.equal(part, chosen[:5]), "rows alone and among others are chosen differently")
