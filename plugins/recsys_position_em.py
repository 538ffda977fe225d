"""How likely each position is looked at, from clicks: by expectation and maximisation, or from randomised rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field as Limits
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Batch, Component, DataError, EncodedSchema, RecipeError, hookimpl

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Several = Annotated[int, Limits(ge=2)]
LEAST = 1e-3
"""Of a position's chance of a look."""
START = 0.9
"""The chance of a look that the search begins with."""


class PositionEM(nn.Module):
    """The chance of a look at each position, by exact expectation and maximisation over what was shown where.

    P(click) = θ_k γ_i for an item i at position k; the item is what the fields `items` say together. Expectation: of a
    row without a click, P(seen) = θ (1 − γ) / (1 − θγ) and P(liked) = γ (1 − θ) / (1 − θγ); maximisation: θ_k and γ_i
    are the means of these over the rows of k and of i, clicks counting 1. The likelihood never falls. It needs the same
    items at several positions, and no reason but the item for a click: where the shown items were chosen for the user,
    name fields that tell what the choice went by too, or learn with the loss `pal`. Only the product is known: θ is
    divided by the largest one.

    Wang et al., "Position Bias Estimation for Unbiased Learning to Rank in Personal Search", WSDM 2018, with a table in
    the place of its regression.

    Args:
        items: fields whose values together say what was shown.
        positions: how many positions there are; those behind count as the last one.
        first: number of the first position in the logs.
        task: whose labels are the clicks; by default the first.
        iterations: at most.
        tolerance: least change of a θ that goes on.

    Raises:
        RecipeError: there is no such field or task.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        items: tuple[str, ...],
        positions: Several = 10,
        first: int = 0,
        task: str | None = None,
        iterations: PositiveInt = 2000,
        tolerance: NonNegativeFloat = 1e-7,
    ) -> None:
        super().__init__()
        names = [field.name for field in schema.fields]
        for name in items:
            if name not in names:
                raise RecipeError(f"position_em: items: no field is called '{name}'; fields: {', '.join(names)}")
        if not items:
            raise RecipeError("position_em: items: name at least one field")
        self.columns = [names.index(name) for name in items]
        self.rows = [schema.fields[column].rows for column in self.columns]
        if math.prod(self.rows) >= 2**63:
            raise RecipeError(f"position_em: items: {', '.join(items)} have more combinations than can be numbered")
        self.task = _task(schema, task, "position_em")
        self.first, self.iterations, self.tolerance = first, iterations, tolerance
        self.likelihoods: list[float] = []
        """Mean log-likelihood of a row before each iteration of the last fit."""
        self.theta: Tensor
        self.register_buffer("theta", torch.zeros(positions))

    def fit(self, rows: Iterable[Batch]) -> None:
        """Find θ.

        Raises:
            RecipeError: the data has no context column `position`.
            DataError: there is no click.
        """
        cells = _Cells()
        for batch in rows:
            item = torch.zeros(len(batch), dtype=torch.int64)
            for column, size in zip(self.columns, self.rows, strict=True):  # of the recipe, not of the data
                item = item * size + batch.ids[:, column].cpu()
            cells.add(item.numpy(), _places(batch, self.first, len(self.theta)), _clicks(batch, self.task))
        which, place, shown, clicked = cells.total()
        if not clicked.sum():
            raise DataError("position_em: no row has a click; there is nothing to tell a look from")
        theta = self._search(which, place, shown, clicked)
        self.theta.copy_(torch.from_numpy(np.clip(theta / theta.max(), LEAST, 1.0)))

    def _search(self, item: Ints, place: Ints, shown: Floats, clicked: Floats) -> Floats:
        """θ, `[K]`; a position that nothing was shown at has the chance of the one before it."""
        count, items = len(self.theta), int(item.max()) + 1
        by_place, by_item = np.bincount(place, shown, count), np.bincount(item, shown, items)
        theta, gamma = np.full(count, START), np.bincount(item, clicked, items) / by_item
        gamma = np.clip(gamma / START, 1e-9, 1 - 1e-9)
        self.likelihoods = []
        for _ in range(self.iterations):
            t, g = theta[place], gamma[item]
            self.likelihoods.append(_likelihood(t * g, shown, clicked))
            left = (shown - clicked) / np.maximum(1 - t * g, 1e-300)
            seen = np.bincount(place, clicked + left * t * (1 - g), count)
            liked = np.bincount(item, clicked + left * g * (1 - t), items)
            new = np.divide(seen, by_place, out=theta.copy(), where=by_place > 0)
            gamma, change = liked / by_item, float(np.abs(new - theta).max())
            theta = new
            if change <= self.tolerance:
                break
        return _filled(theta, by_place > 0)

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]` float32.

        Raises:
            DataError: nothing has been fitted.
        """
        return _read(self.theta, batch, self.first)

    def examination(self) -> Tensor:
        """θ, `[K]`."""
        return self.theta


class PositionRandomised(nn.Module):
    """The chance of a look at each position, from rows whose order was drawn at random (context `uniform`).

    θ_k = (clicks / rows at k) / (clicks / rows at the best position): where what stands at a position was not chosen,
    nothing but the look tells positions apart. Needs no model, but some ten thousand clicks a position for two digits.

    Joachims, Swaminathan and Schnabel, "Unbiased Learning-to-Rank with Biased Feedback", WSDM 2017.

    Args:
        positions: how many positions there are; those behind count as the last one.
        first: number of the first position in the logs.
        task: whose labels are the clicks; by default the first.

    Raises:
        RecipeError: there is no such task.
    """

    def __init__(
        self, schema: EncodedSchema, *, positions: Several = 10, first: int = 0, task: str | None = None
    ) -> None:
        super().__init__()
        self.task, self.first = _task(schema, task, "position_randomised"), first
        self.theta: Tensor
        self.register_buffer("theta", torch.zeros(positions))

    def fit(self, rows: Iterable[Batch]) -> None:
        """Find θ.

        Raises:
            RecipeError: the data has no context column `position` or `uniform`.
            DataError: there is no randomised row, or none with a click.
        """
        count = len(self.theta)
        shown, clicked = np.zeros(count), np.zeros(count)
        for batch in rows:
            uniform = _context(batch, "uniform").cpu().numpy() == 1
            place = _places(batch, self.first, count)[uniform]
            shown += np.bincount(place, minlength=count)
            clicked += np.bincount(place, _clicks(batch, self.task)[uniform], count)
        if not clicked.sum():
            raise DataError(f"position_randomised: {int(shown.sum()):,} rows are `uniform`, none of them with a click")
        rate = np.divide(clicked, shown, out=np.zeros(count), where=shown > 0)
        theta = _filled(rate / rate.max(), shown > 0)
        self.theta.copy_(torch.from_numpy(np.clip(theta, LEAST, 1.0)))

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]` float32.

        Raises:
            DataError: nothing has been fitted.
        """
        return _read(self.theta, batch, self.first)

    def examination(self) -> Tensor:
        """θ, `[K]`."""
        return self.theta


class _Cells:
    """Rows and clicks of each (item, position), added up over batches."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints, Floats, Floats]] = []
        self._size, self._merged = 0, 0

    def add(self, item: Ints, place: Ints, clicked: Floats) -> None:
        """Add a batch, each `[B]`."""
        self._parts.append(_merge(item, place, np.ones(len(item)), clicked))
        self._size += len(self._parts[-1][0])
        if self._size > 2 * self._merged + 1_000_000:  # cells that come again and again take no room
            self._parts = [self._joined()]
            self._size = self._merged = len(self._parts[0][0])

    def total(self) -> tuple[Ints, Ints, Floats, Floats]:
        """Item (numbered anew from 0), position, rows and clicks, each `[cells]`."""
        if not self._parts:
            raise DataError("position_em: there are no rows")
        item, place, shown, clicked = self._joined()
        return np.unique(item, return_inverse=True)[1].astype(np.int64), place, shown, clicked

    def _joined(self) -> tuple[Ints, Ints, Floats, Floats]:
        item, place, shown, clicked = zip(*self._parts, strict=True)
        return _merge(np.concatenate(item), np.concatenate(place), np.concatenate(shown), np.concatenate(clicked))


def _merge(item: Ints, place: Ints, shown: Floats, clicked: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Add up what is of the same item and position."""
    order = np.lexsort((place, item))
    item, place = item[order], place[order]
    new = np.ones(len(item), dtype=bool)
    new[1:] = (item[1:] != item[:-1]) | (place[1:] != place[:-1])
    start = np.flatnonzero(new)
    if not len(start):
        return item, place, shown, clicked
    return item[start], place[start], np.add.reduceat(shown[order], start), np.add.reduceat(clicked[order], start)


def _likelihood(p: Floats, shown: Floats, clicked: Floats) -> float:
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return float((clicked * np.log(p) + (shown - clicked) * np.log1p(-p)).sum() / shown.sum())


def _filled(theta: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    """Positions without rows take over what stands before them, or behind where there is nothing before."""
    place = np.maximum.accumulate(np.where(known, np.arange(len(theta)), -1))
    return np.asarray(theta[np.where(place < 0, int(known.argmax()), place)])


def _context(batch: Batch, name: str) -> Tensor:
    if name not in batch.context:
        raise RecipeError(f"propensity: needs the context column '{name}'; name it under data.context")
    return batch.context[name]


def _places(batch: Batch, first: int, count: int) -> Ints:
    places: Ints = (_context(batch, "position").cpu() - first).clamp(0, count - 1).numpy()
    return places


def _clicks(batch: Batch, task: str) -> Floats:
    clicks: Floats = batch.label[task].cpu().double().numpy()
    return clicks


def _read(theta: Tensor, batch: Batch, first: int) -> Tensor:
    if not theta.any():
        raise DataError("propensity: it has not been fitted")
    position = _context(batch, "position").to(theta.device) - first
    return theta.float().index_select(0, position.clamp(0, len(theta) - 1))


def _task(schema: EncodedSchema, task: str | None, name: str) -> str:
    if task is not None and task not in schema.tasks:
        raise RecipeError(f"{name}: task: the recipe has no task '{task}'; tasks: {', '.join(schema.tasks)}")
    return task or schema.tasks[0]


@hookimpl
def recsys_components() -> list[Component]:
    """Return the propensity models."""
    return [
        Component("propensity", "position_em", PositionEM),
        Component("propensity", "position_randomised", PositionRandomised),
    ]
