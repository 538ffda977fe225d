"""What plugins may import is a promise: a change of this list is a change of the plugin API."""

from __future__ import annotations

import importlib
import subprocess
import sys

import recsys.api

NAMES = [
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
    "FIRST_ID",
    "Field",
    "Fields",
    "Guard",
    "History",
    "Items",
    "Keep",
    "Layout",
    "MLPBlock",
    "Model",
    "NULL_ID",
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
    "UNKNOWN_ID",
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


def test_the_names_are_these() -> None:
    assert sorted(recsys.api.__all__) == NAMES


def test_each_name_is_the_object_of_its_own_module() -> None:
    for name in NAMES:
        value = getattr(recsys.api, name)
        home = getattr(value, "__module__", None)
        if isinstance(value, type):
            assert getattr(importlib.import_module(str(home)), name) is value
            assert str(home).startswith("recsys.")


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, recsys.api; print([m for m in ('torch', 'polars', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
