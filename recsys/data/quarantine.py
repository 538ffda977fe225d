"""Rows that break a rule: each has an address, and too many of them are an error."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from recsys.data.schema import BadRows
from recsys.errors import DataError, listing

ROW = "__row"
"""Name of the column with the number of a raw row in its file, counted from 1."""
BAD_ROWS = pl.DataFrame(
    schema={
        "file": pl.String,
        "row": pl.Int64,
        "column": pl.String,
        "value": pl.String,
        "rule": pl.String,
        "problem": pl.String,
    }
)
"""An empty table of bad rows: file, row in it, column (null if it is the whole row), value, rule and what is wrong."""
_EARLY = 1_000_000
_EXAMPLES = 5
_VALUES = 10


def address(file: str | None, row: int) -> str:
    """Return "file, row N", or "row N" where the source knows no files."""
    return f"row {row}" if file is None else f"{file}, row {row}"


@dataclass
class Quarantine:
    """The rows of one pass that were set aside.

    Args:
        policy: the recipe's rules and budget.
        what: how errors call the rows.
        seen: raw rows read, those set aside included.
        rows: rows set aside.
    """

    policy: BadRows
    what: str
    seen: int = 0
    rows: int = 0
    _found: list[pl.DataFrame] = field(default_factory=list)

    def add(self, bad: pl.DataFrame, seen: int) -> None:
        """Take what a block of `seen` raw rows had, as `BAD_ROWS`; a row may break several rules.

        Raises:
            DataError: so many rows are bad that reading on is no use.
        """
        self.seen += seen
        if len(bad):
            self.rows += bad.select(pl.struct("file", "row").n_unique()).item()
            self._found.append(bad)
            if self.seen >= _EARLY:
                self.check()

    @property
    def found(self) -> pl.DataFrame:
        """Everything that was set aside, as `BAD_ROWS`, in the order of the rows."""
        return pl.concat([BAD_ROWS, *self._found])

    def restore(self, found: pl.DataFrame, seen: int) -> None:
        """Take up what an earlier pass had found when it was broken off after `seen` raw rows."""
        self.seen, self.rows, self._found = 0, 0, []
        self.add(found, seen)

    def check(self) -> None:
        """Compare with the budget.

        Raises:
            DataError: more rows than the budget allows, with counts by rule and the first examples.
        """
        if self.rows <= self.policy.budget * self.seen:
            return
        found = self.found
        counts = found.group_by("rule", "column", maintain_order=True).agg(
            pl.len().alias("rows"),
            pl.col("file", "row", "value", "problem").first(),
            pl.col("value").unique(maintain_order=True).alias("values"),
        )
        lines = [
            f"{address(e['file'], e['row'])}{_column(e['column'])}: {e['value']!r}, {e['problem']}"
            f" ({e['rows']:,} such rows{_distinct(e['column'], e['values'])}; rule {e['rule']})"
            for e in counts.head(_EXAMPLES).iter_rows(named=True)
        ]
        more = f"\n  … and {counts.height - _EXAMPLES} more kinds" if counts.height > _EXAMPLES else ""
        raise DataError(
            f"{self.what}: {self.rows:,} of {self.seen:,} rows ({self.rows / self.seen:.2%}) break a rule, more than "
            f"data.bad_rows.budget {self.policy.budget:.2%}. Mend the logs, or change the rule or the budget. "
            "The first of each kind:\n  " + "\n  ".join(lines) + more
        )


def _distinct(column: str | None, values: list[str | None]) -> str:
    """Return the values that a column has in rows that break a rule, if they are several."""
    if column is None or len(values) < 2:
        return ""
    return f"; values {listing(('null' if v is None else repr(v) for v in values), _VALUES)}"


def _column(name: str | None) -> str:
    return "" if name is None else f", column {name!r}"
