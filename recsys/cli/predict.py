"""`recsys predict`: score raw rows with a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run, or its folder `export`.")],
    data: Annotated[
        list[str], typer.Option("--data", metavar="FILE", help="File or glob of raw rows; can be repeated.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where scores go: .parquet, .csv or .ndjson.")],
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="COLUMN", help="Copy this column beside the score; can be repeated."),
    ] = None,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
) -> None:
    """Score raw rows: the same columns as in training, labels not needed; every row gets its score, in order.

    `recsys predict runs/mine --data new.parquet --out scores.parquet --keep user --keep item`

    The column `score` is the predicted probability (`score_<task>` when the recipe has several labels).
    Values that training never saw are scored as unknown and counted.
    """
    registry = open_registry(plugin, without)
    from recsys.recipe.use import predict_files

    console = make_console()
    rows, unknown, remark = predict_files(
        run, registry, data, out, keep=keep or (), data_root_given=data_root, console=console
    )
    told = f"{rows:,} rows scored into {out} · {unknown:.2%} of their values are unknown to the model"
    console.print(f"{told}\n{remark}" if remark else told, highlight=False, markup=False, soft_wrap=True)
