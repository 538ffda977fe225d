"""From what was measured to findings: when it matters, how much, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from recsys.data.doctor_facts import Examination, Finding, Limits, Severity, SplitFacts
from recsys.data.doctor_rows import Duplicates
from recsys.data.doctor_time import UNITS, Times
from recsys.data.schema import DataConfig, TimeSplit

_RARE_SHARE = 0.01
_RARE_ROWS = 100
_MOSTLY_NULL = 0.9
_NULL_CHANGE = 0.1
_UNKNOWN = 0.1
_UNKNOWN_TRAIN = 0.5
_STABILITY = 0.25
_LABEL_RATIO = 1.25
_LABEL_SIGMA = 5.0
_COPIES = 0.01
_REPEATS = 0.001
_FEW = 20


def findings(found: Examination, config: DataConfig, limits: Limits) -> Iterator[Finding]:
    """Yield the findings, in the order of the splits and columns."""
    yield from _labels(found)
    yield from _times(found, config)
    yield from _columns(found)
    yield from _unknown(found)
    yield from _leaks(found, limits)
    yield from _drift(found)
    if found.duplicates is not None:
        yield from _duplicates(found.duplicates, found, limits)


def _labels(found: Examination) -> Iterator[Finding]:
    train = found.splits["train"]
    for name, split in found.splits.items():
        if not split.examined:
            yield Finding("warning", "empty", None, name, 0, "no rows; give the split more rows, or drop it")
        for task, ones in split.positives.items():
            rare = min(ones, split.examined - ones)
            what = f"label {task!r}: {ones:,} of {split.examined:,} rows are positive"
            if not split.examined:
                continue
            rate = ones / split.examined
            if not rare:
                text = f"{what}; AUC is undefined here and a model learns nothing; choose other rows or another label"
                yield Finding("error" if name == "train" else "warning", "one-class", task, name, rate, text)
            elif rare < _RARE_ROWS:
                text = f"{what}; metrics on so few rows of a class are mostly noise: use more rows"
                yield Finding("warning", "imbalance", task, name, rate, text)
            elif rare / split.examined < _RARE_SHARE:
                text = f"{what}; watch logloss and PR-AUC, and subsample the frequent class only in train"
                yield Finding("note", "imbalance", task, name, rate, text)
            if name != "train" and task in train.positives:
                yield from _label_drift(task, name, train, split)


def _label_drift(task: str, name: str, train: SplitFacts, split: SplitFacts) -> Iterator[Finding]:
    n, m = train.examined, split.examined
    p, q = train.positives[task] / n, split.positives[task] / m
    pooled = (train.positives[task] + split.positives[task]) / (n + m)
    sigma = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    ratio = max(p, q) / min(p, q) if p and q else math.inf
    if sigma and abs(p - q) / sigma > _LABEL_SIGMA and ratio > _LABEL_RATIO:
        text = (
            f"label {task!r} is positive in {q:.2%} of the rows, in train in {p:.2%}; "
            "probabilities will be off here: check how rows were chosen, or calibrate"
        )
        yield Finding("warning", "drift", task, name, q, text)


def _times(found: Examination, config: DataConfig) -> Iterator[Finding]:
    by_time = config.split.column if isinstance(config.split, TimeSplit) else None
    for name, split in found.splits.items():
        for column, times in split.times.items():
            yield from _time_values(column, name, times)
            before = found.splits["train"].times[column]
            if name == "train" or before.high is None or times.low is None or times.low > before.high:
                continue
            share = times.early / times.rows
            text = (
                f"{share:.2%} of the rows are not later than the last train row "
                f"({times.shown(times.low)} against {before.shown(before.high)}): "
                "the model is trained on what came after them; split by time"
            )
            yield Finding("error" if column == by_time else "warning", "time-order", column, name, share, text)
    yield from _unit_change(found)


def _time_values(column: str, name: str, times: Times) -> Iterator[Finding]:
    if times.unreadable:
        share = times.unreadable / (times.rows + times.unreadable)
        text = f"{share:.2%} of the values are neither numbers nor ISO dates; write them as seconds since 1970"
        yield Finding("warning", "time-range", column, name, share, text)
    unit = times.unit
    if unit is None or not times.rows:
        return
    if unit != "seconds" and name == "train":
        text = (
            f"the numbers look like {unit} since 1970 ({times.shown(times.low)} to {times.shown(times.high)}); "
            f"divide by {UNITS[unit]:,} where seconds are meant"
        )
        yield Finding("warning", "time-unit", column, name, float(UNITS[unit]), text)
    other = {u: n for u, n in times.units.items() if u != unit and n}
    for mixed, rows in other.items():
        text = f"{rows:,} rows are in {mixed}, the others in {unit}: their order is wrong; bring all to one unit"
        yield Finding("error", "time-unit", column, name, rows / times.rows, text)
    if times.zero:
        share = times.zero / times.rows
        text = f"{times.zero:,} rows are of 1970-01-01 or before: a missing time written as 0? Drop or repair them"
        yield Finding("warning", "time-range", column, name, share, text)
    beyond = times.beyond[unit] - sum(n for u, n in other.items() if UNITS[u] > UNITS[unit])
    if beyond > 0:
        text = f"{beyond:,} rows are later than 2100-01-01: they would all be in the test split; drop or repair them"
        yield Finding("warning", "time-range", column, name, beyond / times.rows, text)


def _unit_change(found: Examination) -> Iterator[Finding]:
    train = found.splits["train"].times
    for name, split in found.splits.items():
        for column, times in split.times.items():
            if train[column].unit and times.unit and times.unit != train[column].unit:
                text = f"the numbers look like {times.unit}, in train like {train[column].unit}; bring both to one unit"
                yield Finding("error", "time-unit", column, name, float(UNITS[times.unit]), text)


def _columns(found: Examination) -> Iterator[Finding]:
    rows = found.splits["train"].examined
    for name, column in found.columns.items():
        unused = column.role == "unused"
        missing = rows - column.present
        if not column.present and rows:
            yield Finding("note" if unused else "warning", "null", name, "train", 1.0, "no value in any row; drop it")
        elif column.distinct == 1 and not missing:
            text = "the same value in every row: it tells nothing; drop it"
            yield Finding("note" if unused else "warning", "constant", name, "train", 1, text)
        elif column.once and column.present > _FEW and _may_be_id(column.role, column.type):
            text = f"all {column.present:,} values differ, as in a row id: nothing can be learned from it; drop it"
            yield Finding("note" if unused else "warning", "unique", name, "train", column.distinct, text)
        elif column.null.get("train", 0.0) >= _MOSTLY_NULL:
            share = column.null["train"]
            text = f"{share:.2%} of the rows have no value; keep it only if its presence means something"
            yield Finding("note", "null", name, "train", share, text)
        for split, count in column.non_finite.items():
            share = count / found.splits[split].examined
            text = f"{count:,} values are NaN, infinite or too large, and read as missing; repair what writes them"
            yield Finding("note", "non-finite", name, split, share, text)


def _may_be_id(role: str, dtype: str) -> bool:
    """Measurements and times may all differ too; lists rarely mean anything by it."""
    if role in ("multi_valued", "history") or dtype.startswith(("Float", "Date", "Decimal", "List", "Array")):
        return False
    return role != "numeric" or dtype.startswith(("Int", "UInt"))


def _unknown(found: Examination) -> Iterator[Finding]:
    for name, column in found.columns.items():
        for split, share in column.unknown.items():
            if split == "train" and share >= _UNKNOWN_TRAIN:
                text = f"{share:.2%} of the train values are too rare to get an id; lower min_count or raise max_size"
                yield Finding("warning", "unknown", name, split, share, text)
            elif split != "train" and share >= _UNKNOWN:
                known = column.unknown.get("train", 0.0)
                text = (
                    f"{share:.2%} of the values are not in the train vocabulary (in train {known:.2%}); "
                    "add fields that describe new values, or lower min_count"
                )
                yield Finding("warning", "unknown", name, split, share, text)


def _leaks(found: Examination, limits: Limits) -> Iterator[Finding]:
    for task, aucs in found.aucs.items():
        for name, auc in aucs.items():
            # A category that predicts the label backwards on held-out rows would be one too.
            if max(auc, 1 - auc) > limits.leak:
                text = (
                    f"alone it ranks label {task!r} with AUC {auc:.4f}: is it known before the label is? "
                    "Drop it unless it is"
                )
                yield Finding("warning", "leak", name, "train", auc, text)


def _drift(found: Examination) -> Iterator[Finding]:
    for split, inputs in found.drift.items():
        for name, (index, chance) in inputs.items():
            if index > _STABILITY + chance:
                text = (
                    f"its values are distributed otherwise than in train (stability index {index:.2f}, "
                    f"above {_STABILITY} matters); check that both were written alike, and that old rows still help"
                )
                yield Finding("warning", "drift", name, split, index, text)
    for name, column in found.columns.items():
        before = column.null.get("train")
        for split, share in column.null.items():
            if split != "train" and before is not None and abs(share - before) > _NULL_CHANGE:
                text = f"{share:.2%} of the rows have no value, in train {before:.2%}; check what writes the column"
                yield Finding("warning", "drift", name, split, share, text)


def _duplicates(repeated: Duplicates, found: Examination, limits: Limits) -> Iterator[Finding]:
    for (later, earlier), rows in repeated.across.items():
        if not rows.whole:
            continue
        text = (
            f"{rows.whole:,} of {rows.rows:,} rows ({rows.share:.2%}) are in {earlier} too, with the same inputs and "
            f"label ({rows.inputs:,} with the same inputs): copies flatter the metric; keep equal rows in one split"
        )
        over = earlier == "train" and rows.share > limits.duplicates
        severity: Severity = "error" if over else "warning" if rows.share > _COPIES else "note"
        yield Finding(severity, "duplicates", None, later, rows.share, text)
    train = repeated.within.get("train")
    if train is not None and train.share > _REPEATS:
        text = (
            f"{train.whole:,} of {train.rows:,} rows ({train.share:.2%}) repeat an earlier one, inputs and label; "
            "if events were logged twice, drop the copies"
        )
        yield Finding("note", "duplicates", None, "train", train.share, text)
    if repeated.contradicted and train is not None:
        share = repeated.contradicted / train.rows
        text = (
            f"{repeated.contradicted:,} of {train.rows:,} rows ({share:.2%}) have inputs that occur with another "
            "label too: no model can tell them apart; more inputs could"
        )
        yield Finding("note", "contradicted", None, "train", share, text)
