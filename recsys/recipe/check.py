"""A document to a checked `Recipe`: every key known, every component installed, every option of the right type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

import recsys
from recsys.contracts import Named
from recsys.data.sampling import SamplingOptions
from recsys.data.schema import DataConfig
from recsys.errors import RecipeError, did_you_mean, listing
from recsys.plugin import options
from recsys.plugin.hooks import Kind
from recsys.plugin.registry import Checked, Registry
from recsys.recipe import reader
from recsys.recipe.reader import Document, Key
from recsys.train.options import TrainOptions

BLOCKS = ("data", "model", "loss", "propensity", "sampling", "train", "stages")
PARTS: Mapping[str, tuple[Kind, str]] = {
    "embedding": ("embedding", "table"),
    "selector": ("selector", "keep_all"),
    "sequence": ("sequence", "mean_pool"),
}
"""Part of `model:` with exactly one component → (kind, what is used when the recipe does not say)."""
DEFAULT_STAGES: tuple[Mapping[str, Any], ...] = ({"use": "fit"}, {"use": "evaluate"}, {"use": "export"})

_STAGE_NAME = re.compile(r"\w[\w.-]{0,100}")

Block = TypeVar("Block", bound=BaseModel)


class HeadOptions(BaseModel):
    """The `model.head:` block."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    wide: bool = Field(False, description="add a first-order term: one weight for every value of every field")
    ensemble: int = Field(
        1,
        ge=1,
        description="number of members: so many models of the same interactions, each with its own equal part of the "
        "embedding's dimensions and a loss of its own; the score is the mean of their logits",
    )


@dataclass(frozen=True)
class SamplingBlock:
    """The `sampling:` block.

    Args:
        options: which rows, which fields.
        sampler: which items.
    """

    options: SamplingOptions
    sampler: Checked


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be built.

    Args:
        name: file name without its ending.
        folder: folder of the file, the last place where relative data paths are looked for.
        document: the resolved values, with lines.
        data: the `data:` block.
        parts: embedding, selector, sequence.
        interactions: one or more; their outputs stand side by side.
        head: options of the head.
        loss: the loss.
        sampling: the `sampling:` block; None: no rows are sampled.
        train: the `train:` block.
        stages: in order.
        data_root: of a run that goes on: the folder that it was started with.
        propensity: the model of exposure, where the recipe has one.
    """

    name: str
    folder: Path
    document: Document
    data: DataConfig
    parts: Mapping[str, Checked]
    interactions: tuple[Checked, ...]
    head: HeadOptions
    loss: Checked
    sampling: SamplingBlock | None
    train: TrainOptions
    stages: tuple[Checked, ...]
    data_root: Path | None = None
    propensity: Checked | None = None

    def located(self, error: RecipeError) -> RecipeError:
        """Return the error with the file and line of the value that it is about."""
        return _located(error, self.document)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: as given, or one that comes with the package.

    Raises:
        RecipeError: there is none, with the nearest name.
    """
    given = Path(name)
    if given.is_file():
        return given
    here = Path(recsys.__file__).parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), here / "recipes")
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("recipes",) else given
    for candidate in (relative, relative.with_name(relative.name + ".yaml")):
        if not candidate.is_absolute() and (folder / candidate).is_file():
            return folder / candidate
    known = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))
    raise RecipeError(
        f"{name}: no such recipe.{did_you_mean(str(relative), known)} Recipes that come with it: {listing(known)}"
    )


def load_recipe(path: Path, registry: Registry, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Raises:
        RecipeError: with file, line, path in the recipe and the nearest valid name.
    """
    document = reader.read(path)
    for text in overrides:
        document = reader.override(document, text)
    return check_document(document, registry, path.stem, path.resolve().parent)


def check_document(document: Document, registry: Registry, name: str, folder: Path) -> Recipe:
    """Check the values of a recipe.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        return _check(document, registry, name, folder)
    except RecipeError as error:
        raise _located(error, document) from None


def _check(document: Document, registry: Registry, name: str, folder: Path) -> Recipe:
    values = document.value
    for key in values:
        if key not in BLOCKS:
            raise RecipeError(f"unknown key '{key}'.{did_you_mean(key, BLOCKS)} Keys: {listing(BLOCKS)}", path=(key,))
    if "data" not in values:
        raise RecipeError("a recipe needs `data:`; `recsys schema infer FILE` writes a first one")
    model = _mapping(values.get("model") or {}, "model")
    known = (*PARTS, "interaction", "head")
    for key in model:
        if key not in known:
            raise RecipeError(
                f"model: unknown part '{key}'.{did_you_mean(key, known)} Parts: {listing(known)}", path=("model", key)
            )
    if "interaction" not in model:
        raise RecipeError(
            f"model.interaction is missing; installed: {listing(registry.names('interaction'))}", path=("model",)
        )
    written = model["interaction"] if isinstance(model["interaction"], list) else [model["interaction"]]
    in_list = isinstance(model["interaction"], list)
    if not written:
        raise RecipeError("model.interaction: the list is empty", path=("model", "interaction"))
    recipe = Recipe(
        name=name,
        folder=folder,
        document=document,
        data=_block(DataConfig, values["data"], "data"),
        parts={
            part: _component(registry, kind, model.get(part, default), f"model.{part}")
            for part, (kind, default) in PARTS.items()
        },
        interactions=tuple(
            _component(registry, "interaction", spec, f"model.interaction[{i}]" if in_list else "model.interaction")
            for i, spec in enumerate(written)
        ),
        head=_block(HeadOptions, model.get("head") or {}, "model.head"),
        loss=_component(registry, "loss", values.get("loss", "bce"), "loss"),
        sampling=_sampling(registry, values.get("sampling")),
        train=_block(TrainOptions, values.get("train") or {}, "train"),
        stages=tuple(
            _component(registry, "stage", spec, f"stages[{i}]")
            for i, spec in enumerate(_stages(values, registry, model, written))
        ),
        propensity=None
        if values.get("propensity") is None
        else _component(registry, "propensity", values["propensity"], "propensity"),
    )
    for i, stage in enumerate(recipe.stages):
        named = stage.options.get("name")
        if named is not None and not _STAGE_NAME.fullmatch(str(named)):
            raise RecipeError(
                f"stages[{i}].name: {named!r} is no name for a folder; use letters, digits, '-', '_' and '.'",
                path=("stages", i, "name"),
            )
    registry.check("source", recipe.data.source, "data.source")
    registry.check("metric", recipe.train.monitor, "train.monitor")
    return recipe


def _sampling(registry: Registry, given: Any) -> SamplingBlock | None:
    if given is None:
        return None
    values = dict(_mapping(given, "sampling"))
    sampler = _component(registry, "sampler", values.pop("sampler", "uniform"), "sampling.sampler")
    return SamplingBlock(_block(SamplingOptions, values, "sampling"), sampler)


def _component(registry: Registry, kind: Kind, spec: Any, where: str) -> Checked:
    checked = registry.check(kind, spec, where)
    for option, other in _named(registry.get(kind, checked.name).model):
        value = checked.options[option]
        several = value if isinstance(value, tuple | list) else () if value is None else (value,)
        for i, entry in enumerate(several):
            registry.check(
                cast(Kind, other), entry, f"{where}.{option}[{i}]" if value is several else f"{where}.{option}"
            )
    return checked


def _named(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield (option, kind) for the options whose values are names of components."""
    for name, info in model.model_fields.items():
        for kind in _kinds(info.annotation, info.metadata):
            yield info.alias or name, kind


def _kinds(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[str]:
    yield from (mark.kind for mark in (*metadata, *getattr(annotation, "__metadata__", ())) if isinstance(mark, Named))
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _stages(
    values: Mapping[str, Any], registry: Registry, model: Mapping[str, Any], interactions: Sequence[Any]
) -> Sequence[Any]:
    """Return the written stages; without any, those that a used component names; else fit, evaluate, export."""
    written = values.get("stages")
    if written is not None:
        if not isinstance(written, list) or not written:
            raise RecipeError("stages: expected a list such as `- {use: fit}`", path=("stages",))
        return written
    used: list[tuple[Kind, Any]] = [(kind, model.get(part, default)) for part, (kind, default) in PARTS.items()]
    used += [("interaction", spec) for spec in interactions]
    used += [("loss", values.get("loss", "bce"))]
    named = {}
    for kind, spec in used:
        name = spec.get("use") if isinstance(spec, Mapping) else spec
        component = registry.get(kind, str(name)).component
        if component.stages:
            named[component.name] = component.stages
    if len(named) > 1:
        raise RecipeError(f"{listing(named)} each name their own stages; write the recipe's `stages:` out")
    return next(iter(named.values()), DEFAULT_STAGES)


def _block(model: type[Block], given: Any, where: str) -> Block:
    mapping = _mapping(given, where)
    checked = options.check(model, where.rsplit(".", 1)[-1], mapping, where, options.split(where))
    return model.model_construct(**checked)


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: expected a mapping, got {given!r}", path=options.split(where))
    return given


def _located(error: RecipeError, document: Document) -> RecipeError:
    path: Key = error.path
    where = document.where(path)
    return RecipeError(f"{where}: {error}" if where and not str(error).startswith(where) else str(error), path=path)
