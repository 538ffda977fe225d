"""Mixed dimensions against a loop with a table and a matrix for each vocabulary; widths, budgets, pruning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import (
    SCALARS,
    SCHEMA,
    as_read,
    check_export,
    check_gradient_stays_inside,
    check_pruned,
    every_id,
    held,
    selections,
    size,
)

from recsys.api import EncodedSchema, Field, Layout, RecipeError, Selection
from recsys.testing import contract
from recsys_mde import MDE, widths_of

OWNER = {"u": "u", "x": "x", "i": "i", "j": "i", "one": "one", "h.i": "i", "h.s": "h.s"}
SIZES = {"u": 9, "x": 2, "i": 12, "one": 3, "h.s": 6}
WIDTHS = {"u": 1, "x": 6, "i": 1, "one": 6, "h.s": 2}
"""At D = 6 and α = 1.2."""


def make(seed=0, schema=SCHEMA, **options):
    torch.manual_seed(seed)
    return MDE(schema, **{"dim": 6, "alpha": 1.2, "init_std": 1.0, **options})


def test_the_widths_of_these_tests_are_as_written():
    assert widths_of(tuple(SIZES.values()), 6, 1.2) == tuple(WIDTHS.values())
    assert Layout.of(SCHEMA).owners == tuple(SIZES)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 5.0, "dim": 8}, {"budget": 3.0, "dim": 32}], ids=str)
def test_contract(options):
    contract("embedding", MDE, **options)


def test_vectors_and_gradients_are_those_of_the_loop():
    module = make().double()
    tables = dict(zip(module.table.order, module.table.tables, strict=True))
    ids, values, events = every_id()
    values = values.double()
    leaves = list(module.parameters())
    first, index, seen = {}, {}, {}
    for owner, width in WIDTHS.items():
        first[owner] = seen.get(width, 0)
        seen[width] = first[owner] + SIZES[owner]
        index[owner] = sum(w == width for o, w in WIDTHS.items() if list(WIDTHS).index(o) < list(WIDTHS).index(owner))

    def vector(name, i):
        owner = OWNER[name]
        table = tables[WIDTHS[owner]]
        row = table.weight[first[owner] + i]
        if table.projection is None:
            return row
        matrix = table.projection[index[owner]]
        return torch.stack([sum(row[w] * matrix[w, d] for w in range(len(row))) for d in range(6)])

    want = []
    for b in range(len(ids)):
        for f, name in enumerate(SCALARS):
            i = int(as_read(name, ids[b, f]))
            want.append(vector(name, i) * (values[b, f] if name == "x" and i == 1 else 1.0))
    for t in range(events.shape[1]):
        for k, name in enumerate(("h.i", "h.s")):
            want.append(vector(name, int(as_read(name, events[0, t, k]))))
    want = torch.stack(want).flatten()
    got = torch.cat([module(ids, values).flatten(), module.history("h", events).flatten()])
    assert (got - want).abs().max() <= 1e-12
    above = torch.randn_like(want)
    ours = torch.autograd.grad((got * above).sum(), leaves)
    theirs = torch.autograd.grad((want * above).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-11


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.sampled_from([1, 6, 16]), st.floats(0, 4))
def test_widths_are_powers_of_two_that_fall_with_the_vocabulary(sizes, dim, alpha):
    widths = widths_of(sizes, dim, alpha)
    for n, w in zip(sizes, widths, strict=True):
        assert w == dim or (w < dim and w & (w - 1) == 0)
        assert n * w + (w * dim if w < dim else 0) <= n * dim, "no vocabulary takes more than before"
    narrow = [(n, w) for n, w in zip(sizes, widths, strict=True) if w < dim]
    for n, w in narrow:
        assert all(v <= w for m, v in narrow if m > n)
    if alpha == 0:
        assert set(widths) == {dim}


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 1.2), st.lists(st.integers(1, 20_000), min_size=1, max_size=5), st.sampled_from([8, 16]))
def test_the_budget_is_met_and_a_smaller_alpha_does_not_meet_it(budget, sizes, dim):
    schema = EncodedSchema(tuple(Field(f"f{i}", n) for i, n in enumerate(sizes)))
    limit = budget * 4 * dim * sum(sizes)

    def needed(alpha):
        widths = widths_of(sizes, dim, alpha)
        numbers = sum(n * w + (w * dim if w < dim else 0) for n, w in zip(sizes, widths, strict=True))
        return 4 * numbers + 48 * len(sizes)

    if needed(64.0) > limit:
        with pytest.raises(RecipeError, match="least possible budget"):
            MDE(schema, dim=dim, budget=budget)
        return
    module = MDE(schema, dim=dim, budget=budget)
    assert size(module) == held(module) <= limit * (1 + 1e-9)
    found = [needed(a / 50) for a in range(200) if needed(a / 50) <= limit]
    assert not found or size(module) >= found[0], "of all that fit, the largest"


def test_vectors_start_with_the_spread_asked_for():
    schema = EncodedSchema((Field("many", 60_000), Field("few", 4000)))
    e = MDE(schema, dim=64, alpha=0.5, init_std=0.02)(torch.arange(4000).unsqueeze(1).expand(-1, 2).contiguous())
    assert e[:, 1].std().item() == pytest.approx(0.02, rel=0.05)
    assert e[:, 0].std().item() == pytest.approx(0.02, rel=0.3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0.0, 0.6, 1.2]), selections(6), selections(6))
def test_pruned_is_masked_bit_for_bit(alpha, one, other):
    check_pruned(lambda: make(alpha=alpha), one, other)
    check_gradient_stays_inside(make(alpha=alpha), one)


def test_a_dropped_field_takes_its_table_and_its_matrix_with_it():
    schema = EncodedSchema((Field("a", 9000), Field("b", 8000), Field("c", 20)))
    module = MDE(schema, dim=16, alpha=0.5)
    whole = size(module)
    only = module.prune(Selection(("b", "c")))
    assert whole - size(only) > 4 * 9000 - 2 * 17_000 / 8 - 200  # a bit and a half for each row of the shared table
    dims = module.prune(Selection(("a", "b", "c"), dims={"c": torch.arange(16) < 4}))
    assert size(dims) < whole


@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_a_graph_takes_any_batch_also_after_pruning(alpha):
    module = make(alpha=alpha)
    check_export(module)
    check_export(module.prune(Selection(SCALARS[:-1], {"i": torch.arange(12) % 3 > 0}, {"u": torch.arange(6) < 5})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": None}, "give `alpha`"),
        ({"budget": 0.5}, "or `budget`"),
        ({"alpha": None, "budget": 0.1}, "least possible budget is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        make(**options)


def test_ids_that_are_hashes_are_refused():
    with pytest.raises(RecipeError, match="'u' has 4,611,686,018,427,387,906 ids"):
        make(schema=EncodedSchema((Field("u", 2 + (1 << 62)),)))
