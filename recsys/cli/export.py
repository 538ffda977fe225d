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
    mlflow: Annotated[
        Path | None, typer.Option("--mlflow", metavar="DIR", help="A model that MLflow loads (python_function).")
    ] = None,
    kserve: Annotated[
        Path | None, typer.Option("--kserve", metavar="FILE", help="The manifest of a service of KServe.")
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            metavar="URI",
            help="For KServe, where the bundle's folder will lie; without --image, a repository of Triton.",
        ),
    ] = "",
    image: Annotated[
        str | None, typer.Option("--image", help="For KServe, a container image in which `recsys serve` can be run.")
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
    `recsys export runs/mine --mlflow mine_mlflow`
    `recsys export runs/mine --kserve ctr.yaml --name ctr --storage s3://models/ctr --image registry/recsys`

    Needs onnx and onnxruntime (for MLflow and KServe neither), not torch. Every file of the bundle is compared with its
    hash first.
    """
    from recsys.deploy.bundle import open_bundle

    if onnx is None and triton is None and mlflow is None and kserve is None:
        raise ExportError("say what to write: --onnx FILE, --triton DIR, --mlflow DIR or --kserve FILE")
    console = make_console()
    inside = bundle / "bundle"
    opened = open_bundle(inside if inside.is_dir() else bundle)
    if mlflow is not None:
        from recsys.deploy.mlflow import write_mlflow

        write_mlflow(opened, mlflow)
        console.print(f"{mlflow}: {opened.id}", highlight=False, markup=False)
    if kserve is not None:
        from recsys.deploy.kserve import inference_service

        text = inference_service(name, storage, image=image)
        kserve.parent.mkdir(parents=True, exist_ok=True)
        kserve.write_text(text, encoding="utf-8")
        console.print(str(kserve), highlight=False, markup=False)
    if onnx is None and triton is None:
        return
    require("graph")
    from recsys.deploy.raw_graph import RawGraphs

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
