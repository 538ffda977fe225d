"""Sampled rows against loops over the raw logs: which items, whose fields, which labels, whoever trains."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from recsys.contracts import FIRST_ID, Batch, Items
from recsys.data.batches import TrainBatches
from recsys.data.popularity import read_popularity
from recsys.data.prepare import prepare
from recsys.data.samplers import InBatch, Popularity, Uniform
from recsys.data.sampling import Sampling, SamplingOptions
from recsys.data.schema import DataConfig
from recsys.data.shards import Shards
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError, RecipeError
from recsys.testing import contract

ROWS, USERS, ITEMS = 300, 12, 21


@pytest.fixture(scope="module")
def logs() -> pl.DataFrame:
    """Rows in which the colour and the tags follow from the item, and the price changes with time."""
    random = np.random.default_rng(3)
    item = np.minimum(random.geometric(0.1, ROWS) - 1, ITEMS - 1)
    rows = np.arange(ROWS)
    return pl.DataFrame(
        {
            "user": [f"u{u}" for u in random.integers(0, USERS, ROWS)],
            "item": [f"i{i}" if n % 29 else None for n, i in enumerate(item)],
            "colour": [f"c{i % 3}" for i in item],
            "tags": ["|".join(f"t{k}" for k in range(i % 4)) for i in item],
            "price": (item + rows / 1000).astype(np.float32),
            "hour": rows % 5,
            "past": ["|".join(f"i{k}" for k in range(n % 4)) for n in range(ROWS)],
            "y": (random.random(ROWS) < 0.4).astype(np.int64),
            "position": rows % 4,
            "ts": 1000 + rows * 10,
        }
    )


@pytest.fixture(scope="module")
def shards(logs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("logs")
    logs.write_parquet(folder / "train.parquet")
    config = DataConfig.model_validate(
        {
            "source": {},
            "label": "y",
            "categorical": ["user", "item", "colour", "hour"],
            "multi_valued": ["tags"],
            "numeric": {"price": {"transform": "raw"}},
            "sequences": {"clicks": {"columns": {"item": "past"}}},
            "context": {"position": "position", "time": "ts"},
        }
    )
    source = Files(DataRoot((folder,)), train="train.parquet")
    return prepare(config, source, folder / "cache").splits["train"]


def sampling(shards: Shards, make: Any = Uniform, seed: int = 5, **options: Any) -> Sampling:
    chosen = {"item": "item", "fields": ("colour", "tags", "price"), "user": "user", **options}
    made = Sampling.of(shards, SamplingOptions(**chosen), make)
    return replace(made, seed=seed)


def plain(batch: Batch, n: int, schema: Any) -> dict[str, Any]:
    """One row of a batch, by name."""
    row = {f.name: int(batch.ids[n, k]) for k, f in enumerate(schema.fields)}
    assert batch.values is not None
    row["price"] = float(batch.values[n, [f.name for f in schema.fields].index("price")])
    for group, (ids, length) in batch.history.items():
        row[group] = ids[n, : int(length[n]), 0].tolist()
        assert (ids[n, int(length[n]) :] == 0).all()
    row["position"] = int(batch.context["position"][n])
    row["y"] = float(batch.label["label"][n])
    return row


def key(row: dict[str, Any]) -> tuple[int, int]:
    return row["user"], row["item"]


def all_rows(shards: Shards) -> list[dict[str, Any]]:
    whole = shards.read(0, len(shards))
    return [plain(whole, n, shards.schema) for n in range(len(shards))]


OF_ITEM, OF_USER = ("colour", "tags", "price"), ("user", "hour", "clicks", "position")


@pytest.mark.parametrize("positives", ["ignore", "exclude", "label"])
@pytest.mark.parametrize("rows", ["all", "positives"])
@pytest.mark.parametrize("make", [Uniform, Popularity, InBatch])
def test_sampled_rows_are_those_of_the_loops(shards: Shards, make: Any, rows: str, positives: str) -> None:
    logged = all_rows(shards)
    liked = {key(row) for row in logged if row["y"]}
    trained = [row for row in logged if row["y"] or rows == "all"]
    newest: dict[int, dict[str, Any]] = {}
    for row in logged:
        newest[row["item"]] = row
    can_be_drawn = {row["item"] for row in trained if row["item"] >= FIRST_ID}
    batches = TrainBatches(shards, 64, 9, sampled=sampling(shards, make, rows=rows, positives=positives, negatives=3))
    seen = []
    for batch in batches.epoch(1):
        n = len(batch) // 4
        assert batch.negatives == 3
        assert batch.context["positive"].tolist() == [-1] * n + [k for k in range(n) for _ in range(3)]
        found = [plain(batch, k, shards.schema) for k in range(len(batch))]
        assert batch.context["item"].tolist() == [row["item"] for row in found]
        seen += found[:n]
        for place, row in enumerate(found[n:]):
            own = found[place // 3]
            assert row["item"] in can_be_drawn
            assert {name: row[name] for name in OF_ITEM} == {name: newest[row["item"]][name] for name in OF_ITEM}
            assert {name: row[name] for name in OF_USER} == {name: own[name] for name in OF_USER}
            if positives == "exclude":
                assert key(row) not in liked
            assert row["y"] == (positives == "label" and key(row) in liked)
    assert sorted(map(str, seen)) == sorted(map(str, trained))


def test_the_probability_of_an_item_stands_beside_it(shards: Shards) -> None:
    counts = Counter(row["item"] for row in all_rows(shards) if row["item"] >= FIRST_ID)
    weight = {item: n**0.5 for item, n in counts.items()}
    made = sampling(shards, lambda items: Popularity(items, power=0.5))
    for batch in TrainBatches(shards, 100, 1, sampled=made).epoch(0):
        for item, log_q in zip(batch.context["item"].tolist(), batch.context["log_q"].tolist(), strict=True):
            wanted = math.log(weight[item] / sum(weight.values())) if item in weight else -math.inf
            assert log_q == pytest.approx(wanted, abs=1e-6)


def by_row(batches: Any) -> dict[str, list[int]]:
    """Logged row → the items that were sampled for it."""
    found: dict[str, list[int]] = {}
    for batch in batches:
        n = len(batch) // (1 + batch.negatives)
        sampled = batch.context["item"][n:].reshape(n, -1).tolist()
        for k in range(n):
            assert batch.values is not None
            found[str((batch.ids[k].tolist(), batch.values[k].tolist()))] = sampled[k]
    return found


@pytest.mark.parametrize("make", [Uniform, InBatch])
def test_nothing_changes_with_processes_micro_batches_or_a_stop(shards: Shards, make: Any) -> None:
    made = sampling(shards, make, positives="exclude")
    whole = by_row(TrainBatches(shards, 60, 2, sampled=made).epoch(4))
    assert len(whole) > 250
    for ranks, accumulate in ((2, 1), (1, 3), (2, 2)):
        parts: dict[str, list[int]] = {}
        for rank in range(ranks):
            parts |= by_row(TrainBatches(shards, 60, 2, rank, ranks, accumulate, sampled=made).epoch(4))
        assert parts == whole
    rest = by_row(TrainBatches(shards, 60, 2, sampled=made).epoch(4, 3))
    assert rest == {row: whole[row] for row in rest}
    assert by_row(TrainBatches(shards, 60, 2, sampled=made).epoch(5)) != whole
    assert by_row(TrainBatches(shards, 60, 2, sampled=sampling(shards, make, 6)).epoch(4)) != whole


def test_windows_change_the_order_but_not_what_is_added(shards: Shards) -> None:
    made = sampling(shards, InBatch, negatives=2)
    rows = by_row(TrainBatches(shards, 50, 2, shuffle_memory=2e-3, sampled=made).epoch(0))
    assert len(rows) > 250
    for batch in TrainBatches(shards, 50, 2, shuffle_memory=2e-3, sampled=made).epoch(0):
        n = len(batch) // 3
        inside = set(batch.context["item"][:n].tolist())
        assert set(batch.context["item"][n:].tolist()) <= inside  # nothing from other steps


def test_popularity_is_that_of_the_item_in_the_time_slot_of_the_row(shards: Shards) -> None:
    slots, logged = 3, all_rows(shards)
    whole = shards.read(0, len(shards))
    time = whole.context["time"].tolist()
    first, last = min(time), max(time)
    items = sorted({row["item"] for row in logged if row["item"] >= FIRST_ID})

    def slot(t: int) -> int:
        return (t - first) * slots // (last - first + 1)

    n = Counter((slot(t), row["item"]) for t, row in zip(time, logged, strict=True) if row["y"])
    share = {(s, i): (n[s, i] + 1) / (sum(n[s, k] for k in items) + len(items)) for s in range(slots) for i in items}
    seen = 0
    for batch in TrainBatches(shards, 100, 1, sampled=sampling(shards, popularity_slots=slots)).epoch(0):
        given = [batch.context[name].tolist() for name in ("popularity", "time", "item")]
        for m, t, item in zip(*given, strict=True):
            in_slot = [share[slot(t), i] for i in items]
            wanted = (share[slot(t), item] - min(in_slot)) / (max(in_slot) - min(in_slot)) if item in items else 0.0
            assert m == pytest.approx(wanted, abs=1e-6)
            seen += 0 < m < 1
    assert seen > 500
    with pytest.raises(RecipeError, match="need the context column `time`"):
        read_popularity(Shards(shards.folder, replace(shards.schema, context=()), (), True), None, 2)  # type: ignore[arg-type]


def test_in_batch_never_draws_the_row_itself() -> None:
    items = Items(np.arange(5) + FIRST_ID, np.ones(5, np.int64), np.zeros(5, np.int64))
    step = np.array([3, -1, 0, 4, 1])

    class Given:
        items = step
        places = np.arange(5)

        def uniform(self, count: int, stream: int = 0) -> np.ndarray:
            return np.random.default_rng(0).random((5, count))

        def step_items(self) -> np.ndarray:
            return step

    drawn = InBatch(items).draw(Given(), 2000)
    for n in range(5):
        others = {int(i) for k, i in enumerate(step) if i >= 0 and k != n}
        assert set(drawn[n].tolist()) == others
        assert np.bincount(drawn[n], minlength=5).max() < 1.3 * 2000 / len(others)


@settings(max_examples=20)
@given(st.data())
def test_a_draw_is_uniform_in_every_part_of_its_argument(shards: Shards, data: DataObject) -> None:
    made = sampling(shards, seed=data.draw(st.integers(0, 2**40)), negatives=8)
    batches = TrainBatches(shards, 300, 3, sampled=made)
    items = np.concatenate([b.context["item"][len(b) // 9 :].numpy() for e in range(3) for b in batches.epoch(e)])
    counts = np.bincount(items)[FIRST_ID:]
    assert len(counts) == len(made.catalogue.items)
    expected = len(items) / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 65  # chi-square of 20 degrees: p < 2e-6


@pytest.mark.parametrize("make", [Uniform, Popularity, InBatch])
def test_contract(make: Any) -> None:
    contract("sampler", make)


@pytest.mark.parametrize("options", [{"power": 0.0}, {"power": 1.0, "of": "positives"}])
def test_contract_of_popularity(options: dict[str, Any]) -> None:
    contract("sampler", Popularity, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item": "itm"}, "sampling.item: no field 'itm'. Did you mean 'item'?"),
        ({"item": "price"}, "sampling.item: 'price' is numeric"),
        ({"user": "usr"}, "sampling.user: no field 'usr'. Did you mean 'user'?"),
        ({"fields": ("color",)}, "sampling.fields: no field 'color'. Did you mean 'colour'?"),
        ({"fields": ("clicks",)}, "sampling.fields: no field 'clicks'"),
        ({"user": None, "positives": "exclude"}, "sampling.positives: 'exclude' needs to know the user"),
        ({"user": "colour"}, "sampling.user: 'colour' belongs to the item"),
    ],
)
def test_names_are_checked(shards: Shards, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        sampling(shards, **options)
    assert str(caught.value).startswith(message)
    assert caught.value.path[0] == "sampling"


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(40)]
    pl.DataFrame({"user": ["a"] * 40, "item": items, "y": [0, 1] * 20}).write_parquet(tmp_path / "t.parquet")
    fields = {"user": {}, "item": {"min_count": 2}}
    config = DataConfig.model_validate({"source": {}, "label": "y", "categorical": fields})
    rows = prepare(config, Files(DataRoot((tmp_path,)), train="t.parquet"), tmp_path / "cache").splits["train"]
    with pytest.raises(DataError, match="no row of the train split has a known 'item'"):
        sampling(rows, fields=())


def test_multi_task_labels_are_looked_up_per_task(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user": ["a", "a", "b", "b"], "item": ["x", "z", "x", "z"], "c": [1, 0, 1, 1], "p": [0, 0, 1, 0]}
    )
    pl.concat([frame] * 20).write_parquet(tmp_path / "t.parquet")
    config = DataConfig.model_validate({"source": {}, "label": {"c": "c", "p": "p"}, "categorical": ["user", "item"]})
    rows = prepare(config, Files(DataRoot((tmp_path,)), train="t.parquet"), tmp_path / "cache").splits["train"]
    truth: dict[tuple[int, ...], tuple[float, ...]] = {}
    whole = rows.read(0, len(rows))
    for n in range(len(rows)):
        truth[tuple(whole.ids[n].tolist())] = tuple(float(whole.label[t][n]) for t in ("c", "p"))
    made = sampling(rows, fields=(), positives="label")
    for batch in TrainBatches(rows, 80, 0, sampled=made).epoch(0):
        for n in range(len(batch)):
            assert tuple(float(batch.label[t][n]) for t in ("c", "p")) == truth[tuple(batch.ids[n].tolist())]
        assert torch.equal(batch.context["positive"] < 0, torch.arange(len(batch)) < len(batch) // 5)
