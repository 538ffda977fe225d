"""Samplers of the core: which items the sampled rows get."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from recsys.contracts import Draws, Items
from recsys.errors import DataError

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Uniform:
    """Every item of the train split with the same probability.

    q_j = 1/I
    """

    def __init__(self, items: Items) -> None:
        self._size = len(items)

    def draw(self, draws: Draws, count: int) -> Numbers:
        """`Draws -> [B, count]` item numbers."""
        return np.minimum((draws.uniform(count) * self._size).astype(np.int64), self._size - 1)

    def log_q(self) -> Floats:
        """`[I]`."""
        return np.full(self._size, -np.log(self._size))


class Popularity:
    """Items by a power of how often the rows that are trained on have them.

    q_j = n_j^power / Σ_k n_k^power, n_j the rows of item j.

    Mikolov et al., "Distributed representations of words and phrases and their compositionality", NeurIPS 2013
    (power 3/4).

    Args:
        power: 0 draws uniformly, 1 in proportion to the rows.
        of: what is counted: `rows`, or `positives`, the rows with a label of 1; an item without any is then never
            drawn, unless the power is 0.
    """

    def __init__(self, items: Items, *, power: float = 0.75, of: Literal["rows", "positives"] = "rows") -> None:
        count = (items.rows if of == "rows" else items.positives).astype(np.float64)
        if not count.any():
            raise DataError("sampling: no row of the train split has a label of 1, so no item could be drawn")
        weight = count**power
        self._q: Floats = weight / weight.sum()
        self._ends = np.cumsum(weight)

    def draw(self, draws: Draws, count: int) -> Numbers:
        """`Draws -> [B, count]` item numbers, by inverting the cumulative weights."""
        found = np.searchsorted(self._ends, draws.uniform(count) * self._ends[-1], side="right")
        return np.asarray(np.minimum(found, np.flatnonzero(self._q)[-1]), np.int64)

    def log_q(self) -> Floats:
        """`[I]`; −∞ for an item that is never drawn."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self._q))


class InBatch:
    """The items of other rows of the same optimizer step, as in-batch negatives have it.

    q_j = n_j / n: a row's item is drawn as often as the rows have it. The rows of a step that is divided over processes
    or micro-batches count as one.

    Args:
        own: let a row draw itself as well; without it, it draws another row, though that may have the same item.
    """

    def __init__(self, items: Items, *, own: bool = False) -> None:
        total = items.rows.sum()
        self._q = items.rows / total
        self._own = own

    def draw(self, draws: Draws, count: int) -> Numbers:
        """`Draws -> [B, count]` item numbers."""
        step = draws.step_items()
        others = np.flatnonzero(step >= 0)  # [R]: the rows with a known item
        if not len(others):
            raise DataError("sampling: no row of an optimizer step has a known item to draw; raise train.batch_size")
        u = draws.uniform(count)
        place = np.searchsorted(others, draws.places)  # [B]
        inside = (draws.items >= 0) & (not self._own) & (len(others) > 1)
        free = len(others) - inside  # [B]: how many rows each may draw
        at = np.minimum((u * free[:, None]).astype(np.int64), free[:, None] - 1)
        at += inside[:, None] & (at >= place[:, None])  # step over the row itself
        drawn: Numbers = step[others[at]]
        return drawn

    def log_q(self) -> Floats:
        """`[I]`, over all rows of the train split."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self._q))
