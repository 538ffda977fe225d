"""Tables of single kept numbers: the vectors of masking, bit for bit, in the bytes that are promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import COLUMNS, DIM, SCALARS, SCHEMA, every_id, make, mask, masks, outputs, size

from recsys.contracts import EncodedSchema, Field, Selection
from recsys.errors import DataError
from recsys.nn.compact import CompactTable
from recsys.nn.selection import load_selection, save_selection
from recsys.nn.sparse import ElementTable, _place_bytes, _places, _together, compact, element_bytes
from recsys.nn.table import Table


@st.composite
def selections(draw):
    """Any fields, rows and dimensions, and elements of some columns, as densely or as thinly as it comes."""

    def thin(rows):
        share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        return torch.rand(rows, DIM, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < share

    return Selection(
        fields=tuple(f for f in SCALARS if draw(st.integers(0, 4))),
        rows={c: draw(masks(n)) for c, n in COLUMNS.items() if not draw(st.integers(0, 3))},
        dims={c: draw(masks(DIM)) for c in COLUMNS if not draw(st.integers(0, 3))},
        elements={c: thin(n) for c, n in COLUMNS.items() if draw(st.booleans())},
    )


def elements(selection, name, ids):
    """`[..., D]`: one where the selection keeps this id's coordinate."""
    count = COLUMNS[name]
    ids = torch.where((ids < 0) | (ids >= count), 0 if name == "x" else 1, ids)
    own = selection.elements.get(name, torch.ones(count, DIM, dtype=torch.bool))
    return mask(selection, name, ids) & own[ids]


def masked(selection):
    ids, values = every_id()
    table = make()
    scalar = table(ids, values) * torch.stack([elements(selection, n, ids[:, k]) for k, n in enumerate(SCALARS)], 1)
    events = ids[:, :2].unsqueeze(0)
    keep = torch.stack([elements(selection, n, events[..., k]) for k, n in enumerate(("h.i", "h.s"))], 2)
    return scalar, table.history("h", events) * keep


@settings(max_examples=60, deadline=None)
@given(selections())
def test_pruned_is_masked_bit_for_bit_whatever_the_layout(selection):
    want = masked(selection)
    for table in (make().prune(selection), ElementTable(SCHEMA, make(), selection)):
        for got, w in zip(outputs(table), want, strict=True):
            assert torch.equal(got, w)


@settings(max_examples=30, deadline=None)
@given(selections(), selections())
def test_pruning_again_keeps_what_both_keep(one, two):
    twice = ElementTable(SCHEMA, make(), one).prune(two)
    for got, a, b in zip(outputs(twice), masked(one), masked(two), strict=True):
        assert torch.equal(got, torch.where(b == 0, b, a))


@settings(max_examples=30, deadline=None)
@given(selections(), selections())
def test_compacting_what_is_compact_keeps_what_both_keep(one, two):
    once = compact(SCHEMA, make(), one)
    twice = compact(SCHEMA, once, two)
    for got, a, b in zip(outputs(twice), masked(one), masked(two), strict=True):
        assert torch.equal(got, torch.where(b == 0, b, a))
    for name, rows in twice.kept_rows().items():
        ids = torch.arange(COLUMNS[name])
        both = elements(one, name, ids) * elements(two, name, ids) > 0
        if name not in SCALARS or (name in one.fields and name in two.fields):
            assert not (both.any(1) & ~rows).any(), "rows x dimensions may hold rows of zeros, too"
        else:
            assert not rows.any()


class Whole:
    """The rows of a table as integers."""

    def __init__(self, table):
        self.layout, self.fields, self._table = table.layout, table.fields, table

    def read(self, vocabulary, rows):
        return (self._table.read(vocabulary, rows) * 20).round().to(torch.int8)


@settings(max_examples=30, deadline=None)
@given(selections(), selections())
def test_integers_stay_integers_and_do_not_learn(one, two):
    whole = compact(SCHEMA, Whole(make()), Selection(SCALARS))
    for small in (compact(SCHEMA, Whole(make()), one), compact(SCHEMA, compact(SCHEMA, Whole(make()), one), two)):
        assert small.flat.dtype == torch.int8
        assert not small.flat.requires_grad
    for got, full, a, b in zip(outputs(small), outputs(whole), masked(one), masked(two), strict=True):
        assert torch.equal(got.float(), torch.where((a == 0) | (b == 0), 0.0, full.float()))


def test_narrow_numbers_are_cheaper_to_keep_beside_gaps_than_bits():
    schema = EncodedSchema((Field("a", 400),))
    keep = torch.rand(400, 16, generator=torch.Generator().manual_seed(0)) < 0.85
    table = Table(schema, dim=16, init_std=1.0)
    selection = Selection(("a",), elements={"a": keep})
    assert isinstance(compact(schema, table, selection), ElementTable)
    narrow = compact(schema, Whole(table), selection)
    assert isinstance(narrow, CompactTable)
    assert size(narrow) < 400 * (16 + 1)
    ids = torch.arange(400).unsqueeze(1)
    assert torch.equal(narrow(ids)[:, 0].float(), (table.weight * 20).round().detach() * keep)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.5), st.sampled_from([3, 8, 17]))
def test_bytes_are_numbers_bits_and_places(seed, share, dim):
    g = torch.Generator().manual_seed(seed)
    schema = EncodedSchema((Field("a", 800), Field("b", 600)))
    keep = {n: torch.rand(s, dim, generator=g) < share for n, s in (("a", 800), ("b", 600))}
    for k in keep.values():  # the rows that are left come first, so that no id needs a map
        k[: int(k.any(1).sum())] = k[k.any(1)].clone()
        k[int(k.any(1).sum()) :] = False
        k[500:] = False
        k[:500, 0] = True
    small = compact(schema, Table(schema, dim=dim, init_std=1.0), Selection(("a", "b"), elements=keep))
    numbers = sum(int(k.sum()) for k in keep.values())
    rows = sum(int(k.any(1).sum()) for k in keep.values())
    hull = 4 * sum(int(k.any(1).sum()) * int(k.any(0).sum()) for k in keep.values())
    single = 4 * numbers + rows * (-(-dim // 8) + 1) + 4 * -(-rows // {3: 64, 8: 32, 17: 16}[dim])
    assert isinstance(small, ElementTable) == (single < hull)
    assert size(small) <= min(single, hull) + 400
    assert small.flat.numel() == (1 + numbers if single < hull else dim + hull // 4)


@pytest.mark.parametrize("dim", [8, 12, 64, 72])
@pytest.mark.parametrize("patterns", [3, 256, 300])
def test_rows_of_few_patterns_have_a_byte_instead_of_their_bits(dim, patterns):
    schema = EncodedSchema((Field("a", 5000),))
    random = torch.Generator().manual_seed(1)
    different = torch.rand(patterns, dim, generator=random) < 0.5
    keep = different[torch.randint(patterns, (5000,), generator=random)]
    keep[:200] = False
    table = Table(schema, dim=dim, init_std=1.0)
    small = ElementTable(schema, table, Selection(("a",), elements={"a": keep}))
    ids = torch.arange(5000).view(-1, 1)
    assert torch.equal(small(ids)[:, 0], table(ids)[:, 0] * keep)
    stored = {tuple(row) for row in keep.tolist() if any(row)} | {(False,) * dim}
    rows, width = 1 + int(keep.any(1).sum()), -(-dim // 8)
    few = width > 1 and len(stored) <= 256
    assert small.bits.numel() == (len(stored) if few else rows) * width
    assert (small.pattern is not None) == few
    assert size(small) == element_bytes(small.layout, [keep])


@pytest.mark.parametrize("dim", [1, 10, 16, 17, 64, 65, 300, 40_000])
def test_places_are_found_again_whatever_the_dimension(dim):
    counts = torch.randint(0, dim + 1, (500,), generator=torch.Generator().manual_seed(dim))
    counts[::3] = dim
    start = 1 + counts.cumsum(0) - counts
    near, far = _places(start, dim)
    together = _together(dim)[0]
    assert together & (together - 1) == 0
    assert torch.equal(near.long() + far.long()[torch.arange(500) // together], start)
    assert near.nbytes + far.nbytes == _place_bytes(500, dim) <= 4 * 500 + 1000


def test_a_mask_that_is_rows_times_dimensions_takes_no_bits():
    schema = EncodedSchema((Field("a", 100),))
    keep = (torch.arange(100) < 40).unsqueeze(1) & (torch.arange(8) % 2 == 0)
    table = Table(schema, dim=8, init_std=1.0)
    small = table.prune(Selection(("a",), elements={"a": keep}))
    assert isinstance(small, CompactTable)
    ids = torch.arange(100).unsqueeze(1)
    assert torch.equal(small(ids)[:, 0], table.weight * keep)


def test_training_on_is_training_the_masked_table_and_a_file_brings_it_back(tmp_path):
    torch.manual_seed(0)
    keep = {c: torch.rand(n, DIM) < 0.4 for c, n in COLUMNS.items()}
    selection = Selection(SCALARS, elements=keep)
    whole, small = make(), ElementTable(SCHEMA, make(), selection)
    ids, values = every_id()
    target = torch.randn(len(ids), 4, DIM)
    gate = torch.stack([elements(selection, n, ids[:, k]) for k, n in enumerate(SCALARS)], 1)
    for table, open_ in ((whole, gate), (small, torch.ones_like(gate))):
        optimizer = torch.optim.Adam(table.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            ((table(ids, values) * open_ - target) ** 2).sum().backward()
            optimizer.step()
    assert torch.allclose(small(ids, values), whole(ids, values) * gate, atol=1e-6)
    save_selection(selection, tmp_path / "s")
    again = ElementTable(SCHEMA, make(), load_selection(tmp_path / "s"))
    again.load_state_dict(small.state_dict())
    for a, b in zip(outputs(again), outputs(small), strict=True):
        assert torch.equal(a, b)


def test_a_mask_of_the_wrong_shape_is_named():
    with pytest.raises(DataError, match=r"elements of 'u' have shape \(9, 3\), expected \(9, 4\)"):
        make().prune(Selection(SCALARS, elements={"u": torch.zeros(9, 3, dtype=torch.bool)}))


def test_the_graph_takes_any_batch():
    keep = {"u": torch.rand(9, DIM) < 0.5}
    small = ElementTable(SCHEMA, make(), Selection(SCALARS, elements=keep)).eval()
    ids, values = every_id()
    rows = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(small, (ids[:4], values[:4]), dynamic_shapes=(rows, rows))
    assert torch.equal(program.module()(ids, values), small(ids, values))


@settings(max_examples=30, deadline=None)
@given(selections(), selections())
def test_single_numbers_of_a_compact_table_can_go_too(one, two):
    rows_only = Selection(one.fields, one.rows, one.dims)
    twice = make().prune(rows_only).prune(two)
    for got, a, b in zip(outputs(twice), masked(rows_only), masked(two), strict=True):
        assert torch.equal(got, torch.where(b == 0, b, a))
