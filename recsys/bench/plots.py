"""Pictures of benchmark tables: how good a model is against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recsys.bench.report import Line
from recsys.bench.table import Bench

_NAMES = {
    "bytes": "bytes of the model",
    "embedding_bytes": "bytes of the embedding",
    "parameters": "parameters",
    "epoch_seconds": "seconds per epoch",
}


class Point(NamedTuple):
    """A row of the table in the picture; `spread` is the standard deviation over seeds, 0 for one run."""

    x: float
    y: float
    spread: float


def points(bench: Bench, lines: Sequence[Line]) -> dict[str, list[Point]]:
    """Return series → its points from left to right, without rows that have no finished run or no such number."""
    assert bench.plot is not None
    found: dict[str, list[Point]] = {}
    for line in lines:
        x, y = getattr(line, bench.plot.x), line.metrics.get(bench.plot.y)
        if isinstance(x, int | float) and y is not None:
            spread = y.sd if y.sd == y.sd else 0.0  # of one run it is NaN
            found.setdefault(line.series, []).append(Point(float(x), y.mean, spread))
    return {series: sorted(rows) for series, rows in found.items()}


def draw(bench: Bench, lines: Sequence[Line], path: Path) -> bool:
    """Draw the finished rows of a table: a line for each that is varied, bars of one standard deviation.

    Args:
        bench: the table; it has a plot.
        lines: of the table.
        path: of the picture; its ending chooses the format.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert bench.plot is not None
    series = points(bench, lines)
    if not series:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in series.items():
        x, y, spread = zip(*rows, strict=True)
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=name, linewidth=1.2, markersize=4)
    varied = next((e.overrides[-1].split("=")[0] for e in bench.entries if e.value is not None), "value")
    axes.set_xlabel(_NAMES.get(bench.plot.x, varied))
    axes.set_ylabel(f"{bench.split} {bench.plot.y}")
    if bench.plot.log:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(bench.name)
    # Without the date, the same table gives the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    return True
