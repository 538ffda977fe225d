"""How well the truth itself does: the best value that a model's metric can reach."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.data.simulate_random import Floats


def auc(score: Floats, label: npt.NDArray[np.integer]) -> float:
    """Return P(score of a 1 > score of a 0) + ½·P(equal), exact through mid-ranks; NaN when one class is empty.

    Args:
        score: `[n]` float64.
        label: `[n]` in {0, 1}.
    """
    ones = int(label.sum())
    zeros = len(label) - ones
    if ones == 0 or zeros == 0:
        return float("nan")
    _, group, count = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    middle = last - 0.5 * (count - 1)  # the mean of the ranks that equal scores share, counted from 1
    return float((middle[group[label == 1]].sum() - 0.5 * ones * (ones + 1)) / (ones * zeros))


class Tally:
    """Clicks and rows by true probability, for the click rate and the best AUC of a log of any length.

    Probabilities are counted in 2²⁰ equal bins and a bin's rows count as tied, which moves the AUC by less than
    half the share of (clicked, not clicked) pairs that meet in one bin.
    """

    _BINS = 1 << 20

    def __init__(self) -> None:
        self._ones = np.zeros(self._BINS, dtype=np.int64)
        self._all = np.zeros(self._BINS, dtype=np.int64)

    def add(self, chance: Floats, label: npt.NDArray[np.integer]) -> None:
        """Count rows: true probability `[n]` in [0, 1], label `[n]` in {0, 1}."""
        place = np.minimum((chance * self._BINS).astype(np.int64), self._BINS - 1)
        self._all += np.bincount(place, minlength=self._BINS)
        self._ones += np.bincount(place[label == 1], minlength=self._BINS)

    @property
    def rows(self) -> int:
        """Rows so far."""
        return int(self._all.sum())

    @property
    def rate(self) -> float:
        """Share of rows with a click; NaN without rows."""
        return float(self._ones.sum() / self.rows) if self.rows else float("nan")

    @property
    def auc(self) -> float:
        """AUC of the true probability; NaN when every label is the same."""
        zeros = self._all - self._ones
        pairs = float(self._ones.sum()) * float(zeros.sum())
        if pairs == 0.0:
            return float("nan")
        below = np.cumsum(zeros) - 0.5 * zeros
        return float((self._ones * below).sum() / pairs)
