"""Predictions against the truth of a simulated log: what no held-out label can say without noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recsys.data.simulate_random import Floats, Longs
from recsys.data.simulate_value import divergence
from recsys.data.simulate_world import START
from recsys.errors import DataError, did_you_mean, listing

_DAY = 86_400
_TRUTH = {"uniform": "uniform_truth", "log": "truth"}


@dataclass(frozen=True)
class Scored:
    """How predictions compare with the probabilities that drew the labels.

    Args:
        rows: that were compared.
        excess: mean KL(p ‖ prediction) in nats, 0 for the truth: log loss above the least possible, without noise.
        auc: expected AUC of the predictions over labels drawn anew.
        best_auc: that of the truth.
    """

    rows: int
    excess: float
    auc: float
    best_auc: float


def score_file(predictions: Path, simulated: Path, against: str = "uniform") -> Scored:
    """Compare a file of `row_id` and `score` with the truth beside a simulated log.

    Args:
        predictions: Parquet, as `recsys predict --keep row_id` writes it.
        simulated: folder that `recsys simulate` wrote.
        against: rows that were scored, those of the uniform slice or those of the log.

    Raises:
        DataError: a column or the truth is missing, or a row is unknown or there twice.
    """
    both = _with_truth(predictions, simulated, against)
    score, p = (both[name].to_numpy() for name in ("score", "chance"))
    return Scored(len(both), float(divergence(p, score).mean()), expected_auc(score, p), expected_auc(p, p))


def excess_by_day(predictions: Path, simulated: Path, against: str = "uniform") -> pl.DataFrame:
    """Return `day` (from 0), `rows`, `excess` (mean KL in nats) and its standard error `se`, for every day there is.

    Where tastes or popularity change, this tells how long predictions go without an answer to it.

    Args:
        predictions: as in `score_file`.
        simulated: as in `score_file`.
        against: as in `score_file`.

    Raises:
        DataError: as in `score_file`.
    """
    both = _with_truth(predictions, simulated, against)
    score, p = (both[name].to_numpy() for name in ("score", "chance"))
    seconds = pl.scan_parquet(sorted((simulated / against).glob("part-*.parquet"))).select("row_id", "ts").collect()
    days = both.join(seconds, "row_id", maintain_order="left").with_columns(
        day=(pl.col("ts") - START) // _DAY, excess=pl.Series(divergence(p, score))
    )
    spread = pl.col("excess").std() / pl.len().sqrt()
    return days.group_by("day").agg(rows=pl.len(), excess=pl.col("excess").mean(), se=spread).sort("day")


def _with_truth(predictions: Path, simulated: Path, against: str) -> pl.DataFrame:
    """Return `row_id`, `score` and `chance` of the rows of a file of predictions."""
    if against not in _TRUTH:
        raise DataError(
            f"no rows '{against}' to compare with.{did_you_mean(against, _TRUTH)} There are: {listing(_TRUTH)}"
        )
    found = pl.read_parquet(predictions)
    missing = [name for name in ("row_id", "score") if name not in found.columns]
    if missing:
        raise DataError(
            f"{predictions}: no column {listing(missing)}; `recsys predict --keep row_id` writes what is needed here"
        )
    files = sorted((simulated / _TRUTH[against]).glob("part-*.parquet"))
    if not files:
        raise DataError(f"{simulated / _TRUTH[against]}: no truth to compare with; `recsys simulate` writes it")
    twice = len(found) - found["row_id"].n_unique()
    if twice:
        raise DataError(f"{predictions}: {twice} rows are there more than once")
    truth = pl.scan_parquet(files).select("row_id", "chance").collect()
    scores = found.select(pl.col("row_id").cast(pl.Int64), pl.col("score").cast(pl.Float64))
    both = scores.join(truth, "row_id", maintain_order="left")
    if len(both) < len(found):
        raise DataError(f"{predictions}: {len(found) - len(both)} of {len(found)} rows are not in {files[0].parent}")
    return both


def expected_auc(score: Floats, p: Floats) -> float:
    """Return Σ_{i≠j} p_i (1 - p_j) ([s_i > s_j] + ½[s_i = s_j]) / Σ_{i≠j} p_i (1 - p_j); NaN when that is 0.

    Args:
        score: `[n]`.
        p: probability of a 1 `[n]`.
    """
    _, group = np.unique(score, return_inverse=True)
    ones, zeros = np.bincount(group, weights=p), np.bincount(group, weights=1.0 - p)
    itself = float((p * (1.0 - p)).sum())
    pairs = float(p.sum() * (1.0 - p).sum()) - itself
    if pairs <= 0.0:
        return float("nan")
    won = float((ones * (np.cumsum(zeros) - 0.5 * zeros)).sum()) - 0.5 * itself
    return won / pairs


def expected_ndcg(score: Floats, p: Floats, group: Longs, k: int) -> float:
    """Return nDCG@k with the gain p and the discount 1/log2(rank + 1), averaged over groups that have any gain.

    Equal scores keep the order of the rows.

    Args:
        score: `[n]`.
        p: gain `[n]`.
        group: `[n]`.
        k: ranks that count.
    """
    found, ideal = _dcg(score, p, group, k), _dcg(p, p, group, k)
    return float((found[ideal > 0] / ideal[ideal > 0]).mean())


def _dcg(score: Floats, gain: Floats, group: Longs, k: int) -> Floats:
    _, number = np.unique(group, return_inverse=True)
    order = np.lexsort((-score, number))
    first = np.searchsorted(number[order], np.arange(number.max() + 1))
    rank = np.arange(len(order)) - first[number[order]]
    worth = np.where(rank < k, gain[order] / np.log2(rank + 2.0), 0.0)
    return np.bincount(number[order], weights=worth).astype(np.float64)


def propensity_error(estimated: Floats, theta: Floats, observed: Longs) -> tuple[float, float]:
    """Return the root mean square of ln(θ̂/θ), and z = (mean(o/θ̂) - 1) / se, which is small when θ̂ is right.

    Args:
        estimated: θ̂ `[n]`, over all rows, shown or not.
        theta: `[n]`.
        observed: `[n]` in {0, 1}.
    """
    ratio = observed / estimated
    error = np.sqrt(np.mean(np.log(estimated / theta) ** 2))
    return float(error), float((ratio.mean() - 1.0) / (ratio.std() / np.sqrt(len(ratio))))
