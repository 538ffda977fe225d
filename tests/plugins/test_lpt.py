"""Eight-bit tables: rounding by chance against its probabilities, what stays, what is stored; whole runs."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import SCALARS, SCHEMA, check_export, check_pruned, every_id, held, outputs, selections, size
from safetensors.torch import load_file
from typer.testing import CliRunner

from recsys.api import EncodedSchema, Field, Selection
from recsys.cli import app
from recsys.testing import contract, samples
from recsys_lpt import ALPT, HIGHEST, LOWEST, LPT, moved, on_grid, rounded

BOTH = pytest.mark.parametrize("kind", [LPT, ALPT])
STEP = 0.05


def make(kind, seed=0, schema=SCHEMA, **options):
    torch.manual_seed(seed)
    return kind(schema, **{"dim": 6, "init_std": 1.0, "step": STEP, **options})


def train(table, steps, first=0, optimizer=None, lr=0.02, decay=0.0):
    """Adam towards fixed numbers on some of the ids, by the part's own steps; returns the optimizer."""
    optimizer = optimizer or torch.optim.Adam(
        [p for p in table.parameters() if p.requires_grad], lr, weight_decay=decay
    )
    table.train()
    for step in range(first, first + steps):
        batch = samples.batch(16, table.schema, seed=step)
        optimizer.zero_grad()
        ((table(batch.ids, batch.values) - 0.3) ** 2).sum().backward()
        optimizer.step()
        table.after_step()
    return optimizer


def whole_numbers(table):
    return (table.weight / table.step).detach()


@pytest.mark.parametrize(("kind", "options"), [(LPT, {}), (LPT, {"stochastic": False}), (ALPT, {})])
def test_contract(kind, options):
    contract("embedding", kind, **options)


@settings(max_examples=8, deadline=None)
@given(st.floats(-6.3, 6.3), st.sampled_from([0.01, 0.05, 0.3]), st.integers(0, 99))
def test_rounding_by_chance_is_right_on_average(value, step, seed):
    n = 10**6
    w = torch.full((n // 10, 10), value, dtype=torch.float64)
    delta = torch.tensor(step, dtype=torch.float64)
    got = rounded(w, delta, torch.Generator().manual_seed(seed))
    inside = min(max(value, LOWEST * step), HIGHEST * step)
    low = (inside / step) // 1
    share = inside / step - low
    assert set((got / delta).round().unique().tolist()) <= {low, low + 1}
    sigma = step * (share * (1 - share) / n) ** 0.5
    assert abs(float(got.mean()) - inside) <= 4 * sigma + 1e-9


def test_the_numbers_of_a_row_and_of_different_rows_are_rounded_apart():
    up = rounded(torch.full((200_000, 4), 0.35), torch.tensor(1.0), torch.Generator().manual_seed(1)).double()
    both = torch.cat([up, up.roll(1, 0)[:, :1]], 1)
    between = torch.corrcoef(both.T) - torch.eye(5)
    assert between.abs().max() < 4 / 200_000**0.5
    per_row = torch.full((200_000, 4), 0.35), torch.ones(200_000, 1)
    assert torch.equal(rounded(*per_row, torch.Generator().manual_seed(1)).double(), up)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 10), st.integers(0, 10**6))
def test_a_number_on_the_grid_never_moves(step, seed):
    q = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float32).unsqueeze(1).expand(-1, 50).contiguous()
    for delta in (torch.tensor(step), torch.full((256, 1), step)):
        w = delta * q
        assert torch.equal(rounded(w, delta, torch.Generator().manual_seed(seed)), w)
        assert torch.equal(on_grid(w, delta), w)
        assert not list(moved(w, delta))


def test_steps_below_half_a_step_are_lost_by_the_nearest_and_kept_by_chance():
    tables = {s: make(LPT, stochastic=s, step=0.05, init_std=0.0) for s in (True, False)}
    for table in tables.values():
        for _ in range(400):
            with torch.no_grad():
                table.weight += 0.004
            table.after_step()
    assert not bool(tables[False].weight.any())
    n = tables[True].weight.numel()
    # The mean walks 400 x .004 = 1.6; each step's number is off by at most .05/2 as a standard deviation.
    assert abs(float(tables[True].weight.detach().mean()) - 1.6) < 4 * 0.025 * (400 / n) ** 0.5


@BOTH
def test_after_every_step_all_numbers_are_eight_bits_times_the_step(kind):
    table = make(kind)
    for k in range(15):
        train(table, 1, first=k)
        q = whole_numbers(table)
        assert torch.allclose(q, q.round(), atol=1e-4)
        assert int(q.round().min()) >= LOWEST
        assert int(q.round().max()) <= HIGHEST
    far = make(kind, init_std=100.0)
    assert float(whole_numbers(far).abs().max()) <= 128.001


@BOTH
def test_rows_that_no_batch_had_stay_and_cost_nothing(kind):
    table = make(kind, schema=EncodedSchema((Field("a", 1000),)))
    before = table.weight.detach().clone()
    optimizer = torch.optim.Adam([table.weight], 0.02)
    table.train()
    for _ in range(5):
        optimizer.zero_grad()
        (table(torch.arange(10, 40).unsqueeze(1)) ** 2).sum().backward()
        optimizer.step()
        (rows,) = moved(table.weight, table.step)
        assert rows.tolist() == list(range(10, 40))
        table.after_step()
    assert torch.equal(table.weight[40:], before[40:])
    assert torch.equal(table.weight[:10], before[:10])
    assert not torch.equal(table.weight[10:40], before[10:40])


@BOTH
@pytest.mark.parametrize("block", [6, 30, 1 << 15])
def test_blocks_miss_no_row(kind, block, monkeypatch):
    """Some blocks are rounded whole, some in part."""
    monkeypatch.setattr("recsys_lpt.BLOCK", block)
    table = make(kind)
    for some in (torch.arange(32) % 3 == 0, torch.arange(32) % 3 > 0, torch.arange(32) == 31, torch.arange(32) < 40):
        before = table.weight.detach().clone()
        with torch.no_grad():
            table.weight[some] += 0.5 * STEP
        table.after_step()
        assert not list(moved(table.weight, table.step))
        assert torch.equal(table.weight[~some], before[~some])
        gone = (table.weight - before)[some].detach() / STEP
        assert set(gone.round().unique().tolist()) == {0.0, 1.0}


@BOTH
def test_pruned_is_the_training_table_bit_for_bit_in_eight_bits(kind):
    table = make(kind)
    train(table, 20)
    shown = [t.detach().clone() for t in outputs(table.train())]
    small = table.prune(Selection(SCALARS)).eval()
    for ours, training, evaluated in zip(outputs(small), shown, outputs(table.eval()), strict=True):
        assert torch.equal(ours, training)
        assert torch.equal(ours, evaluated)
    assert small.codes.flat.dtype == torch.int8
    assert not [p for p in small.parameters() if p.requires_grad], "no optimizer moves what is stored"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([LPT, ALPT]), selections(6), selections(6))
def test_pruned_is_masked_bit_for_bit_and_again(kind, one, other):
    check_pruned(lambda: make(kind), one, other)


@pytest.mark.parametrize(("kind", "share"), [(LPT, 1 / 4), (ALPT, 5 / 16)])
def test_bytes(kind, share):
    schema = EncodedSchema((Field("a", 3000), Field("b", 500)))
    table = make(kind, schema=schema, dim=16)
    small = table.prune(Selection(("a", "b")))
    full = table.weight.nbytes
    assert full * share <= size(small) == held(small) <= full * share + 400
    part = table.prune(Selection(("a", "b"), rows={"a": torch.arange(3000) % 3 == 0}))
    numbers = full * share * 1500 / 3500
    assert numbers <= size(part) <= numbers + 2 * 3000 + 400, "one map of two bytes for each id"
    thin = torch.rand(3000, 16) < 0.2
    single = table.prune(Selection(("a",), elements={"a": thin}))
    assert int(thin.sum()) <= single.codes.flat.numel() <= int(thin.sum()) + 1
    assert size(single) < size(table.prune(Selection(("a",))))


@BOTH
def test_a_file_brings_back_the_same_bits_and_the_next_step_too(kind, tmp_path):
    one, two = make(kind), make(kind, seed=9)
    optimizer = train(one, 4)
    torch.save({"table": one.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}, tmp_path / "state")
    state = torch.load(tmp_path / "state")
    two.load_state_dict(state["table"])
    again = torch.optim.Adam([two.weight], 0.02)
    again.load_state_dict(state["optimizer"])
    train(one, 3, first=4, optimizer=optimizer)
    train(two, 3, first=4, optimizer=again)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = make(kind, seed=9)
    assert not torch.equal(other.get_extra_state(), make(kind).get_extra_state()), "every seed has chance of its own"


@BOTH
def test_a_graph_takes_any_batch_also_after_pruning(kind):
    table = make(kind)
    check_export(table)
    check_export(table.prune(Selection(SCALARS[:-1], {"i": torch.arange(12) % 3 > 0}, {"u": torch.arange(6) < 5})))
    check_export(table.prune(Selection(SCALARS, elements={"i": torch.rand(12, 6) < 0.3})))


def test_numeric_fields_need_values():
    with pytest.raises(ValueError, match="needs their values"):
        make(LPT).prune(Selection(SCALARS))(every_id()[0])


@pytest.mark.parametrize("embedding", ["lpt", "alpt"])
def test_its_own_stages_store_bytes_resume_to_the_same_bits_and_come_back(tmp_path, embedding):
    runner, out, part = CliRunner(), tmp_path / "run", tmp_path / "part"
    changes = ["stages=null", f"model.embedding={embedding}", "data.source.rows=4000", "model.embedding.dim=16"]
    command = ["train", "quickstart", *changes, "train.epochs=2", "train.batch_size=512", "--out", str(out), "--json"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output.splitlines()[-1])["metrics"]
    fitted = load_file(out / "1-fit" / "model.safetensors")["embedding.weight"]
    exported = load_file(out / "export" / "model.safetensors")
    assert exported["embedding.codes.flat"].dtype == torch.int8
    assert exported["embedding.codes.flat"].nbytes == fitted.nbytes // 4 + 16
    took = json.loads((out / "2-prune" / "prune.json").read_text())
    saved = 0.75 if embedding == "lpt" else 0.6875
    assert took["bytes_before"] - took["bytes_after"] >= saved * fitted.nbytes - 4000
    again = runner.invoke(app, ["evaluate", str(out), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output.splitlines()[-1])["metrics"]["test"] == told["test"]
    # As if stopped in the second epoch: the checkpoint of the first one is the newest there is.
    shutil.copytree(out, part)
    shutil.rmtree(max((part / "1-fit" / "checkpoints").iterdir()))
    for folder in ("2-prune", "3-evaluate", "4-export", "export"):
        shutil.rmtree(part / folder, ignore_errors=True)
    state = json.loads((part / "state.json").read_text())
    state |= {"stages": [], "selections": [], "scores": {}, "weights": None}
    (part / "state.json").write_text(json.dumps(state))
    assert runner.invoke(app, ["train", "--resume", str(part)]).exit_code == 0
    for name in ("1-fit/model.safetensors", "export/model.safetensors"):
        ends = [load_file(folder / name) for folder in (out, part)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
