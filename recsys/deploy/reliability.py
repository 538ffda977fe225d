"""How often what is predicted happens: rows in groups of near probabilities, and a picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys.deploy.calibration import Floats, sigmoid
from recsys.errors import RecipeError

GROUPS = 15


@dataclass(frozen=True)
class Reliability:
    """Groups of rows, from the lowest probabilities to the highest.

    Args:
        predicted: mean probability of each group.
        observed: share of positives in it.
        rows: number of rows in it.
    """

    predicted: Floats
    observed: Floats
    rows: Floats


def reliability(p: Floats, y: Floats, groups: int = GROUPS) -> Reliability:
    """Return the groups, of equally many rows each; equal probabilities stay together. `[n], [n]`."""
    order = np.argsort(p, kind="stable")
    p, y = p[order], y[order]
    if not len(p):
        none = np.zeros(0)
        return Reliability(none, none, none)
    group = np.arange(len(p)) * groups // len(p)
    starts = np.flatnonzero(np.concatenate([[True], (group[1:] != group[:-1]) & (p[1:] != p[:-1])]))
    rows = np.diff(np.append(starts, len(p))).astype(np.float64)
    return Reliability(np.add.reduceat(p, starts) / rows, np.add.reduceat(y, starts) / rows, rows)


def plot(path: Path, logit: Floats, calibrated: Floats, y: Floats) -> None:
    """Draw a reliability diagram of a model before and after it was calibrated; equal numbers give equal files.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("calibrate.plot needs matplotlib: pip install 'recsys[report]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="perfect")
    for name, p, color in (("before", sigmoid(logit), "#c44e52"), ("after", calibrated, "#4c72b0")):
        groups = reliability(p, y)
        axes.plot(groups.predicted, groups.observed, marker="o", markersize=4, color=color, label=name)
    axes.set(xlabel="predicted probability", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    with mpl.rc_context({"svg.hashsalt": "recsys"}):
        figure.savefig(path, metadata={"Date": None})
