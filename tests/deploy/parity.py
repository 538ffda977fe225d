"""Every component in a small model, as training would leave it, for the comparison with its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import made
import torch

from recsys.abilities import Counting, Deciding, Ranking
from recsys.contracts import Selection
from recsys.data.encode import Encoder
from recsys.errors import RecipeError
from recsys.nn.model import Model

DATA: dict[str, Any] = {**made.DATA, **made.LISTS}
EMBEDDING: dict[str, Any] = {"use": "table", "dim": 8, "init_std": 0.3}
OPTIONS: dict[str, dict[str, Any]] = {
    "frequency": {"budget": 0.5},
    "magnitude": {"budget": 0.5},
    "pep": {"budget": 0.5},
    "dnis": {"blocks": 4},
    "qr": {"budget": 0.6},
    "mde": {},
    "unified": {"rows": 64},
    "mgqe": {},
    "fixed": {"fields": ["user", "shop", "price"]},
}
"""Options of components that have no default for them, or none for so small a model."""


def spec(name: str, **more: Any) -> dict[str, Any]:
    return {"use": name, **OPTIONS.get(name, {}), **more}


def names(kind: str) -> list[str]:
    """Every installed component of a kind."""
    return sorted(entry.component.name for entry in made.REGISTRY.all() if entry.component.kind == kind)


def interaction(name: str) -> dict[str, Any]:
    return {"embedding": EMBEDDING, "interaction": spec(name)}


def embedding(name: str) -> dict[str, Any]:
    return {
        "embedding": spec(name, dim=8),
        "interaction": ["fm", {"use": "mlp", "hidden": [8]}],
        "head": {"wide": True},
    }


def selector(name: str) -> dict[str, Any]:
    return {"embedding": EMBEDDING, "selector": spec(name), "interaction": "fm"}


def sequence(name: str) -> dict[str, Any]:
    return {"embedding": EMBEDDING, "sequence": spec(name), "interaction": {"use": "mlp", "hidden": [8]}}


def trained(encoder: Encoder, data: Mapping[str, Any], model: Mapping[str, Any]) -> Model:
    """Return a model as it is after training: counted, with decisions that are not those of the start."""
    built = made.model_of(encoder, data, model)
    for part in built.modules():
        if isinstance(part, Counting):
            columns = {f.name: f.rows for f in encoder.schema.fields}
            for h in encoder.schema.histories:
                columns |= {f"{h.name}.{f.name}": f.rows for f in h.columns}
            part.take_counts({name: (torch.arange(rows) * 7919) % 97 for name, rows in columns.items()})
    return built.eval()


def pruned(model: Model) -> Model:
    """Return the smaller model: what its parts decided is gone, or half of the ids if none decides."""
    if isinstance(model.selector, Ranking):
        chosen = Selection(("user", "price", "shop"))
    elif model.decides:
        chosen = model.kept()
    else:
        chosen = Selection(model.embedding.fields.names, {"user": torch.arange(model.schema.fields[0].rows) % 2 == 0})
    return model.prune(chosen).eval()


__all__ = ["Deciding", "RecipeError"]
