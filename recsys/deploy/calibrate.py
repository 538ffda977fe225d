"""The stage `calibrate`: finds how logits become probabilities that are as often right as they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from recsys.contracts import Stage
from recsys.deploy.calibration import Calibration, Curve, Floats, sigmoid
from recsys.deploy.export import CURVES, Export
from recsys.deploy.reliability import plot, reliability
from recsys.errors import RecipeError
from recsys.train.checkpoint import write_json
from recsys.train.run import Run
from recsys.train.score import predict
from recsys.train.stages import Evaluate

Method = Literal["temperature", "platt", "isotonic"]
_BINS = 1000
_STEPS = 100
_HOTTEST = 1e3


class Calibrate:
    """Fit, on rows that did not train the model, how its logits become probabilities; the bundle applies it.

    temperature: p = σ(z / T). platt: p = σ(z / T + b). isotonic: p = the non-decreasing function of z nearest to the
    labels, found by pooling adjacent violators over 1,000 groups of rows with near logits. The model stays as it is;
    rankings do not change, but for ties that isotonic makes. It comes after the last stage that changes the model.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (temperature); Platt, "Probabilistic Outputs for
    Support Vector Machines", 1999; Zadrozny and Elkan, "Transforming Classifier Scores into Accurate Multiclass
    Probability Estimates", KDD 2002 (isotonic).

    Args:
        method: temperature, platt or isotonic.
        split: on whose rows it is fitted.
        plot: draw a reliability diagram into the stage's folder, which needs the extra `report`.
    """

    name = "calibrate"

    def __init__(
        self,
        *,
        method: Method = "temperature",
        split: Literal["valid", "test", "train"] = "valid",
        plot: bool = False,
    ) -> None:
        self.method: Method = method
        self.split = split
        self.plot = plot

    def run(self, run: Run) -> None:
        """Write `calibration.json` of the run, and how well it does.

        Raises:
            RecipeError: there is no such split, or one of its labels has one class only.
        """
        splits = [self.split, *(name for name in ("valid", "test") if name in run.splits and name != self.split)]
        curves: dict[str, Curve] = {}
        told: dict[str, Any] = {}
        for split in splits:
            found = predict(run.model, run.split(split), run.train.eval_batch_size, run.world, run.device)
            weights = found.context["weight"].numpy() if "weight" in found.context else None
            for task in run.schema.tasks:
                z, y = found.logit[task].numpy(), found.label[task].numpy()
                if split == self.split:
                    curves[task] = _fitted(run.stage, task, z, y, weights, self.method)
                before, after = _measured(sigmoid(z), y), _measured(curves[task](z), y)
                told.setdefault(split, {})[task] = {"before": before, "after": after}
                run.say(f"{run.stage}: {split}: {task}: {_words(before)} → {_words(after)}")
                if self.plot and run.world.leads:
                    plot(run.stage_folder / f"{split}-{_plain(task)}.svg", z, curves[task](z), y)
        if run.world.leads:
            write_json(run.stage_folder / "calibrate.json", told)
            write_json(run.folder / CURVES, Calibration(curves).to_json())


def check_calibrated_last(stages: list[tuple[str, Stage]]) -> None:
    """Refuse a stage that could change the model after it was calibrated.

    Raises:
        RecipeError: there is one.
    """
    calibrated = ""
    for label, stage in stages:
        if isinstance(stage, Calibrate):
            calibrated = label
        elif calibrated and not isinstance(stage, Evaluate | Export):
            raise RecipeError(f"{label} may change the model after {calibrated}; put {calibrated} behind it")


def fit_curve(z: Floats, y: Floats, method: Method, weights: Floats | None = None) -> Curve:
    """Return the curve with the least log loss of its kind (isotonic: squared error), logits `[n]`, labels `[n]`."""
    w = np.ones_like(z) if weights is None else weights.astype(np.float64)
    if method == "isotonic":
        return _isotonic(z, y, w)
    slope, shift = _logistic(z, y, w, shifted=method == "platt")
    return Curve(method, 1.0 / slope, shift)


def _fitted(stage: str, task: str, z: Floats, y: Floats, weights: Floats | None, method: Method) -> Curve:
    if len(y) == 0 or y.min() == y.max():
        raise RecipeError(f"{stage}: all labels of {task!r} are equal in these {len(y):,} rows; calibrate on others")
    return fit_curve(z, y, method, weights)


def _logistic(z: Floats, y: Floats, w: Floats, *, shifted: bool) -> tuple[float, float]:
    """Newton's method on the weighted log loss of σ(a z + b), halving steps that do not descend; a stays positive."""
    a, b = 1.0, 0.0
    total = w.sum()

    def loss(a: float, b: float) -> float:
        x = a * z + b
        return float((w * (np.logaddexp(0.0, x) - y * x)).sum() / total)

    now = loss(a, b)
    for _ in range(_STEPS):
        p = sigmoid(a * z + b)
        error, curvature = w * (p - y), w * p * (1.0 - p)
        gradient = np.array([(error * z).sum(), error.sum() if shifted else 0.0]) / total
        mixed = (curvature * z).sum() if shifted else 0.0
        hessian = np.array([[(curvature * z * z).sum(), mixed], [mixed, curvature.sum() if shifted else total]]) / total
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        size = 1.0
        while size > 1e-6:
            next_a, next_b = max(a - size * float(step[0]), 1.0 / _HOTTEST), b - size * float(step[1])
            after = loss(next_a, next_b)
            if after <= now:
                break
            size /= 2
        else:
            return a, b
        done = now - after < 1e-14
        a, b, now = next_a, next_b, after
        if done:
            break
    return a, b


def _isotonic(z: Floats, y: Floats, w: Floats) -> Curve:
    """Pool adjacent violators over groups of rows with near logits; equal logits stay together."""
    order = np.argsort(z, kind="stable")
    z, y, w = z[order], y[order], w[order]
    group = np.arange(len(z)) * _BINS // len(z)
    first = np.concatenate([[True], (z[1:] != z[:-1]) & (group[1:] != group[:-1])])
    starts = np.flatnonzero(first)
    weight, positive = np.add.reduceat(w, starts), np.add.reduceat(w * y, starts)
    ends = np.append(starts[1:], len(z)) - 1
    pools: list[list[float]] = []  # weight, positives, lowest and highest logit of groups that share a probability
    for mass, hits, low, high in zip(weight, positive, z[starts], z[ends], strict=True):
        pools.append([float(mass), float(hits), float(low), float(high)])
        while len(pools) > 1 and pools[-2][1] * pools[-1][0] >= pools[-1][1] * pools[-2][0]:
            last = pools.pop()
            pools[-1] = [pools[-1][0] + last[0], pools[-1][1] + last[1], pools[-1][2], last[3]]
    least = 1.0 / (len(z) + 2.0)
    points = [(at, p) for p, low, high in _levels(pools, least) for at in dict.fromkeys((low, high))]
    return Curve("isotonic", logits=tuple(at for at, _ in points), probabilities=tuple(p for _, p in points))


def _levels(pools: list[list[float]], least: float) -> list[tuple[float, float, float]]:
    return [(min(max(hits / mass if mass else 0.5, least), 1 - least), low, high) for mass, hits, low, high in pools]


def _measured(p: Floats, y: Floats) -> dict[str, float]:
    clipped = np.clip(p, 1e-12, 1 - 1e-12)
    logloss = float(-(y * np.log(clipped) + (1 - y) * np.log1p(-clipped)).mean())
    bins = reliability(p, y)
    ece = float((bins.rows * np.abs(bins.predicted - bins.observed)).sum() / max(len(y), 1))
    return {"logloss": logloss, "ece": ece}


def _words(measured: Mapping[str, float]) -> str:
    return f"log loss {measured['logloss']:.5f}, ECE {measured['ece']:.5f}"


def _plain(task: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in task)
