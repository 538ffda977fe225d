"""Mini-batch-aware regularisation against the sum over rows in the paper, and what it must leave alone."""

import json

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from recsys.cli import app
from recsys.contracts import Batch, EncodedSchema, Field, History
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys.train.counts import RowCounts
from recsys_mba import MBATable

ITEM = Field("item", 12)
SCHEMA = EncodedSchema(
    (ITEM, Field("price", 2, numeric=True), Field("city", 5)),
    (History("past", (Field("seen", 12, shares="item"),), 4, ("item",)),),
)
CITY = 14  # first row of the city: 12 items, 2 rows of the price


def batch(rows, seed=0):
    torch.manual_seed(seed)
    ids = torch.stack([torch.randint(0, 12, (rows,)), torch.ones(rows).long(), torch.randint(0, 5, (rows,))], 1)
    past = torch.randint(0, 12, (rows, 4, 1))  # 0 is padding
    length = torch.full((rows,), 4)
    return Batch(ids, torch.randn(rows, 3), {"past": (past, length)})


def rows_used(b, i):
    """The rows of the table that row i of the batch uses."""
    item, price, city = b.ids[i].tolist()
    return {item, 12 + price, CITY + city} | {e for e in b.history["past"][0][i].flatten().tolist() if e}


def slow_penalty(table, b, counts):
    touched = set().union(*(rows_used(b, i) for i in range(len(b))))
    return table.l2 / 2 * sum(table.weight[j].square().sum() / counts[j] for j in sorted(touched))


def one_row(b, i):
    return Batch(b.ids[i : i + 1], b.values[i : i + 1], {"past": tuple(x[i : i + 1] for x in b.history["past"])})


def look_up(table, b):
    table(b.ids, b.values)
    table.history("past", b.history["past"][0])


def counted(batches, **options):
    table = MBATable(SCHEMA, dim=3, init_std=1.0, **options).double()
    counts = RowCounts(SCHEMA)
    for b in batches:
        counts.add(b)
    table.take_counts(counts.by_column())
    return table


def test_contract():
    contract("embedding", MBATable)


def test_counts_are_the_rows_of_the_log_that_use_a_value():
    batches = [batch(20, seed) for seed in range(3)]
    wanted = [sum(j in rows_used(b, i) for b in batches for i in range(20)) for j in range(19)]
    assert counted(batches).count.tolist() == wanted


def test_penalty_and_gradient_are_those_of_the_sum():
    batches = [batch(8, seed) for seed in range(4)]
    table = counted(batches, l2=0.3)
    for b in batches:
        look_up(table, b)
        fast, slow = table.penalty(), slow_penalty(table, b, table.count)
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)
        ours, theirs = (torch.autograd.grad(x, table.weight)[0] for x in (fast, slow))
        assert (ours - theirs).abs().max() <= 1e-12
        untouched = [j for j in range(19) if not any(j in rows_used(b, i) for i in range(8))]
        assert untouched
        assert not bool(ours[untouched].any())


@pytest.mark.parametrize("together", [False, True])
def test_over_an_epoch_a_row_shrinks_as_the_paper_says(together):
    torch.manual_seed(0)
    rate, l2 = 0.1, 0.5
    whole = batch(6)
    every = [whole] if together else [one_row(whole, i) for i in range(6)]
    table = counted([whole], l2=l2)
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD([table.weight], lr=rate)
    for b in every:
        optimizer.zero_grad()
        look_up(table, b)
        table.penalty().backward()
        optimizer.step()
    n = table.count.double()
    factor = (1 - rate * l2 / n) ** (1 if together else n)
    factor[n == 0] = 1
    torch.testing.assert_close(table.weight.detach(), before * factor.unsqueeze(1), rtol=1e-12, atol=0)


def test_in_evaluation_there_is_none_and_without_counts_it_says_what_to_do():
    table = counted([batch(4)])
    look_up(table, batch(4))
    assert table.penalty() > 0
    table.eval()
    look_up(table, batch(4))
    assert table.penalty() == 0
    fresh = MBATable(SCHEMA)
    look_up(fresh, batch(4))
    with pytest.raises(RecipeError, match="count_rows"):
        fresh.penalty()


RECIPE = """
data:
  source: {use: files, train: train.parquet, valid: valid.parquet}
  label: y
  categorical: [item, city]
  sequences: {past: {columns: {item: seen}, max_length: 3}}
model: {embedding: {use: mba_table, dim: 4, l2: 0.5, init_std: 0.1}, interaction: {use: mlp, hidden: [4]}}
train: {epochs: 1, batch_size: 20, accelerator: cpu}
"""


def test_a_recipe_counts_before_it_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    item = torch.randint(0, 9, (200,), generator=generator).tolist()
    frame = pl.DataFrame({
        "item": item,
        "city": [i % 3 for i in item],
        "seen": [[i, (i + 1) % 9] for i in item],
        "y": [int(i % 2) for i in range(200)],
    })  # fmt: skip
    for name in ("train", "valid"):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "r.yaml").write_text(RECIPE)
    losses = []
    for l2 in ("0.5", "0.0"):
        out = tmp_path / l2
        given = ["train", str(tmp_path / "r.yaml"), f"model.embedding.l2={l2}", "--out", str(out), "--json"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        assert (out / "1-count_rows").is_dir()
        losses.append(json.loads((out / "2-fit" / "history.json").read_text())["epochs"][0]["train/loss"])
    # 27 rows of 4 numbers of variance 0.01, each used by 22 to 67 of 200 training rows, all in every step
    assert 1e-4 < losses[0] - losses[1] < 1e-1
    given = ["train", str(tmp_path / "r.yaml"), "stages=[fit]", "--out", str(tmp_path / "no")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code != 0
    assert "count_rows" in str(result.output) + str(result.exception)
