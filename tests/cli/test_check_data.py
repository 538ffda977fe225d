"""`recsys check` on the command line: what it prints about data, its JSON, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from recsys.cli.check import command
from recsys.data.doctor import examine
from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_source, data_root
from recsys.recipe.check import load_recipe
from recsys.recipe.describe import dry_run, expected_memory

Call = Callable[..., Any]
RECIPE = """
data:
  source: {{use: files, train: {0}/train.parquet, test: {0}/test.parquet}}
  label: y
  categorical: [{1}]
  numeric: [price]
model: {{interaction: fm, embedding: {{use: table, dim: 4}}}}
train: {{batch_size: 128, optimizer: {2}}}
"""


@pytest.fixture
def call() -> Call:
    app = typer.Typer()
    app.command()(command)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def logs(rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    y = (rng.random(rows) < 0.3).astype(int)
    columns = {"y": y, "user": rng.integers(0, 20, rows), "copy": y, "id": np.arange(rows), "price": rng.random(rows)}
    return pl.DataFrame(columns)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write logs and a recipe with these categorical fields."""

    def write(*fields: str, optimizer: str = "adam", test: pl.DataFrame | None = None) -> Path:
        logs(900, 0).write_parquet(tmp_path / "train.parquet")
        (logs(600, 1) if test is None else test).write_parquet(tmp_path / "test.parquet")
        path = tmp_path / "mine.yaml"
        path.write_text(RECIPE.format(tmp_path, ", ".join(fields), optimizer))
        return path

    return write


def test_exit_status(call: Call, recipe: Callable[..., Path]) -> None:
    sound = recipe("user")
    for words in ((), ("--strict",), ("--json", "--strict")):
        assert call(sound, *words).exit_code == 0
    leaking = recipe("user", "copy", "id")
    shown = call(leaking)
    assert shown.exit_code == 0
    assert call(leaking, "--strict").exit_code == 1
    assert call(leaking, "--json", "--strict").exit_code == 1
    lines = shown.output.splitlines()
    told = [line.split()[:4] for line in lines if line.startswith(("error", "warning", "note"))]
    assert ["warning", "leak", "copy", "train"] in told
    assert ["warning", "unique", "id", "train"] in told
    assert lines[-1] == f"data: {len(told)} warnings"
    copies = recipe("user", test=logs(900, 0).head(30))
    assert call(copies).exit_code == 0
    assert call(copies, "--max-duplicates", 0.5).exit_code == 1


def test_a_label_that_cannot_be_read_is_an_error(call: Call, recipe: Callable[..., Path]) -> None:
    broken = recipe("user", test=logs(600, 1).with_columns(y=pl.lit(3)))
    result = call(broken, "--json")
    assert result.exit_code == 1
    (finding,) = [f for f in json.loads(result.stdout)["findings"] if f["code"] == "encode"]
    assert (finding["severity"], finding["split"]) == ("error", "test")
    assert "row 1, label column 'y'" in finding["message"]


def test_json_of_a_recipe(call: Call, recipe: Callable[..., Path]) -> None:
    found = json.loads(call(recipe("user", "copy"), "--json").stdout)
    assert set(found) == {
        "recipe", "rows_limit", "splits", "columns", "duplicates", "single_input_auc", "stability_index",
        "events_per_row", "findings", "counts",
    }  # fmt: skip
    assert found["splits"]["train"]["rows"] == 900
    positives = int(logs(900, 0)["y"].sum())
    assert found["splits"]["train"]["positives"] == {"label": positives}
    assert found["splits"]["train"]["positive_rate"]["label"] == pytest.approx(positives / 900)
    assert found["single_input_auc"]["label"]["copy"] == 1.0
    assert found["columns"]["user"]["distinct"] == 20
    assert [set(f) for f in found["findings"]] == [{"severity", "code", "column", "split", "number", "message"}]
    assert found["counts"] == {"error": 0, "warning": 1, "note": 0}


@pytest.mark.parametrize(("optimizer", "state"), [("adam", 2), ("adagrad", 1), ("sgd", 0)])
def test_expected_memory(call: Call, recipe: Callable[..., Path], optimizer: str, state: int) -> None:
    """user: 22 rows of 4; price: 2 rows of 4; one bias. A record: 4 bytes of price, 1 of user, 1 of label."""
    memory = json.loads(call(recipe("user", optimizer=optimizer), "--json").stdout)["recipe"]["memory_bytes"]
    weights = (memory["tables"] + memory["network"]) // 4
    assert memory["tables"] == 4 * 24 * 4
    assert memory["gradients"] == 4 * weights
    assert memory["optimizer"] == state * 4 * weights
    assert memory["batch"] == 128 * (2 * 8 + 2 * 4 + 4)
    assert memory["encoded"] == {"train": 900 * 6, "test": 600 * 6}


def test_the_encoded_size_is_about_that_on_disk(tmp_path: Path) -> None:
    """Lists are taken at their mean length, not at the longest that is kept."""
    rng = np.random.default_rng(0)
    tags = pl.Series([[f"t{v}" for v in rng.integers(0, 9, rng.integers(0, 5))] for _ in range(500)])
    logs(500, 0).with_columns(tags=tags).write_parquet(tmp_path / "train.parquet")
    path = tmp_path / "lists.yaml"
    path.write_text(
        f"data: {{source: {{use: files, train: {tmp_path}/train.parquet}}, label: y, categorical: [user], "
        "multi_valued: [tags]}\nmodel: {interaction: fm}\n"
    )
    registry = load_registry()
    recipe = load_recipe(path, registry)
    dry = dry_run(recipe, registry, None, 10_000)
    found = examine(dry.rows_of, recipe.data, dry.encoder)
    assert found.events["tags"] == pytest.approx(tags.list.len().mean())
    told = expected_memory(recipe, dry, {"train": 500}, found.events).encoded["train"]
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")
    written = sum(f.stat().st_size for f in prepared.splits["train"].folder.rglob("*.bin"))
    assert told == pytest.approx(written, rel=0.25)


def test_logs_without_a_recipe(call: Call, tmp_path: Path) -> None:
    """What the guessed block leaves out is examined too, and reported as what it is."""
    frame = logs(3000, 0).with_columns(same=pl.lit(7), past=pl.lit(1_600_000_000_000) + pl.col("id"), ts=pl.col("id"))
    frame = frame.rename({"y": "click"}).with_columns(ts=pl.col("ts") + 1_700_000_000)
    frame.head(2000).write_csv(tmp_path / "a.csv")
    frame.tail(1000).write_csv(tmp_path / "b.csv")
    for words in ((tmp_path / "a.csv", tmp_path / "b.csv"), (tmp_path,), (tmp_path / "*.csv",)):
        result = call(*words, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["recipe"] is None
        assert sum(split["rows"] for split in found["splits"].values()) == 3000
        codes = {(f["code"], f["column"], f["severity"]) for f in found["findings"]}
        assert ("leak", "copy", "warning") in codes
        assert ("constant", "same", "note") in codes
        assert ("unique", "id", "note") in codes
        assert found["splits"]["train"]["time"]["ts"]["unit"] == "seconds"
        assert found["splits"]["test"]["time"]["ts"]["not_after_train"] == 0
    assert "data: " in call(tmp_path).output.splitlines()[-1]


def test_logs_without_a_label(call: Call, tmp_path: Path) -> None:
    logs(300, 0).select("user", "price").write_parquet(tmp_path / "logs.parquet")
    found: dict[str, Any] = json.loads(call(tmp_path / "logs.parquet", "--json").stdout)
    assert [f["code"] for f in found["findings"] if f["code"] == "no-label"] == ["no-label"]
    assert found["single_input_auc"] == {}


@pytest.mark.parametrize("name", ["quickstart", "frappe/fm", "adult/dcnv2", "movielens_100k/autoint"])
def test_recipes_have_no_errors(call: Call, name: str, request: pytest.FixtureRequest) -> None:
    folder = () if name == "quickstart" else ("--data-root", request.getfixturevalue("recsys_data"))
    result = call(name, *folder, "--rows", 5000, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["counts"]["error"] == 0
    assert all(split["examined"] <= 5000 for split in found["splits"].values())
    assert not [f for f in found["findings"] if f["code"] in ("leak", "unique", "constant")]


def test_a_split_without_rows_is_told(call: Call, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("user,price,y\n1,0.5,0\n2,abc,1\n3,0.7,1\n4,0.1,0\n")
    result = call(tmp_path / "few.csv")
    assert result.exit_code == 0
    assert result.output.count("no rows; give the split more rows, or drop it") == 2
