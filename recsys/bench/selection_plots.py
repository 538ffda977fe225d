"""Pictures of selection tables: AUC over the number of fields, and what the area under it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.bench.report import Spread
from recsys.bench.retraining import AUC
from recsys.bench.selection_report import Line
from recsys.bench.table import Bench

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES, COST = "curves.svg", "cost.svg"


def draw(bench: Bench, lines: Sequence[Line], out: Path) -> list[Path]:
    """Draw what is finished; returns the pictures."""
    drawn = []
    if any(line.curve for line in lines):
        drawn.append(draw_curves(bench, lines, out / CURVES))
    if any(line.aukc for line in lines):
        drawn.append(draw_cost(bench, lines, out / COST))
    return drawn


def draw_curves(bench: Bench, lines: Sequence[Line], path: Path) -> Path:
    """Draw AUC over the number of fields, a line for each row, bars of one standard deviation over seeds."""
    figure = _figure(10)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        if line.curve:
            y, spread = zip(*((s.mean, _bar(s)) for s in line.curve.values()), strict=True)
            style: dict[str, Any] = {"color": _colour(i), "marker": _marker(i), "markersize": 4, "linewidth": 1.2}
            axes.errorbar(list(line.curve), y, yerr=spread, capsize=2, label=line.name, **style)
    axes.set_xlabel("number of fields")
    axes.set_ylabel(f"{bench.split} {AUC}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    axes.set_title(bench.name)
    return _save(figure, path)


def draw_cost(bench: Bench, lines: Sequence[Line], path: Path) -> Path:
    """Draw AUKC over seconds of the search, and over its forward passes by those of one training."""
    figure = _figure(12)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, line in enumerate(lines):
        if line.aukc is not None:
            _dot(left, i, line.name, line.seconds, line.aukc)
            _dot(right, i, line.name, line.relative, line.aukc)
    left.set_xscale("log")
    left.tick_params(axis="x", which="minor", labelsize=6, labelrotation=45)
    right.set_xscale("symlog", linthresh=0.1)  # some searches make no pass at all
    right.set_xlim(
        -0.02, 1.5 * max([1.0, *(line.relative.mean + _bar(line.relative) for line in lines if line.relative)])
    )
    left.set_xlabel("seconds of the search")
    right.set_xlabel("row passes of the search, by those of one training")
    left.set_ylabel(f"AUKC ({bench.split})")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(bench.name)
    shown = {
        name: handle for axes in (left, right) for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", fontsize="small")
    return _save(figure, path)


def _dot(axes: Axes, i: int, name: str, cost: Spread | None, area: Spread) -> None:
    if cost is not None:
        style: dict[str, Any] = {"color": _colour(i), "marker": _marker(i), "capsize": 2, "linestyle": "none"}
        axes.errorbar([cost.mean], [area.mean], xerr=[_bar(cost)], yerr=[_bar(area)], label=name, **style)


def _bar(spread: Spread) -> float:
    return 0.0 if math.isnan(spread.sd) else spread.sd


def _colour(i: int) -> str:
    return f"C{i % 10}"


def _marker(i: int) -> str:
    return "osD^vP*X"[i // 10 % 8]


def _figure(width: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    # Without the date, the same table gives the same file.
    figure.savefig(path, metadata={"Date": None})
    return path
