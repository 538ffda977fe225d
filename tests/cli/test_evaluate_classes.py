"""`evaluate` in classes of rows, with bounds: against scores of `recsys predict`, counted and measured apart."""

import json
import math
import random
from collections import Counter

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

RECIPE = """
data:
  source: {use: files, path: logs.csv}
  split: {by: column, column: part, valid: valid, test: test}
  label: y
  categorical: {user: {}, item: {min_count: 2}, shop: {}}
  context: {group: user, position: place}
model: {embedding: {use: table, dim: 4}, interaction: fm}
train: {epochs: 1, batch_size: 256}
stages:
  - {use: fit}
  - use: evaluate
    metrics: [auc, recall@2]
    splits: [test]
    by:
      shop: values
      position: {value: [0, 2]}
      item: {train_rows: [5, 20], train_positives: [3]}
      group: {train_rows: [40]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw = random.Random(1)
    lines = ["part,user,item,shop,place,y"]
    for n in range(4000):
        part = "train" if n < 2500 else "valid" if n < 2800 else "test"
        item = int(60 * draw.random() ** 2) + (10 if part == "test" else 0)
        user, shop = draw.randrange(60) if draw.random() < 0.9 else 60 + n % 7, ("a", "b", "")[draw.randrange(3)]
        y = int(draw.random() < (0.6 if item % 3 == 0 else 0.3))
        lines.append(f"{part},{user},{item},{shop},{draw.randrange(4)},{y}")
    (tmp_path / "logs.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_class_is_measured_on_its_own_rows(recsys, folder):
    told = json.loads(recsys("train", "recipe.yaml", "--out", "run", "--json").splitlines()[-1])["metrics"]
    logs = pl.read_csv("logs.csv", schema_overrides={"shop": pl.String})
    test = logs.filter(pl.col("part") == "test")
    test.write_csv("test.csv")
    recsys("predict", "run", "--data", "test.csv", "--out", "scores.csv")
    score, y = pl.read_csv("scores.csv")["score"].to_list(), test["y"].to_list()
    train = logs.filter(pl.col("part") == "train")
    rows, clicks = Counter(train["item"]), Counter(train.filter(pl.col("y") == 1)["item"])
    users = Counter(train["user"])
    learned = {item for item, count in rows.items() if count >= 2}
    classes = {
        "shop=a": [shop == "a" for shop in test["shop"]],
        "shop=b": [shop == "b" for shop in test["shop"]],
        "shop=missing": [shop is None for shop in test["shop"]],
        "position ≤0": [p <= 0 for p in test["place"]],
        "position >0 ≤2": [0 < p <= 2 for p in test["place"]],
        "position >2": [p > 2 for p in test["place"]],
        "item train_rows ≤5": [(rows[i] if i in learned else 0) <= 5 for i in test["item"]],
        "item train_rows >5 ≤20": [5 < rows[i] <= 20 for i in test["item"]],
        "item train_rows >20": [rows[i] > 20 for i in test["item"]],
        "item train_positives ≤3": [(clicks[i] if i in learned else 0) <= 3 for i in test["item"]],
        "item train_positives >3": [clicks[i] > 3 for i in test["item"]],
        "group train_rows ≤40": [users[u] <= 40 for u in test["user"]],
        "group train_rows >40": [users[u] > 40 for u in test["user"]],
    }
    gaps = {"shop gap", "position gap", "item train_rows gap", "item train_positives gap", "group train_rows gap"}
    assert set(told) == {"test", *(f"test[{name}]" for name in (*classes, *gaps))}
    auc = {}
    for name, inside in classes.items():
        mine = [i for i, here in enumerate(inside) if here]
        assert mine, name
        found = told[f"test[{name}]"]
        assert found["rows"] == len(mine), name
        auc[name] = roc_auc_score([y[i] for i in mine], [score[i] for i in mine])
        assert found["auc"] == pytest.approx(auc[name], abs=1e-6), name
    assert told["test[shop gap]"]["auc"] == pytest.approx(abs(auc["shop=a"] - auc["shop=b"]), abs=1e-6)
    three = [auc[f"position {name}"] for name in ("≤0", ">0 ≤2", ">2")]
    assert told["test[position gap]"]["auc"] == pytest.approx(max(three) - min(three), abs=1e-6)
    assert json.loads((folder / "run" / "2-evaluate" / "metrics.json").read_text()) == told

    again = json.loads(recsys("evaluate", "run", "--split", "test", "--json"))["metrics"]
    assert again == told


def test_bounds_are_repeated_and_stand_beside_their_score(recsys, folder):
    options = ("stages.1.by={shop: values}", "stages.1.intervals=0.9", "stages.1.draws=40")
    told = json.loads(recsys("train", "recipe.yaml", *options, "--out", "run", "--json").splitlines()[-1])["metrics"]
    for label in ("test", "test[shop=a]", "test[shop=missing]"):
        found = told[label]
        for name in ("auc", "recall@2"):
            assert found[f"{name}.low"] < found[name] < found[f"{name}.high"], (label, name)
    assert set(told["test[shop gap]"]) == {"auc", "recall@2"}
    again = json.loads(recsys("evaluate", "run", "--split", "test", "--json"))["metrics"]
    assert again == told
    wider = json.loads(recsys("evaluate", "run", "--split", "test", "--intervals", "0.99", "--json"))["metrics"]
    assert wider["test"]["auc.low"] < told["test"]["auc.low"]
    shown = recsys("evaluate", "run", "--split", "test")
    assert "test[shop=a]" in shown
    assert f"({told['test']['auc.low']:.5f}" in shown


def test_a_class_without_both_labels_is_undefined_and_in_no_gap(recsys, folder):
    logs = pl.read_csv("logs.csv")
    alone = pl.when((pl.col("part") == "test") & (pl.col("place") == 3)).then(0).otherwise(pl.col("y"))
    logs.with_columns(y=alone).write_csv("logs.csv")
    options = ("stages.1.by={position: values}", "stages.1.metrics=[auc]")
    told = json.loads(recsys("train", "recipe.yaml", *options, "--out", "run", "--json").splitlines()[-1])["metrics"]
    values = [told[f"test[position={n}]"]["auc"] for n in range(4)]
    assert values[3] is None
    assert told["test[position gap]"]["auc"] == pytest.approx(max(values[:3]) - min(values[:3]))
    assert not math.isnan(told["test"]["auc"])


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("{itm: values}", r"2-evaluate: by: 'itm' is neither a categorical field nor .*Did you mean 'item'"),
        ("{item: {train_row: [3]}}", "train_row"),
        ("{item: {train_rows: []}}", "expected rising numbers"),
        ("{item: {train_rows: [5, 2]}}", "expected rising numbers"),
        ("{item: values}", r"by.item: \d+ values, at most 50 can be shown; give thresholds"),
    ],
)
def test_mistakes_are_told(recsys, folder, by, message):
    with pytest.raises(SystemExit, match=message):
        recsys("train", "recipe.yaml", f"stages.1.by={by}", "--out", "run")
    assert "at most" in message or not (folder / "run" / "1-fit").exists()
