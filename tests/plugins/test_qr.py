"""Quotient-remainder embeddings against a loop, one pair of tables for each vocabulary; codes, size and spread."""

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

from recsys.contracts import EncodedSchema, Field, Selection
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_qr import QR

SIZES = {"u": 9, "x": 2, "i": 12, "one": 3, "h.s": 6}
OWNER = {**{name: name for name in SIZES}, "j": "i", "h.i": "i"}
OPTIONS = [{"collisions": 2}, {"collisions": 3, "op": "add"}, {"collisions": 4}, {"collisions": 1}]


def make(seed=0, schema=SCHEMA, **options):
    torch.manual_seed(seed)
    return QR(schema, **{"dim": 6, "init_std": 1.0, **options})


def tables(module, m):
    """Owner → its Q and R, or its only table, cut by hand."""
    found, first = {}, 0
    for owner, n in SIZES.items():
        q = len(range(0, n, m))
        count = (q, m) if q + m < n else (n,)
        parts = []
        for rows in count:
            parts.append((first, first + rows))
            first += rows
        found[owner] = parts
    assert first == module.table.weight.shape[0]
    return found


@pytest.mark.parametrize("options", [*OPTIONS, {"budget": 6.0, "dim": 32}], ids=str)
def test_contract(options):
    contract("embedding", QR, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vectors_and_gradients_are_those_of_the_loop(options):
    module = make(**options).double().train()
    weight = module.table.weight
    torch.nn.init.normal_(weight)
    m = options["collisions"]
    ids, values, events = every_id()
    values = values.double()
    want, past = torch.zeros(*ids.shape, 6).double(), torch.zeros(*events.shape, 6).double()
    g, g_past, grad = torch.randn_like(want), torch.randn_like(past), torch.zeros_like(weight)
    w = weight.detach()

    def add(name, i, factor, into, slope):
        parts = tables(module, m)[OWNER[name]]
        if len(parts) == 1:
            row = parts[0][0] + i
            into += w[row] * factor
            grad[row] += slope * factor
            return
        quotient = parts[0][0] + (i // m + i % m) % (parts[0][1] - parts[0][0])
        remainder = parts[1][0] + i % m
        times = options.get("op") != "add"
        into += (w[quotient] * w[remainder] if times else w[quotient] + w[remainder]) * factor
        grad[quotient] += slope * factor * (w[remainder] if times else 1.0)
        grad[remainder] += slope * factor * (w[quotient] if times else 1.0)

    for f, name in enumerate(SCALARS):
        for b, i in enumerate(as_read(name, ids[:, f]).tolist()):
            add(name, i, values[b, f] if name == "x" and i == 1 else 1.0, want[b, f], g[b, f])
    for k, name in enumerate(("h.i", "h.s")):
        for t, i in enumerate(as_read(name, events[0, :, k]).tolist()):
            add(name, i, 1.0, past[0, t, k], g_past[0, t, k])
    got, got_past = module(ids, values), module.history("h", events)
    ((got * g).sum() + (got_past * g_past).sum()).backward()
    for a, b in ((got, want), (got_past, past), (weight.grad, grad)):
        assert (a - b).abs().max() <= 1e-12


def codes(module, n):
    """`[n, 2]`: the rows of every id of the first field."""
    return module.table.addresses[0].alone(0)(torch.arange(n).unsqueeze(1))[0].squeeze(1)


@given(st.integers(1, 3000), st.integers(1, 300))
def test_no_two_ids_have_the_same_code_and_all_rows_are_in_use(n, m):
    module = make(schema=EncodedSchema((Field("v", n),)), collisions=m, dim=1)
    found = codes(module, n)
    assert len(torch.unique(found, dim=0)) == n
    rows = module.table.weight.shape[0]
    assert rows == min(n, -(-n // m) + m)
    assert torch.equal(torch.unique(found), torch.arange(rows))


def test_the_most_frequent_ids_do_not_share_a_row():
    """Ids are in the order of frequency: with a bare quotient, the first hundred would all read one row of Q."""
    module = make(schema=EncodedSchema((Field("v", 10_000),)), collisions=100)
    for first in (0, 100, 5000):
        part = codes(module, 10_000)[first : first + 100]
        assert len(torch.unique(part[:, 0])) == 100
        assert len(torch.unique(part[:, 1])) == 100


@given(st.floats(0.02, 1.5), st.lists(st.integers(1, 20_000), min_size=1, max_size=5), st.sampled_from([8, 16]))
@settings(max_examples=40)
def test_the_budget_is_met_by_the_least_collisions_that_do(budget, sizes, dim):
    schema = EncodedSchema(tuple(Field(f"f{i}", n) for i, n in enumerate(sizes)))
    limit = budget * 4 * dim * sum(sizes)

    def needed(m):
        return 4 * dim * sum(min(n, -(-n // m) + m) for n in sizes) + 49 * len(sizes)

    possible = [m for m in range(1, max(sizes) + 1) if needed(m) <= limit]
    if not possible:
        with pytest.raises(RecipeError, match="least possible budget"):
            make(schema=schema, budget=budget, dim=dim)
        return
    module = make(schema=schema, budget=budget, dim=dim)
    assert size(module) == held(module) == needed(possible[0]) <= limit


@pytest.mark.parametrize("op", ["mul", "add"])
def test_vectors_start_about_zero_with_the_spread_asked_for(op):
    schema = EncodedSchema((Field("v", 90_000), Field("few", 200)))
    module = make(schema=schema, collisions=300, op=op, init_std=0.02, dim=32)
    ids = torch.stack([torch.arange(90_000), torch.arange(90_000) % 200], 1)
    e = module(ids)
    assert e[:, 0].std().item() == pytest.approx(0.02, rel=0.05)
    assert e[:200, 1].std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(e[:, 0].mean().item()) < 0.002
    assert 0.45 < (module.table.weight > 0).double().mean().item() < 0.55


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(one=selections(6), other=selections(6))
@settings(max_examples=25)
def test_pruned_is_masked_bit_for_bit(options, one, other):
    check_pruned(lambda: make(**options), one, other)
    check_gradient_stays_inside(make(**options), one)


def test_a_dropped_field_takes_its_tables_with_it():
    schema = EncodedSchema((Field("a", 90_000), Field("b", 10_000)))
    module = make(schema=schema, collisions=300, dim=16)
    assert module.table.weight.shape[0] == 300 + 300 + 34 + 300
    assert module.prune(Selection(("a",))).weight.shape[0] == 600
    assert module.prune(Selection(("b",))).weight.shape[0] == 334
    few = torch.arange(90_000) < 10  # ten ids read ten rows of each table
    assert module.prune(Selection(("a",), {"a": few})).weight.shape[0] == 20
    half = module.prune(Selection(("a",), dims={"a": torch.arange(16) < 8}))
    assert half.weight.shape == (600, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_takes_any_batch_also_after_pruning(options):
    module = make(**options)
    check_export(module)
    check_export(module.prune(Selection(SCALARS[:-1], {"i": torch.arange(12) % 3 > 0}, {"u": torch.arange(6) < 5})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `collisions`"),
        ({"collisions": 3, "budget": 0.5}, "or `budget`"),
        ({"budget": 0.2}, r"budget 0.2 is 153 bytes of the full table's 768; .* the least possible budget is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        make(**options)


def test_ids_that_are_hashes_are_refused():
    with pytest.raises(RecipeError, match=r"'u' has 4,611,686,018,427,387,906 ids; .* 4,294,967,296 rows at least"):
        make(schema=EncodedSchema((Field("u", 2 + (1 << 62)),)), collisions=5)
