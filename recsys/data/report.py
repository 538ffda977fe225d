"""What encoding met: missing, unknown, non-finite and cut values per column and split."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ColumnCounts:
    """Counts of one column; of the unknown values, `too_long` had more bytes than the field's `max_bytes`.

    Of a list column, `null` counts rows without events and null events, `unknown` events, `cut` shortened rows.
    """

    null: int = 0
    unknown: int = 0
    unreadable: int = 0
    non_finite: int = 0
    cut: int = 0
    too_long: int = 0

    def add(
        self,
        *,
        null: int = 0,
        unknown: int = 0,
        unreadable: int = 0,
        non_finite: int = 0,
        cut: int = 0,
        too_long: int = 0,
    ) -> None:
        """Add the counts of a block."""
        self.null += null
        self.unknown += unknown
        self.unreadable += unreadable
        self.non_finite += non_finite
        self.cut += cut
        self.too_long += too_long

    def counts(self) -> tuple[int, ...]:
        """Return the counts in the order of the report's table."""
        return (self.null, self.unknown, self.unreadable, self.non_finite, self.cut, self.too_long)


@dataclass
class SplitReport:
    """Counts of one split: rows, those set aside beside them, positives per task, and per column."""

    rows: int = 0
    aside: int = 0
    positives: dict[str, int] = field(default_factory=dict)
    columns: dict[str, ColumnCounts] = field(default_factory=dict)

    def remark(self) -> str:
        """Return the counts of all columns in a few words, such as `12 unknown values in 2 columns`; or nothing."""
        kinds = {
            "missing": "null",
            "unknown": "unknown",
            "unreadable": "unreadable",
            "not finite": "non_finite",
            "cut": "cut",
            "too long": "too_long",
        }
        parts = [f"{self.aside:,} {'row' if self.aside == 1 else 'rows'} set aside"] if self.aside else []
        for word, kind in kinds.items():
            counts = {name: n for name, column in self.columns.items() if (n := getattr(column, kind))}
            if counts:
                total = sum(counts.values())
                what = ("list" if word == "cut" else f"{word} value") + ("s" if total > 1 else "")
                where = f"column {next(iter(counts))!r}" if len(counts) == 1 else f"{len(counts)} columns"
                parts.append(f"{total:,} {what}{' cut' if word == 'cut' else ''} in {where}")
        return ", ".join(parts)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SplitReport:
        """Read what `dataclasses.asdict` gave."""
        columns = {name: ColumnCounts(**counts) for name, counts in value["columns"].items()}
        return cls(value["rows"], value["aside"], value["positives"], columns)

    def column(self, name: str) -> ColumnCounts:
        """Return the counts of a column, started at zero."""
        return self.columns.setdefault(name, ColumnCounts())


@dataclass
class EncodeReport:
    """Counts of every split, and what deserves a warning."""

    splits: dict[str, SplitReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return header and rows (split, column, counts with their share of the rows); columns without are left out."""
        header = ("split", "column", "missing", "unknown", "unreadable", "not finite", "cut", "too long")
        rows = [
            (split, name, *(_share(n, counts.rows) for n in c.counts()))
            for split, counts in self.splits.items()
            for name, c in counts.columns.items()
            if any(c.counts())
        ]
        return header, rows

    def __str__(self) -> str:
        lines = [
            f"{split}: {s.rows:,} rows{f', {s.aside:,} set aside' if s.aside else ''}; "
            + ", ".join(f"{t} {_share(p, s.rows)}" for t, p in s.positives.items())
            for split, s in self.splits.items()
        ]
        header, rows = self.table()
        if rows:
            width = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(r, width, strict=True)) for r in [header, *rows]]
        if self.ignored:
            lines.append(f"columns not used: {', '.join(self.ignored)}")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def remarks(self) -> list[str]:
        """Return one line for each split in which something was set aside, missing, unknown, unreadable or cut."""
        return [f"{name}: {text}" for name, counts in self.splits.items() if (text := counts.remark())]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ignored": list(self.ignored)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EncodeReport:
        """Read what `to_json` gave."""
        splits = {name: SplitReport.from_json(s) for name, s in value["splits"].items()}
        return cls(splits, list(value["warnings"]), tuple(value["ignored"]))


def _share(n: int, rows: int) -> str:
    return f"{n:,} ({n / rows:.2%})" if rows else f"{n:,}"
