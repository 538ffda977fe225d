"""`recsys export`: a bundle in the forms that other servers take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry, require
from recsys.errors import ExportError

if TYPE_CHECKING:
    from rich.console import Console

    from recsys.plugin.registry import Registry


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
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="FILE", help="Sign the bundle with the key in this file.")
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
    index: Annotated[
        str | None, typer.Option("--index", metavar="LIBRARY", help="An index of the run's items: usearch.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="For an index, its folder.")] = None,
    items: Annotated[
        list[str] | None,
        typer.Option("--items", metavar="FIELD", help="For an index, a field of the item, its id first; repeated."),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option("--catalogue", metavar="FILE", help="For an index, a row for each item: .parquet, .csv, .ndjson."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="For an index, whose score; the first by default.")] = None,
    plugin: PluginFiles = None,
    without: Without = None,
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

    `recsys export runs/mine --sign key`

    `recsys export runs/mine --index usearch --items item --out items`

    Needs onnx and onnxruntime (for MLflow and KServe neither), not torch; an index needs torch and a run. Every file
    of the bundle is compared with its hash first.
    """
    from recsys.deploy.bundle import open_bundle

    if not any((onnx, triton, mlflow, kserve, index, sign)):
        raise ExportError(
            "say what to write: --onnx FILE, --triton DIR, --mlflow DIR, --kserve FILE, --sign FILE or --index LIBRARY"
        )
    console = make_console()
    if index is not None:
        _write_index(bundle, index, out, items or [], catalogue, task, open_registry(plugin, without), console)
    if not any((onnx, triton, mlflow, kserve, sign)):
        return
    inside = bundle / "bundle"
    opened = open_bundle(inside if inside.is_dir() else bundle)
    if sign is not None:
        from recsys.deploy.bundle import MANIFEST
        from recsys.deploy.signature import SIGNATURE, read_key, text_of

        text = text_of((opened.folder / MANIFEST).read_bytes(), read_key(sign))
        (opened.folder / SIGNATURE).write_text(text, encoding="ascii")
        console.print(f"{opened.folder / SIGNATURE}: {opened.id}", highlight=False, markup=False)
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


def _write_index(
    run: Path,
    library: str,
    out: Path | None,
    items: list[str],
    catalogue: Path | None,
    task: str | None,
    registry: Registry,
    console: Console,
) -> None:
    if library != "usearch":
        raise ExportError(f"--index {library}: usearch is the only library there is")
    if out is None or not items:
        raise ExportError("an index needs --out DIR, and --items FIELD for each field of the item, its id first")
    require("index")
    from recsys.recipe.items import export_index

    told = export_index(run, registry, out, items, catalogue=catalogue, task=task, console=console)
    console.print(f"{out}: {told}", highlight=False, markup=False)
