"""What a recipe is, before anything runs: its JSON Schema, and the size and cost of a recipe's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.contracts import Batch, EncodedSchema
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.split import split_frames
from recsys.nn.model import Model
from recsys.plugin.options import json_schema
from recsys.plugin.registry import Registry
from recsys.recipe.build import build_loss, build_model, build_source, data_root
from recsys.recipe.check import PARTS, HeadOptions, Recipe
from recsys.train.options import TrainOptions


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    schema = json_schema(registry)
    defs: dict[str, Any] = schema["$defs"]

    def ref(name: str) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{name}"}

    blocks: Mapping[str, Any] = {"data": DataConfig, "train": TrainOptions, "head": HeadOptions}
    for name, model in blocks.items():
        block = model.model_json_schema(ref_template="#/$defs/" + name + ".{model}")
        for inner, value in block.pop("$defs", {}).items():
            defs[f"{name}.{inner}"] = value
        defs[f"block.{name}"] = block
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
            "train": ref("block.train"),
            "stages": {"type": "array", "items": ref("stage"), "minItems": 1},
        },
        "$defs": defs,
    }


@dataclass(frozen=True)
class Dry:
    """What `recsys check` found.

    Args:
        schema: of the encoded rows; sizes are those of the rows that were looked at.
        rows: how many rows of the train split were looked at.
        splits: names of the splits.
        model: on the meta device: shapes without memory.
        flops: floating-point operations of one forward pass, per row.
        shapes: name → shape, for the steps from ids to logits.
    """

    schema: EncodedSchema
    rows: int
    splits: tuple[str, ...]
    model: Model
    flops: float
    shapes: Mapping[str, tuple[str, ...]]


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
    frames = split_frames(source, recipe.data.split)
    sample = frames["train"].head(rows)
    encoder = Encoder.fit(sample, recipe.data)
    schema = encoder.schema
    build_loss(recipe, registry, schema)
    with torch.device("meta"):
        model = build_model(recipe, registry, schema, recipe.train.seed).eval()
        batch = _example(schema, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch)
    looked = sample.select(pl.len()).collect().item()
    fields, dim = len(Model.consumer_fields(schema, model.embedding).names), model.embedding.fields.dim
    shapes = {"ids": ("B", str(len(schema.fields))), "e": ("B", str(fields), str(dim))}
    for checked, interaction in zip(recipe.interactions, model.interactions, strict=True):
        shapes[checked.name] = ("B", str(interaction.width))
    return Dry(schema, looked, tuple(frames), model, counter.get_total_flops() / 64, shapes)


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
