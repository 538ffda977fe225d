"""What a benchmark table says: which recipes, how many seeds, which metrics, and what was published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from recsys.abilities import Scoring
from recsys.bench.options import Plot, Row, Selection, Table, Vary
from recsys.bench.retraining import Retraining, check_search, read_retraining
from recsys.contracts import metric_name
from recsys.errors import RecipeError, RunError, did_you_mean, listing
from recsys.plugin import options
from recsys.plugin.registry import Registry
from recsys.recipe import reader
from recsys.recipe.check import Recipe, find_recipe, load_recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,63}")

Part = TypeVar("Part", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """A checked row.

    Args:
        name: in the table, and of the folder of its runs.
        path: of the recipe.
        overrides: of the table, then of the row.
        recipe: checked.
        published: metric → published value.
        source: where and how that was measured.
        series: name of the row that was varied, or its own.
        value: of the varied option.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    published: dict[str, float]
    source: str
    series: str
    value: Any = None


@dataclass(frozen=True)
class Bench:
    """A checked table.

    Args:
        name: of the file.
        metrics: columns; where a recipe has several tasks, `task/metric`.
        split: on which they are measured.
        seeds: of the runs.
        entries: the rows.
        plot: picture of the rows.
        retraining: how the rankings of a selection table are judged.
    """

    name: str
    metrics: tuple[str, ...]
    split: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    plot: Plot | None = None
    retraining: Retraining | None = None

    def chosen(self, only: Sequence[str] | None) -> tuple[Entry, ...]:
        """Return the rows of these names, or all.

        Raises:
            RunError: a name is none of them.
        """
        names = [entry.name for entry in self.entries]
        for name in only or ():
            if name not in names:
                raise RunError(f"--only: no row '{name}'.{did_you_mean(name, names)} Rows: {listing(names)}")
        return tuple(entry for entry in self.entries if not only or entry.name in only)


def read_table(path: Path, registry: Registry, seeds: int | None = None) -> Bench:
    """Read a table and check every recipe in it.

    Args:
        path: of the table.
        registry: the components.
        seeds: runs of each recipe; by default what the table says.

    Raises:
        RecipeError: with file and line, and the nearest valid name.
    """
    document = reader.read(path)
    try:
        table = Table.model_construct(**options.check(Table, "the table", document.value, "", ()))
        rows = [
            Row.model_construct(**options.check(Row, "the row", row, f"rows[{i}]", ("rows", i)))
            for i, row in enumerate(table.rows)
        ]
        judged = None
        if table.selection is not None:
            checked = options.check(Selection, "selection", table.selection, "selection", ("selection",))
            judged = Selection.model_construct(**checked)
        entries = tuple(
            entry for i, row in enumerate(rows) for entry in _entries(row, table, judged, path, registry, i)
        )
        names = [entry.name for entry in entries]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise RecipeError(f"rows[{i}]: {name!r} is in the table already; give one a `name`", path=("rows", i))
            if not _NAME.fullmatch(name):
                raise RecipeError(f"rows[{i}].name: {name!r} is no name for a folder", path=("rows", i))
        plot = _plot(table, registry)
        retraining = None
        if judged is not None:
            recipe = _find(judged.base, path)
            base = load_recipe(recipe, registry, (*table.overrides, *judged.overrides))
            retraining = read_retraining(judged, recipe.resolve(), base, table.overrides, table.metrics)
            for entry in entries:
                check_search(entry.name, entry.recipe, retraining)
            if judged.reference is not None and judged.reference not in names:
                raise RecipeError(
                    f"selection.reference: no row '{judged.reference}'.{did_you_mean(judged.reference, names)} "
                    f"Rows: {listing(names)}",
                    path=("selection", "reference"),
                )
    except RecipeError as error:
        where = document.where(error.path)
        raise RecipeError(f"{where}: {error}" if where else str(error), path=error.path) from None
    chosen = range(table.first_seed, table.first_seed + (seeds or table.seeds))
    return Bench(path.stem, tuple(table.metrics), table.split, tuple(chosen), entries, plot, retraining)


def _plot(table: Table, registry: Registry) -> Plot | None:
    """The picture that the table asks for."""
    if table.plot is None:
        return None
    if table.selection is not None:
        raise RecipeError("plot: a selection table has pictures of its own; leave this out", path=("plot",))
    plot = _part(Plot, table.plot, "plot", ("plot",))
    if plot.y not in table.metrics:
        registry.check("metric", plot.y, "plot.y")
        raise RecipeError(f"plot.y: {plot.y!r} is none of the table's metrics", path=("plot", "y"))
    return plot


def _entries(
    row: Row, table: Table, judged: Selection | None, path: Path, registry: Registry, index: int
) -> Iterator[Entry]:
    """The entry of a row, or one for each value of the option that it varies."""
    if row.vary is None:
        yield _entry(row, table, judged, path, registry, index)
        return
    vary = _part(Vary, row.vary, f"rows[{index}].vary", ("rows", index, "vary"))
    for value in vary.values:
        yield _entry(row, table, judged, path, registry, index, (vary.option, value))


def _entry(
    row: Row,
    table: Table,
    judged: Selection | None,
    path: Path,
    registry: Registry,
    index: int,
    varied: tuple[str, Any] | None = None,
) -> Entry:
    if row.recipe is None and judged is None:
        raise RecipeError(f"rows[{index}]: 'the row' needs the option 'recipe'", path=("rows", index))
    overrides = tuple(table.overrides)
    if row.recipe is None and judged is not None:
        recipe, overrides = _find(judged.base, path), (*overrides, *judged.overrides)
    else:
        recipe = _find(row.recipe or "", path)
    series = row.name or recipe.stem
    if row.selector is not None:
        series = row.name or str(row.selector if isinstance(row.selector, str) else row.selector.get("use"))
        # Without stages of the recipe, those that the selector names.
        overrides = (*overrides, f"model.selector={json.dumps(row.selector)}", "stages=null")
    overrides, name, value = (*overrides, *row.overrides), series, None
    if varied is not None:
        option, value = varied
        overrides, name = (*overrides, f"{option}={json.dumps(value)}"), f"{series}@{value}"
    checked = load_recipe(recipe, registry, overrides)
    for metric in (*table.metrics, *row.published):
        _check_metric(metric, checked, registry, "metrics" if metric in table.metrics else f"rows[{index}].published")
    return Entry(name, recipe.resolve(), overrides, checked, dict(row.published), row.source, series, value)


def _check_metric(metric: str, recipe: Recipe, registry: Registry, where: str) -> None:
    """Refuse what no stage of a recipe measures: a metric, of a task where there are several, or another result."""
    tasks = tuple(recipe.data.label)
    specs = [spec for stage in recipe.stages for spec in stage.options.get("metrics", ())]
    own = {metric_name(spec) for spec in specs if isinstance(spec, str | Mapping)}
    task, of_task, name = metric.rpartition("/")
    if of_task and task not in tasks:
        raise RecipeError(f"{where}: {metric!r}: no task '{task}'.{did_you_mean(task, tasks)} Tasks: {listing(tasks)}")
    if name not in own:
        stages = [registry.make("stage", stage, where=f"stages: {stage.name}") for stage in recipe.stages]
        if not any(metric in stage.results() for stage in stages if isinstance(stage, Scoring)):
            registry.check("metric", name, where)


def _find(recipe: str, table: Path) -> Path:
    """The file of a recipe: beside the table, or one that comes with the package."""
    beside = table.parent / recipe
    return beside if beside.is_file() else find_recipe(recipe)


def _part(model: type[Part], given: Mapping[str, Any], where: str, path: tuple[str | int, ...]) -> Part:
    return model.model_construct(**options.check(model, where, given, "", path))
