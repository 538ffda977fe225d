"""One small recipe with everything at once, from the command line, against facts worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from recsys.contracts import FIRST_ID, NULL_ID
from recsys.data.encode import Encoder
from recsys.train.checkpoint import sha256

Command = Callable[..., str]
ROWS = 600
RECIPE = """
data:
  source: {use: files, path: logs.parquet}
  split: {by: time, column: ts, valid: 0.2, test: 0.2}
  bad_rows: {non_finite: map}
  label: {click: clicked, like: {column: stars, at_least: 4}}
  categorical:
    user: {hash_buckets: 11}
    item: {}
    shown_before: {share: item}
    city: {min_count: 2, null_values: ["?"]}
  numeric:
    price: {transform: quantile, buckets: 4}
    age: {transform: standard}
    depth: {transform: log}
  multi_valued:
    tags: {max_length: 2}
  sequences:
    past: {columns: {item: items, city: cities}, max_length: 3}
  context: {weight: w, group: user, time: ts, position: pos}
model:
  embedding: {use: table, dim: 4}
  interaction: [fm, {use: mlp, hidden: [8]}, {use: cross, layers: 1}]
  head: {wide: true}
loss: bce
train: {epochs: 2, batch_size: 64, learning_rate: 0.01, monitor: gauc, patience: 0}
stages:
  - {use: fit}
  - {use: evaluate, metrics: [auc, logloss, gauc, ece], splits: [train, valid, test]}
  - {use: export}
"""


def logs() -> pl.DataFrame:
    rng = np.random.default_rng(5)
    item, user = rng.integers(0, 12, ROWS), rng.integers(0, 25, ROWS)
    chance = 1 / (1 + np.exp(-((item % 3) - 1.0 + 0.5 * (user % 2))))
    lengths = rng.integers(0, 6, ROWS)
    cities = np.array(["a", "b", "c", "?"])
    return pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": item,
            "shown_before": rng.integers(6, 18, ROWS),  # items 12 to 17 are in no other column
            "city": cities[rng.integers(0, 4, ROWS)],
            "price": rng.exponential(size=ROWS),
            "age": np.where(rng.random(ROWS) < 0.1, np.nan, rng.integers(18, 70, ROWS)),
            "depth": rng.integers(0, 1000, ROWS),
            "tags": ["|".join(f"t{t}" for t in rng.integers(0, 5, n)) for n in rng.integers(0, 5, ROWS)],
            "items": [rng.integers(0, 12, n).tolist() for n in lengths],
            "cities": [cities[rng.integers(0, 3, n)].tolist() for n in lengths],
            "clicked": (rng.random(ROWS) < chance).astype(int),
            "stars": rng.integers(1, 6, ROWS),
            "w": np.where(item < 6, 0.0, 1.0),
            "ts": np.arange(ROWS) + 10**9,
            "pos": rng.integers(1, 5, ROWS),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs and recipe; the first test that asks trains there."""
    folder = tmp_path_factory.mktemp("everything")
    logs().write_parquet(folder / "logs.parquet")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def run(recsys: Command, folder: Path) -> Path:
    """The trained run."""
    if not (folder / "run").exists():
        recsys("train", folder / "recipe.yaml", "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def scores(recsys: Command, run: Path, tmp_path: Path) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Score rows with the trained run."""

    def predict(rows: pl.DataFrame) -> pl.DataFrame:
        rows.write_parquet(tmp_path / "new.parquet")
        recsys("predict", run, "--data", tmp_path / "new.parquet", "--out", tmp_path / "scores.parquet")
        return pl.read_parquet(tmp_path / "scores.parquet")

    return predict


def test_every_task_is_measured_on_every_split_and_measured_equally_again(recsys: Command, run: Path) -> None:
    told = json.loads((run / "metrics.json").read_text())["metrics"]
    names = {f"{task}/{metric}" for task in ("click", "like") for metric in ("auc", "logloss", "gauc", "ece")}
    assert {split: set(found) for split, found in told.items()} == dict.fromkeys(("train", "valid", "test"), names)
    again = json.loads(recsys("evaluate", run, "--split", "test", "--json"))["metrics"]
    assert again["test"] == {name: value for name, value in told["test"].items() if name in again["test"]}
    assert set(again["test"]) == names
    history = json.loads((run / "1-fit" / "history.json").read_text())
    gauc = [sum(epoch[f"valid/{task}/gauc"] for task in ("click", "like")) / 2 for epoch in history["epochs"]]
    assert history["best_epoch"] == 1 + int(np.argmax(gauc)), "the monitor is the mean over the tasks"


def test_ids_are_those_worked_out_by_hand(run: Path) -> None:
    encoder = Encoder.load(run / "encoder")
    train = logs()[:360]
    block = next(encoder.transform(train.lazy()))
    newest = pl.Series("item", [item for row in train["items"] for item in row[-3:]], pl.Int64)
    values = pl.concat([train["item"], train["shown_before"].alias("item"), newest])
    counts = values.value_counts().sort(["count", "item"], descending=[True, False])
    ids = {value: FIRST_ID + i for i, value in enumerate(counts["item"])}
    assert block.ids["item"].tolist() == [ids[v] for v in train["item"]]
    assert block.ids["shown_before"].tolist() == [ids[v] for v in train["shown_before"]]
    assert block.history["past"].values[:, 0].tolist() == [ids[v] for v in newest]
    assert block.history["past"].length.tolist() == [min(len(row), 3) for row in train["items"]]
    assert (block.ids["city"] == NULL_ID).tolist() == (train["city"] == "?").to_list()
    assert block.ids["user"].min() >= FIRST_ID
    assert block.ids["user"].max() < FIRST_ID + 11
    quarter = np.bincount(block.ids["price"])[FIRST_ID:]
    assert quarter.tolist() == [90, 90, 90, 90], "buckets of equal mass"
    age = block.values["age"]
    assert np.isnan(age).tolist() == np.isnan(train["age"].to_numpy()).tolist()
    assert float(np.nanmean(age)) == pytest.approx(0, abs=1e-6)
    assert float(np.nanstd(age)) == pytest.approx(1, abs=1e-6)
    assert block.label["like"].tolist() == (train["stars"] >= 4).cast(int).to_list()
    # One table: 11 user buckets, the shared items once, cities, quarters, tags; two rows of ids for each owner.
    rows = (2 + 11) + (2 + len(ids)) + (2 + 3) + (2 + 4) + 2 + 2 + (2 + 5)
    table = next(t for name, t in load_file(run / "1-fit" / "model.safetensors").items() if t.shape == (rows, 4))
    assert len(table) == rows


def test_scores_do_not_see_what_the_model_must_not_see(
    scores: Callable[[pl.DataFrame], pl.DataFrame], run: Path
) -> None:
    rows = logs().tail(40)
    base = scores(rows)
    assert base.columns == ["score_click", "score_like"]
    assert base["score_click"].n_unique() > 30

    def same(other: pl.DataFrame) -> bool:
        return bool(np.allclose(scores(other).to_numpy(), base.to_numpy(), rtol=0, atol=1e-7))

    older = pl.concat_list(pl.lit([7, 7, 7]), pl.col("items"))
    older_cities = pl.concat_list(pl.lit(["a", "a", "a"]), pl.col("cities"))
    full = pl.col("items").list.len() >= 3
    assert same(
        rows.with_columns(
            pl.when(full).then(older).otherwise("items").alias("items"),
            pl.when(full).then(older_cities).otherwise("cities").alias("cities"),
        )
    ), "events before the newest three"
    assert not same(rows.with_columns(pl.col("items").list.reverse(), pl.col("cities").list.reverse()))
    assert same(rows.with_columns(city=pl.col("city").replace("?", None))), "a declared null is a null"
    assert same(rows.with_columns(age=pl.col("age").fill_nan(None)))
    assert same(rows.drop("clicked", "stars", "w", "ts", "pos")), "labels and context are no features"
    assert same(rows.with_columns(price=pl.col("price") * 1.0, tags="x|" + pl.col("tags")).with_columns(
        pl.when(pl.col("tags").str.count_matches("|", literal=True) >= 2).then("tags").otherwise(rows["tags"])
    )), "tags before the last two"  # fmt: skip
    # Other lengths in the batch give other padding: each row alone scores as among the others.
    one = pl.concat([scores(rows[i : i + 1]) for i in (0, 1, 2)])
    assert np.allclose(one.to_numpy(), base[:3].to_numpy(), rtol=0, atol=1e-6)


def test_a_row_of_weight_zero_teaches_nothing_and_another_weight_something(
    recsys: Command, folder: Path, run: Path
) -> None:
    flipped = pl.when((pl.col("w") == 0) & (pl.int_range(pl.len()) < 360)).then(1 - pl.col("clicked"))
    others = {
        "flipped": logs().with_columns(flipped.otherwise("clicked").alias("clicked")),
        "heavier": logs().with_columns(w=pl.when(pl.col("item") == 7).then(3.0).otherwise("w")),
    }
    weights = {}
    for name, frame in others.items():
        (folder / name).mkdir()
        frame.write_parquet(folder / name / "logs.parquet")
        recsys("train", folder / "recipe.yaml", "--data-root", folder / name, "--out", folder / f"run-{name}")
        weights[name] = sha256(folder / f"run-{name}" / "1-fit" / "model.safetensors")
    assert weights["flipped"] == sha256(run / "1-fit" / "model.safetensors")
    assert weights["heavier"] != weights["flipped"]


def test_a_task_without_a_metric_leaves_the_choice_to_the_others(recsys: Command, folder: Path) -> None:
    valid = (pl.int_range(pl.len()) >= 360) & (pl.int_range(pl.len()) < 480)
    (folder / "one-class").mkdir()
    one_class = logs().with_columns(stars=pl.when(valid).then(1).otherwise("stars"))
    one_class.write_parquet(folder / "one-class" / "logs.parquet")
    # A learning rate at which the later epochs are worse.
    options = ("train.epochs=4", "train.learning_rate=0.3", "train.monitor=auc")
    told = recsys(
        "train", folder / "recipe.yaml", *options, "--data-root", folder / "one-class", "--out", folder / "run-1"
    )
    assert "warning: valid: label 'like' is 0 in all 120 rows" in told
    history = json.loads((folder / "run-1" / "1-fit" / "history.json").read_text())
    auc = [epoch["valid/click/auc"] for epoch in history["epochs"]]
    assert all(epoch["valid/like/auc"] is None for epoch in history["epochs"])
    assert history["best_epoch"] == 1 + int(np.argmax(auc)) < 4
