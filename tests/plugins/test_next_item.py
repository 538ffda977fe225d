"""Rows for the next item: histories and splits against a loop, negatives by their rule, a model through the CLI."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recsys.api import DataRoot
from recsys.cli import app
from recsys.errors import DataError
from recsys.testing import contract
from recsys_next_item import NextItem

SPLITS = ("train", "valid", "test")


def written(folder, events):
    """A log of (user, item, time), in any order."""
    users, items, times = zip(*events, strict=True)
    pl.DataFrame({"user": users, "item": items, "time": times}).write_parquet(folder / "log.parquet")
    return DataRoot((folder,))


def rows_of(source):
    return {name: source.scan(name).collect() for name in SPLITS}


def a_log(users=40, items=30, seed=0):
    random = np.random.default_rng(seed)
    events = []
    for user in range(users):
        size = int(random.integers(1, 9))
        chosen = random.choice(items, size, replace=False)
        events += [(user, int(i), int(t)) for i, t in zip(chosen, random.integers(0, 12, size), strict=True)]
    return events


def test_contract(tmp_path):
    written(tmp_path, a_log())
    contract("source", NextItem, path=str(tmp_path / "log.parquet"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_positives_are_the_log_and_histories_what_came_strictly_before(
    tmp_path_factory, seed, negatives, least, longest
):
    events = a_log(seed=seed)
    options = {"negatives": negatives, "least": least, "max_length": longest}
    root = written(tmp_path_factory.mktemp("log"), events)
    parts = rows_of(NextItem(root, path="log.parquet", **options))
    found = pl.concat(parts.values())
    wanted = {}
    for user, item, time in events:
        earlier = [(t, i) for u, i, t in events if u == user and t < time]
        if len(earlier) >= least:
            wanted[user, item, time] = [i for _, i in sorted(earlier)][-longest:]
    positive = found.filter(pl.col("label") == 1)
    assert {(u, i, t): h for u, i, t, h in positive.select("user", "item", "time", "history").iter_rows()} == wanted
    assert positive.height == len(wanted)
    assert found.height == (1 + negatives) * len(wanted)
    negative = found.filter(pl.col("label") == 0)
    owned = {(u, i) for u, i, _ in events}
    assert not owned & set(negative.select("user", "item").iter_rows())
    for user, time, history in negative.select("user", "time", "history").unique().iter_rows():
        assert any(h == history for (u, _, t), h in wanted.items() if (u, t) == (user, time))


def test_the_last_event_tests_and_the_one_before_validates(tmp_path):
    events = [(u, 10 * u + t, t) for u in range(5) for t in range(6)]
    parts = rows_of(NextItem(written(tmp_path, events), path="log.parquet"))
    assert {name: sorted(set(rows["time"])) for name, rows in parts.items()} == {
        "train": [1, 2, 3], "valid": [4], "test": [5]
    }  # fmt: skip


def test_a_split_by_time_cuts_between_moments(tmp_path):
    events = a_log(users=200)
    parts = rows_of(NextItem(written(tmp_path, events), path="log.parquet", split="time", valid=0.2, test=0.2))
    train, valid, test = (parts[name]["time"] for name in SPLITS)
    assert train.max() < valid.min()
    assert valid.max() < test.min()
    later = [t for _, _, t in events if t >= test.min()]
    assert 0.1 < len(later) / len(events) <= 0.3


def test_the_order_of_the_log_does_not_matter_and_the_seed_does(tmp_path):
    events = a_log()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = NextItem(written(tmp_path / "a", events), path="log.parquet")
    other = NextItem(written(tmp_path / "b", events[::-1]), path="log.parquet")
    assert rows_of(one)["train"].equals(rows_of(other)["train"])
    assert one.identity() != other.identity()  # the bytes differ
    another = NextItem(written(tmp_path / "a", events), path="log.parquet", seed=1)
    first, second = rows_of(one)["train"], rows_of(another)["train"]
    assert not first.equals(second)
    assert first.filter(pl.col("label") == 1).equals(second.filter(pl.col("label") == 1))
    assert one.identity() != another.identity()
    assert one.identity() == NextItem(DataRoot((tmp_path / "a",)), path="log.parquet").identity()


def test_negatives_are_uniform_over_the_items_that_are_left(tmp_path):
    events = [(0, i, i) for i in range(4)] + [(1, i, 0) for i in range(20)]
    source = NextItem(written(tmp_path, events), path="log.parquet", negatives=4000)
    drawn = pl.concat(rows_of(source).values()).filter(pl.col("label") == 0)
    counts = drawn["item"].value_counts()
    assert sorted(counts["item"]) == list(range(4, 20))
    expected = drawn.height / 16
    chi_square = ((counts["count"] - expected) ** 2 / expected).sum()
    assert chi_square < 38  # 15 degrees of freedom, p < 0.001


def test_the_property_of_an_item_is_its_last_value(tmp_path):
    root = written(tmp_path, [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 9, 0)])
    pl.DataFrame({"item": [1, 2, 9], "tags": [[5, 6], [7], [8]]}).write_parquet(tmp_path / "items.parquet")
    table = {"path": "items.parquet", "on": "item", "column": "tags"}
    test = rows_of(NextItem(root, path="log.parquet", items=table))["test"]
    assert test.select("item", "tags", "history", "history_tags").rows() == [
        (3, None, [1, 2], [6, 7]), (9, 8, [1, 2], [6, 7])
    ]  # fmt: skip
    pl.DataFrame({"item": [1, 1], "tags": [5, 6]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="item 1 is there twice"):
        rows_of(NextItem(root, path="log.parquet", items=table))


def test_the_property_of_a_user_comes_with_its_place_among_all_values(tmp_path):
    root = written(tmp_path, [(u, i, t) for u in (3, 7, 9) for t, i in enumerate((u, u + 1, u + 2))])
    table = {"path": "users.parquet", "on": "user", "column": "age"}
    ages = pl.DataFrame({"user": [9, 7, 1], "age": [56, 18, 35]})
    ages.write_parquet(tmp_path / "users.parquet")
    plain = NextItem(root, path="log.parquet")
    source = NextItem(root, path="log.parquet", users=table)
    found = rows_of(source)
    for name, frame in found.items():
        assert frame.drop("age", "age_class").equals(plain.scan(name).collect())
    rows = pl.concat(found.values()).select("user", "age", "age_class").rows()
    assert set(rows) == {(3, None, -1), (7, 18, 0), (9, 56, 2)}
    before = source.identity()
    assert before != plain.identity()
    ages.head(2).write_parquet(tmp_path / "users.parquet")
    assert source.identity() != before


def test_wrong_input_is_named(tmp_path):
    root = written(tmp_path, [(0, 1, 0), (0, 2, 1)])
    with pytest.raises(DataError, match="nearly all of the 2 items"):
        NextItem(root, path="log.parquet").scan("train")
    with pytest.raises(DataError, match=r"no column 'when'\. Columns: user, item, time"):
        NextItem(root, path="log.parquet", time="when").scan("train")
    with pytest.raises(DataError, match="no 'all' split; it gives train, valid, test"):
        NextItem(root, path="log.parquet").scan("all")


RECIPE = """
data:
  source: {use: next_item, path: log.parquet, negatives: 2}
  label: label
  categorical: [item]
  sequences: {past: {columns: {item: history}, max_length: 5}}
  context: {group: user}
model: {embedding: {use: table, dim: 4}, sequence: {use: din, hidden: [8]}, interaction: {use: dice_mlp, hidden: [8]}}
train: {epochs: 1, batch_size: 64}
stages: [{use: fit}, {use: evaluate, metrics: [gauc, auc]}]
"""


def test_din_trains_on_it_from_a_recipe_and_twice_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    written(tmp_path, a_log(users=100))
    (tmp_path / "r.yaml").write_text(RECIPE)
    results = []
    for out in ("a", "b"):
        given = ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / out), "--json", "train.accelerator=cpu"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout.splitlines()[-1])["metrics"])
    assert results[0] == results[1]
    assert 0 < results[0]["test"]["gauc"] < 1
