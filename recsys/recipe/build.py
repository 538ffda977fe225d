"""A checked recipe to its parts: data, model, loss, and the run that the stages work on."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

import recsys
from recsys.contracts import SAMPLED, EncodedSchema, Exporter, Items, Loss, Metric, Propensity, Sampler, Source
from recsys.data.encode import Encoder
from recsys.data.prepare import Prepared, prepare
from recsys.data.sampling import Sampling, check_sampling
from recsys.data.schema import DataConfig, HashSplit
from recsys.data.shards import Shards
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError, RecipeError, RunError, did_you_mean, if_file
from recsys.nn.head import Head
from recsys.nn.model import Model
from recsys.nn.weightless import weightless
from recsys.plugin.hooks import Kind
from recsys.plugin.registry import Checked, Registry
from recsys.recipe.check import Recipe, check_document
from recsys.recipe.reader import Document
from recsys.train import distributed
from recsys.train.checkpoint import MANIFEST, read_json, replacing, sha256, write_json
from recsys.train.distributed import World
from recsys.train.progress import bar
from recsys.train.run import PlantedTruth, Run, Spec, derive_seed, restore_model

NEEDED = ("model.json", "model.safetensors", "recipe.json", "encoder/encoder.json")
"""What an exported folder must have, and list."""


def cache_folder() -> Path:
    """Return where encoded data is kept: `RECSYS_CACHE`, else `~/.cache/recsys`."""
    return Path(os.environ.get("RECSYS_CACHE") or Path.home() / ".cache" / "recsys")


def data_root(recipe: Recipe, given: Path | None) -> DataRoot:
    """Return the places where relative data paths are looked for, in order."""
    set_by_environment = os.environ.get("RECSYS_DATA")
    places = [given, recipe.data_root, Path(set_by_environment) if set_by_environment else None, recipe.folder]
    return DataRoot(tuple(place for place in places if place is not None), recipe.data.dataset)


def build_source(recipe: Recipe, registry: Registry, root: DataRoot) -> Source:
    """Return the recipe's source."""
    return cast(Source, registry.build("source", recipe.data.source, root, where="data.source"))


def prepare_data(recipe: Recipe, source: Source, console: Console, world: World, *, strict: bool = False) -> Prepared:
    """Encode the splits, or take them from the cache; one process of each machine does it for the others.

    Args:
        recipe: of the data.
        source: of the rows.
        console: shows the progress.
        world: the processes that train together.
        strict: tell files apart by all of their bytes, and refuse columns that the recipe does not name.
    """
    if strict:
        refuse_unused(recipe.data, source)

    def work() -> Prepared:
        with bar(console, disable=not world.leads) as progress:
            task = progress.add_task("reading the data", total=None)
            return prepare(
                recipe.data,
                source,
                cache_folder(),
                strict=strict,
                progress=lambda what, rows: progress.update(task, description=what, completed=rows),
            )

    return distributed.led(world, work) or prepare(recipe.data, source, cache_folder(), strict=strict)


def refuse_unused(config: DataConfig, source: Source) -> None:
    """Raise a `DataError` when a file has a column that the recipe does not name."""
    if not isinstance(source, Files):
        return
    used = config.columns()
    if isinstance(config.split, HashSplit):
        used = (*used, *config.split.columns)
    elif config.split is not None:
        used = (*used, config.split.column)
    for split in source.splits():
        for file, column in source.unused(split, used):
            raise DataError(f"{file}: the recipe does not name column {column!r}.{did_you_mean(column, used)}")


def build_model(recipe: Recipe, registry: Registry, schema: EncodedSchema, seed: int) -> Model:
    """Return the recipe's model; equal seeds give equal weights, and no other random numbers are touched."""

    def part(checked: Checked, kind: Kind, *positional: Any, where: str | None = None) -> Any:
        try:
            return registry.make(kind, checked, *positional, where=where or f"model.{kind}")
        except RecipeError as error:
            raise recipe.located(error) from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = part(recipe.parts["embedding"], "embedding", schema)
        selector = part(recipe.parts["selector"], "selector", embedding.fields)
        dim = embedding.fields.dim
        sequences = {
            history.name: part(recipe.parts["sequence"], "sequence", dim * len(history.columns))
            for history in schema.histories
            if history.target
        }
        members = recipe.head.ensemble
        try:
            fields = Model.consumer_fields(schema, embedding, members)
        except RecipeError as error:
            raise recipe.located(error) from error
        several = len(recipe.interactions) > 1
        interactions = [
            part(checked, "interaction", fields, where=f"model.interaction[{i}]" if several else None)
            for _ in range(members)
            for i, checked in enumerate(recipe.interactions)
        ]
        head = Head(schema, interactions, wide=recipe.head.wide, members=members)
        return Model(schema, embedding, selector, sequences, interactions, head)


def build_loss(recipe: Recipe, registry: Registry, schema: EncodedSchema) -> Loss:
    """Return the recipe's loss; its initial weights depend on the seed alone.

    Raises:
        RecipeError: it needs a context column that the recipe does not name.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.train.seed, "loss"))
            loss = cast(Loss, registry.make("loss", recipe.loss, schema.tasks, schema, where="loss"))
    except RecipeError as error:
        raise recipe.located(error) from error
    sampled = () if recipe.sampling is None else recipe.sampling.options.context
    for need in loss.needs:
        if need in SAMPLED and not sampled:
            raise recipe.located(
                RecipeError(
                    f"loss: '{recipe.loss.name}' compares logged rows with sampled ones; add the block `sampling:`",
                    path=("loss",),
                )
            )
        estimated = need == "propensity" and recipe.propensity is not None
        if need not in (*schema.context, *sampled) and not estimated:
            other = ", or add a block `propensity:` that estimates it" if need == "propensity" else ""
            raise recipe.located(
                RecipeError(
                    f"loss: '{recipe.loss.name}' needs the context column '{need}'; name it under data.context{other}",
                    path=("loss",),
                )
            )
    return loss


def build_propensity(recipe: Recipe, registry: Registry, schema: EncodedSchema) -> Propensity | None:
    """Return the recipe's propensity model, which has not been fitted yet; None if it has none.

    Raises:
        RecipeError: it cannot be built, or the log has a propensity of its own.
    """
    if recipe.propensity is None:
        return None
    try:
        if "propensity" in schema.context:
            raise RecipeError(
                f"propensity: data.context names the column of a propensity already, beside "
                f"'{recipe.propensity.name}'; keep one",
                path=("propensity",),
            )
        return cast(Propensity, registry.make("propensity", recipe.propensity, schema, where="propensity"))
    except RecipeError as error:
        raise recipe.located(error) from error


def build_run(
    recipe: Recipe,
    registry: Registry,
    folder: Path,
    encoder: Encoder,
    splits: Mapping[str, Shards],
    *,
    world: World,
    console: Console,
    source: Source | None = None,
) -> Run:
    """Put the parts together."""

    def metric(spec: Spec) -> Metric:
        return cast(Metric, registry.build("metric", spec, where="metric"))

    def exporter(spec: Spec) -> Exporter:
        return cast(Exporter, registry.build("exporter", spec, where="exporter"))

    run = Run(
        folder=folder,
        train=recipe.train,
        encoder=encoder,
        splits={},
        build_model=lambda seed: build_model(recipe, registry, encoder.schema, seed),
        loss=build_loss(recipe, registry, encoder.schema),
        metric=metric,
        exporter=exporter,
        recipe=recipe.document.value,
        world=world,
        console=console,
        reference=source.reference if isinstance(source, PlantedTruth) else None,
        build_sampling=build_sampling(recipe, registry, encoder.schema, splits),
        propensity=build_propensity(recipe, registry, encoder.schema),
    )
    run.splits = {name: run.complete(shards) for name, shards in splits.items()}
    return run


def build_sampling(
    recipe: Recipe, registry: Registry, schema: EncodedSchema, splits: Mapping[str, Shards]
) -> Callable[[int], Sampling] | None:
    """Return what makes the recipe's sampling from a seed; the items are read once, when it is first asked.

    Raises:
        RecipeError: the block names what the encoded rows do not have.
    """
    block = recipe.sampling
    if block is None:
        return None
    try:
        check_sampling(block.options, schema)
    except RecipeError as error:
        raise recipe.located(error) from error
    sampler = block.sampler

    def make(items: Items) -> Sampler:
        return cast(Sampler, registry.make("sampler", sampler, items, where="sampling.sampler"))

    @functools.cache
    def first() -> Sampling:
        return Sampling.of(splits["train"], block.options, make)

    return lambda seed: replace(first(), seed=seed)


def describe_run(
    recipe: Recipe, registry: Registry, fingerprint: str, arguments: Sequence[str], root: Path | None
) -> dict[str, Any]:
    """Return what must be known to repeat a run: versions, plugins, data, code."""
    packages = ("torch", "lightning", "polars", "numpy", "torchmetrics", "pluggy", "safetensors")
    return {
        "recipe": recipe.name,
        "recipe_folder": str(recipe.folder),
        "data_root": None if root is None else str(root.resolve()),
        "arguments": list(arguments),
        "recsys": recsys.__version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "plugins": {plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in registry.plugins},
        "data": fingerprint,
        "threads": torch.get_num_threads(),
        "git": _git_hash(recipe.folder),
    }


def write_run(folder: Path, recipe: Recipe, facts: Mapping[str, Any], encoder: Encoder) -> None:
    """Start a run folder: encoder, recipe, and last the facts, for a folder that has them can be resumed."""
    with replacing(folder / "encoder") as temporary:
        encoder.save(temporary)
    write_json(folder / "recipe.json", recipe.document.value)
    write_json(folder / "run.json", facts)


def read_run(folder: Path, registry: Registry) -> tuple[Recipe, dict[str, Any]]:
    """Read the recipe and the facts of a run folder.

    Raises:
        RunError: it is no run folder.
    """
    if not (folder / "run.json").is_file():
        near = sorted(str(path.parent) for path in folder.parent.glob("*/run.json")) if folder.parent.is_dir() else []
        hint = f" Runs beside it: {', '.join(near[-5:])}" if near else ""
        raise RunError(f"{folder}: no run folder (it has no run.json).{if_file(folder)}{hint}")
    facts = read_json(folder / "run.json")
    document = Document(read_json(folder / "recipe.json"), {(): str(folder / "recipe.json")})
    recipe = check_document(document, registry, facts["recipe"], Path(facts["recipe_folder"]))
    root = facts.get("data_root")
    return replace(recipe, data_root=None if root is None else Path(root)), facts


def load_trained(folder: Path, registry: Registry, console: Console) -> tuple[Recipe, Run, dict[str, Any]]:
    """Return a finished run with its trained model, without its data; or what such a run exported.

    Raises:
        RunError: nothing has been trained in it yet, or a file was altered after it was exported.
    """
    if is_export(folder):
        return load_exported(folder, registry, console)
    recipe, facts = read_run(folder, registry)
    state = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
    recipe = _without_selector(recipe, registry, state)
    run = _with_weights_of_file(recipe, registry, folder, console, Run.restore)
    if run.state["weights"] is None:
        raise RunError(
            f"{folder}: no stage of this run has finished training; continue it with `recsys train --resume {folder}`"
        )
    return recipe, run, facts


def is_export(folder: Path) -> bool:
    """Whether a folder was written by the stage `export`."""
    return (folder / MANIFEST).is_file() and (folder / "recipe.json").is_file() and not (folder / "run.json").exists()


def load_exported(folder: Path, registry: Registry, console: Console) -> tuple[Recipe, Run, dict[str, Any]]:
    """Return the exported model, with the encoder that was exported with it.

    Raises:
        RunError: a file is missing, or was altered after it was exported.
    """
    digests, shape = read_json(folder / MANIFEST), read_json(folder / "model.json")
    if not isinstance(digests, dict) or not isinstance(shape, dict):
        raise RunError(f"{folder}: not what the stage `export` writes; export the run again")
    for name in (*NEEDED, *shape.get("selections", ())):
        if name not in digests:
            raise RunError(f"{folder / MANIFEST}: does not list {name}; export the run again")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: missing; it was there when the model was exported")
        if sha256(path) != digest:
            raise RunError(f"{path}: altered after the model was exported (sha256 differs)")
    document = Document(read_json(folder / "recipe.json"), {(): str(folder / "recipe.json")})
    recipe = _without_selector(check_document(document, registry, folder.name, folder), registry, shape)
    state = {**shape, "weights": "model.safetensors"}

    def take_up(run: Run) -> None:
        run.state |= state
        restore_model(run)

    return recipe, _with_weights_of_file(recipe, registry, folder, console, take_up), {}


def _without_selector(recipe: Recipe, registry: Registry, state: Any) -> Recipe:
    """The recipe once its selector was pruned away: its choice is a file, and what it was built from may be gone."""
    if not isinstance(state, dict) or not state.get("selections"):
        return recipe
    left = registry.check("selector", {"use": "keep_all", "scale": state.get("scale", 1.0)}, "model.selector")
    return replace(recipe, parts={**recipe.parts, "selector": left})


def _with_weights_of_file(
    recipe: Recipe, registry: Registry, folder: Path, console: Console, take_up: Callable[[Run], None]
) -> Run:
    """Build a run without its data, and let it take up what the folder holds: as little memory as that takes.

    A plugin's part that looks at its weights when it is pruned needs some: then all are drawn first.
    """
    encoder = Encoder.load(folder / "encoder")
    for light in (True, False):
        try:
            with weightless() if light else contextlib.nullcontext():
                run = build_run(recipe, registry, folder, encoder, {}, world=World(), console=console)
            take_up(run)
            break
        except (NotImplementedError, RuntimeError):
            if not light:
                raise
    return run


def _git_hash(folder: Path) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
