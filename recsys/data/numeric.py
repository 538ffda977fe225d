"""Numeric fields: running moments, quantile buckets, and the transform that they parametrise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID, NULL_ID
from recsys.data.hashing import mix_array
from recsys.data.limits import LARGEST
from recsys.data.schema import Numeric
from recsys.data.values import Floats

SAMPLE_ROWS = 1 << 18
"""Quantiles are exact up to this many present values, and those of a fixed random sample above."""


@dataclass(frozen=True)
class NumericSpec:
    """A fitted numeric field.

    Args:
        transform: as in the recipe.
        mean: subtracted after the logarithm, if any.
        scale: divides; 1 for a constant column.
        bounds: inner bucket bounds, ascending; bucket i holds `bounds[i-1] <= x < bounds[i]`.
    """

    transform: str
    mean: float = 0.0
    scale: float = 1.0
    bounds: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """Number of ids of a quantile field."""
        return FIRST_ID + len(self.bounds) + 1

    def values(self, x: Floats) -> npt.NDArray[np.float32]:
        """Return the scaled numbers, `[n]` float32, NaN where missing."""
        y = signed_log(x) if self.transform == "log" else x
        return np.clip((y - self.mean) / self.scale, -LARGEST, LARGEST).astype(np.float32)

    def bucket_ids(self, x: Floats) -> npt.NDArray[np.int64]:
        """Return the bucket ids of a quantile field, `[n]`, `NULL_ID` where missing."""
        bucket = np.searchsorted(np.asarray(self.bounds, np.float64), x, side="right") + FIRST_ID
        return np.where(np.isnan(x), NULL_ID, bucket)


def signed_log(x: Floats) -> Floats:
    """Return sign(x) log(1 + |x|)."""
    return np.sign(x) * np.log1p(np.abs(x))


class RowSample:
    """Keeps the numbers of up to `SAMPLE_ROWS` rows: those whose row number hashes lowest, for every block size."""

    def __init__(self, dtype: npt.DTypeLike = np.float64) -> None:
        self._keys = np.empty(0, np.uint64)
        self.values: npt.NDArray[np.floating] = np.empty(0, dtype)

    def add(self, x: npt.NDArray[np.floating], rows: npt.NDArray[np.int64]) -> None:
        """Take numbers `[n]` of rows `[n]`."""
        keys, values = np.concatenate([self._keys, mix_array(rows)]), np.concatenate([self.values, x])
        if len(keys) > SAMPLE_ROWS:
            lowest = np.argpartition(keys, SAMPLE_ROWS)[:SAMPLE_ROWS]
            keys, values = keys[lowest], values[lowest]
        self._keys, self.values = keys, values


class NumericFit:
    """Learns one numeric field block by block in constant memory.

    Moments are merged pairwise (Chan, Golub, LeVeque 1979), so that a large mean does not drown a small variance.
    """

    def __init__(self, options: Numeric) -> None:
        self._options = options
        self.count = 0
        self._mean = 0.0
        self._m2 = 0.0
        self._sample = RowSample()

    def add(self, x: Floats, first_row: int) -> None:
        """Take the values of a block, `[n]` with NaN where missing, the first being row `first_row`."""
        present = ~np.isnan(x)
        kept = x[present]
        if not len(kept):
            return
        if self._options.transform == "quantile":
            self._sample.add(kept, np.flatnonzero(present) + first_row)
            self.count += len(kept)
            return
        y = signed_log(kept) if self._options.transform == "log" else kept
        mean = float(y.mean())
        m2 = float(((y - mean) ** 2).sum())
        total = self.count + len(y)
        delta = mean - self._mean
        self._mean += delta * len(y) / total
        self._m2 += m2 + delta * delta * self.count * len(y) / total
        self.count = total

    def spec(self) -> NumericSpec:
        """Return the fitted field."""
        transform = self._options.transform
        if transform == "raw":
            return NumericSpec(transform)
        if transform == "quantile":
            shares = np.arange(1, self._options.buckets) / self._options.buckets
            sample = self._sample.values
            bounds = np.unique(np.quantile(sample, shares, method="higher"))
            bounds = bounds[bounds > sample.min()]
            return NumericSpec(transform, bounds=tuple(float(b) for b in bounds))
        scale = math.sqrt(self._m2 / self.count)
        tiny = 1e-12 * max(abs(self._mean), 1.0)
        return NumericSpec(transform, self._mean, scale if scale > tiny else 1.0)
