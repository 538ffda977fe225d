"""What pruning leaves behind gives the same vectors as masking, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from recsys.contracts import EncodedSchema, Field, History, Selection
from recsys.errors import DataError
from recsys.nn.compact import CompactTable
from recsys.nn.table import Table

DIM = 4
SCHEMA = EncodedSchema(
    fields=(Field("u", 9), Field("x", 2, numeric=True), Field("i", 12), Field("j", 12, shares="i")),
    histories=(History("h", (Field("i", 12, shares="i"), Field("s", 6)), 5),),
)
COLUMNS = {"u": 9, "x": 2, "i": 12, "j": 12, "h.i": 12, "h.s": 6}
SCALARS = ("u", "x", "i", "j")


def masks(size):
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda bits: torch.tensor(bits))


@st.composite
def selections(draw):
    return Selection(
        fields=tuple(f for f in SCALARS if draw(st.booleans())),
        rows={c: draw(masks(n)) for c, n in COLUMNS.items() if draw(st.booleans())},
        dims={c: draw(masks(DIM)) for c in COLUMNS if draw(st.booleans())},
    )


def make():
    torch.manual_seed(1)
    return Table(SCHEMA, dim=DIM, init_std=1.0)


def every_id():
    """All ids of all columns, some out of range; and numeric values."""
    ids = torch.arange(-2, 16).unsqueeze(1).expand(-1, 4).contiguous()
    return ids, torch.linspace(-2, 2, len(ids)).unsqueeze(1).expand(-1, 4).contiguous()


def mask(selection, name, ids):
    """`[..., D]`: one where the selection keeps this id's coordinate; ids as the table reads them."""
    size = COLUMNS[name]
    ids = torch.where((ids < 0) | (ids >= size), 0 if name == "x" else 1, ids)
    rows = selection.rows.get(name, torch.ones(size, dtype=torch.bool))[ids]
    dims = selection.dims.get(name, torch.ones(DIM, dtype=torch.bool))
    keep = rows.unsqueeze(-1) & dims
    return keep & (name in selection.fields or name not in SCALARS)


def masked(table, selection):
    """What the pruned table must give: the whole one's output with the dropped parts set to zero."""
    ids, values = every_id()
    scalar = table(ids, values) * torch.stack([mask(selection, n, ids[:, k]) for k, n in enumerate(SCALARS)], 1)
    events = ids[:, :2].unsqueeze(0)  # [1, L, 2]
    keep = torch.stack([mask(selection, n, events[..., k]) for k, n in enumerate(("h.i", "h.s"))], 2)
    return scalar, table.history("h", events) * keep


def outputs(table):
    ids, values = every_id()
    return table(ids, values), table.history("h", ids[:, :2].unsqueeze(0))


def size(table):
    return sum(t.nbytes for t in table.export_tables().values())


@settings(max_examples=60, deadline=None)
@given(selections())
def test_pruned_is_masked_bit_for_bit(selection):
    table = make()
    for got, want in zip(outputs(table.prune(selection)), masked(table, selection), strict=True):
        assert torch.equal(got, want)


@settings(max_examples=30, deadline=None)
@given(selections(), selections())
def test_pruning_again_keeps_what_both_keep(one, two):
    table = make()
    twice = table.prune(one).prune(two)
    first, second = masked(table, one), masked(table, two)
    for got, a, b in zip(outputs(twice), first, second, strict=True):
        assert torch.equal(got, torch.where(b == 0, b, a))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.6), st.sampled_from([4, 8, 16]))
def test_bytes_really_fall(seed, share, dim):
    g = torch.Generator().manual_seed(seed)
    schema = EncodedSchema((Field("a", 800), Field("b", 600)))
    table = Table(schema, dim=dim)
    rows = {n: torch.rand(s, generator=g) < share for n, s in (("a", 800), ("b", 600))}
    small = table.prune(Selection(("a", "b"), rows))
    kept = int(sum(int(r.sum()) for r in rows.values()))
    # values, a two-byte map at most, and a few numbers per field
    assert size(small) <= 4 * dim * (kept + 1) + 2 * 1401 + 2 * (25 + 2 * dim)
    assert size(small) < size(table)
    assert small.flat.numel() == dim * (kept + 1)
    tensors = {k: v.contiguous() for k, v in small.export_tables().items()}
    assert len(save(tensors)) == pytest.approx(size(small), rel=0.01, abs=2000)


def test_dropping_dimensions_needs_no_map():
    table = Table(EncodedSchema((Field("a", 1000), Field("b", 1000))), dim=8)
    small = table.prune(Selection(("a", "b"), dims={"a": torch.arange(8) < 2}))
    assert small.flat.numel() == 8 + 2 * 1000 + 8 * 1000
    assert len(small.slots) == 1


def test_keeping_the_first_ids_needs_no_map():
    table = Table(EncodedSchema((Field("a", 1000), Field("b", 50), Field("c", 50, shares="b"))), dim=2)
    rows = {"a": torch.arange(1000) < 700, "b": torch.arange(50) < 20, "c": torch.arange(50) < 30}
    small = table.prune(Selection(("a", "b", "c"), rows))
    assert len(small.slots) == 1
    assert small.flat.numel() == 2 * (1 + 700 + 30)
    ids = torch.arange(1000).unsqueeze(1).expand(-1, 3).contiguous()
    kept = torch.stack([ids[:, 0] < 700, (ids[:, 1] < 20) | (ids[:, 1] >= 50), (ids[:, 2] < 30) | (ids[:, 2] >= 50)], 1)
    assert torch.equal(small(ids), table(ids) * kept.unsqueeze(-1))


def test_a_dropped_field_costs_nothing():
    table = Table(EncodedSchema((Field("a", 5000), Field("b", 10))), dim=8)
    assert table.prune(Selection(("b",))).flat.numel() == 8 * 11


def test_keeping_everything_is_the_same_table_in_a_copy():
    table = make()
    same = table.prune(Selection(SCALARS, {"u": torch.ones(9, dtype=torch.bool)}))
    assert torch.equal(same.export_tables()["weight"], table.weight)
    assert same.weight is not table.weight


SOME = Selection(
    ("u", "i", "j"),
    {"u": torch.arange(9) % 2 == 0, "i": torch.arange(12) > 4},
    {"i": torch.tensor([True, False, True, False]), "j": torch.tensor([True, True, False, False])},
)
ROWS = Selection(("u", "x", "i", "j"), {"u": torch.arange(9) % 2 == 0, "i": torch.arange(12) > 4})


@pytest.mark.parametrize("selection", [SOME, ROWS], ids=["coordinates", "rows"])
def test_training_on_is_training_the_masked_table(selection):
    whole, small = make(), make().prune(selection)
    ids, values = every_id()
    target = torch.randn(len(ids), 4, DIM, generator=torch.Generator().manual_seed(3))
    keep = torch.stack([mask(selection, n, ids[:, k]) for k, n in enumerate(SCALARS)], 1)
    for table, gate in ((whole, keep), (small, torch.ones_like(keep))):
        optimizer = torch.optim.Adam(table.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            ((table(ids, values) * gate - target) ** 2).sum().backward()  # pulls at the zeros too
            optimizer.step()
    assert torch.allclose(small(ids, values), whole(ids, values) * keep, atol=1e-6)
    assert torch.equal(small.flat.detach()[:DIM], torch.zeros(DIM))


def test_state_round_trip_through_the_same_pruning():
    small = make().prune(SOME)
    with torch.no_grad():
        small.flat[DIM:] += 1.0
    torch.manual_seed(9)
    again = Table(SCHEMA, dim=DIM).prune(SOME)
    again.load_state_dict(small.state_dict())
    for a, b in zip(outputs(again), outputs(small), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [1, 63, 64, 255, 32_768, 39_999])
def test_rows_that_are_gone_cost_two_bits_an_id(keep):
    rows = torch.arange(40_000) >= 40_000 - keep
    whole = Table(EncodedSchema((Field("a", 40_000),)), dim=1, init_std=1.0)
    table = whole.prune(Selection(("a",), {"a": rows}))
    ids = torch.arange(40_000).unsqueeze(1)
    assert torch.equal(table(ids)[:, 0, 0], whole.weight[:, 0] * rows)
    assert table.slots.nbytes == 16 * (1 + 40_000 // 64)


def test_unknown_names_and_wrong_sizes_are_named():
    with pytest.raises(DataError, match=r"'h\.t'.*Did you mean 'h\.s'"):
        make().prune(Selection(SCALARS, {"h.t": torch.ones(6, dtype=torch.bool)}))
    with pytest.raises(DataError, match=r"rows of 'u' has shape \(8,\), expected \(9,\)"):
        make().prune(Selection(SCALARS, {"u": torch.zeros(8, dtype=torch.bool)}))


def test_the_type_says_what_it_is():
    assert isinstance(make().prune(SOME), CompactTable)
