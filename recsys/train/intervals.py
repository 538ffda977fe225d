"""How far a score may lie from what other rows of the same kind would give: the bootstrap over groups, or over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recsys.train.score import Predictions

Scores = dict[str, dict[str, float]]
"""Class of rows → metric → value."""


@dataclass(frozen=True)
class Clusters:
    """Rows that are drawn together: those of a group.

    Args:
        order: `[N]` row numbers, group after group.
        start: `[G]` where a group begins in `order`.
        size: `[G]` its rows.
    """

    order: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, predictions: Predictions) -> Clusters:
        """By the context column `group`; without one, every row is a group."""
        rows = len(next(iter(predictions.logit.values())))
        if "group" not in predictions.context:
            return cls(torch.arange(rows), torch.arange(rows), torch.ones(rows, dtype=torch.int64))
        order = torch.argsort(predictions.context["group"], stable=True)
        _, size = torch.unique_consecutive(predictions.context["group"][order], return_counts=True)
        return cls(order, size.cumsum(0) - size, size)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many groups as there are, with replacement: row numbers `[M]`, and for each the number of the draw `[M]`.

        A group that is drawn twice has two numbers: its rows are not to be ranked among their copies.
        """
        chosen = torch.randint(len(self.size), (len(self.size),), generator=generator)
        size = self.size[chosen]
        owner = torch.repeat_interleave(torch.arange(len(size)), size)
        inside = torch.arange(len(owner)) - (size.cumsum(0) - size)[owner]
        return self.order[self.start[chosen][owner] + inside], owner


def taken(predictions: Predictions, rows: Tensor, group: Tensor | None = None) -> Predictions:
    """Return some of the rows, which may come from other groups now."""
    context = {name: values[rows] for name, values in predictions.context.items()}
    if group is not None and "group" in context:
        context["group"] = group
    return replace(
        predictions,
        logit={task: values[rows] for task, values in predictions.logit.items()},
        label={task: values[rows] for task, values in predictions.label.items()},
        context=context,
    )


def intervals(
    score: Callable[[Predictions, Tensor], Scores], predictions: Predictions, level: float, draws: int, seed: int
) -> Scores:
    """Return `NAME.low` and `NAME.high` for every score: percentiles over draws of groups.

    Undefined where half of the draws, or more, have no score.

    Args:
        score: of rows, with their numbers among all rows.
        predictions: all rows.
        level: share of the draws that lie inside.
        draws: how many.
        seed: of the draws; equal seeds give equal intervals.
    """
    clusters, generator = Clusters.of(predictions), torch.Generator().manual_seed(seed)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(draws):
        rows, group = clusters.draw(generator)
        for label, values in score(taken(predictions, rows, group), rows).items():
            for name, value in values.items():
                found.setdefault((label, name), []).append(value)
    result: Scores = {}
    for (label, name), values_ in found.items():
        low, high = _bounds([value for value in values_ if not math.isnan(value)], level, draws)
        result.setdefault(label, {}).update({f"{name}.low": low, f"{name}.high": high})
    return result


def _bounds(values: list[float], level: float, draws: int) -> tuple[float, float]:
    if 2 * len(values) <= draws:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def bounded(scores: dict[str, float]) -> Iterator[str]:
    """Yield the names of the scores themselves, without their bounds and counts."""
    yield from (name for name in scores if not name.endswith((".low", ".high")) and name != "rows")
