"""What a recipe is, before anything runs: its JSON Schema, and the size and cost of a recipe's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.contracts import Batch, EncodedSchema
from recsys.data.doctor import first_rows
from recsys.data.encode import Encoder
from recsys.data.layout import Layout, id_type
from recsys.data.reading import RawRows
from recsys.data.sampling import SamplingOptions
from recsys.data.schema import FLOAT_CONTEXT, DataConfig
from recsys.data.split import split_rows
from recsys.nn.model import Model
from recsys.plugin.options import json_schema
from recsys.plugin.registry import Registry
from recsys.recipe.build import (
    build_loss,
    build_model,
    build_propensity,
    build_sampling,
    build_source,
    data_root,
)
from recsys.recipe.check import PARTS, HeadOptions, Recipe
from recsys.train.options import TrainOptions


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    schema = json_schema(registry)
    defs: dict[str, Any] = schema["$defs"]

    def ref(name: str) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{name}"}

    blocks: Mapping[str, Any] = {
        "data": DataConfig,
        "sampling": SamplingOptions,
        "train": TrainOptions,
        "head": HeadOptions,
    }
    for name, model in blocks.items():
        block = model.model_json_schema(ref_template="#/$defs/" + name + ".{model}")
        for inner, value in block.pop("$defs", {}).items():
            defs[f"{name}.{inner}"] = value
        defs[f"block.{name}"] = block
    defs["block.sampling"]["properties"]["sampler"] = ref("sampler")
    parts = {part: ref(kind) for part, (kind, _) in PARTS.items()}
    interaction = {"anyOf": [ref("interaction"), {"type": "array", "items": ref("interaction"), "minItems": 1}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "recsys recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "base": {"type": "string", "description": "a recipe that lies below this one"},
            "data": ref("block.data"),
            "model": {
                "type": "object",
                "additionalProperties": False,
                "properties": {**parts, "interaction": interaction, "head": ref("block.head")},
            },
            "loss": ref("loss"),
            "sampling": ref("block.sampling"),
            "propensity": ref("propensity"),
            "train": ref("block.train"),
            "stages": {"type": "array", "items": ref("stage"), "minItems": 1},
        },
        "$defs": defs,
    }


@dataclass(frozen=True)
class Dry:
    """What a recipe builds, without memory and without training.

    Args:
        rows_of: split → raw rows.
        encoder: fitted on the rows that were looked at.
        schema: of the encoded rows; sizes are those of the rows that were looked at.
        rows: how many rows of the train split were looked at.
        model: on the meta device: shapes without memory.
        flops: floating-point operations of one forward pass, per row.
        shapes: name → shape, for the steps from ids to logits.
    """

    rows_of: Mapping[str, RawRows]
    encoder: Encoder
    schema: EncodedSchema
    rows: int
    model: Model
    flops: float
    shapes: Mapping[str, tuple[str, ...]]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.rows_of)


@dataclass(frozen=True)
class Memory:
    """Bytes that training a recipe takes; activations, which depend on the model, come on top.

    Args:
        tables: embedding tables and first-order weights, float32.
        network: all other weights.
        gradients: one number beside every weight.
        optimizer: what the update rule keeps beside every weight.
        batch: one encoded batch of `train.batch_size` rows.
        encoded: split → its encoded rows on disk.
    """

    tables: int
    network: int
    gradients: int
    optimizer: int
    batch: int
    encoded: Mapping[str, int]


_STATE = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}
"""Update rule → numbers that it keeps beside every weight."""


def expected_memory(
    recipe: Recipe, dry: Dry, rows: Mapping[str, int], events: Mapping[str, float] | None = None
) -> Memory:
    """Return how many bytes training takes.

    Args:
        recipe: the checked recipe.
        dry: what it builds.
        rows: split → its rows.
        events: list column → mean events per row; by default lists are taken for full.
    """
    schema, known = dry.schema, events or {}
    tables, others = (sum(p.numel() for p in group) for group in dry.model.parameter_groups())
    row = len(schema.fields) * (12 if schema.has_numeric else 8) + 4 * len(schema.tasks)
    row += sum(4 if name in FLOAT_CONTEXT else 8 for name in schema.context)
    row += sum(8 + 8 * h.max_length * len(h.columns) for h in schema.histories)
    record = float(Layout.of(schema).size)
    for history in schema.histories:
        length = known.get(history.columns[0].name, history.max_length)
        width = id_type(max(column.rows for column in history.columns)).itemsize
        record += 8 + length * len(history.columns) * width  # an offset, and the ids of the events
    return Memory(
        tables=4 * tables,
        network=4 * others,
        gradients=4 * (tables + others),
        optimizer=4 * _STATE[recipe.train.optimizer] * (tables + others),
        batch=row * recipe.train.batch_size,
        encoded={split: round(record * n) for split, n in rows.items()},
    )


def dry_run(recipe: Recipe, registry: Registry, given: Path | None, rows: int) -> Dry:
    """Build everything without memory and without training.

    Args:
        recipe: the checked recipe.
        registry: the components.
        given: `--data-root`.
        rows: rows of the train split to learn sizes from.

    Raises:
        RecsysError: whatever would stop the training before its first step.
    """
    source = build_source(recipe, registry, data_root(recipe, given))
    splits = split_rows(source, recipe.data.split, rows=recipe.data.batch_rows)
    sample = first_rows(splits["train"], rows)
    looked = 0

    def count(end: int) -> None:
        nonlocal looked
        looked = end

    encoder = Encoder.fit(sample, recipe.data, progress=count)
    schema = encoder.schema
    build_loss(recipe, registry, schema)
    build_sampling(recipe, registry, schema, {})
    build_propensity(recipe, registry, schema)
    with torch.device("meta"):
        model = build_model(recipe, registry, schema, recipe.train.seed).eval()
        batch = _example(schema, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch)
    fields, dim = len(Model.consumer_fields(schema, model.embedding).names), model.embedding.fields.dim
    shapes = {"ids": ("B", str(len(schema.fields))), "e": ("B", str(fields), str(dim))}
    for checked, interaction in zip(recipe.interactions, model.interactions, strict=False):
        # Of an ensemble, the first member's; the others are like it.
        shapes[checked.name] = ("B", str(interaction.width))
    return Dry(splits, encoder, schema, looked, model, counter.get_total_flops() / 64, shapes)


def _example(schema: EncodedSchema, rows: int) -> Batch:
    return Batch(
        ids=torch.zeros((rows, len(schema.fields)), dtype=torch.int64),
        values=torch.ones((rows, len(schema.fields))) if schema.has_numeric else None,
        history={
            h.name: (
                torch.zeros((rows, h.max_length, len(h.columns)), dtype=torch.int64),
                torch.full((rows,), h.max_length, dtype=torch.int64),
            )
            for h in schema.histories
        },
    )
