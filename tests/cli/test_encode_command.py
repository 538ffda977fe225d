"""`recsys encode`: what training would encode, ahead of it; and raw logs with histories, trained on."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.data.shards import Shards

Command = Callable[..., str]
RECIPE = """
data:
  source: {use: files, path: log.csv}
  split: {by: time, column: ts}
  label: click
  categorical: [user, item, shop]
  sequences:
    past: {columns: {item: item_history, shop: shop_history}, max_length: 4}
model: {interaction: fm, embedding: {use: table, dim: 4}}
train: {epochs: 1, batch_size: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log in the order of time, half of whose clicks follow from what was clicked before."""
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = 600
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, 30, rows),
            "item": [f"i{i}" for i in rng.integers(0, 40, rows)],
            "shop": rng.integers(0, 5, rows),
            "ts": np.sort(rng.integers(0, 300, rows)),
            "click": rng.integers(0, 2, rows),
        }
    )
    frame.write_csv(tmp_path / "log.csv")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path / "mine.yaml"


def last_line(told: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    return result


def test_training_uses_what_was_encoded(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    plain = "data.sequences={}"
    first = last_line(recsys("encode", recipe, plain, "--json"))
    assert sum(first["rows"].values()) == 600
    assert first["report"]["splits"]["train"]["rows"] == first["rows"]["train"]
    assert not first["reused"]
    folder = Path(first["folder"])
    shards = [f for name in first["rows"] for f in (folder / name).rglob("*") if f.is_file()]
    assert first["bytes_per_row"] == pytest.approx(sum(f.stat().st_size for f in shards) / 600, abs=1e-3)
    assert first["bytes"] == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    result = last_line(recsys("train", recipe, plain, "--out", tmp_path / "run", "--json"))
    assert set(result["metrics"]) == {"valid", "test"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == first["fingerprint"]
    second = last_line(recsys("encode", recipe, plain, "--json"))
    assert second["reused"]
    assert second["folder"] == first["folder"]
    assert [f.name for f in (tmp_path / "cache").iterdir() if not f.name.startswith(".")] == [folder.name]


def test_the_report_says_what_was_met(recsys: Command, recipe: Path) -> None:
    told = recsys("encode", recipe, "data.sequences={}", "data.defaults.min_count=20")
    for text in ("train: ", "valid: ", "test: ", "unknown", "columns not used: ts", "folder  ", "per row", "rows/s"):
        assert text in told
    assert "(encoded before)" in recsys("encode", recipe, "data.sequences={}", "data.defaults.min_count=20")


def histories(frame: pl.DataFrame, column: str, max_length: int) -> list[list[str]]:
    """Return the clicked values before each row, the slow way."""
    rows = list(frame.iter_rows(named=True))
    return [
        [r[column] for r in rows if r["click"] == "1" and r["user"] == row["user"] and int(r["ts"]) < int(row["ts"])][
            -max_length:
        ]
        for row in rows
    ]


@pytest.mark.parametrize("out", ["built", "built.parquet"])
def test_histories_from_the_log_to_a_trained_model(recsys: Command, tmp_path: Path, recipe: Path, out: str) -> None:
    options = ("--history", "user", "--time", "ts", "--events", "click=1", "--out", tmp_path / out)
    result = last_line(recsys("encode", recipe, *options, "--json"))
    raw = pl.read_csv(tmp_path / "log.csv", infer_schema=False)
    built = pl.read_parquet(tmp_path / out)
    assert built.drop("item_history", "shop_history").equals(raw)
    assert built["item_history"].to_list() == histories(raw, "item", 4)
    assert built["shop_history"].to_list() == histories(raw, "shop", 4)
    assert result["events"] == (raw["click"] == "1").sum()
    assert result["lengths"]["item_history"] == built["item_history"].list.len().sum()
    assert result["overrides"] == [f"data.source.path={tmp_path / out}"]

    encoded = last_line(recsys("encode", recipe, *result["overrides"], "--json"))
    stored = 0
    for name, rows in encoded["rows"].items():
        folder = Path(encoded["folder"]) / name
        assert len(Shards.open(folder)) == rows
        offsets = sorted(folder.glob("history0-offsets-*.bin"))
        assert offsets
        events = sum(int(np.fromfile(f, "<i8")[-1]) for f in offsets)
        size = sum(f.stat().st_size for f in folder.glob("history0-values-*.bin"))
        # Two columns of ids of one byte each, and nothing for the places that a short history leaves empty.
        assert size == events * 2
        stored += events
    assert stored == result["lengths"]["item_history"] < 4 * 600
    assert built["item_history"].list.len().min() == 0
    trained = last_line(recsys("train", recipe, *result["overrides"], "--out", tmp_path / "run", "--json"))
    assert 0 < trained["metrics"]["test"]["logloss"] < 2
    scores = tmp_path / "scores.parquet"
    recsys("predict", tmp_path / "run", "--data", tmp_path / out, "--out", scores)
    assert pl.read_parquet(scores)["score"].is_between(0, 1).all()


def test_a_log_without_any_event_is_told_of(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "built"
    told = recsys("encode", recipe, "--history", "user", "--time", "ts", "--events", "click=7", "--out", out)
    assert "warning: no row is an event (click=7); every history is empty" in told
    assert pl.read_parquet(out)["item_history"].to_list() == [[]] * 600
    with pytest.raises(SystemExit, match="item_history"):
        recsys("train", recipe, f"data.source.path={out}", "--out", tmp_path / "run")


def test_a_split_with_empty_histories_only(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    frame = pl.read_csv(tmp_path / "log.csv").with_columns(user=pl.when(pl.col("ts") < 250).then("user").otherwise(99))
    frame.with_columns(click=pl.when(pl.col("user") == 99).then(pl.col("item") < "i2").otherwise("click")).write_csv(
        tmp_path / "log.csv"
    )
    out = tmp_path / "built"
    recsys("encode", recipe, "--history", "user", "--time", "ts", "--events", "user>=99", "--out", out)
    data = pl.read_parquet(out)
    assert data.filter(pl.col("ts").cast(pl.Int64) <= 250)["item_history"].list.len().max() == 0
    reverse = data.reverse().with_columns(ts=-pl.col("ts").cast(pl.Int64))
    reverse.write_parquet(tmp_path / "reversed.parquet")
    changed = f"data.source.path={tmp_path / 'reversed.parquet'}"
    trained = last_line(recsys("train", recipe, changed, "--out", tmp_path / "run", "--json"))
    assert 0 < trained["metrics"]["test"]["logloss"] < 2


def test_histories_of_a_simulated_source(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    text = RECIPE.replace("{use: files, path: log.csv}", "{use: simulated, rows: 2000, seed: 1}")
    text = text.replace("  split: {by: time, column: ts}\n", "").replace("label: click", "label: y")
    text = text.replace("shop", "category")
    recipe.write_text(text)
    options = ("--history", "user", "--time", "ts", "--out", tmp_path / "built")
    result = last_line(recsys("encode", recipe, *options, "--json"))
    assert result["rows"] == {"train": 1600, "valid": 200, "test": 200}
    assert pl.read_parquet(tmp_path / "built" / "test")["item_history"].list.len().max() == 4
    trained = last_line(recsys("train", recipe, *result["overrides"], "--out", tmp_path / "run", "--json"))
    assert set(trained["metrics"]) == {"valid", "test"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--time", "ts"], "belong to --history"),
        (["--sort"], "belong to --history"),
        (["--history", "user", "--out", "x"], "--history needs --time"),
        (["--history", "user", "--time", "ts"], "--history needs --time COLUMN and --out"),
        (["--history", "usr", "--time", "ts", "--out", "x"], "Did you mean 'user'"),
        (["--history", "user", "--time", "ts", "--out", "x", "--events", "clik"], "Did you mean 'click'"),
        (["--history", "user", "--time", "shop", "--out", "x"], ", column 'shop': the time is earlier"),
    ],
)
def test_what_is_refused(recsys: Command, recipe: Path, options: list[str], told: str) -> None:
    options = [str(recipe.parent / "x") if option == "x" else option for option in options]
    with pytest.raises(SystemExit) as refused:
        recsys("encode", recipe, *options)
    assert told in str(refused.value)
    assert not list(recipe.parent.glob("*x"))


MOVIELENS = """
data:
  source:
    use: files
    path: movielens_100k/ratings.parquet
    join: [{path: movielens_100k/movies.parquet, on: movie_id}]
  split: {by: time, column: timestamp}
  label: {like: {column: rating, at_least: 4}}
  categorical: [user_id, movie_id, title]
  sequences:
    past: {columns: {movie_id: movie_history, title: title_history}, max_length: 20}
model: {interaction: fm}
"""


def test_liked_films_of_movielens(recsys: Command, tmp_path: Path, recsys_data: Path) -> None:
    (tmp_path / "films.yaml").write_text(MOVIELENS)
    options = ("--history", "user_id", "--time", "timestamp", "--events", "rating>=4", "--sort")
    recsys("encode", tmp_path / "films.yaml", *options, "--out", tmp_path / "built", "--data-root", recsys_data)
    raw = pl.read_parquet(recsys_data / "movielens_100k" / "ratings.parquet")
    built = pl.read_parquet(tmp_path / "built")
    assert built.drop("movie_history", "title_history").equals(raw)
    titles = dict(
        pl.read_parquet(recsys_data / "movielens_100k" / "movies.parquet").select("movie_id", "title").iter_rows()
    )
    liked = defaultdict(list)
    for i, (user, movie, rating, time) in enumerate(raw.select(raw.columns[:4]).iter_rows()):
        if rating >= 4:
            liked[user].append((time, i, movie))
    for past in liked.values():
        past.sort()
    for i in random.Random(0).sample(range(raw.height), 2000):
        row = built.row(i, named=True)
        expected = [movie for time, _, movie in liked[row["user_id"]] if time < row["timestamp"]][-20:]
        assert row["movie_history"] == expected
        assert row["title_history"] == [titles[movie] for movie in expected]
