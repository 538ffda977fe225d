"""Guessing a data block: the text is valid, and the block it describes can be prepared."""

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
import yaml

from recsys.data.infer import infer_schema
from recsys.data.prepare import prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

ROWS = 60
FRAME = pl.DataFrame(
    {
        "row_key": [f"r{i}" for i in range(ROWS)],
        "user_id": [i % 7 + 10_000 * (i % 7) for i in range(ROWS)],
        "city: raw": ["?", "x", "y"] * 20,
        "price": [0.5 * i for i in range(ROWS)],
        "age": [20 + i % 30 for i in range(ROWS)],
        "constant": ["same"] * ROWS,
        "empty": pl.Series([None] * ROWS, dtype=pl.Int64),
        "tags": [["a", "b"], [], ["c"]] * 20,
        "shape": [{"w": 1}] * ROWS,
        "fold": [i % 5 for i in range(ROWS)],
        "seen": [datetime(2024, 1, 1 + i % 25) for i in range(ROWS)],
        "clicked": [0, 1, 0, 0] * 15,
        "flag": [0, 1, 1] * 20,
    }
)


def test_the_guess_is_right_where_it_is_clear(tmp_path: Path) -> None:
    path = tmp_path / "logs.parquet"
    FRAME.write_parquet(path)
    text = infer_schema(str(path))
    block = yaml.safe_load(text)["data"]
    assert block["label"] == "clicked"
    assert block["split"] == {"by": "time", "column": "seen", "valid": 0.1, "test": 0.1}
    assert block["categorical"] == {"user_id": None, "city: raw": {"null_values": ["?"]}, "flag": None}
    assert block["numeric"] == {"price": None, "age": None}
    assert block["multi_valued"] == {"tags": None}
    for reason in (
        "# row_key: left out, all 60 values differ: a row id?",
        "# constant: left out, it is constant",
        "# empty: left out, it has no value in any row",
        "# shape: left out, Struct({'w': Int64}) cannot be encoded",
        "# fold: left out, looks like a split",
    ):
        assert reason in text
    config = DataConfig.model_validate(block)
    prepared = prepare(config, Files(DataRoot(()), path=str(path)), tmp_path / "cache")
    assert sum(map(len, prepared.splits.values())) == ROWS


def test_text_files_are_typed_by_their_values(tmp_path: Path) -> None:
    path = tmp_path / "logs.csv"
    FRAME.select("user_id", "age", "clicked", pl.when(pl.col("price") > 2).then("price").alias("price")).with_columns(
        pl.col("price").cast(pl.String).fill_null("NA")
    ).write_csv(path)
    block = yaml.safe_load(infer_schema(str(path)))["data"]
    assert block["categorical"] == {"user_id": None}
    assert block["numeric"] == {"age": None, "price": {"null_values": ["NA"]}}
    assert block["label"] == "clicked"


def test_without_a_label_there_is_something_to_fill_in(tmp_path: Path) -> None:
    FRAME.select("user_id", "price").write_parquet(tmp_path / "logs.parquet")
    assert "label: FILL_IN  # no column holds just 0 and 1" in infer_schema(str(tmp_path / "logs.parquet"))


def test_missing_logs_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        infer_schema(str(tmp_path / "nothing.parquet"))
