"""Compares the rows that a server sees with those of training: missing, unknown, and where numbers and scores lie."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from recsys.contracts import NULL_ID, UNKNOWN_ID
from recsys.deploy.encode import Encoded
from recsys.deploy.predictor import Predictor, Scores, together
from recsys.deploy.server.batch import joined
from recsys.deploy.spec import NumberColumn

HALF = 10_000
"""So many rows ago, a row counts half."""
EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Upper ends of the bins of scores."""
_TOGETHER = 256
"""So many rows are counted at once; counting each row alone would cost as much as scoring it."""
_SMALLEST = 1e-4
_NEAR = 1e-6
Floats = npt.NDArray[np.float64]


class Tally:
    """Counts of rows by column: all of them, and the recent ones with weights that halve every `HALF` rows."""

    def __init__(self, *shape: int) -> None:
        self.total = np.zeros(shape)
        self.recent = np.zeros(shape)

    def add(self, counts: npt.NDArray[Any], rows: int) -> None:
        """Add what was counted in so many rows."""
        self.total += counts
        self.recent *= 0.5 ** (rows / HALF)
        self.recent += counts


class Drift:
    """Counts of one model since it began to serve.

    Args:
        predictor: whose rows and scores are seen.
    """

    def __init__(self, predictor: Predictor) -> None:
        spec, schema = predictor.spec, predictor.schema
        self._columns: Mapping[str, Mapping[str, Any]] = {c["name"]: c["baseline"] for c in schema["columns"]}
        self._ids = [c.column for c in spec.ids]
        self._numbers = [c.column for c in spec.numbers]
        self._lists = [c.column for group in spec.lists for c in group.columns]
        self._edges, self._below = _edges(spec.numbers, self._columns)
        self._tasks = predictor.tasks
        self._scores: Mapping[str, Any] = schema.get("scores", {})
        names = len(self._ids) + len(self._numbers) + len(self._lists)
        self.values, self.missing, self.unknown = Tally(names), Tally(names), Tally(names)
        self._bins = Tally(*self._edges.shape)
        self.clipped = 0
        self._waiting: list[tuple[Encoded, Scores]] = []
        self._rows = 0
        self._lock = threading.Lock()
        self._histogram = np.zeros((len(self._tasks), len(EDGES) + 1))
        self._sums = np.zeros(len(self._tasks))
        self._at_most = Tally(len(self._tasks), max((len(s["edges"]) for s in self._scores.values()), default=0))
        self._scored = Tally(1)

    def saw(self, encoded: Encoded, scores: Scores) -> None:
        """Take note of rows; they are counted when there are some of them, or when somebody asks."""
        with self._lock:
            self._waiting.append((encoded, scores))
            self._rows += len(scores)
            if self._rows >= _TOGETHER:
                self._count()

    def counted(self) -> None:
        """Count what waits."""
        with self._lock:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            encoded, scores = zip(*self._waiting, strict=True)
            self._waiting, self._rows = [], 0
            self._add(joined(encoded), together(scores))

    def _add(self, encoded: Encoded, scores: Scores) -> None:
        rows, numbers = len(encoded.ids), len(self._numbers)
        parts = [(np.full(len(self._ids) + numbers, rows), *_rates(encoded.ids))]
        for events, length in encoded.lists:
            inside = np.arange(events.shape[1]) < length[:, None]
            parts.append((np.full(events.shape[2], int(length.sum())), *_rates(events[inside])))
        known, missing, unknown = (np.concatenate(found) for found in zip(*parts, strict=True))
        self.values.add(known, rows)
        self.missing.add(missing, rows)
        unknown[len(self._ids) : len(self._ids) + numbers] = 0  # a number's id says whether it is there
        self.unknown.add(unknown, rows)
        if numbers and encoded.values is not None:
            own = slice(len(self._ids), len(self._ids) + numbers)
            there = encoded.ids[:, own] != NULL_ID
            at_most = (encoded.values[:, own, None] <= self._edges) & there[:, :, None]
            self._bins.add(at_most.sum(axis=0), rows)
        self._count_scores(scores, rows)

    def _count_scores(self, scores: Scores, rows: int) -> None:
        self.clipped += int(scores.clipped.sum())
        self._scored.add(np.array([rows]), rows)
        at_most = np.zeros(self._at_most.total.shape)
        for t, task in enumerate(self._tasks):
            p = scores.probability[task]
            self._histogram[t] += np.bincount(np.searchsorted(EDGES, p), minlength=len(EDGES) + 1)
            self._sums[t] += p.sum()
            if task in self._scores:
                at_most[t] = (p[:, None] <= np.array(self._scores[task]["edges"]) + _NEAR).sum(axis=0)
        self._at_most.add(at_most, rows)

    def collect(self) -> Iterable[Metric]:
        """Yield what Prometheus reads."""
        self.counted()
        names = [*self._ids, *self._numbers, *self._lists]
        told: list[tuple[str, str, Tally]] = [
            ("recsys_values", "Values that were read (events, for lists)", self.values),
            ("recsys_missing_values", "Values that were missing", self.missing),
            ("recsys_unknown_values", "Values that training never saw", self.unknown),
        ]
        for name, text, tally in told:
            family = CounterMetricFamily(name, text, labels=["column"])
            for column, count in zip(names, tally.total.tolist(), strict=True):
                family.add_metric([column], count)
            yield family
        yield from self._rates(names)
        yield CounterMetricFamily("recsys_clipped_ids", "Ids outside of their field's range", value=self.clipped)
        family_ = HistogramMetricFamily("recsys_scores", "Probabilities that were given", labels=["task"])
        for t, task in enumerate(self._tasks):
            counts = np.cumsum(self._histogram[t])
            bounds = [*(str(edge) for edge in EDGES), "+Inf"]
            family_.add_metric([task], list(zip(bounds, counts.tolist(), strict=True)), float(self._sums[t]))
        yield family_
        psi = GaugeMetricFamily(
            "recsys_drift_psi",
            "Population stability index of recent numbers and scores against training; above 0.2 they have moved",
            labels=["kind", "name"],
        )
        for kind, name, value in self._indices():
            psi.add_metric([kind, name], value)
        yield psi

    def _rates(self, names: Sequence[str]) -> Iterable[Metric]:
        recent = GaugeMetricFamily("recsys_recent_ratio", "Share of recent values", labels=["column", "what"])
        base = GaugeMetricFamily("recsys_training_ratio", "The same share in training", labels=["column", "what"])
        for what, tally in (("missing", self.missing), ("unknown", self.unknown)):
            share = tally.recent / np.maximum(self.values.recent, 1e-12)
            for column, value in zip(names, share.tolist(), strict=True):
                if what in self._columns[column]:
                    recent.add_metric([column, what], value)
                    base.add_metric([column, what], float(self._columns[column][what]))
        yield recent
        yield base

    def _indices(self) -> Iterable[tuple[str, str, float]]:
        first = len(self._ids)
        for f, column in enumerate(self._numbers):
            there = self.values.recent[first + f] - self.missing.recent[first + f]
            known = ~np.isnan(self._below[f])
            if there > 0 and known.any():
                yield "number", column, index(self._bins.recent[f][known] / there, self._below[f][known])
        for t, task in enumerate(self._tasks):
            if task in self._scores and self._scored.recent[0] > 0:
                expected = np.array(self._scores[task]["at_most"], dtype=np.float64)
                found = self._at_most.recent[t][: len(expected)] / self._scored.recent[0]
                yield "score", task, index(found, expected)


def index(found: Floats, expected: Floats) -> float:
    """Return the population stability index Σ (a − b) ln(a / b) of two distributions, given by shares up to edges.

    `[E], [E] -> float`; a bin without rows counts as one of a ten-thousandth.
    """
    masses = [np.diff(np.concatenate([[0.0], shares, [1.0]])) for shares in (found, expected)]
    a, b = (np.maximum(mass, _SMALLEST) for mass in masses)
    return float(((a - b) * np.log(a / b)).sum())


def _rates(ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`[B, F] -> [F], [F]`: missing and unknown."""
    return (ids == NULL_ID).sum(axis=0), (ids == UNKNOWN_ID).sum(axis=0)


def _edges(numbers: Sequence[NumberColumn], columns: Mapping[str, Mapping[str, Any]]) -> tuple[Floats, Floats]:
    """Return scaled edges and the shares of training up to each, `[N, E]` both; NaN where nothing is known."""
    most = max((len(columns[n.column].get("at_most", {})) for n in numbers), default=0)
    edges, below = (np.full((len(numbers), most), np.nan) for _ in range(2))
    for f, number in enumerate(numbers):
        shares, quantiles = (columns[number.column].get(key, {}) for key in ("at_most", "quantiles"))
        for e, (name, share) in enumerate(shares.items()):
            raw = float(quantiles[name])
            y = np.sign(raw) * np.log1p(abs(raw)) if number.transform == "log" else raw
            edge = (y - number.mean) / number.scale
            edges[f, e], below[f, e] = edge + _NEAR * max(1.0, abs(edge)), share
    return edges, below
