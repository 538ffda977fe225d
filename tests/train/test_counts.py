"""Counts of ids against a loop over the rows; who may see them, and who does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from recsys.contracts import Batch, EncodedSchema, Field, History
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.prepare import prepare
from recsys.data.shards import Shards, write_blocks
from recsys.errors import RecipeError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train import counts as counting
from recsys.train.counts import RowCounts, count_rows
from recsys.train.distributed import World

SCHEMA = EncodedSchema(
    (Field("item", 7), Field("price", 2, numeric=True), Field("city", 5), Field("other", 4, shares="item")),
    (History("past", (Field("seen", 7, shares="item"), Field("shop", 3)), 3, ("item", "city")),),
)


def shards(tmp_path: Path, rows: int, seed: int = 0) -> Shards:
    """Rows of random ids and lists of 0 to 3 events."""
    g = np.random.default_rng(seed)
    length = g.integers(0, 4, rows)
    events = np.stack([g.integers(0, 7, length.sum()), g.integers(0, 3, length.sum())], 1)
    price = np.where(g.random(rows) < 0.3, np.nan, 1.5).astype(np.float32)
    ids = {"item": g.integers(0, 7, rows), "city": g.integers(0, 5, rows), "other": g.integers(0, 4, rows)}
    past = {"past": Ragged(events, length)}
    block = EncodedColumns(rows, ids, {"price": price}, past, {"label": g.integers(0, 2, rows).astype(np.uint8)}, {})
    return write_blocks(SCHEMA, [block], tmp_path / "rows")


def slow(batch: Batch) -> dict[str, list[int]]:
    """For every column, row by row: the ids that the row has in it or in a column that shares its vocabulary."""
    items, prices, cities, shops = Counter(), Counter(), Counter(), Counter()
    past, length = batch.history["past"]
    for i in range(len(batch)):
        item, price, city, other = batch.ids[i].tolist()
        events = past[i, : int(length[i])].tolist()
        items.update({item, other} | {seen for seen, _ in events if seen})
        prices.update({price})
        cities.update({city})
        shops.update({shop for _, shop in events if shop})
    of = {"item": (items, 7), "price": (prices, 2), "city": (cities, 5), "other": (items, 4)}
    of |= {"past.seen": (items, 7), "past.shop": (shops, 3)}
    return {name: [counter[i] for i in range(rows)] for name, (counter, rows) in of.items()}


@given(rows=st.integers(1, 60), seed=st.integers(0, 999), ranks=st.integers(1, 3), size=st.sampled_from([1, 7, 64]))
def test_counts_are_those_of_a_loop_whatever_the_blocks(
    tmp_path_factory: Any, rows: int, seed: int, ranks: int, size: int
) -> None:
    data = shards(tmp_path_factory.mktemp("rows"), rows, seed)
    wanted = slow(data.read(0, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "MOST_ROWS", size)
        told: list[int] = []
        whole = count_rows(data, World(), torch.device("cpu"), told.append)
        assert sum(told) == rows
        parts = [count_rows(data, World(r, ranks), torch.device("cpu")) for r in range(ranks)]
    assert {name: c.tolist() for name, c in whole.items()} == wanted
    for name, count in whole.items():
        assert torch.equal(sum(p[name] for p in parts), count), "the ranks' parts are all rows once"


def test_a_table_larger_than_the_batch_is_counted_in_the_same_way() -> None:
    schema = EncodedSchema((Field("a", 1000),))
    counts = RowCounts(schema)
    for ids in ([3, 999, 3], list(range(1000)) * 2):
        counts.add(Batch(torch.tensor(ids).unsqueeze(1)))
    want = torch.full((1000,), 2)
    want[3], want[999] = 4, 3
    assert torch.equal(counts.by_column()["a"], want)


PLUGIN = """
from __future__ import annotations
import torch
from recsys.api import Component, Table, hookimpl

class Knowing(Table):
    \"\"\"A table that knows the counts.\"\"\"

    needs_counts = False

    def __init__(self, schema, *, dim: int = 4) -> None:
        super().__init__(schema, dim=dim)
        self.register_buffer("count", torch.zeros(self.weight.shape[0], dtype=torch.int64))

    def take_counts(self, counts) -> None:
        self.count.copy_(torch.cat([counts[c.name] for c in self.layout.columns]))

@hookimpl
def recsys_components():
    return [Component("embedding", "knowing", Knowing)]
"""


def test_the_stage_counts_the_train_split_alone_and_the_run_comes_back(tmp_path: Path) -> None:
    (tmp_path / "knowing_plugin.py").write_text(PLUGIN)
    registry = load_registry(files=[tmp_path / "knowing_plugin.py"])
    for embedding in ("knowing", "table"):
        given_ = ["data.source.rows=3000", f"model.embedding={embedding}", "stages=[{use: count_rows}]"]
        recipe = load_recipe(find_recipe("quickstart"), registry, given_)
        prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")
        console = Console(file=(tmp_path / "log.txt").open("w"))
        run = build_run(
            recipe, registry, tmp_path / embedding, prepared.encoder, prepared.splits, world=World(), console=console
        )
        if embedding == "table":
            with pytest.raises(RecipeError, match="no part of the model takes counts"):
                run_stages(run, recipe, registry)
            continue
        run_stages(run, recipe, registry)
        train = run.split("train")
        ids = train.read(0, len(train)).ids
        want = torch.cat([torch.bincount(ids[:, f], minlength=field.rows) for f, field in enumerate(run.schema.fields)])
        kept = load_file(tmp_path / embedding / "1-count_rows" / "model.safetensors")["embedding.count"]
        assert torch.equal(kept, want)
        assert int(want.sum()) == len(train) * len(run.schema.fields) < 3000 * len(run.schema.fields)
