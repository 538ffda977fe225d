"""`recsys check`: everything about a recipe that can be known before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption

if TYPE_CHECKING:
    from recsys.recipe.check import Recipe
    from recsys.recipe.describe import Dry


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with recsys.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as `train.epochs=2`.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the train split to learn the sizes from.")] = 100_000,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
) -> None:
    """Check a recipe without training: keys, options, columns, shapes, parameters, memory and cost of a step.

    `recsys check recipes/frappe/dcnv2.yaml --data-root data`
    """
    registry = open_registry(plugin, without)
    from recsys.recipe.check import find_recipe, load_recipe
    from recsys.recipe.describe import dry_run

    checked = load_recipe(find_recipe(recipe), registry, overrides or ())
    _print(checked, dry_run(checked, registry, data_root, rows))


def _print(recipe: Recipe, dry: Dry) -> None:
    from rich.table import Table

    console = make_console()
    table = Table("input", "kind", "ids", "shares", box=None, pad_edge=False)
    for field in dry.schema.fields:
        table.add_row(field.name, "numeric" if field.numeric else "categorical", f"{field.rows:,}", field.shares or "")
    for history in dry.schema.histories:
        kind = f"history of {', '.join(history.target)}" if history.target else "multi-valued"
        for column in history.columns:
            table.add_row(column.name, f"{kind}, at most {history.max_length}", f"{column.rows:,}", column.shares or "")
    console.print(table)
    steps = " → ".join(f"{name} [{', '.join(shape)}]" for name, shape in dry.shapes.items())
    console.print(f"\nshapes: {steps} → logit [B]", highlight=False, markup=False, soft_wrap=True)
    count = sum(p.numel() for p in dry.model.parameters())
    tables = sum(p.numel() for p in dry.model.parameter_groups()[0])
    batch = recipe.train.batch_size
    # Adam keeps two numbers beside every weight, and the gradient is a fourth.
    console.print(
        f"parameters: {count:,} ({tables:,} in tables) · with gradients and optimizer {count * 16 / 2**20:,.1f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    step = 3 * dry.flops * batch / 1e9
    cost = f"cost: {dry.flops / 1e6:,.2f} MFLOP per row forward, about {step:,.1f} GFLOP per step of {batch:,} rows"
    console.print(cost, highlight=False, soft_wrap=True)
    stages = ", ".join(stage.options.get("name") or stage.name for stage in recipe.stages)
    console.print(f"splits: {', '.join(dry.splits)} · stages: {stages}", highlight=False, soft_wrap=True)
    console.print(
        f"the recipe is sound; sizes are those of the first {dry.rows:,} training rows", highlight=False, soft_wrap=True
    )
