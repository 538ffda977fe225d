"""Every component in a small model, as training would leave it, and the scores of its graph beside the trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import made
import numpy as np
import onnxruntime
import polars as pl
import torch

from recsys.abilities import Counting, Ranking
from recsys.contracts import FIRST_ID, Batch, Selection
from recsys.data.encode import Encoder
from recsys.data.vocabulary import Vocabulary
from recsys.deploy.encode import RowEncoder
from recsys.deploy.golden import training_logits
from recsys.deploy.graph import input_names, onnx_graph
from recsys.deploy.write import spec_of
from recsys.nn.model import Model
from recsys.train.losses import BCE

TOLERANCE = 1e-6
TABLE: dict[str, Any] = {"use": "table", "dim": 8, "init_std": 0.1}
PERCEPTRON: dict[str, Any] = {"use": "mlp", "hidden": [8]}
OPTIONS: dict[str, dict[str, Any]] = {
    "frequency": {"budget": 0.5},
    "magnitude": {"budget": 0.5},
    "pep": {"budget": 0.5},
    "dnis": {"blocks": 4},
    "qr": {"budget": 0.7},
    "mde": {"alpha": 0.3},
    "unified": {"rows": 64},
    "fixed": {"fields": ["user", "shop", "price"]},
}
"""Options of components that have no default for them, or none for so small a model."""
DATA: dict[str, Any] = made.DATA
LISTS: dict[str, Any] = {**made.DATA, **made.LISTS}


def names(kind: str) -> list[str]:
    """Every component of this package of a kind."""
    return sorted(e.component.name for e in made.REGISTRY.all() if e.component.kind == kind)


CASES = [f"{kind} {name}" for kind in ("embedding", "interaction", "selector", "sequence") for name in names(kind)]


def recipe(kind: str, name: str) -> dict[str, Any]:
    """The model block of a recipe with one component to look at."""
    own = {"use": name, **OPTIONS.get(name, {})}
    match kind:
        case "embedding":
            return {"embedding": {**own, "dim": 8}, "interaction": ["fm", PERCEPTRON]}
        case "selector":
            return {"embedding": TABLE, "selector": own, "interaction": "fm"}
        case "sequence":
            return {"embedding": TABLE, "sequence": own, "interaction": PERCEPTRON}
        case _:
            return {"embedding": TABLE, "interaction": own}


def trained(encoder: Encoder, data: Mapping[str, Any], model: Mapping[str, Any], steps: int = 20) -> Model:
    """Return a model whose parts have counted the training rows, and have learned from them.

    Training matters for more than the numbers: normalisations know the size of what they see afterwards, as in any
    model that is exported.
    """
    built = made.model_of(encoder, data, model, noise=0.0)
    columns = {f.name: f.rows for f in encoder.schema.fields}
    for h in encoder.schema.histories:
        columns |= {f"{h.name}.{f.name}": f.rows for f in h.columns}
    for part in built.modules():
        if isinstance(part, Counting):
            part.take_counts({name: (torch.arange(rows) * 7919) % 97 for name, rows in columns.items()})
    _fit(built, made.sample_of(encoder), steps)
    return built.eval()


def _fit(model: Model, batch: Batch, steps: int) -> None:
    """Learn a rule that the made rows follow."""
    rule = made.LOGS.select(
        (pl.col("price").fill_null(8.0) / 4 + (pl.col("user") % 3) + (pl.col("shop") == "s3") * 2) > 3
    )
    labels = torch.tensor(rule.to_series().fill_null(False).to_list(), dtype=torch.float32)
    context = {"attribute": torch.arange(len(batch)) % 2}
    batch = replace(batch, label=dict.fromkeys(model.schema.tasks, labels), context=context)
    own = {id(p) for part in model.stepped() for p in part.own_parameters()}
    own |= {id(p) for part in model.searched() for p in part.architecture()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in own], lr=3e-3)

    loss = BCE(tasks=model.schema.tasks)
    torch.manual_seed(1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.objective(loss, batch).backward()
        optimizer.step()
        for part in model.stepped():
            part.after_step()


def pruned(model: Model) -> Model:
    """Return the smaller model: what its parts decided is gone, or some fields or ids if none decides."""
    if isinstance(model.selector, Ranking):
        chosen = Selection(("user", "price", "shop"))
    elif model.decides:
        chosen = model.kept()
    else:
        some = {f.name: torch.arange(f.rows) % 3 > 0 for f in model.schema.fields if f.rows > 9}
        chosen = Selection(model.embedding.fields.names, some)
    return model.prune(chosen).eval()


def rows_with_unseen_values(count: int = 150) -> pl.DataFrame:
    """Raw rows of which some have values that the encoder never saw, or none."""
    at = pl.int_range(pl.len())
    logs = pl.concat([made.LOGS] * (count // made.SIZE + 1)).head(count).drop("click", "buy")
    return logs.with_columns(
        pl.when(at % 5 == 1).then(pl.col("user") + 10**6).otherwise("user").alias("user"),
        pl.when(at % 7 == 2).then(pl.lit("new")).when(at % 7 == 3).then(None).otherwise("item").alias("item"),
        pl.when(at % 4 == 0).then(pl.col("price") * 1.5 - 3).otherwise("price").alias("price"),
        pl.col("past").list.eval(pl.when(pl.element() == "i3").then(pl.lit("new")).otherwise(pl.element())),
    )


def difference(encoder: Encoder, model: Model, rows: pl.DataFrame) -> tuple[float, float]:
    """Return the largest difference of a probability between graph and trainer, and how far the trainer's are apart."""
    wanted = np.stack(list(training_logits(encoder, model, rows).values()), 1)
    tables = {
        name: dict(zip(found.values.to_list(), range(FIRST_ID, found.rows), strict=True))
        if isinstance(found, Vocabulary)
        else None
        for name, found in encoder.lookups.items()
    }
    encoded = RowEncoder(spec_of(encoder), tables).rows(rows.to_dicts())
    arrays = [encoded.ids, *([] if encoded.values is None else [encoded.values])]
    arrays += [array for pair in encoded.lists for array in pair]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(onnx_graph(model), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for some in (slice(0, 1), slice(0, len(rows))):
        feeds = {name: array[some] for name, array in zip(input_names(encoder.schema), arrays, strict=True)}
        logit, probability, clipped = session.run(["logit", "probability", "clipped"], feeds)
        p = 1 / (1 + np.exp(-wanted[some]))
        worst = max(worst, float(np.abs(1 / (1 + np.exp(-logit.astype(np.float64))) - p).max()))
        worst = max(worst, float(np.abs(probability - p).max()))
        assert not clipped.any()
    return worst, float(np.ptp(wanted))
