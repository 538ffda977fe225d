"""`recsys export`: a bundle in the forms that other servers take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import make_console, require
from recsys.errors import ExportError


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or of a run that has one.")],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="FILE", help="One ONNX graph from raw columns to scores.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option("--triton", metavar="DIR", help="A model in this repository of Triton.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The model's name for the server.")] = "recsys",
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="For Triton, encoder and graph as two models, joined by the server.")
    ] = False,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="For Triton, rows of a batch at most.")] = 1024,
    delay: Annotated[
        int, typer.Option("--delay", min=0, help="For Triton, microseconds that a request may wait for others.")
    ] = 500,
    instances: Annotated[int, typer.Option("--instances", min=1, help="For Triton, instances of the model.")] = 1,
    null: Annotated[
        str, typer.Option("--null", metavar="TEXT", help="The text that means missing; tensors have no null.")
    ] = "<null>",
    normalized: Annotated[
        bool, typer.Option("--normalized", help="Texts that the recipe normalises come normalised already.")
    ] = False,
) -> None:
    """Write a bundle in a form that other servers take, from raw columns to scores.

    `recsys export runs/mine --onnx mine.onnx`
    `recsys export runs/mine --triton models --name ctr`

    Needs onnx and onnxruntime, not torch. Every file of the bundle is compared with its hash first.
    """
    require("graph")
    from recsys.deploy.bundle import open_bundle
    from recsys.deploy.raw_graph import RawGraphs

    if onnx is None and triton is None:
        raise ExportError("say what to write: --onnx FILE or --triton DIR")
    console = make_console()
    inside = bundle / "bundle"
    opened = open_bundle(inside if inside.is_dir() else bundle)
    graphs = RawGraphs(opened, null, normalized)
    if onnx is not None:
        content = graphs.whole()
        onnx.parent.mkdir(parents=True, exist_ok=True)
        onnx.write_bytes(content)
        console.print(f"{onnx}: {len(content):,} bytes, {opened.id}", highlight=False, markup=False)
    if triton is not None:
        from recsys.deploy.triton import Batching, write_triton

        batching = Batching(max_batch, delay, instances)
        for folder in write_triton(graphs, triton, name, ensemble=ensemble, batching=batching):
            console.print(str(folder), highlight=False, markup=False)
