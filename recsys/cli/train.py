"""`recsys train`: from a recipe to a trained, evaluated, saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.errors import RecipeError

if TYPE_CHECKING:
    from recsys.plugin.registry import Registry
    from recsys.recipe.check import Recipe

DataRootOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        help="Where relative data paths start; else RECSYS_DATA, else the recipe's folder.",
    ),
]


def command(
    recipe: Annotated[
        str | None, typer.Argument(help="Recipe file, or the name of one that comes with recsys.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as `train.epochs=2`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; by default one in `runs/`.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Continue this run where it stopped.")
    ] = None,
    allow_drift: Annotated[
        bool,
        typer.Option(
            "--allow-drift", help="With --resume: go on although versions or options have changed; never other data."
        ),
    ] = False,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object in the last line of stdout.")
    ] = False,
) -> None:
    """Train a recipe: encode the data, run the stages, save everything in a run folder.

    `recsys train quickstart` needs no data. `recsys train recipes/frappe/dcnv2.yaml train.epochs=2
    model.head.wide=true --out runs/mine` changes options for one run; `train.devices=2` trains on two devices.
    `recsys train --resume runs/mine` continues a run that was stopped; with `--allow-drift train.learning_rate=1e-4`
    behind it, it goes on with another learning rate.
    """
    registry = open_registry(plugin, without)
    from recsys.recipe import execute

    changes = [text for text in (recipe, *(overrides or [])) if text is not None]
    if resume is not None:
        if out is not None or not all("=" in text for text in changes):
            raise RecipeError("--resume continues a run with its own recipe and folder; give nothing else beside it")
        checked, folder = execute.resumed(resume, registry, changes, allow_drift)
    else:
        checked = _checked(recipe, overrides, registry)
        folder = execute.new_folder(checked, out)
    session = execute.Session(
        checked,
        registry,
        folder,
        resume=resume is not None,
        allow_drift=allow_drift,
        data_root=data_root,
        console=make_console(stderr=as_json),
    )
    if execute.must_launch(checked):
        source = (
            [*changes, "--resume", str(folder)]
            if resume is not None
            else [str(recipe), *(overrides or []), "--out", str(folder)]
        )
        flags = [("--plugin", str(file)) for file in plugin or []] + [("--without", name) for name in without or []]
        flags += [("--data-root", str(data_root))] if data_root is not None else []
        switches = [name for name, given in (("--json", as_json), ("--allow-drift", allow_drift)) if given]
        execute.launch_all(["train", *source, *switches, *(word for flag in flags for word in flag)], checked)
    else:
        result = session.run()
        if as_json and result is not None:
            import json

            print(json.dumps(result), flush=True)


def _checked(recipe: str | None, overrides: list[str] | None, registry: Registry) -> Recipe:
    from recsys.recipe.check import find_recipe, load_recipe

    if recipe is None:
        raise RecipeError("which recipe? For example: recsys train quickstart")
    return load_recipe(find_recipe(recipe), registry, overrides or ())
