"""From logits to probabilities that are as often right as they say; a value, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.errors import BundleError

Floats = npt.NDArray[np.float64]
METHODS = ("none", "temperature", "platt", "isotonic")


@dataclass(frozen=True)
class Curve:
    """How the logit of one task becomes a probability.

    none: p = σ(z). temperature and platt: p = σ(z / T + b), b = 0 for the first.
    isotonic: p = the piecewise linear function through the points (logit, probability), constant outside of them.

    Args:
        method: one of `METHODS`.
        temperature: T.
        shift: b.
        logits: of the points, ascending.
        probabilities: of the points, not falling.
    """

    method: str = "none"
    temperature: float = 1.0
    shift: float = 0.0
    logits: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def __call__(self, logit: Floats) -> Floats:
        """`[B] -> [B]` float64 in [0, 1]."""
        if self.method == "isotonic":
            return np.interp(logit, self.logits, self.probabilities)
        return sigmoid(logit if self.method == "none" else logit / self.temperature + self.shift)

    def check(self) -> None:
        """Raise a ValueError for a curve that is none."""
        good = self.method in METHODS and self.temperature > 0
        if self.method == "isotonic":
            p = np.array(self.probabilities)
            rising = bool((np.diff(self.logits) > 0).all() and (np.diff(p) >= 0).all())
            good = good and 0 < len(self.logits) == len(p) and rising and bool(((p >= 0) & (p <= 1)).all())
        if not good:
            raise ValueError(f"no curve: {self.method!r}")


@dataclass(frozen=True)
class Calibration:
    """The curve of every task."""

    curves: Mapping[str, Curve]

    @classmethod
    def none(cls, tasks: tuple[str, ...]) -> Calibration:
        """Return the calibration that changes nothing."""
        return cls({task: Curve() for task in tasks})

    def probabilities(self, logit: Mapping[str, Floats]) -> dict[str, Floats]:
        """`{task: [B]} -> {task: [B]}`."""
        return {task: self.curves[task](z) for task, z in logit.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            task: {
                "method": c.method,
                "temperature": c.temperature,
                "shift": c.shift,
                "logits": list(c.logits),
                "probabilities": list(c.probabilities),
            }
            for task, c in self.curves.items()
        }

    @classmethod
    def of_json(cls, body: Any, tasks: tuple[str, ...]) -> Calibration:
        """Read what `to_json` gave.

        Raises:
            BundleError: it is something else.
        """
        try:
            curves = {}
            for task in tasks:
                entry = body[task]
                points = {name: tuple(float(x) for x in entry[name]) for name in ("logits", "probabilities")}
                curves[task] = Curve(entry["method"], float(entry["temperature"]), float(entry["shift"]), **points)
                curves[task].check()
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"calibration.json: not a calibration of {', '.join(tasks)}: {error}") from None
        return cls(curves)


def sigmoid(logit: Floats) -> Floats:
    """Return 1 / (1 + exp(-z)) without overflow, `[B] -> [B]`."""
    small = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1.0, small) / (1.0 + small)
