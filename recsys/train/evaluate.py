"""The stage `evaluate`: metrics of whole splits, of classes of their rows, and how certain they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from rich.table import Table as TextTable
from torch import Tensor

from recsys.contracts import Metric, Named, metric_name
from recsys.errors import DataError, RecipeError
from recsys.train.checkpoint import write_json
from recsys.train.classes import Classes, Rule, check_rules, counts_train, divide
from recsys.train.intervals import Scores, bounded, intervals, taken
from recsys.train.run import Run
from recsys.train.score import Predictions, measure, predict

Level = Annotated[float, Field(gt=0, lt=1)]


class Evaluate:
    """Score every row of the splits once and measure.

    With `by`, also in classes of rows: every metric inside each class, the number of its rows, and the gap, the largest
    value less the smallest. Results are called `test[attribute=1]`, `test[item train_rows ≤10]`, `test[attribute gap]`.
    A class of missing or unknown values (an attribute of -1) is measured, but not part of the gap. Rows are ranked
    among those of their class and group.

    With `intervals`, each score has bounds: of draws with replacement of groups (context column `group`; without one,
    of rows), as many as there are, the middle share of their scores (the percentile bootstrap). What groups have in
    common is then no reason to be too certain. The model stays as it is: how another training would do is not told. A
    gap has no bounds: the largest of noisy values less the smallest is biased upwards, and its draws twice as much.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.

    Args:
        metrics: names of metrics, or `{use: NAME, …}` with options; `ndcg@5` is short for `{use: ndcg, k: 5}`, and is
            what it is called in results. Any can be given another `name`.
        splits: names of splits; by default validation and test, as far as there are any.
        by: column → classes; a categorical field or a context column. values: one for each value. `{value: [1, 5]}`:
            up to 1, up to 5, above; train_rows or train_positives in place of value: by how many rows of the train
            split, or how many with a label of 1 (of the first task), have the row's value.
        intervals: the share that the bounds are to hold, such as 0.95. null: no bounds.
        draws: number of draws for the bounds.

    Raises:
        RecipeError: two metrics have one name.
    """

    name = "evaluate"

    def __init__(
        self,
        *,
        metrics: tuple[Annotated[str | dict[str, Any], Named("metric")], ...] = ("auc", "logloss"),
        splits: tuple[Literal["train", "valid", "test"], ...] | None = None,
        by: dict[str, Rule] | None = None,
        intervals: Level | None = None,
        draws: PositiveInt = 500,
    ) -> None:
        self.metrics = metrics
        self.splits = splits
        self.by = by or {}
        self.intervals = intervals
        self.draws = draws
        names = [metric_name(spec) for spec in metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"evaluate: two metrics are called '{twice[0]}'; give one of them another `name`")

    @property
    def counts_train(self) -> bool:
        """Whether it reads the train split, whatever it measures."""
        return counts_train(self.by)

    def check(self, run: Run) -> None:
        """Refuse, before anything is trained, what the rows have no columns for.

        Raises:
            RecipeError: a column is missing, or thresholds do not rise.
        """
        for spec in self.metrics:
            run.measuring(spec)
        check_rules(run, self.by)

    def run(self, run: Run) -> None:
        """Fill `run.scores`."""
        self.check(run)
        metrics = {metric_name(spec): run.measuring(spec) for spec in self.metrics}
        names = self.splits or tuple(name for name in ("valid", "test") if name in run.splits)
        if not names:
            raise RecipeError(f"{run.stage}: the data has neither a valid nor a test split; give `splits: [train]`")
        labels: list[str] = []
        for name in names:
            found = self._measured(run, name, metrics)
            for label, values in found.items():
                run.scores.setdefault(label, {}).update(values)
            labels += found
        if run.world.leads:
            write_json(run.stage_folder / "metrics.json", {label: plain(run.scores[label]) for label in labels})
            run.console.print(_table(run, labels))

    def _measured(self, run: Run, split: str, metrics: Mapping[str, Metric]) -> Scores:
        """The scores of a split and of its classes, with their bounds."""
        shards = run.split(split)
        predictions = predict(run.model, shards, run.train.eval_batch_size, run.world, run.device)
        classes = divide(run, split, predictions, self.by)
        whole = {split: measure(predictions, metrics)}
        refused: list[str] = []
        by_class = _in_classes(split, predictions, torch.arange(len(shards)), classes, metrics, refused)
        for line in refused:
            run.say(f"[yellow]warning: {run.stage}: {line}[/yellow]")
        scores = {**whole, **by_class}
        if self.intervals is None:
            return scores

        def again(drawn: Predictions, rows: Tensor) -> Scores:
            try:
                value = measure(drawn, metrics)
            except DataError:  # too little weight in this draw
                value = {}
            return {split: value, **_in_classes(split, drawn, rows, classes, metrics, [])}

        bounds = intervals(again, predictions, self.intervals, self.draws, run.seed("intervals", split))
        for division in classes:
            bounds.pop(_gap_of(split, division), None)
        return {label: _beside(values, bounds.get(label, {})) for label, values in scores.items()}


def _in_classes(
    split: str,
    predictions: Predictions,
    rows: Tensor,
    classes: Sequence[Classes],
    metrics: Mapping[str, Metric],
    refused: list[str],
) -> Scores:
    """Scores of each class, and the gaps.

    Args:
        split: its name.
        predictions: of some rows.
        rows: their numbers in the split.
        classes: of all rows of the split.
        metrics: by name.
        refused: classes that a metric refuses are told here; their scores are undefined.
    """
    found: Scores = {}
    for division in classes:
        of, compared = division.of[rows], []
        for number, name in enumerate(division.names):
            mine = (of == number).nonzero().flatten()
            try:
                values = measure(taken(predictions, mine), metrics)
            except DataError as error:
                refused.append(f"{split}[{name}]: {error}")
                values = {}
            found[f"{split}[{name}]"] = {**values, "rows": float(len(mine))}
            compared += [values] if division.known[number] else []
        found[_gap_of(split, division)] = _gap(compared)
    return found


def _gap_of(split: str, division: Classes) -> str:
    return f"{split}[{division.what} gap]"


def _gap(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Largest less smallest value of each metric, undefined where fewer than two are known."""
    gaps = {}
    for name in dict.fromkeys(name for values in scores for name in values):
        known = [values[name] for values in scores if not math.isnan(values.get(name, math.nan))]
        gaps[name] = max(known) - min(known) if len(known) > 1 else math.nan
    return gaps


def _beside(values: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, float]:
    """The scores, each followed by its bounds."""
    result = {}
    for name, value in values.items():
        result[name] = value
        if name != "rows":
            result |= {key: bounds[key] for key in (f"{name}.low", f"{name}.high") if key in bounds}
    return result


def plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN; an undefined metric is null."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def _table(run: Run, labels: Sequence[str]) -> TextTable:
    best = {label: run.reference(label) if run.reference and label in run.splits else {} for label in labels}
    columns = list(dict.fromkeys(name for label in labels for name in bounded(run.scores[label])))
    table = TextTable(title=run.stage, title_justify="left")
    table.add_column("split")
    table.add_column("rows", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
        if any(column in known for known in best.values()):
            table.add_column(f"best possible {column}", justify="right")
    for label in labels:
        scores = run.scores[label]
        rows = len(run.splits[label]) if label in run.splits else scores.get("rows")
        cells = [label.replace("[", r"\["), "" if rows is None else f"{rows:,.0f}"]
        for column in columns:
            cells.append(_cell(scores, column))
            if any(column in known for known in best.values()):
                cells.append(f"{best[label][column]:.5f}" if column in best[label] else "–")
        table.add_row(*cells)
    return table


def _cell(scores: Mapping[str, float], column: str) -> str:
    if math.isnan(scores.get(column, math.nan)):
        return "undefined"
    low, high = scores.get(f"{column}.low", math.nan), scores.get(f"{column}.high", math.nan)
    bounds = "" if math.isnan(low) else f" ({low:.5f}–{high:.5f})"
    return f"{scores[column]:.5f}{bounds}"
