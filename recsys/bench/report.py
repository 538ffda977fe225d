"""What the runs of a table come to: mean and standard deviation over seeds, beside what was published."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.bench.execute import Job
from recsys.bench.table import Bench, Entry


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1 below the line) of a number over seeds; of one run the latter is NaN."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.mean:.5f}" + ("" if math.isnan(self.sd) else f" ± {self.sd:.5f}")


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Args:
        name: of the recipe.
        runs: finished ones.
        metrics: metric → spread over the finished runs; without those for which it was undefined.
        valid: the same of the monitored metric at the best epoch; what hyper-parameters may be chosen by.
        epoch_seconds: median seconds per epoch of training.
        epochs: mean number of the best epoch.
        parameters: of the model.
        published: metric → published value.
        source: of that.
        bytes: that a serving process must hold, the mean over the runs.
        embedding_bytes: those of the embedding.
        series: name of the row that was varied, or its own.
        value: of the varied option.
    """

    name: str
    runs: int
    metrics: Mapping[str, Spread]
    valid: Spread | None
    epoch_seconds: float | None
    epochs: float | None
    parameters: int | None
    published: Mapping[str, float]
    source: str
    bytes: float | None
    embedding_bytes: float | None
    series: str
    value: Any


def summarise(bench: Bench, jobs: Sequence[Job]) -> list[Line]:
    """Return a line for every recipe of a table, from its finished runs."""
    lines = []
    for entry in bench.entries:
        done = [job for job in jobs if job.entry is entry and job.done]
        found = [(job.result(), _fit(job.folder), _train_rows(job.folder)) for job in done]
        metrics = {}
        for metric in bench.metrics:
            values = [_named(r["metrics"].get(bench.split, {}), metric, entry) for r, _, _ in found]
            if known := [v for v in values if v is not None]:
                metrics[metric] = Spread.of(known)
        seconds = [rows / r["rows_per_second"] for r, _, rows in found if r["rows_per_second"] and rows]
        fits = [fit for _, fit, _ in found if fit is not None]
        best = [v for fit in fits if (v := _valid(fit, entry.recipe.train.monitor)) is not None]
        lines.append(
            Line(
                entry.name,
                len(done),
                metrics,
                Spread.of(best) if best else None,
                statistics.median(seconds) if seconds else None,
                statistics.fmean(fit["best_epoch"] for fit in fits) if fits else None,
                found[0][0]["parameters"] if found else None,
                entry.published,
                entry.source,
                _mean([r.get("bytes") for r, _, _ in found]),
                _mean([r.get("embedding_bytes") for r, _, _ in found]),
                entry.series,
                entry.value,
            )
        )
    return lines


def _named(scores: Mapping[str, float | None], metric: str, entry: Entry) -> float | None:
    """The value of a column; `task/metric` is called just `metric` where a recipe has that task alone."""
    task, _, name = metric.rpartition("/")
    return scores.get(name if tuple(entry.recipe.data.label) == (task,) else metric)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known, None if nothing is."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _fit(run: Path) -> dict[str, Any] | None:
    """Return the history of the last fit stage."""
    histories = sorted(run.glob("*/history.json"), key=lambda path: int(path.parent.name.split("-")[0]))
    if not histories:
        return None
    found: dict[str, Any] = json.loads(histories[-1].read_text(encoding="utf-8"))
    return found


def _valid(fit: Mapping[str, Any], monitor: str) -> float | None:
    """Return the monitored metric on the validation split at the best epoch, the mean over tasks."""
    epoch: Mapping[str, float | None] = fit["epochs"][fit["best_epoch"] - 1] if fit["best_epoch"] else {}
    values = [v for name, v in epoch.items() if name.startswith("valid/") and name.rsplit("/", 1)[-1] == monitor]
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _train_rows(run: Path) -> int:
    return int(json.loads((run / "data.json").read_text(encoding="utf-8"))["splits"]["train"]["rows"])


def cells(bench: Bench, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table, as text."""
    header = ["recipe", "runs"]
    for metric in bench.metrics:
        header += [f"{bench.split} {metric}", "published"]
    header += ["valid", "s per epoch", "best epoch", "parameters", "embedding bytes", "published by"]
    rows = []
    for line in lines:
        row = [line.name, f"{line.runs}/{len(bench.seeds)}"]
        for metric in bench.metrics:
            published = line.published.get(metric)
            row += [str(line.metrics.get(metric, "")), "" if published is None else f"{published:.5g}"]
        row += [
            "" if line.valid is None else str(line.valid),
            "" if line.epoch_seconds is None else f"{line.epoch_seconds:.3g}",
            "" if line.epochs is None else f"{line.epochs:.1f}",
            "" if line.parameters is None else f"{line.parameters:,}",
            "" if line.embedding_bytes is None else f"{line.embedding_bytes:,.0f}",
            line.source,
        ]
        rows.append(row)
    return header, rows


def write(bench: Bench, lines: Sequence[Line], out: Path) -> None:
    """Write `table.md`, `table.csv` and `table.json` into `out`."""
    header, rows = cells(bench, lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(markdown(header, rows) + "\n", encoding="utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (out / "table.json").write_text(json.dumps(to_json(bench, lines), indent=2) + "\n", encoding="utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def to_json(bench: Bench, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the table as plain values; a standard deviation of one run is null."""
    return {
        "table": bench.name,
        "split": bench.split,
        "seeds": list(bench.seeds),
        "rows": [plain(asdict(line)) for line in lines],
    }


def plain(value: Any) -> Any:
    """Return a value as JSON has it: lists, text as keys, and null for what is undefined."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
