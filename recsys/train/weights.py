"""Weights of rows from propensities, in one place; and how many rows such weights leave of a log."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from recsys.contracts import Batch
from recsys.errors import RecipeError, did_you_mean, listing

WeightMode = Literal["none", "floor", "cap", "power", "shrink", "selfnorm"]
"""How a weight 1/θ is bounded; see `make_weight`."""

_RANGES: dict[str, tuple[float, float, str]] = {
    "floor": (0.0, 1.0, "a least propensity in (0, 1]"),
    "cap": (1.0 - 1e-12, math.inf, "a largest weight ≥ 1"),
    "power": (-1e-12, 1.0, "an exponent in [0, 1]"),
    "shrink": (0.0, math.inf, "a number > 0"),
}
"""Mode → what `value` must be: more than the first, at most the second; in words."""


def make_weight(
    theta: Tensor, mode: WeightMode = "none", value: float | None = None, *, rows: Tensor | None = None
) -> Tensor:
    """Weights of rows from their propensities θ: `[B] -> [B]`, float32 (float64 stays), no gradient to θ.

    | mode | weight | value |
    |---|---|---|
    | none | 1/θ | |
    | floor | 1/max(θ, M) | M |
    | cap | min(1/θ, C) | C |
    | power | θ^−α | α |
    | shrink | w·λ/(w² + λ), w = 1/θ | λ |
    | selfnorm | w / mean(w), w = 1/θ, the mean over the rows that count | |

    Args:
        theta: propensities in (0, 1].
        mode: how large weights are kept down.
        value: M, C, α or λ.
        rows: `[B]`, not 0 for the rows that count; the others get the weight 0.

    Raises:
        RecipeError: no such mode, or a value that the mode does not take.
    """
    _check(mode, value)
    theta = theta.detach()
    theta = theta if theta.dtype == torch.float64 else theta.float()
    given = 0.0 if value is None else value
    with torch.autocast(theta.device.type, enabled=False):
        weight = 1 / (theta.clamp(min=given) if mode == "floor" else theta)
        if mode == "cap":
            weight = weight.clamp(max=given)
        elif mode == "power":
            weight = weight**given
        elif mode == "shrink":
            weight = weight * given / (weight**2 + given)
        counts = torch.ones_like(weight) if rows is None else (rows != 0).to(weight.dtype)
        weight = torch.where(counts > 0, weight, 0.0)
        if mode == "selfnorm":
            weight = weight * (counts.sum().clamp(min=1) / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))
    return weight


def _check(mode: str, value: float | None) -> None:
    modes = ("none", *_RANGES, "selfnorm")
    if mode not in modes:
        raise RecipeError(f"unknown weight mode '{mode}'.{did_you_mean(mode, modes)} Modes: {listing(modes)}")
    if mode not in _RANGES:
        if value is not None:
            raise RecipeError(f"the weight mode '{mode}' takes no value, got {value}")
        return
    low, high, words = _RANGES[mode]
    if value is None or not low < value <= high or math.isinf(value):
        raise RecipeError(f"the weight mode '{mode}' takes {words}, got {value}")


OCTAVES = (-16, 48)
"""Powers of two between which weights are counted apart; smaller and larger ones count with the last."""
STEPS = 32
"""Classes of weights per power of two: a weight is known to 1 %."""
CLASSES = (OCTAVES[1] - OCTAVES[0]) * STEPS

_SUM, _SQUARES, _LARGEST, _ROWS, _BOUNDED, _RATIO, _RATIO_SQUARES, _SEEN, _HIDDEN, _USED, _USED_SQUARES = range(11)
FIRST = 11
"""Where the classes begin."""
SIZE = FIRST + CLASSES
"""Numbers that `weighed` keeps: sums, and rows by class of weight."""

WARN, REFUSE = 0.1, 0.01
"""Shares of effective rows below which training warns, and stops."""
LARGEST_Z = 4.0
"""Of the calibration, in standard errors."""


def weighed(sums: Tensor, raw: Tensor, used: Tensor, batch: Batch) -> Tensor:
    """Return `sums [SIZE]` float64 with a batch's weights `[B]` added, before and after they are bounded."""
    raw, used = raw.detach().double(), used.detach().double()
    counts = raw > 0
    new = sums.clone()
    new[_SUM] += raw.sum()
    new[_SQUARES] += (raw**2).sum()
    new[_LARGEST] = torch.maximum(sums[_LARGEST], raw.amax()) if len(raw) else sums[_LARGEST]
    new[_ROWS] += counts.sum()
    # A bound that is relative, such as a mean, is none: only weights that were made smaller by one count.
    new[_USED] += torch.where(counts, used, 0.0).sum()
    new[_USED_SQUARES] += torch.where(counts, used, 0.0).square().sum()
    new[_BOUNDED] += (counts & (used < raw * (1 - 1e-6))).sum()
    if "observed" in batch.context and "propensity" in batch.context:
        observed = batch.context["observed"].double()
        ratio = observed / batch.context["propensity"].double()
        new[_RATIO] += ratio.sum()
        new[_RATIO_SQUARES] += (ratio**2).sum()
        new[_SEEN] += len(ratio)
        new[_HIDDEN] += (observed == 0).sum()
    place = ((raw.clamp(min=2.0 ** OCTAVES[0]).log2() - OCTAVES[0]) * STEPS).long().clamp(0, CLASSES - 1)
    new[FIRST:].scatter_add_(0, place, counts.double())
    return new


def merged(parts: Tensor) -> Tensor:
    """Return the sums of all ranks, `[R, SIZE] -> [SIZE]`."""
    whole = parts.sum(0)
    whole[_LARGEST] = parts[:, _LARGEST].amax()
    return whole


def flattened(sums: Tensor) -> str | None:
    """Say it if every weight of an epoch lies beyond its bound, so that all rows count the same; else None."""
    total, squares, _, rows, bounded = sums[:_RATIO].tolist()
    used, used_squares = sums[_USED:FIRST].tolist()
    vary = rows * squares > total**2 * (1 + 1e-6)
    alike = rows * used_squares <= used**2 * (1 + 1e-9)
    if rows < 2 or bounded < rows or not vary or not alike:
        return None
    return (
        f"all {rows:,.0f} weights, {total / rows:,.4g} on the average, lie beyond their bound and count as "
        f"{used / rows:,.4g}: they say nothing any more"
    )


def weight_facts(sums: Tensor) -> dict[str, float]:
    """Return what an epoch's weights were like; empty if no row had one.

    `ess` = (Σw)²/Σw², over the rows with a weight; `ess_share` = ess/n; `max_share` = max w/Σw; `top_share`, the share
    of Σw in the 1 % of the rows that have the largest weights, to 1 %; `clipped`, the share of rows whose weight was
    made smaller; and, of a log that has rows that were not shown, `calibration_z` = (mean(o/θ) − 1)/se over all rows,
    which a right θ keeps within ±4.
    """
    total, squares, largest, rows, bounded, ratio, ratio_squares, seen, hidden = sums[:_USED].tolist()
    if not rows or not total:
        return {}
    effective = total**2 / squares
    facts = {
        "ess": effective,
        "ess_share": effective / rows,
        "max_share": largest / total,
        "top_share": _top_share(sums[FIRST:].cpu(), rows),
        "clipped": bounded / rows,
    }
    if hidden and seen > 1:
        mean = ratio / seen
        variance = max(ratio_squares / seen - mean**2, 0.0)
        facts["calibration_z"] = (mean - 1) / math.sqrt(variance / seen) if variance else math.nan
    return facts


def _top_share(counts: Tensor, rows: float) -> float:
    """Share of the sum of all weights in the 1 % of the rows with the largest ones, by class."""
    middle = 2.0 ** (OCTAVES[0] + (torch.arange(CLASSES, dtype=torch.float64) + 0.5) / STEPS)
    counts, middle = counts.flip(0), middle.flip(0)
    before = counts.cumsum(0) - counts
    taken = torch.minimum(counts, (0.01 * rows - before).clamp(min=0))
    return float((taken * middle).sum() / (counts * middle).sum())


def told(facts: dict[str, float]) -> str:
    """Say what the weights of an epoch were like."""
    z = f", calibration z {facts['calibration_z']:.1f}" if "calibration_z" in facts else ""
    return (
        f"weights: {facts['ess']:,.0f} effective rows ({facts['ess_share']:.1%}), largest {facts['max_share']:.1%} and "
        f"top 1 % of the rows {facts['top_share']:.1%} of the sum, {facts['clipped']:.1%} clipped{z}"
    )
