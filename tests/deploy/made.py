"""Bundles of small models that were never trained, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from recsys.contracts import Batch
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.deploy.calibration import Calibration
from recsys.deploy.golden import batch_of
from recsys.deploy.write import Facts, write_bundle
from recsys.nn.model import Model
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_model
from recsys.recipe.check import check_document
from recsys.recipe.reader import Document

REGISTRY = load_registry(environ={})
SIZE = 400
LOGS = pl.DataFrame(
    {
        "user": [n * n % 41 for n in range(SIZE)],
        "item": [f"i{n * 7 % 30}" for n in range(SIZE)],
        "shop": [f"s{n * 5 % 9}" if n % 11 else None for n in range(SIZE)],
        "city": [("Köln", "paris ", "Paris", "東京", "")[n % 5] for n in range(SIZE)],
        "price": [float(n % 17) if n % 7 else None for n in range(SIZE)],
        "age": [n % 60 for n in range(SIZE)],
        "tags": [[f"t{n % 3}", f"t{n % 5}"][: n % 3] for n in range(SIZE)],
        "past": [[f"i{(n + k) * 3 % 30}" for k in range(n % 7)] for n in range(SIZE)],
        "past_shop": [[f"s{(n + k) % 9}" for k in range(n % 7)] for n in range(SIZE)],
        "click": [int(n % 3 == 0) for n in range(SIZE)],
        "buy": [int(n % 9 == 0) for n in range(SIZE)],
    }
)
DATA: dict[str, Any] = {
    "source": {"use": "files", "path": "nowhere.parquet"},
    "label": {"click": "click"},
    "categorical": {"user": {}, "item": {}, "shop": {}, "city": {"normalize": ["nfc", "strip", "lower"]}},
    "numeric": {"price": {}, "age": {"transform": "quantile", "buckets": 8}},
}
LISTS: dict[str, Any] = {
    "multi_valued": {"tags": {"max_length": 4}},
    "sequences": {"clicks": {"columns": {"item": "past", "shop": "past_shop"}, "max_length": 5}},
}
MODEL: dict[str, Any] = {
    "embedding": {"use": "table", "dim": 4, "init_std": 0.3},
    "interaction": ["fm", {"use": "mlp", "hidden": [8]}],
}


def encoder_of(data: Mapping[str, Any]) -> Encoder:
    """Fit an encoder on the made logs."""
    return Encoder.fit(LOGS.lazy(), DataConfig.model_validate(data))


def model_of(
    encoder: Encoder, data: Mapping[str, Any], model: Mapping[str, Any], seed: int = 5, noise: float = 0.05
) -> Model:
    """Build a recipe's model, with parameters that are not those of the start."""
    recipe = check_document(Document({"data": data, "model": model}, {(): "made"}), REGISTRY, "made", Path())
    built = build_model(recipe, REGISTRY, encoder.schema, seed)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.is_floating_point():
                parameter.add_(noise * torch.randn(parameter.shape, generator=numbers))
    return built.eval()


def sample_of(encoder: Encoder) -> Batch:
    """Encode the made logs."""
    (block,) = encoder.transform(LOGS.lazy(), labels=False)
    return batch_of(encoder, block)


def write(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    *,
    compiled: bool = False,
) -> tuple[Encoder, Model]:
    """Write a bundle; return what it was made of."""
    data = data or {**DATA, **LISTS}
    encoder = encoder_of(data)
    built = model_of(encoder, data, model or MODEL)
    write_model(folder, encoder, built, data, model or MODEL, calibration, compiled=compiled)
    return encoder, built


def write_model(
    folder: Path,
    encoder: Encoder,
    built: Model,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    calibration: Calibration | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Write a bundle of a model."""
    facts = Facts({"data": dict(data), "model": dict(model)}, {"test": {"auc": 0.5, "gauc": None}}, {}, "abc")
    folder.mkdir(parents=True)
    write_bundle(folder, encoder, built, sample_of(encoder), facts, calibration, compiled=compiled)
