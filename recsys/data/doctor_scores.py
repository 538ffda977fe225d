"""What encoded rows tell about single inputs: missing and unknown shares, how well one input ranks, and drift."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from recsys.contracts import NULL_ID, UNKNOWN_ID, EncodedSchema, History
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.hashing import mix_array

SAMPLE_ROWS = 1 << 18
"""Numbers are ranked exactly up to this many rows, and those of a fixed sample of rows above."""
_TOP = 20
_DECILES = np.arange(1, 10) / 10
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def grouped_auc(score: Floats, negative: Counts, positive: Counts) -> float:
    """Return the AUC of rows that come in groups of one score each; equal scores count half, NaN without both classes.

    Args:
        score: `[n]`, one per group.
        negative: `[n]` rows with label 0.
        positive: `[n]` rows with label 1.
    """
    _, place = np.unique(score, return_inverse=True)
    low = np.bincount(place, weights=negative)
    high = np.bincount(place, weights=positive)
    pairs = low.sum() * high.sum()
    if not pairs:
        return float("nan")
    return float((high * (np.cumsum(low) - low / 2)).sum() / pairs)


def held_out_auc(counts: Counts) -> float:
    """Return the AUC of a categorical input that is replaced by its share of positives, learned on other rows.

    The rows are in two halves; each is ranked by the shares of the other, drawn towards the overall share by one
    imagined row, and the two AUCs are averaged. A value that only one row has says nothing about the other half:
    row ids get .5, not 1.

    Args:
        counts: `[ids, 2 halves, 2 labels]` rows.
    """
    found = []
    for half in (0, 1):
        learned = counts[:, 1 - half]
        total = learned.sum()
        if not total:
            continue
        prior = learned[:, 1].sum() / total
        score = (learned[:, 1] + prior) / (learned.sum(axis=1) + 1.0)
        found.append(grouped_auc(score, counts[:, half, 0], counts[:, half, 1]))
    known = [auc for auc in found if not np.isnan(auc)]
    return float(np.mean(known)) if known else float("nan")


def ranked_auc(x: npt.NDArray[np.float32], label: npt.NDArray[np.uint8]) -> float:
    """Return the AUC of a number in the better direction, at least .5; missing values below or above all others.

    Args:
        x: `[n]`, NaN where missing.
        label: `[n]` in {0, 1}.
    """
    missing = np.isnan(x)
    ends = (-np.inf, np.inf) if missing.any() else (0.0,)
    found = [
        grouped_auc(np.where(missing, end, x.astype(np.float64)), (label == 0).astype(int), label.astype(int))
        for end in ends
    ]
    return max(max(auc, 1 - auc) for auc in found)


def stability_index(before: Counts, after: Counts) -> tuple[float, float]:
    """Return the population stability index of two counts `[bins]`, and what chance alone may give it.

    PSI = Σ (p - q) ln(p / q), with half a row added to every bin; .25 is the customary bound of a change that
    matters. Under equal distributions its mean is about (bins - 1)(1/n + 1/m); twice that is returned.
    """
    n, m, bins = before.sum(), after.sum(), len(before)
    if not n or not m or bins < 2:
        return 0.0, 0.0
    p, q = (before + 0.5) / (n + bins / 2), (after + 0.5) / (m + bins / 2)
    return float(((p - q) * np.log(p / q)).sum()), float(2 * (bins - 1) * (1 / n + 1 / m))


class Sample:
    """Keeps whole rows in bounded memory: all up to `most`, and above those whose row number hashes small."""

    def __init__(self, most: int = SAMPLE_ROWS) -> None:
        self._most = most
        self._keys = np.empty(0, np.uint64)
        self._parts: list[npt.NDArray[np.float32]] = []
        self._labels: list[npt.NDArray[np.uint8]] = []

    def add(self, keys: npt.NDArray[np.uint64], values: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> None:
        """Take a block: keys `[n]`, values `[n, S]`, labels `[n, T]`."""
        self._keys = np.concatenate([self._keys, keys])
        self._parts.append(values)
        self._labels.append(labels)
        if len(self._keys) > 2 * self._most:
            self._shrink()

    def _shrink(self) -> None:
        if len(self._keys) > self._most:
            kept = np.sort(np.argpartition(self._keys, self._most)[: self._most])
            self._keys = self._keys[kept]
            self._parts = [np.concatenate(self._parts)[kept]]
            self._labels = [np.concatenate(self._labels)[kept]]

    def result(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Return values `[n, S]` and labels `[n, T]`, n being at most `most`."""
        self._shrink()
        if not self._parts:
            return np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)
        return np.concatenate(self._parts), np.concatenate(self._labels)


class EncodedFacts:
    """Running facts about the encoded rows of one split; memory grows with the vocabularies, not with the rows.

    Args:
        schema: of the rows.
        targets: whether to learn how well each input ranks the labels.
    """

    def __init__(self, schema: EncodedSchema, *, targets: bool) -> None:
        self.rows = 0
        self.positives = dict.fromkeys(schema.tasks, 0)
        self.null: dict[str, int] = {}
        self.unknown: dict[str, int] = {}
        self.events: dict[str, int] = {}
        self._schema = schema
        self._fields = {f.name: np.zeros(f.rows, np.int64) for f in schema.fields if not f.numeric}
        self._targets = {
            (task, name): np.zeros(4 * len(count), np.int64)
            for task in (schema.tasks if targets else ())
            for name, count in self._fields.items()
        }
        self._numeric = [f.name for f in schema.fields if f.numeric]
        beside = [name for history in schema.histories for name in _list_scalars(history)]
        self.scalars = [*self._numeric, *beside]
        self._sample = Sample()
        self._sampled: tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]] | None = None

    def add(self, block: EncodedColumns) -> None:
        """Take a block of encoded rows with their labels."""
        keys = mix_array(np.arange(self.rows, self.rows + block.rows))
        half = (keys & np.uint64(1)).astype(np.int64)
        self.rows += block.rows
        for task in self.positives:
            self.positives[task] += int(block.label[task].sum())
        for name, count in self._fields.items():
            ids = block.ids[name].astype(np.int64)
            _count(count, ids)
            for task in self._schema.tasks:
                if (task, name) in self._targets:
                    _count(self._targets[task, name], ids * 4 + half * 2 + block.label[task])
        self._add_missing(block)
        if self.scalars:
            labels = np.stack([*block.label.values()], axis=1) if block.label else np.empty((block.rows, 0), np.uint8)
            self._sample.add(keys, np.stack(self._scalars(block), axis=1), labels)

    def _add_missing(self, block: EncodedColumns) -> None:
        for name, count in self._fields.items():
            self.null[name], self.unknown[name] = int(count[NULL_ID]), int(count[UNKNOWN_ID])
        for name in self._numeric:
            self.null[name] = self.null.get(name, 0) + int(np.isnan(block.values[name]).sum())
        for history in self._schema.histories:
            ragged = block.history[history.name]
            for k, column in enumerate(history.columns):
                self.null[column.name] = self.null.get(column.name, 0) + int((ragged.length == 0).sum())
                unknown = int((ragged.values[:, k] == UNKNOWN_ID).sum())
                self.unknown[column.name] = self.unknown.get(column.name, 0) + unknown
                self.events[column.name] = self.events.get(column.name, 0) + len(ragged.values)

    def _scalars(self, block: EncodedColumns) -> list[npt.NDArray[np.float32]]:
        """Return numbers of every row that are ranked: numeric inputs, lengths of lists, hits of the target in them."""
        found = [np.asarray(block.values[name], np.float32) for name in self._numeric]
        for history in self._schema.histories:
            ragged = block.history[history.name]
            found.append(ragged.length.astype(np.float32))
            if history.target:
                found.append(_hits(ragged, [block.ids[name] for name in history.target]))
        return found

    def null_rate(self, column: str) -> float:
        """Return the share of rows without a value (of a list: without events)."""
        return self.null[column] / self.rows if self.rows else 0.0

    def unknown_rate(self, column: str) -> float | None:
        """Return the share of rows (of a list: of events) whose value is not in the vocabulary; None of numbers."""
        if column not in self.unknown:
            return None
        return self.unknown[column] / max(self.events.get(column, self.rows), 1)

    def sampled(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Return the sample of numbers, `[n, S]` in the order of `scalars`, and its labels `[n, T]`."""
        if self._sampled is None:
            self._sampled = self._sample.result()
        return self._sampled

    def aucs(self, task: str) -> Mapping[str, float]:
        """Return input → AUC of that input alone; NaN where a class is absent."""
        found = {
            name: held_out_auc(count.reshape(-1, 2, 2)) for (of, name), count in self._targets.items() if of == task
        }
        values, labels = self.sampled()
        at = self._schema.tasks.index(task)
        return found | {name: ranked_auc(values[:, i], labels[:, at]) for i, name in enumerate(self.scalars)}

    def drift_to(self, other: EncodedFacts) -> Mapping[str, tuple[float, float]]:
        """Return input → stability index from this split to another, and its bound by chance.

        The bins of a categorical input are its 20 most frequent values in this split, and all others (the unknown
        ones too: leaving them out would make the known ones look more frequent); those of a number its deciles.
        """
        found = {}
        for name, count in self._fields.items():
            before, after = count, other._fields[name]
            ranked = np.argsort(-before, kind="stable")
            top = ranked[ranked != UNKNOWN_ID][:_TOP]
            rest = [[c.sum() - c[top].sum()] for c in (before, after)]
            bins = [np.concatenate([c[top], r]) for c, r in zip((before, after), rest, strict=True)]
            used = (bins[0] + bins[1]) > 0
            found[name] = stability_index(bins[0][used], bins[1][used])
        mine, its = self.sampled()[0], other.sampled()[0]
        if len(mine) and len(its):
            found |= {name: _number_drift(mine[:, i], its[:, i]) for i, name in enumerate(self.scalars)}
        return found


def _list_scalars(history: History) -> list[str]:
    length = f"length of {history.name}"
    return [length, f"target in {history.name}"] if history.target else [length]


def _hits(ragged: Ragged, target: list[npt.NDArray[np.integer]]) -> npt.NDArray[np.float32]:
    """Return how many past events of each row equal the row's own target in every column, `[rows]`."""
    row = np.repeat(np.arange(len(ragged.length)), ragged.length)  # [E]
    same = np.ones(len(row), np.bool_)
    for k, ids in enumerate(target):
        own = ids[row]
        same &= (ragged.values[:, k] == own) & (own > UNKNOWN_ID)
    return np.bincount(row[same], minlength=len(ragged.length)).astype(np.float32)


def _count(into: Counts, codes: npt.NDArray[np.integer]) -> None:
    """Add how often each code occurs; large tables are touched only where there is something to add."""
    if len(into) <= 4 * len(codes):
        into += np.bincount(codes, minlength=len(into))
    else:
        code, count = np.unique(codes, return_counts=True)
        into[code] += count


def _number_drift(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return the stability index over the deciles of `before`, missing values being a bin of their own."""
    known = before[~np.isnan(before)]
    if not len(known):
        return 0.0, 0.0
    bounds = np.unique(np.quantile(known, _DECILES, method="higher"))
    missing = len(bounds) + 1
    counts = [
        np.bincount(np.where(np.isnan(x), missing, np.searchsorted(bounds, x, side="right")), minlength=missing + 1)
        for x in (before, after)
    ]
    used = (counts[0] + counts[1]) > 0
    return stability_index(counts[0][used], counts[1][used])
