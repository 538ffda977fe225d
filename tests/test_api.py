"""What plugins may import is a promise: a change of this list is a change of the plugin API."""

from __future__ import annotations

import importlib
import subprocess
import sys

import recsys.api

NAMES = [
    "Addressed",
    "Batch",
    "Buffers",
    "Column",
    "Component",
    "DataError",
    "DataRoot",
    "Dropout",
    "EncodedSchema",
    "FIRST_ID",
    "Field",
    "Fields",
    "Guard",
    "History",
    "Keep",
    "Layout",
    "MLPBlock",
    "NULL_ID",
    "Named",
    "Predictions",
    "QuantizedTable",
    "Rank",
    "RecipeError",
    "RecsysError",
    "Run",
    "Selection",
    "Share",
    "Stored",
    "Table",
    "TrainBatches",
    "UNKNOWN_ID",
    "bar",
    "build_optimizer",
    "column_groups",
    "compact",
    "entmax",
    "hash_text",
    "hookimpl",
    "keep_most",
    "keep_within",
    "kept_columns",
    "label_bce",
    "linear",
    "measure",
    "mix",
    "places",
    "predict",
    "pruned_bytes",
    "pruned_table",
    "quantized",
    "require_room",
    "scale",
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
