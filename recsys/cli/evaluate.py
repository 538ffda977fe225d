"""`recsys evaluate`: measure a trained run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run, or its folder `export`.")],
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="train, valid or test; by default valid and test."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="By default those of the recipe; can be repeated."),
    ] = None,
    intervals: Annotated[
        float | None,
        typer.Option("--intervals", metavar="SHARE", min=0, max=1, help="Bounds that hold this share, such as 0.95."),
    ] = None,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")] = False,
) -> None:
    """Measure a trained run on its recipe's splits, every row once.

    `recsys evaluate runs/mine --split test --metric auc --metric ece`; `recsys list metric` names them all.
    With `--intervals 0.95` each score has bounds, from rows drawn again by group, or one by one without groups.
    """
    registry = open_registry(plugin, without)
    from recsys.recipe.use import evaluate_run, plain_scores

    _, scores = evaluate_run(
        run,
        registry,
        splits=split or (),
        metrics=metric or (),
        intervals=intervals,
        data_root_given=data_root,
        console=make_console(stderr=as_json),
    )
    if as_json:
        import json

        print(json.dumps({"run": str(run), "metrics": plain_scores(scores)}))
