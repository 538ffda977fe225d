"""Writes a bundle: the trained model and its encoder as files that need neither torch nor Polars to be used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recsys
from recsys.contracts import Batch
from recsys.data.encode import Encoder
from recsys.data.schema import Categorical
from recsys.data.vocabulary import Vocabulary as Learned
from recsys.deploy import aot, golden
from recsys.deploy import bundle as files
from recsys.deploy.calibration import Calibration
from recsys.deploy.card import card, card_text, components
from recsys.deploy.columns import describe, describe_scores
from recsys.deploy.compile import compile_graph
from recsys.deploy.graph import input_names, onnx_graph
from recsys.deploy.predictor import load
from recsys.deploy.spec import EncoderSpec, IdColumn, ListGroup, NumberColumn, Vocabulary
from recsys.errors import RecipeError
from recsys.nn.model import Model
from recsys.train.checkpoint import save_tensors

TOLERANCE = 1e-6
"""Largest difference between a probability and its golden answer, unless rounding alone is more in training too."""
_ALONE = 48
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "polars", "numpy")


@dataclass(frozen=True)
class Facts:
    """What is told of a model beside its files.

    Args:
        recipe: as resolved.
        metrics: split → metric → value; None where undefined.
        plugins: name → distribution and version.
        data: fingerprint of the data; empty where unknown.
    """

    recipe: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float | None]]
    plugins: Mapping[str, str]
    data: str


def write_bundle(
    folder: Path,
    encoder: Encoder,
    model: Model,
    sample: Batch,
    facts: Facts,
    calibration: Calibration | None = None,
    *,
    compiled: bool = False,
) -> float:
    """Write a bundle into an empty folder, load it, and let it answer its golden rows.

    Args:
        folder: exists, and is empty.
        encoder: that belongs to the model.
        model: trained; it stays as it is.
        sample: encoded training rows, for what the columns look like.
        facts: that the bundle tells.
        calibration: how logits become probabilities; by default as they are.
        compiled: add the graph as native code, which the manifest marks as executable.

    Returns:
        The largest difference between a probability of the bundle and one of the training code, over the golden rows.

    Raises:
        RecipeError: the model or its inputs have no form outside of training; or native code is asked for, and there is
            no compiler.
        BundleError: the bundle answers otherwise than the training code.
    """
    if encoder.config.noise_inputs():
        raise RecipeError("planted noise is no column of the logs that a service could be sent; remove `data.noise`")
    spec = spec_of(encoder)
    (folder / files.GRAPH).write_bytes(onnx_graph(model))
    save_tensors(folder / files.WEIGHTS, model.state_dict())
    (folder / files.ENCODER).write_text(spec.to_json(), encoding="utf-8")
    _write_vocabularies(folder, encoder, spec)
    curves = calibration or Calibration.none(spec.tasks)
    _json(folder / files.CALIBRATION, curves.to_json())
    rows, rounded = _write_golden(folder, encoder, model, curves)
    _lines(folder / files.WARMUP, rows[:64])
    scores = describe_scores(model, sample, curves)
    _json(folder / files.COLUMNS, {**describe(encoder, spec, sample), "scores": scores})
    _json(folder / "recipe.json", _public(facts.recipe))
    told = {
        "versions": {"recsys": recsys.__version__, "python": platform.python_version(), **_versions(PACKAGES)},
        "plugins": dict(facts.plugins),
        "recipe": hashlib.sha256(_text(_public(facts.recipe)).encode()).hexdigest(),
        "data": facts.data,
        "metrics": facts.metrics,
        "tasks": list(spec.tasks),
    }
    about = card(facts.recipe, told, model, spec)
    _json(folder / "model_card.json", about)
    (folder / "model_card.md").write_text(card_text(about), encoding="utf-8")
    _json(folder / "SBOM.cdx.json", components(told, _digest(folder / files.GRAPH)))
    signature = {
        "inputs": _inputs(model),
        "outputs": {
            "logit": {"type": "float32", "shape": ["B", len(spec.tasks)]},
            "probability": {"type": "float32", "shape": ["B", len(spec.tasks)]},
            "clipped": {"type": "int64", "shape": ["B"]},
        },
    }
    tolerance = max(TOLERANCE, 4 * rounded)
    curves_by_task = {task: curve.method for task, curve in curves.curves.items()}
    body = {**told, "signature": signature, "tolerance": tolerance, "calibration": curves_by_task}
    executable = {files.COMPILED: compile_graph(folder / files.COMPILED, model)} if compiled else False
    _seal(folder, {"executable": executable, **body})
    gap = load(folder).check_golden()
    return max(gap, aot.load(folder, allow_executable=True).check_golden()) if compiled else gap


def spec_of(encoder: Encoder) -> EncoderSpec:
    """Return the encoder as plain values, every option resolved."""
    config = encoder.config

    def ids(column: str, field: str) -> IdColumn:
        options: Categorical = config.options(field)
        nulls, steps = tuple(options.null_values or ()), tuple(options.normalize or ())
        return IdColumn(column, encoder.owner(field), nulls, steps, options.max_bytes)

    vocabularies = {
        name: Vocabulary(lookup.kind, len(lookup.values), f"vocabulary/{number}.json")
        if isinstance(lookup, Learned)
        else Vocabulary(lookup.kind, lookup.size)
        for number, (name, lookup) in enumerate(encoder.lookups.items())
    }
    numbers = tuple(
        NumberColumn(
            name,
            fitted.transform,
            fitted.mean,
            fitted.scale,
            fitted.bounds,
            tuple(config.numeric[name].null_values),
            config.bad_rows.number == "map",
        )
        for name, fitted in encoder.numerics.items()
    )
    bags = [ListGroup(n, (ids(n, n),), o.max_length, o.separator) for n, o in config.multi_valued.items()]
    sequences = [
        ListGroup(group, tuple(ids(column, target) for target, column in s.columns.items()), s.max_length, s.separator)
        for group, s in config.sequences.items()
    ]
    scalar = tuple(ids(name, name) for name in config.categorical)
    return EncoderSpec(vocabularies, scalar, numbers, (*bags, *sequences), tuple(config.label))


def _write_vocabularies(folder: Path, encoder: Encoder, spec: EncoderSpec) -> None:
    (folder / "vocabulary").mkdir()
    for name, vocabulary in spec.vocabularies.items():
        lookup = encoder.lookups[name]
        if vocabulary.file is not None and isinstance(lookup, Learned):
            text = json.dumps(lookup.values.to_list(), ensure_ascii=False, separators=(",", ":"))
            (folder / vocabulary.file).write_text(text + "\n", encoding="utf-8")


def _write_golden(folder: Path, encoder: Encoder, model: Model, curves: Calibration) -> tuple[list[golden.Row], float]:
    """Write golden rows with their answers, which training gives; return the rows, and what rounding moves these by."""
    rows = golden.golden_rows(encoder)
    batch = _batch(encoder, rows)
    rows, logit, rounded = golden.answers(rows, golden.logits_of(model, batch), golden.rounding(model, batch))
    if not rows:
        raise RecipeError("the model gives no score to rely on for any golden row; its training has diverged")
    plain, probability = Calibration.none(tuple(logit)).probabilities(logit), curves.probabilities(logit)
    (folder / "golden").mkdir()
    _lines(folder / files.REQUESTS, rows)
    responses = [
        {key: {task: float(z[at]) for task, z in found.items()} for key, found in told.items()}
        for told in ({"logit": logit, "uncalibrated": plain, "probability": probability},)
        for at in range(len(rows))
    ]
    _lines(folder / files.RESPONSES, responses)
    return rows, max(rounded, golden.alone(model, _batch(encoder, rows[:_ALONE])))


def _batch(encoder: Encoder, rows: Sequence[golden.Row]) -> Batch:
    (block,) = encoder.transform(golden.frame_of(encoder, rows).lazy(), labels=False)
    return golden.batch_of(encoder, block)


def _inputs(model: Model) -> dict[str, Any]:
    schema = model.schema
    shapes: list[tuple[str, list[Any]]] = [("int64", ["B", len(schema.fields)])]
    shapes += [("float32", ["B", len(schema.fields)])] if schema.has_numeric else []
    for history in schema.histories:
        shapes += [("int64", ["B", "L", len(history.columns)]), ("int64", ["B"])]
    names = input_names(schema)
    return {name: {"type": t, "shape": shape} for name, (t, shape) in zip(names, shapes, strict=True)}


def _seal(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest, last of all."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in found
    }
    facts = {"schema": files.SCHEMA, "files": entries, **body}
    (folder / files.MANIFEST).write_bytes(files.seal(facts))


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the places where its data lie."""
    data = {key: value for key, value in recipe.get("data", {}).items() if key not in ("source", "dataset")}
    return {**recipe, "data": data}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _json(path: Path, value: Any) -> None:
    path.write_text(_text(value), encoding="utf-8")


def _lines(path: Path, values: Sequence[Any]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    path.write_text(text, encoding="utf-8")
