"""What an examination of logs finds: numbers per split and column, and findings that say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recsys.data.doctor_rows import Duplicates
from recsys.data.doctor_time import Times

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
Role = Literal["categorical", "numeric", "multi_valued", "history", "unused"]


@dataclass(frozen=True)
class Finding:
    """Something about the data that deserves a look.

    Args:
        severity: an error stops, a warning may cost a wrong result, a note is good to know.
        code: short and stable, such as `leak`.
        column: that it is about; None where it is about rows.
        split: that it was found in; None where it is about several or all.
        number: what was measured, as the message says.
        message: one sentence with what was found, and what to do.
    """

    severity: Severity
    code: str
    column: str | None
    split: str | None
    number: float | None
    message: str


@dataclass(frozen=True)
class Limits:
    """From where on something is a finding.

    Args:
        leak: an AUC of one input alone above this is suspicious.
        duplicates: a larger share of a later split's rows that the train split has too is an error.
    """

    leak: float = 0.99
    duplicates: float = 1.0


@dataclass
class SplitFacts:
    """One split.

    Args:
        rows: all rows.
        examined: the first so many were examined.
        positives: task → rows with label 1 among them.
        times: time column → its times.
    """

    rows: int = 0
    examined: int = 0
    positives: dict[str, int] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)


@dataclass
class ColumnFacts:
    """One column.

    Args:
        name: of the column.
        role: what the data block makes of it; `unused` where it leaves it out.
        type: of the raw values.
        distinct: different values in the examined train rows; of a list column, different lists.
        exact: whether `distinct` is exact, or estimated because there are very many.
        once: whether no value occurs twice in the examined train rows.
        present: train rows with a value.
        ids: size of its vocabulary with the ids of missing and unknown values; None of numbers.
        null: split → share of rows without a value.
        unknown: split → share of rows (of a list: of events) whose value is not in the vocabulary.
        non_finite: split → NaN, infinities and numbers too large for float32, all read as missing.
    """

    name: str
    role: Role
    type: str
    distinct: int = 0
    exact: bool = True
    once: bool = False
    present: int = 0
    ids: int | None = None
    null: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, float] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)


@dataclass
class Examination:
    """All that was found.

    Args:
        limit: rows of each split that were examined at most.
        splits: name → facts, `train` first.
        columns: name → facts.
        duplicates: equal rows; None when a split could not be read.
        aucs: task → input → AUC of that input alone on train rows; NaN where undefined. Inputs are columns, and of
            lists their length and whether the row's own target is in them.
        drift: split → input → (population stability index against train, what chance alone may give).
        events: history → mean events per examined train row.
        findings: the gravest first.
    """

    limit: int
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    aucs: dict[str, dict[str, float]] = field(default_factory=dict)
    drift: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    events: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings; the gravest stay first."""
        self.findings = sorted([*self.findings, *findings], key=lambda found: SEVERITIES.index(found.severity))

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON; what is undefined is None."""
        return {
            "rows_limit": self.limit,
            "splits": {name: _split_json(split) for name, split in self.splits.items()},
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "duplicates": None if self.duplicates is None else _duplicates_json(self.duplicates),
            "single_input_auc": {task: _defined(aucs) for task, aucs in self.aucs.items()},
            "stability_index": {s: {name: psi for name, (psi, _) in of.items()} for s, of in self.drift.items()},
            "events_per_row": self.events,
            "findings": [asdict(finding) for finding in self.findings],
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
        }


def _defined(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _split_json(split: SplitFacts) -> dict[str, Any]:
    return {
        "rows": split.rows,
        "examined": split.examined,
        "positives": split.positives,
        "positive_rate": {t: n / split.examined if split.examined else None for t, n in split.positives.items()},
        "time": {column: times.to_json() for column, times in split.times.items()},
    }


def _duplicates_json(found: Duplicates) -> dict[str, Any]:
    return {
        "exact": found.exact,
        "within": {split: asdict(repeated) for split, repeated in found.within.items()},
        "across": [
            {"split": later, "also_in": earlier, **asdict(repeated)}
            for (later, earlier), repeated in found.across.items()
        ],
        "contradicted_train_rows": found.contradicted,
    }
