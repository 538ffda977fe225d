"""What a benchmark table says: which recipes, how many seeds, which metrics, and what was published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from recsys.errors import RecipeError
from recsys.plugin import options
from recsys.plugin.registry import Registry
from recsys.recipe import reader
from recsys.recipe.check import Recipe, find_recipe, load_recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,63}")

Part = TypeVar("Part", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Vary(_Strict):
    """An option that a row of the table is repeated with."""

    option: str = Field(description="path of the option in the recipe, such as `model.embedding.budget`")
    values: list[Any] = Field(min_length=1, description="its values; each gives a row called `name@value`")


class Plot(_Strict):
    """A picture of the table: one point for every row, one line for every row that is varied."""

    x: Literal["bytes", "embedding_bytes", "parameters", "epoch_seconds", "value"] = Field(
        "embedding_bytes", description="what goes to the right; `value` is that of the varied option"
    )
    y: str = Field("auc", description="metric that goes upwards")
    log: bool = Field(True, description="logarithmic scale to the right")


class Row(_Strict):
    """A recipe of the table."""

    recipe: str = Field(description="recipe file, relative to the table's folder, or one that comes with recsys")
    name: str | None = Field(default=None, description="in the table; by default the recipe's file name")
    overrides: list[str] = Field(default=[], description="changes of the recipe, such as `train.learning_rate=0.01`")
    vary: dict[str, Any] | None = Field(default=None, description="{option, values}: one row for each value")
    published: dict[str, float] = Field(default={}, description="metric -> published value")
    source: str = Field(default="", description="where and how that was measured")


class Table(_Strict):
    """Recipes to train with several seeds each."""

    rows: list[dict[str, Any]] = Field(min_length=1, description="the recipes")
    metrics: list[str] = Field(default=["auc", "logloss"], min_length=1, description="columns of the table")
    split: str = Field(default="test", description="split on which they are measured")
    seeds: int = Field(default=5, ge=1, description="runs of each recipe")
    first_seed: int = Field(default=2021, ge=0, description="train.seed of the first run; the others follow")
    overrides: list[str] = Field(default=[], description="changes of every recipe, such as `train.threads=1`")
    plot: dict[str, Any] | None = Field(default=None, description="{x, y, log}: a picture of the table, plot.svg")


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
    """A checked table."""

    name: str
    metrics: tuple[str, ...]
    split: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    plot: Plot | None = None


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
        entries = tuple(entry for i, row in enumerate(rows) for entry in _entries(row, table, path, registry, i))
        plot = _part(Plot, table.plot, "plot", ("plot",)) if table.plot is not None else None
        if plot is not None:
            registry.check("metric", plot.y, "plot.y")
            if plot.y not in table.metrics:
                raise RecipeError(f"plot.y: {plot.y!r} is none of the table's metrics", path=("plot", "y"))
        names = [entry.name for entry in entries]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise RecipeError(f"rows[{i}]: {name!r} is in the table already; give one a `name`", path=("rows", i))
            if not _NAME.fullmatch(name):
                raise RecipeError(f"rows[{i}].name: {name!r} is no name for a folder", path=("rows", i))
    except RecipeError as error:
        where = document.where(error.path)
        raise RecipeError(f"{where}: {error}" if where else str(error), path=error.path) from None
    chosen = range(table.first_seed, table.first_seed + (seeds or table.seeds))
    return Bench(path.stem, tuple(table.metrics), table.split, tuple(chosen), entries, plot)


def _entries(row: Row, table: Table, path: Path, registry: Registry, index: int) -> Iterator[Entry]:
    """The entry of a row, or one for each value of the option that it varies."""
    if row.vary is None:
        yield _entry(row, table, path, registry, index)
        return
    vary = _part(Vary, row.vary, f"rows[{index}].vary", ("rows", index, "vary"))
    for value in vary.values:
        yield _entry(row, table, path, registry, index, (vary.option, value))


def _entry(
    row: Row, table: Table, path: Path, registry: Registry, index: int, varied: tuple[str, Any] | None = None
) -> Entry:
    beside = path.parent / row.recipe
    recipe = beside if beside.is_file() else find_recipe(row.recipe)
    overrides = (*table.overrides, *row.overrides)
    series = name = row.name or recipe.stem
    value = None
    if varied is not None:
        option, value = varied
        overrides, name = (*overrides, f"{option}={json.dumps(value)}"), f"{series}@{value}"
    checked = load_recipe(recipe, registry, overrides)
    for metric in (*table.metrics, *row.published):
        registry.check("metric", metric, "metrics" if metric in table.metrics else f"rows[{index}].published")
    return Entry(name, recipe.resolve(), overrides, checked, dict(row.published), row.source, series, value)


def _part(model: type[Part], given: Mapping[str, Any], where: str, path: tuple[str | int, ...]) -> Part:
    return model.model_construct(**options.check(model, where, given, "", path))
