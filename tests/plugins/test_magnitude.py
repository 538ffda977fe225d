"""Pruning by magnitude and by frequency against Python's sort; the schedule, its regrowth and its end."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from recsys.cli import app
from recsys.contracts import EncodedSchema, Field, History
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_magnitude import FrequencyTable, MagnitudeTable

ROWS = {"item": 400, "price": 2, "city": 50}
SCHEMA = EncodedSchema(
    (Field("item", 400), Field("price", 2, numeric=True), Field("city", 50)),
    (History("past", (Field("seen", 400, shares="item"),), 4, ("item",)),),
)


def size(table):
    return sum(t.nbytes for t in table.export_tables().values())


def every_row(table):
    ids = torch.arange(400).unsqueeze(1).expand(-1, 3).clone()
    ids[:, 1].clamp_(max=1)
    ids[:, 2].clamp_(max=49)
    return table(ids, torch.ones(400, 3)), table.history("past", ids[:, :1].unsqueeze(0))


@pytest.mark.parametrize("build", [MagnitudeTable, FrequencyTable])
def test_contract(build):
    contract("embedding", build)


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.7])
def test_the_largest_numbers_of_all_fields_together_are_kept(budget):
    torch.manual_seed(0)
    table = MagnitudeTable(SCHEMA, dim=8, init_std=1.0, budget=budget)
    with torch.no_grad():
        table.weight[:400] *= torch.linspace(0.1, 2, 400).unsqueeze(1)
    kept = table.kept()
    mask = torch.cat([kept.elements[name] for name in ROWS])
    assert torch.equal(kept.elements["past.seen"], kept.elements["item"])
    numbers = sorted(((abs(x), i) for i, x in enumerate(table.weight.flatten().tolist())), reverse=True)
    best = {i for _, i in numbers[: int(mask.sum())]}
    assert best == set(mask.flatten().nonzero().squeeze(1).tolist())
    small = table.prune(kept)
    whole = 4 * 452 * 8
    assert 0.97 * budget * whole < size(small) <= budget * whole
    masked = MagnitudeTable(SCHEMA, dim=8)
    masked.weight.data = table.weight.detach() * mask
    for got, want in zip(every_row(small), every_row(masked), strict=True):
        assert torch.equal(got, want)


def zeros(table):
    return int((table.weight == 0).sum())


def test_the_schedule_is_that_of_the_paper():
    torch.manual_seed(0)
    table = MagnitudeTable(SCHEMA, dim=8, init_std=1.0, every=10, rate=0.75, scale=100.0)
    n = 452 * 8
    order = table.weight.detach().abs().flatten().argsort()
    for step in range(1, 1001):
        table.after_step()
        if step in (9, 10, 100, 354, 1000):
            wanted = int(0.75 * (1 - 0.99 ** ((step - step % 10) / 100)) * n)
            assert zeros(table) == wanted
            assert torch.equal(table.weight.flatten()[order[:wanted]], torch.zeros(wanted))
    assert zeros(table) == int(0.75 * (1 - 0.99**10) * n)


def train(table, steps):
    """Adam towards fixed numbers, from all ids, one at a time."""
    optimizer = torch.optim.Adam(table.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        e, events = every_row(table)
        ((e - 0.3) ** 2).sum().add(((events + 0.1) ** 2).sum()).backward()
        optimizer.step()
        if isinstance(table, MagnitudeTable):
            table.after_step()
        yield


def test_zeroed_numbers_grow_again_in_training_and_never_after_prune():
    torch.manual_seed(0)
    table = MagnitudeTable(SCHEMA, dim=8, init_std=1.0, every=10, rate=0.5, scale=1.0, budget=0.4)
    seen = [zeros(table) for _ in train(table, 20)]
    after = int(0.5 * (1 - 0.99**10) * 452 * 8)
    assert seen[9] == after
    assert seen[10] == 0, "the moments of Adam bring all of them back in the next step"
    mask = table.kept().elements["item"]
    small = table.prune(table.kept())
    for _ in train(small, 10):
        pass
    assert not bool(every_row(small)[0][:, 0][~mask].any())
    assert bool(every_row(small)[0][:, 0][mask].all())


def test_the_step_is_part_of_what_is_saved():
    one, two = (MagnitudeTable(SCHEMA, dim=2, every=5) for _ in range(2))
    for _ in range(13):
        one.after_step()
    two.load_state_dict(one.state_dict())
    assert two.step == 13


def test_no_schedule_zeroes_nothing():
    table = MagnitudeTable(SCHEMA, dim=2, init_std=1.0)
    for _ in range(100):
        table.after_step()
    assert zeros(table) == 0


def test_the_most_frequent_rows_are_kept_and_of_equal_ones_the_first():
    torch.manual_seed(0)
    table = FrequencyTable(SCHEMA, dim=8, budget=0.5)
    with pytest.raises(RecipeError, match="count_rows"):
        table.kept()
    counts = {name: torch.randint(0, 12, (rows,)) for name, rows in ROWS.items()}
    table.take_counts({**counts, "past.seen": counts["item"]})
    kept = table.kept()
    mask = torch.cat([kept.rows[name] for name in ROWS])
    numbers = torch.cat(list(counts.values())).tolist()
    order = sorted(range(452), key=lambda i: (-numbers[i], i))
    assert set(order[: int(mask.sum())]) == set(mask.nonzero().squeeze(1).tolist())
    assert numbers[order[int(mask.sum())]] == numbers[order[int(mask.sum()) - 1]], "the limit lies among equal ones"
    assert 0.95 * 0.5 * 4 * 452 * 8 < size(table.prune(kept)) <= 0.5 * 4 * 452 * 8


@pytest.mark.parametrize("embedding", ["magnitude", "frequency"])
def test_its_own_stages_end_within_the_budget_and_come_back(tmp_path, embedding):
    changes = ["stages=null", f"model.embedding={embedding}", "model.embedding.budget=0.5", "data.source.rows=4000"]
    changes += ["model.embedding.every=2", "model.embedding.scale=1.0"] if embedding == "magnitude" else []
    out = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["train", "quickstart", *changes, "train.epochs=1", "train.batch_size=512", "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.output.splitlines()[-1])["metrics"]["test"]
    prune = next(out.glob("*-prune"))
    took = json.loads((prune / "prune.json").read_text())
    whole = load_file(next(out.glob("*-fit")) / "model.safetensors")["embedding.weight"].nbytes
    assert took["bytes_before"] - took["bytes_after"] >= 0.5 * whole
    again = CliRunner().invoke(app, ["evaluate", str(out), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output.splitlines()[-1])["metrics"]["test"] == told
