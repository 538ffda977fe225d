"""What a metric promises; see `recsys.contracts.Metric`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from recsys.data.schema import CONTEXT
from recsys.errors import RecsysError
from recsys.testing import samples
from recsys.testing.kit import Check, expect

ROWS = 60


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a metric."""
    return [
        Check(
            "declares", "derive from torchmetrics.Metric; set `needs` and `higher_is_better`", lambda: _declares(build)
        ),
        Check("float64_scalar", "keep logits in float64 and return a float64 tensor `[]`", lambda: _scalar(build)),
        Check(
            "order_invariant",
            "keep counts, sums or all rows as states; never an average of averages",
            lambda: _order(build),
        ),
        Check(
            "undefined_is_nan", "return NaN, not 0 and no exception, where it is undefined", lambda: _undefined(build)
        ),
        Check("nan_refused", "raise a RecsysError when a logit is NaN", lambda: _nan(build)),
        Check("reset", "register all that accumulates with add_state", lambda: _reset(build)),
    ]


def sample(rows: int = ROWS) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits (some tied), labels of both classes and the context columns."""
    logit = (torch.randn(rows, generator=samples.generator(0), dtype=torch.float64) * 4).round() / 4
    label = (torch.rand(rows, generator=samples.generator(1)) < torch.sigmoid(logit)).float()
    return logit, label, dict(samples.context(rows))


def measure(build: Callable[..., Any], chunks: Sequence[Tensor], rows: int = ROWS) -> Tensor:
    """Return the metric after one update per chunk of row numbers."""
    return _compute(_feed(build(), chunks, *sample(rows)))


def _feed(metric: Metric, chunks: Sequence[Tensor], logit: Tensor, label: Tensor, context: dict[str, Tensor]) -> Metric:
    needs = getattr(metric, "needs", ())
    for chunk in chunks:
        metric.update(logit[chunk], label[chunk], **{name: context[name][chunk] for name in needs})
    return metric


def _compute(metric: Metric) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method", category=UserWarning)
        value = metric.compute()
    expect(isinstance(value, Tensor), f"compute returned {type(value).__name__}, expected a tensor")
    result: Tensor = value
    return result


def _declares(build: Callable[..., Any]) -> None:
    metric = build()
    expect(isinstance(metric, Metric), f"the factory returned {type(metric).__name__}, no torchmetrics.Metric")
    needs = getattr(metric, "needs", None)
    fine = isinstance(needs, tuple) and all(name in CONTEXT for name in needs)
    expect(fine, f"`needs` is {needs!r}, expected a tuple of context columns")
    expect(isinstance(metric.higher_is_better, bool), f"`higher_is_better` is {metric.higher_is_better!r}")


def _scalar(build: Callable[..., Any]) -> None:
    value = measure(build, [torch.arange(ROWS)])
    expect(value.shape == () and value.dtype == torch.float64, f"compute returned {value.dtype} {tuple(value.shape)}")
    expect(bool(torch.isfinite(value)), f"on {ROWS} rows of both classes it is {float(value)}")


def _order(build: Callable[..., Any]) -> None:
    rows = torch.arange(ROWS)
    wanted = measure(build, [rows])
    shuffled = torch.randperm(ROWS, generator=samples.generator(2))
    for chunks, what in (
        ([rows[:7], rows[7:8], rows[8:]], "in three updates of unequal size"),
        ([rows[i : i + 1] for i in range(ROWS)], "one row at a time"),
        ([shuffled[:25], shuffled[25:]], "in another order"),
    ):
        got = measure(build, chunks)
        expect(
            bool((got - wanted).abs() <= 1e-12 * (1 + wanted.abs())), f"the rows {what} give {got}, at once {wanted}"
        )


def _undefined(build: Callable[..., Any]) -> None:
    expect(bool(torch.isnan(_compute(build()))), "without any row it is not NaN")
    logit, label, context = sample()
    for value in (0.0, 1.0):
        single = _compute(_feed(build(), [torch.arange(ROWS)], logit, torch.full_like(label, value), context))
        expect(not bool(torch.isinf(single)), f"with labels of one class it is {float(single)}")


def _nan(build: Callable[..., Any]) -> None:
    logit, label, context = sample()
    logit[5] = torch.nan
    try:
        value = _compute(_feed(build(), [torch.arange(ROWS)], logit, label, context))
    except (RecsysError, ValueError):
        return
    expect(False, f"with one NaN logit it is {float(value)}")


def _reset(build: Callable[..., Any]) -> None:
    rows = torch.arange(ROWS)
    metric = _feed(build(), [rows[:20]], *sample())
    _compute(metric)
    metric.reset()
    value = _compute(_feed(metric, [rows], *sample()))
    wanted = measure(build, [rows])
    expect(torch.equal(value, wanted), f"after reset it gives {float(value)}, a new one {float(wanted)}")
