"""The two kinds of tables as the command runs them: recipes beside each other, and rankings of fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recsys.bench import plots, report, selection, selection_plots, selection_report
from recsys.bench.execute import Job, jobs
from recsys.bench.table import Bench
from recsys.errors import RunError

Cells = tuple[list[str], list[list[str]]]
"""Header and rows, as text."""


@dataclass(frozen=True)
class Wave:
    """Jobs that need nothing of each other."""

    title: str
    jobs: Sequence[Job]


class Study(Protocol):
    """A table with the folder of its runs."""

    problems: list[RunError]

    def waves(self) -> Iterator[Wave]:
        """Yield what there is to run; every wave once all that could be run of the ones before has ended."""
        ...

    def write(self) -> None:
        """Write what is finished so far as `table.md`, `table.csv` and `table.json`."""
        ...

    def cells(self) -> list[Cells]:
        """Return the tables to be shown, without rows of which nothing is finished."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return all rows as plain values."""
        ...

    def pictured(self) -> bool:
        """Whether there are pictures of this table."""
        ...

    def draw(self) -> list[Path]:
        """Draw what is finished; return the files."""
        ...


def study(bench: Bench, out: Path, only: Sequence[str] | None) -> Study:
    """Return what the command runs.

    Args:
        bench: the table.
        out: folder of the runs.
        only: names of rows; all by default.

    Raises:
        RunError: a name is no row.
    """
    names = tuple(entry.name for entry in bench.chosen(only))
    return Comparing(bench, out, names) if bench.retraining is None else Selecting(bench, out, names)


@dataclass
class Comparing:
    """Recipes × seeds: first every recipe with the first seed, then with the second, and so on."""

    bench: Bench
    out: Path
    names: Sequence[str]
    problems: list[RunError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs = [job for job in jobs(self.bench, self.out) if job.entry.name in self.names]

    def waves(self) -> Iterator[Wave]:
        """Yield all jobs at once."""
        yield Wave(self.bench.name, self.jobs)

    def write(self) -> None:
        """Write the table."""
        report.write(self.bench, self._lines(), self.out)

    def cells(self) -> list[Cells]:
        """Return the table, without rows that have no finished run."""
        return [report.cells(self.bench, [line for line in self._lines() if line.runs])]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return report.to_json(self.bench, self._lines())

    def pictured(self) -> bool:
        """Whether the table asks for a picture."""
        return self.bench.plot is not None

    def draw(self) -> list[Path]:
        """Draw the picture, if there is anything to draw."""
        path = self.out / "plot.svg"
        return [path] if plots.draw(self.bench, self._lines(), path) else []

    def _lines(self) -> list[report.Line]:
        return report.summarise(self.bench, self.jobs)


@dataclass
class Selecting:
    """For every seed the searches, then the base with the best fields of what they found.

    A set of fields is trained once for each seed, whoever chose it.
    """

    bench: Bench
    out: Path
    names: Sequence[str]
    problems: list[RunError] = field(default_factory=list)

    def waves(self) -> Iterator[Wave]:
        """Yield two waves for each seed."""
        entries = [entry for entry in self.bench.entries if entry.name in self.names]
        counts = len(selection.judging(self.bench).counts)
        for seed in self.bench.seeds:
            title = f"{self.bench.name}, seed {seed}"
            searching = selection.searches(entries, seed, self.out)
            yield Wave(f"{title}, searches", searching)
            done = [found for job in searching if (found := self._found(job)) is not None]
            training = selection.retrains(self.bench, done, seed, self.out)
            yield Wave(f"{title}, {counts * len(done)} choices of fields", training)

    def write(self) -> None:
        """Write the table with its curves."""
        selection_report.write(self.bench, self._lines(), self.out)

    def cells(self) -> list[Cells]:
        """Return the table and the curves, without rows that have no finished search."""
        lines = [line for line in self._lines() if line.seeds]
        return [selection_report.cells(self.bench, lines), selection_report.curve_cells(self.bench, lines)]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return selection_report.to_json(self.bench, self._lines())

    def pictured(self) -> bool:
        """Always."""
        return True

    def draw(self) -> list[Path]:
        """Draw the curves and the costs."""
        return selection_plots.draw(self.bench, self._lines(), self.out)

    def _found(self, job: Job) -> selection.Found | None:
        try:
            return selection.found(job, self.bench)
        except RunError as error:
            self.problems.append(error)
            return None

    def _lines(self) -> list[selection_report.Line]:
        return selection_report.summarise(self.bench, self.out)
