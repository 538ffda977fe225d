"""What an interaction promises; see `recsys.contracts.Interaction`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recsys.testing import modules, samples
from recsys.testing.kit import Check, expect
from recsys.testing.modules import ROWS, Inputs


class Subject:
    """`[B, F, D] -> [B, H]`."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory

    def build(self, count: int = 3) -> nn.Module:
        """Build on `count` fields."""
        module: nn.Module = self.factory(samples.fields(count))
        return module

    def inputs(self, rows: int, count: int = 3) -> Inputs:
        """`e [B, F, D]`."""
        return (samples.vectors(rows, count),)

    def shape(self, module: nn.Module, rows: int, count: int = 3) -> tuple[int, ...]:
        """`[B, H]`, H as the component declares it."""
        width = getattr(module, "width", None)
        expect(type(width) is int and width > 0, f"`width` must be the number of output columns, got {width!r}")
        return (rows, int(str(width)))

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """B."""
        return ({0: batch},)

    def objective(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The output."""
        return modules.random_sum(module(*inputs))


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of an interaction."""
    subject = Subject(build)
    return [
        *modules.checks(subject),
        Check("is_logit", "set `self.is_logit` to True or False in __init__", lambda: _is_logit(subject)),
        Check("explain", "return a dict of tensors; {} when there is nothing to show", lambda: _explain(subject)),
    ]


def _is_logit(subject: Subject) -> None:
    found = getattr(subject.build(), "is_logit", None)
    expect(isinstance(found, bool), f"`is_logit` is {found!r}")


def _explain(subject: Subject) -> None:
    module = modules.disturb(subject.build()).eval()
    (e,) = subject.inputs(ROWS)
    before = module(e)
    with torch.no_grad():
        shown = modules.call(module, "explain", e)
    expect(isinstance(shown, Mapping), f"explain returned {type(shown).__name__}")
    for name, value in shown.items():
        expect(isinstance(value, Tensor), f"explain gives {type(value).__name__} for '{name}', expected a tensor")
        modules.finite(value, f"explain's '{name}'")
    expect(torch.equal(before, module(e)), "explain changes what forward returns")
