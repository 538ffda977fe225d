"""What a sequence encoder promises; see `recsys.contracts.Sequence`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from recsys.testing import modules, samples
from recsys.testing.kit import Check, expect
from recsys.testing.modules import ROWS, Inputs

WIDTH_PER_FIELD = 4


class Subject:
    """`[B, W], [B, L, W], [B] -> [B, W]`; here W grows with `count`, the number of columns of one event."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory

    def build(self, count: int = 3) -> nn.Module:
        """Build for `count` columns per event."""
        module: nn.Module = self.factory(count * WIDTH_PER_FIELD)
        return module

    def inputs(self, rows: int, count: int = 3) -> Inputs:
        """Target, history with zeros in the padding, length."""
        width = count * WIDTH_PER_FIELD
        length = samples.lengths(rows)
        events = samples.vectors(rows, samples.LENGTH, width, seed=1)
        return (
            samples.vectors(rows, 1, width).squeeze(1),
            events * _valid(length, samples.LENGTH).unsqueeze(-1),
            length,
        )

    def shape(self, module: nn.Module, rows: int, count: int = 3) -> tuple[int, ...]:
        """`[B, W]`."""
        return (rows, count * WIDTH_PER_FIELD)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """B, and L of the history."""
        return ({0: batch}, {0: batch, 1: Dim("length", min=1)}, {0: batch})

    def objective(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The output."""
        return modules.random_sum(module(*inputs))


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a sequence encoder."""
    subject = Subject(build)
    return [
        *modules.checks(subject),
        Check(
            "padding_invariance",
            "mask positions from `length` on before any sum, softmax or norm over L",
            lambda: _padding(subject),
        ),
        Check(
            "empty_history",
            "give zeros where `length` is 0, and clamp the divisor or fill the mask so that no 0/0 has a gradient",
            lambda: _empty(subject),
        ),
        Check("any_length", "take L from the shape of the history, not from the first batch", lambda: _any(subject)),
    ]


def _padding(subject: Subject) -> None:
    module = modules.disturb(subject.build()).eval()
    target, history, length = subject.inputs(ROWS)
    wanted = module(target, history, length)
    noise = 10 * torch.randn(history.shape, generator=samples.generator(9))
    dirty = torch.where(_valid(length, samples.LENGTH).unsqueeze(-1), history, noise)
    modules.close(module(target, dirty, length), wanted, "other values in the padding change the output")
    longer = torch.cat([history, noise[:, :3]], dim=1)
    modules.close(module(target, longer, length), wanted, "three more padded positions change the output")
    last = samples.LENGTH - 1
    moved = history.clone()
    moved[0, last] += 1.0  # row 0 is full: its newest event is no padding
    expect(
        not torch.equal(module(target, moved, length)[0], wanted[0]), "the newest event of a full history is not read"
    )


def _empty(subject: Subject) -> None:
    module = modules.disturb(subject.build()).train()
    target, history, length = subject.inputs(ROWS)
    length[2], history[2] = 0, 0.0
    target.requires_grad_()
    history.requires_grad_()
    y = module(target, history, length)
    expect(bool((y[2] == 0).all()), "an empty history does not give zeros")
    modules.random_sum(y).backward()  # type: ignore[no-untyped-call]
    for x, name in [(target, "target"), (history, "history"), *((p, n) for n, p in module.named_parameters())]:
        if x.grad is not None:
            modules.finite(x.grad, f"with an empty history in the batch, the gradient of {name}")
    module.eval()
    none = module(target[:2], history[:2], torch.zeros_like(length[:2]))
    expect(bool((none == 0).all()), "a batch of empty histories does not give zeros")


def _any(subject: Subject) -> None:
    module = modules.disturb(subject.build()).eval()
    target, history, length = subject.inputs(ROWS)
    wanted = module(target, history, length)
    short = length <= 1
    cut = module(target[short], history[short, :1], length[short])
    modules.close(cut, wanted[short], "histories of one event give another output when L is 1")


def _valid(length: Tensor, longest: int) -> Tensor:
    return torch.arange(longest) < length.unsqueeze(1)  # [B, L]
