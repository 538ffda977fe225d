"""What a stage promises; see `recsys.contracts.Stage`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from recsys.testing.kit import Check, expect


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a stage; what it does to a run is for the plugin's own tests."""
    return [
        Check("builds", "take recipe options only, and do the work in `run`", lambda: _builds(build)),
        Check("run", "define `def run(self, run: Run) -> None`", lambda: _run(build)),
    ]


def _builds(build: Callable[..., Any]) -> None:
    first, second = build(), build()
    expect(
        first is not second, "the factory returns the same object twice, so two stages of a recipe would share state"
    )


def _run(build: Callable[..., Any]) -> None:
    method = getattr(build(), "run", None)
    expect(callable(method), "it has no method `run`")
    if callable(method):
        try:
            inspect.signature(method).bind(object())
        except TypeError as error:
            raise AssertionError(f"`run` cannot be called with the run alone: {error}") from None
        expect(not inspect.iscoroutinefunction(method), "`run` is a coroutine")
