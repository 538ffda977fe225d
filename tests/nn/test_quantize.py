"""Numbers in fewer bits: what a loop rounds them to, the bytes that are foretold, the same again from a file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import DIM, SCALARS, SCHEMA, every_id, make, outputs, size
from test_sparse import selections

from recsys.contracts import EncodedSchema, Field, Selection
from recsys.errors import RecipeError
from recsys.nn.budget import keep_within, pruned_bytes
from recsys.nn.head import Head
from recsys.nn.interaction import FM
from recsys.nn.layout import Layout
from recsys.nn.model import Model
from recsys.nn.quantize import QuantizedTable, quantized
from recsys.nn.selection import KeepAll
from recsys.nn.table import Table

STORED = st.sampled_from(["float16", "int8"])
COLUMNS = Layout.of(SCHEMA).columns


def rounded(table, stored):
    """The table's own numbers, one by one, as they are after being stored."""
    blocks = []
    for v, rows in enumerate(table.layout.rows):
        block = table.read(v, torch.arange(rows))
        top = max((abs(float(w)) for w in block.flatten()), default=0.0)
        step = torch.tensor(top / 127 if top else 1.0)
        for row in block:
            for k, w in enumerate(row.tolist()):
                row[k] = torch.tensor(w).half().float() if stored == "float16" else round(w / float(step)) * step
        blocks.append(block)
    return blocks


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.just(Selection(SCALARS)), selections()), STORED)
def test_numbers_are_those_that_a_loop_rounds(selection, stored):
    table = make().prune(selection)
    small = quantized(SCHEMA, table, stored)
    want = make()
    with torch.no_grad():
        want.weight.copy_(torch.cat(rounded(table, stored)))
    ids, values = every_id()
    for got, full, before in zip(outputs(small), outputs(want), outputs(table), strict=True):
        # What one column drops of a vocabulary that others keep is zero for it, before as after.
        torch.testing.assert_close(got, torch.where(before == 0, 0.0, full), rtol=1e-6, atol=1e-9)
    assert small(ids, values).dtype == torch.float32
    assert small.table.flat.dtype == getattr(torch, stored)
    assert not [p for p in small.parameters() if p.requires_grad]


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.just(Selection(SCALARS)), selections()), STORED)
def test_bytes_are_foretold_and_a_file_brings_it_back(selection, stored):
    small = quantized(SCHEMA, make().prune(selection), stored)
    assert size(small) == pruned_bytes(SCHEMA, DIM, selection, stored)
    other = make()
    with torch.no_grad():
        other.weight.mul_(3.0)
    again = quantized(SCHEMA, other.prune(selection), stored)
    again.load_state_dict(small.state_dict())
    for a, b in zip(outputs(again), outputs(small), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=25, deadline=None)
@given(selections(), selections(), STORED)
def test_pruned_and_renumbered_afterwards_it_gives_the_same(one, two, stored):
    small = quantized(SCHEMA, make().prune(one), stored)
    for got, want in zip(
        outputs(small.prune(two)), outputs(quantized(SCHEMA, make().prune(one), stored).prune(two)), strict=True
    ):
        assert torch.equal(got, want)
    moved, selection = small.reordered((None,) * len(small.layout.rows))
    assert isinstance(moved, QuantizedTable)
    assert set(selection.fields) <= set(SCALARS)
    for got, want in zip(outputs(moved), outputs(small), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("stored", "budget"), [("float16", 0.3), ("int8", 0.2), ("int8", 0.1)])
def test_a_budget_counts_numbers_as_they_are_stored(stored, budget):
    torch.manual_seed(0)
    schema = EncodedSchema((Field("a", 3000), Field("b", 1000)))
    table = Table(schema, dim=16, init_std=1.0)
    few = keep_within(schema, 16, table.weight.abs(), budget)
    many = keep_within(schema, 16, table.weight.abs(), budget, stored)
    small = quantized(schema, table.prune(many), stored)
    assert 0.97 * budget < size(small) / table.weight.nbytes <= budget
    count = [sum(int(m.sum()) for m in chosen.elements.values()) for chosen in (few, many)]
    assert count[1] > 1.4 * count[0]


def test_rounding_errs_by_half_a_step_at_most_and_eight_bits_take_a_quarter():
    schema = EncodedSchema((Field("a", 5000), Field("b", 3000)))
    table = Table(schema, dim=16, init_std=1.0)
    small = quantized(schema, table, "int8")
    ids = torch.randint(0, 3000, (4000, 2))
    step = torch.stack([table.read(v, torch.arange(n)).abs().max() / 127 for v, n in enumerate((5000, 3000))])
    error = (small(ids) - table(ids)).abs().amax((0, 2))
    assert bool((error <= step / 2 * (1 + 1e-5)).all())
    assert bool((error > 0.4 * step).all())
    assert size(small) < 0.2501 * table.weight.nbytes + 200


def test_a_model_says_what_cannot_be_stored_in_fewer_bits():
    class Odd(torch.nn.Module):
        fields = make().fields

    table = make()
    fm = FM(Model.consumer_fields(SCHEMA, table))
    model = Model(SCHEMA, table, KeepAll(table.fields), {}, [fm], Head(SCHEMA, [fm]))
    once = model.quantized("int8")
    with pytest.raises(RecipeError, match=r"\(QuantizedTable\) has no numbers that could be stored as int8"):
        once.quantized("int8")
    model.selector = Odd()
    with pytest.raises(RecipeError, match="put the stage `prune` before"):
        model.quantized("int8")


def test_the_graph_takes_any_batch():
    small = quantized(SCHEMA, make().prune(Selection(SCALARS[:3])), "int8").eval()
    ids, values = every_id()
    rows = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(small, (ids[:4], values[:4]), dynamic_shapes=(rows, rows))
    assert torch.equal(program.module()(ids, values), small(ids, values))
