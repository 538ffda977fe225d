"""`recsys schema`: the data part of recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, open_registry

app = typer.Typer(no_args_is_help=True, help="The data part of recipes: infer a first one, or print the JSON Schema.")


@app.command("infer")
def infer(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Logs: Parquet, CSV, TSV, NDJSON or Arrow IPC; all of one kind.")
    ],
) -> None:
    """Write a first `data:` block for your own logs, with a reason beside every guess.

    `recsys schema infer logs.parquet > recipe.yaml`, then add `model: {interaction: fm}` and train.
    """
    from recsys.data.infer import infer_schema

    print(infer_schema(*files))


@app.command("json")
def as_json(plugin: PluginFiles = None, without: Without = None) -> None:
    """Print the JSON Schema of recipes, with every installed component, for editors that complete YAML.

    `recsys schema json > recipe.schema.json`
    """
    registry = open_registry(plugin, without)
    import json

    from recsys.recipe.describe import recipe_schema

    print(json.dumps(recipe_schema(registry), indent=2))
