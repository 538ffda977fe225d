"""What a plugin may import, and all that it needs; these names stay while the entry-point group is `recsys.v1`.

    from recsys.api import Component, Fields, hookimpl

The protocols that a component of each kind fulfils are described in `recsys.contracts`, and what it may do beside them
in `recsys.abilities`; the base classes of a plugin are its own (`torch.nn.Module`, `torchmetrics.Metric`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recsys.contracts import (
    FIRST_ID,
    NULL_ID,
    UNKNOWN_ID,
    Batch,
    Draws,
    EncodedSchema,
    Field,
    Fields,
    History,
    Items,
    Named,
    Selection,
)
from recsys.errors import DataError, RecipeError, RecsysError
from recsys.plugin.hooks import Component, hookimpl

if TYPE_CHECKING:
    from recsys.data.batches import EvalBatches, TrainBatches
    from recsys.data.hashing import hash_text, mix
    from recsys.data.sources import DataRoot
    from recsys.nn.addressed import Addressed, column_groups
    from recsys.nn.attention import AttentionSizes, attend
    from recsys.nn.budget import keep_most, keep_within, pruned_bytes, require_room
    from recsys.nn.dropout import Dropout
    from recsys.nn.entmax import entmax
    from recsys.nn.head import first_order, full
    from recsys.nn.kept import Keep, Rank, kept_columns, places, widen
    from recsys.nn.layout import Column, Guard, Layout, scale
    from recsys.nn.mlp import MLPBlock, Share, linear
    from recsys.nn.model import Model, Vectors
    from recsys.nn.optim import build_optimizer
    from recsys.nn.own_adam import OwnAdam
    from recsys.nn.precision import full_precision
    from recsys.nn.quantize import QuantizedTable, Stored, quantized
    from recsys.nn.ranked import Best, RankedFields, Ranking, best, chosen, how_many, passing
    from recsys.nn.second import second_model
    from recsys.nn.sparse import compact
    from recsys.nn.table import Table, pruned_table
    from recsys.train.distributed import gather_rows
    from recsys.train.gradients import field_gradients
    from recsys.train.guard import Buffers
    from recsys.train.losses import label_bce, product_bce, row_mean
    from recsys.train.progress import bar
    from recsys.train.ranks import Discount, Ranks, discounts, rank_rows
    from recsys.train.run import Run
    from recsys.train.sampled import pairs
    from recsys.train.score import Predictions, measure, predict
    from recsys.train.weights import WeightMode, make_weight

__all__ = [
    "FIRST_ID",
    "NULL_ID",
    "UNKNOWN_ID",
    "Addressed",
    "AttentionSizes",
    "Batch",
    "Best",
    "Buffers",
    "Column",
    "Component",
    "DataError",
    "DataRoot",
    "Discount",
    "Draws",
    "Dropout",
    "EncodedSchema",
    "EvalBatches",
    "Field",
    "Fields",
    "Guard",
    "History",
    "Items",
    "Keep",
    "Layout",
    "MLPBlock",
    "Model",
    "Named",
    "OwnAdam",
    "Predictions",
    "QuantizedTable",
    "Rank",
    "RankedFields",
    "Ranking",
    "Ranks",
    "RecipeError",
    "RecsysError",
    "Run",
    "Selection",
    "Share",
    "Stored",
    "Table",
    "TrainBatches",
    "Vectors",
    "WeightMode",
    "attend",
    "bar",
    "best",
    "build_optimizer",
    "chosen",
    "column_groups",
    "compact",
    "discounts",
    "entmax",
    "field_gradients",
    "first_order",
    "full",
    "full_precision",
    "gather_rows",
    "hash_text",
    "hookimpl",
    "how_many",
    "keep_most",
    "keep_within",
    "kept_columns",
    "label_bce",
    "linear",
    "make_weight",
    "measure",
    "mix",
    "pairs",
    "passing",
    "places",
    "predict",
    "product_bce",
    "pruned_bytes",
    "pruned_table",
    "quantized",
    "rank_rows",
    "require_room",
    "row_mean",
    "scale",
    "second_model",
    "widen",
]

_LAZY = {
    "EvalBatches": "recsys.data.batches",
    "Model": "recsys.nn.model",
    "Vectors": "recsys.nn.model",
    "WeightMode": "recsys.train.weights",
    "make_weight": "recsys.train.weights",
    "field_gradients": "recsys.train.gradients",
    "gather_rows": "recsys.train.distributed",
    "Predictions": "recsys.train.score",
    "Buffers": "recsys.train.guard",
    "AttentionSizes": "recsys.nn.attention",
    "attend": "recsys.nn.attention",
    "bar": "recsys.train.progress",
    "Addressed": "recsys.nn.addressed",
    "Column": "recsys.nn.layout",
    "DataRoot": "recsys.data.sources",
    "Dropout": "recsys.nn.dropout",
    "Guard": "recsys.nn.layout",
    "Keep": "recsys.nn.kept",
    "Layout": "recsys.nn.layout",
    "MLPBlock": "recsys.nn.mlp",
    "OwnAdam": "recsys.nn.own_adam",
    "Rank": "recsys.nn.kept",
    "Best": "recsys.nn.ranked",
    "Discount": "recsys.train.ranks",
    "Ranks": "recsys.train.ranks",
    "discounts": "recsys.train.ranks",
    "rank_rows": "recsys.train.ranks",
    "RankedFields": "recsys.nn.ranked",
    "Ranking": "recsys.nn.ranked",
    "best": "recsys.nn.ranked",
    "chosen": "recsys.nn.ranked",
    "Run": "recsys.train.run",
    "Share": "recsys.nn.mlp",
    "Table": "recsys.nn.table",
    "TrainBatches": "recsys.data.batches",
    "build_optimizer": "recsys.nn.optim",
    "column_groups": "recsys.nn.addressed",
    "compact": "recsys.nn.sparse",
    "entmax": "recsys.nn.entmax",
    "first_order": "recsys.nn.head",
    "full": "recsys.nn.head",
    "full_precision": "recsys.nn.precision",
    "hash_text": "recsys.data.hashing",
    "how_many": "recsys.nn.ranked",
    "keep_most": "recsys.nn.budget",
    "keep_within": "recsys.nn.budget",
    "kept_columns": "recsys.nn.kept",
    "label_bce": "recsys.train.losses",
    "product_bce": "recsys.train.losses",
    "row_mean": "recsys.train.losses",
    "linear": "recsys.nn.mlp",
    "measure": "recsys.train.score",
    "mix": "recsys.data.hashing",
    "pairs": "recsys.train.sampled",
    "passing": "recsys.nn.ranked",
    "places": "recsys.nn.kept",
    "predict": "recsys.train.score",
    "pruned_bytes": "recsys.nn.budget",
    "pruned_table": "recsys.nn.table",
    "QuantizedTable": "recsys.nn.quantize",
    "Stored": "recsys.nn.quantize",
    "quantized": "recsys.nn.quantize",
    "require_room": "recsys.nn.budget",
    "scale": "recsys.nn.layout",
    "second_model": "recsys.nn.second",
    "widen": "recsys.nn.kept",
}
"""Names whose modules import torch or polars: imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'recsys.api' has no attribute '{name}'")
