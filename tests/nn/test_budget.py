"""Bytes that are foretold are those that are exported; what is kept within a budget is as much as fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import DIM, SCHEMA, make, size
from test_compact import selections as rows_and_dims
from test_sparse import selections

from recsys.contracts import EncodedSchema, Field, Selection
from recsys.errors import RecipeError
from recsys.nn.budget import keep_most, keep_within, pruned_bytes, require_room
from recsys.nn.compact import CompactTable
from recsys.nn.selection import both
from recsys.nn.sparse import ElementTable
from recsys.nn.table import Table


@settings(max_examples=150, deadline=None)
@given(st.one_of(selections(), rows_and_dims()))
def test_bytes_are_those_of_the_pruned_table(selection):
    assert pruned_bytes(SCHEMA, DIM, selection) == size(make().prune(selection))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.sampled_from([3, 8, 17]), st.sampled_from([100, 300, 40_000]))
def test_bytes_are_right_for_maps_of_every_width(seed, share, dim, rows):
    g = torch.Generator().manual_seed(seed)
    schema = EncodedSchema((Field("a", rows), Field("b", 50), Field("c", 30, shares="b")))
    kept = {n: torch.rand(s, generator=g) < share for n, s in (("a", rows), ("b", 50), ("c", 30))}
    single = {n: torch.rand(len(k), dim, generator=g) < 0.3 for n, k in kept.items()}
    for selection in (
        Selection(("a", "b", "c"), rows=kept),
        Selection(("a", "b", "c"), elements={n: k.unsqueeze(1).expand(-1, dim) for n, k in kept.items()}),
        Selection(("a", "b", "c"), rows=kept, elements=single),
    ):
        assert pruned_bytes(schema, dim, selection) == size(Table(schema, dim=dim).prune(selection))


def test_all_of_it_is_the_table_itself():
    everything = Selection(("u", "x", "i", "j"))
    assert pruned_bytes(SCHEMA, DIM, everything) == size(make()) == 4 * (9 + 2 + 12 + 6) * DIM


@st.composite
def scored(draw):
    """Scores of rows or of numbers, negative and equal ones among them."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (29,) if draw(st.booleans()) else (29, DIM)
    scores = torch.randn(shape, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        scores = (2 * scores).round()
    return scores.long() if draw(st.booleans()) else scores


def count(selection, of):
    """Rows or numbers that are kept, each once."""
    masks = selection.rows if of.dim() == 1 else selection.elements
    return int(torch.cat([masks[name] for name in ("u", "x", "i", "h.s")]).sum())


def top(scores, n):
    """The first n by falling score, of equal ones those that come first, as a mask; by a sort of Python's."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view(scores.shape)


def spread(mask):
    parts = dict(zip(("u", "x", "i", "h.s"), mask.split([9, 2, 12, 6]), strict=True))
    parts |= {"j": parts["i"], "h.i": parts["i"]}
    given_ = {"rows": parts} if mask.dim() == 1 else {"elements": parts}
    return Selection(("u", "x", "i", "j"), **given_)


@settings(max_examples=80, deadline=None)
@given(scored(), st.floats(0.6, 1.2))
def test_what_is_kept_is_the_best_and_one_more_would_not_fit(scores, budget):
    most = budget * 4 * 29 * DIM
    kept = keep_within(SCHEMA, DIM, scores, budget)
    n = count(kept, scores)
    same = both(kept, spread(top(scores, n)))
    assert count(same, scores) == n, "another one has a higher score"
    assert size(make().prune(kept)) <= most
    if n < scores.numel():
        assert size(make().prune(spread(top(scores, n + 1)))) > most


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("single", [False, True])
def test_a_larger_table_uses_its_budget_up(budget, single):
    torch.manual_seed(0)
    schema = EncodedSchema((Field("a", 3000), Field("b", 1000)))
    table = Table(schema, dim=8, init_std=1.0)
    scores = table.weight.abs() if single else table.weight.norm(dim=1)
    small = table.prune(keep_within(schema, 8, scores, budget))
    assert isinstance(small, ElementTable if single else CompactTable)
    whole = 4 * 4000 * 8
    assert budget * whole - 100 < size(small) <= budget * whole


def test_minus_infinity_is_never_kept_even_if_there_is_room():
    scores = torch.arange(29.0)
    scores[[0, 9, 20]] = -torch.inf
    kept = keep_within(SCHEMA, DIM, scores, 10.0)
    assert torch.equal(kept.rows["u"], torch.arange(9) != 0)
    assert torch.equal(kept.rows["i"], torch.arange(12) != 9)
    assert torch.equal(kept.rows["j"], kept.rows["h.i"])


def test_a_budget_that_nothing_meets_and_scores_that_are_none():
    with pytest.raises(RecipeError, match=r"budget of 0\.01 of the table's 464 bytes is less than an empty one takes"):
        keep_within(SCHEMA, DIM, torch.ones(29), 0.01)
    with pytest.raises(RecipeError, match="NaN"):
        keep_within(SCHEMA, DIM, torch.full((29,), torch.nan), 0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.floats(0.01, 1.0))
def test_a_budget_has_room_or_is_refused_with_the_least_possible_one(a, b, dim, budget):
    schema = EncodedSchema((Field("a", a), Field("b", b)))
    whole = 4 * (a + b) * dim
    empty = Table(schema, dim=dim).prune(Selection(()))
    least = sum(t.nbytes for t in empty.export_tables().values())
    if least <= budget * whole:
        require_room(schema, dim, budget)
        return
    with pytest.raises(RecipeError, match=rf"constants alone take {least:,}: the least possible budget is (\S+)") as e:
        require_room(schema, dim, budget)
    assert float(str(e.value).split()[-1]) == pytest.approx(least / whole, rel=0.01)


@pytest.mark.parametrize(("stored", "budget", "wanted"), [("int8", 0.24, "rows"), ("float32", 0.3, "elements")])
def test_whole_rows_where_bits_would_cost_more_than_they_save(stored, budget, wanted):
    torch.manual_seed(0)
    schema = EncodedSchema((Field("a", 3000), Field("b", 1000)))
    sizes = torch.randn(4000, 10).abs()
    chosen = keep_most(schema, 10, sizes, budget, stored)
    assert bool(chosen.elements) == (wanted == "elements")
    assert pruned_bytes(schema, 10, chosen, stored) <= budget * 4 * 4000 * 10
    squares = sizes.square()
    kept = []
    for scores in (sizes, squares.sum(1)):
        one = keep_within(schema, 10, scores, budget, stored)
        masks = one.elements or {name: m.unsqueeze(1).expand(-1, 10) for name, m in one.rows.items()}
        kept.append(float((squares * torch.cat([masks["a"], masks["b"]])).sum()))
    assert kept.index(max(kept)) == ("elements", "rows").index(wanted)
