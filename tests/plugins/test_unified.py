"""Unified embedding against a loop in the words of the paper; the hash against the core's; one table for everything."""

import json
import math
import subprocess
import sys

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import (
    COLUMNS,
    SCALARS,
    SCHEMA,
    as_read,
    check_export,
    check_gradient_stays_inside,
    check_pruned,
    every_id,
    held,
    masked,
    outputs,
    selections,
    size,
)
from torchmetrics.functional.classification import binary_auroc

from recsys.cli import app
from recsys.contracts import EncodedSchema, Field, History, Selection
from recsys.data.hashing import hash_text, mix
from recsys.errors import RecipeError
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.testing import contract
from recsys_unified import Unified, splitmix

HUGE = 2 + (1 << 62)
OWNER = {"u": "u", "x": "x", "i": "i", "j": "i", "one": "one", "h.i": "i", "h.s": "h.s"}
OPTIONS = [
    {"rows": 40, "chunks": 2},
    {"rows": 7, "chunks": 1, "sign": True},
    {"rows": 30, "chunks": 4, "sign": True, "small": 6},
    {"rows": 50, "chunks": 2, "private": True, "small": 3},
]


def make(seed=0, schema=SCHEMA, **options):
    torch.manual_seed(seed)
    return Unified(schema, **{"dim": 8, **options})


def slow_rows(name, i, options):
    """(row, sign) of each chunk of an id; rows of the hashed part, or ("own", owner, id, chunk)."""
    owner, found = OWNER[name], []
    sizes = {"u": 9, "x": 2, "i": 12, "one": 3, "h.s": 6}
    small = [o for o in sizes if o == "x" or sizes[o] <= options.get("small", 0)]
    hashed = [o for o in sizes if o not in small]
    first, count = 0, options["rows"]
    if options.get("private"):
        spare, total = options["rows"] - len(hashed), sum(sizes[o] for o in hashed)
        exact = {o: spare * sizes[o] / total for o in hashed}
        parts = {o: 1 + int(exact[o]) for o in hashed}
        for o in sorted(hashed, key=lambda o: int(exact[o]) - exact[o])[: options["rows"] - sum(parts.values())]:
            parts[o] += 1
        assert sum(parts.values()) == options["rows"]
        before = hashed[: hashed.index(owner)] if owner in hashed else []
        first, count = sum(parts[o] for o in before), parts.get(owner, 1)
    start = options["rows"]
    for o in small:
        if o == owner:
            return [(start + i * options["chunks"] + c, 1) for c in range(options["chunks"])]
        start += sizes[o] * options["chunks"]
    for c in range(options["chunks"]):
        h = mix((i ^ mix(hash_text(owner) ^ mix(c))) % 2**64)
        sign = -1 if options.get("sign") and h >> 63 else 1
        found.append((first + (h & (2**63 - 1)) % count, sign))
    return found


@pytest.mark.parametrize("options", [*OPTIONS, {"budget": 3.0, "chunks": 4, "dim": 64}], ids=str)
def test_contract(options):
    contract("embedding", Unified, **{"dim": 8, **options, "rows": 64} if "rows" in options else options)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_the_hash_is_that_of_the_core_bit_for_bit(numbers):
    got = splitmix(torch.tensor(numbers)).tolist()
    assert [x % 2**64 for x in got] == [mix(x % 2**64) for x in numbers]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vectors_and_gradients_are_those_of_the_loop(options):
    module = make(**options).double().train()
    weight = module.table.weight
    torch.nn.init.normal_(weight)
    ids, values, events = every_id()
    values = values.double()
    want, past = torch.zeros(*ids.shape, 8).double(), torch.zeros(*events.shape, 8).double()
    grad = torch.zeros_like(weight)
    g, g_past = torch.randn_like(want), torch.randn_like(past)
    width = 8 // options["chunks"]

    def add(name, i, factor, into, slope):
        for c, (row, sign) in enumerate(slow_rows(name, i, options)):
            part = slice(c * width, (c + 1) * width)
            into[part] = weight[row].detach() * sign * factor
            grad[row] += slope[part] * sign * factor

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
    module.eval()
    assert torch.equal(module(ids, values), got)


def test_one_row_for_all_learns_from_all_fields_at_once():
    """M = 1: the numerical derivative of the row is the sum over every field that reads it."""
    schema = EncodedSchema((Field("a", 5), Field("b", 7)))
    module = make(schema=schema, rows=1, chunks=1, dim=3).double().train()
    torch.nn.init.normal_(module.table.weight)
    ids, slope = torch.tensor([[2, 6]]), torch.randn(1, 2, 3).double()
    (module(ids).square() * slope).sum().backward()
    weight, h = module.table.weight.detach(), 1e-6
    for d in range(3):
        ends = []
        for step in (h, -h):
            weight[0, d] += step
            ends.append((module(ids).square() * slope).sum().item())
            weight[0, d] -= step
        assert module.table.weight.grad[0, d] == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-7)


def rows_of(module, f, ids):
    """`[n] -> [n, C]`: the rows that ids of one field read."""
    return module.table.addresses[0].alone(f)(ids.unsqueeze(1))[0].squeeze(1)


FEW = EncodedSchema((Field("a", 5000), Field("b", 5000), Field("again", 5000, shares="a")))


def test_rows_are_the_same_in_another_process_and_after_loading():
    code = (
        "import torch; from recsys.contracts import EncodedSchema, Field; from recsys_unified import Unified;"
        "m = Unified(EncodedSchema((Field('a', 5000), Field('b', 5000))), rows=997);"
        "print(m.table.addresses[0](torch.tensor([[3, 4], [4999, 2]]))[0].flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module = make(schema=FEW, rows=997, dim=16)
    mine = module.table.addresses[0](torch.tensor([[3, 4, 3], [4999, 2, 2]]))[0]
    assert json.loads(done.stdout) == mine[:, :2].flatten().tolist()
    other = make(seed=5, schema=FEW, rows=997, dim=16)
    other.load_state_dict(module.state_dict())
    ids = torch.randint(0, 5000, (50, 3))
    assert torch.equal(other(ids), module(ids))
    assert torch.equal(module(ids.flip(0)), module(ids).flip(0))


def test_fields_read_different_rows_unless_they_share_and_chunks_are_independent():
    module = make(schema=FEW, rows=100_003)
    ids = torch.arange(5000)
    a, b, again = (rows_of(module, f, ids) for f in range(3))
    assert torch.equal(a, again)
    assert (a == b).float().mean() < 0.001
    # Ids that share a row of the first chunk: their rows of the second are alike by chance alone.
    few = make(schema=FEW, rows=50)
    first, second = rows_of(few, 0, ids).T
    same = (first[:, None] == first) & ~torch.eye(5000, dtype=torch.bool)
    alike = (second[:, None] == second)[same].float().mean().item()
    assert alike == pytest.approx(1 / 50, rel=0.1)


@given(st.integers(0, 10**6), st.integers(2, 2000), st.sampled_from([1, 3]))
@settings(max_examples=20)
def test_rows_are_loaded_evenly(start, count, chunks):
    module = make(schema=EncodedSchema((Field("v", HUGE),)), rows=count, chunks=chunks, dim=6)
    ids = torch.arange(start, start + 50 * count)
    load = torch.bincount(rows_of(module, 0, ids).flatten(), minlength=count).double()
    expected = 50 * chunks
    chi = ((load - expected) ** 2 / expected).sum().item() / (count - 1)
    assert abs(chi - 1) < 6 * (2 / (count - 1)) ** 0.5


def test_the_size_depends_on_rows_and_width_alone():
    for rows, vocabulary in ((64, 5), (64, 10**6), (64, HUGE), (7, HUGE)):
        module = make(schema=EncodedSchema((Field("a", vocabulary), Field("b", 9))), rows=rows)
        assert sum(p.numel() for p in module.parameters()) == rows * 4
    own = make(schema=EncodedSchema((Field("a", HUGE), Field("b", 9), Field("x", 2, numeric=True))), rows=64, small=9)
    assert sum(p.numel() for p in own.parameters()) == 64 * 4 + (9 + 2) * 8


@pytest.mark.parametrize("small", [0, 6])
def test_other_fields_change_no_row(small):
    module = make(schema=EncodedSchema((Field("a", 5000), Field("b", HUGE))), rows=997, small=small)
    more = EncodedSchema((Field("c", 6), Field("b", HUGE), Field("a", 6000), Field("n", 2, numeric=True)))
    other = make(schema=more, rows=997, small=small)
    ids = torch.arange(5000)
    assert torch.equal(rows_of(module, 0, ids), rows_of(other, 2, ids))
    assert torch.equal(rows_of(module, 1, ids << 40), rows_of(other, 1, ids << 40))


def test_ids_as_large_as_they_come():
    schema = EncodedSchema((Field("u", HUGE),), (History("h", (Field("u", HUGE, shares="u"),), 3, ("u",)),))
    module = make(schema=schema, rows=1000, sign=True).eval()
    ids = torch.tensor([[2], [HUGE - 1], [1 << 61], [HUGE], [-5]])
    e = module(ids)
    assert len({tuple(v) for v in e[:3, 0].tolist()}) == 3
    assert torch.equal(e[3], e[4])  # read as unknown
    assert torch.equal(module.history("h", ids.unsqueeze(0))[0, :, 0], e[:, 0])
    smaller = module.prune(Selection(("u",), dims={"u": torch.arange(8) < 4, "h.u": torch.arange(8) < 2}))
    assert torch.equal(smaller(ids), e * (torch.arange(8) < 4))
    assert torch.equal(smaller.history("h", ids.unsqueeze(0))[0], e * (torch.arange(8) < 2))
    assert smaller.prune(Selection(())).weight.shape == (1000, 2)  # events keep what they read
    alone = make(schema=EncodedSchema(schema.fields), rows=1000).prune(Selection(()))
    assert alone.weight.numel() == 1
    assert not alone(ids).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(one=selections(8), other=selections(8))
@settings(max_examples=25)
def test_pruned_is_masked_bit_for_bit(options, one, other):
    check_pruned(lambda: make(**options), one, other)
    check_gradient_stays_inside(make(**options), one)


def test_rows_that_nothing_reads_go_when_vocabularies_are_closed():
    """At one row for each chunk of an id, a share exp(-1) of the rows is read by nobody."""
    schema = EncodedSchema((Field("a", 30_000), Field("b", 20_000)))
    module = make(schema=schema, rows=100_000, dim=16).eval()
    everything = Selection(("a", "b"))
    smaller = module.prune(everything)
    addressed = {
        (r) for f, n in ((0, 30_000), (1, 20_000)) for r in rows_of(module, f, torch.arange(n)).flatten().tolist()
    }
    assert smaller.weight.shape == (len(addressed), 8)
    assert smaller.weight.shape[0] / 100_000 == pytest.approx(1 - 2.718281828**-1, abs=0.01)
    assert size(smaller) < 0.66 * size(module)
    ids = torch.stack([torch.arange(30_000), torch.arange(30_000).clamp(max=19_999)], 1)
    assert torch.equal(smaller(ids), module(ids))
    full = make(schema=schema, rows=500)
    assert size(full.prune(everything)) == size(full)  # every row is in use
    one = module.prune(Selection(("b",)))
    assert size(one) < 0.4 * size(module)
    assert torch.equal(one(ids), module(ids) * torch.tensor([0.0, 1.0])[:, None])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_takes_any_batch_also_after_pruning(options):
    module = make(**options)
    check_export(module)
    rows = torch.arange(12) % 3 > 0
    check_export(module.prune(Selection(SCALARS[:-1], {"i": rows}, {"u": torch.arange(8) < 5})))


@given(st.floats(0.05, 2.0), st.sampled_from([1, 2, 8]), st.sampled_from([0, 20]))
def test_all_that_serving_holds_stays_within_the_budget(budget, chunks, small):
    schema = EncodedSchema((Field("a", 3000), Field("b", 20), Field("c", 500, shares="a"), Field("x", 2, numeric=True)))
    module = make(schema=schema, dim=16, budget=budget, chunks=chunks, small=small)
    limit = budget * 4 * 16 * (3000 + 20 + 2)
    assert limit - 4 * (16 // chunks) < size(module) <= limit
    assert size(module) == held(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `rows`"),
        ({"rows": 5, "budget": 0.5}, "one of them"),
        ({"rows": 5, "dim": 10, "chunks": 4}, "dim 10 cannot be cut into 4 chunks"),
        ({"budget": 0.01}, r"budget 0.01 is 10 bytes .* the least possible budget is"),
        ({"rows": 3, "private": True}, "4 vocabularies need at least as many rows, not 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        make(**options)


def test_a_budget_of_vocabularies_that_nobody_counted_is_refused():
    with pytest.raises(RecipeError, match=r"'u' has 4,611,686,018,427,387,906 ids.*give `rows`"):
        make(schema=EncodedSchema((Field("u", HUGE),)), budget=0.5)


def test_the_least_possible_budget_that_the_error_names_is_possible():
    with pytest.raises(RecipeError) as caught:
        make(budget=0.01)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    assert make(budget=least * 1.01).table.weight.shape[0] > 0


def test_masks_outside_the_hashed_part_too():
    module = make(**OPTIONS[2]).eval()
    rows = torch.arange(COLUMNS["one"]) == 2
    selection = Selection(SCALARS, {"one": rows})
    smaller = module.prune(selection)
    assert all(torch.equal(a, b) for a, b in zip(outputs(smaller), masked(module, selection), strict=True))


def planted(seed=1, large=2000):
    """Rows of Zipf ids with a planted second-order model; fields 6 and 7 say nothing, 8 and 9 have few ids."""
    torch.manual_seed(seed)
    sizes = [large] * 8 + [5, 20]
    truth = [(0.6 * torch.randn(n, 4), 0.3 * torch.randn(n)) for n in sizes]
    ids = torch.stack([(torch.rand(160_000) * math.log(n)).exp().sub(1).long().clamp(0, n - 1) for n in sizes], 1)
    use = [f for f in range(10) if f not in (6, 7)]
    vectors = torch.stack([truth[f][0][ids[:, f]] for f in use])
    z = 0.25 * (vectors.sum(0).square().sum(1) - vectors.square().sum((0, 2)))
    z += torch.stack([truth[f][1][ids[:, f]] for f in use]).sum(0)
    return EncodedSchema(tuple(Field(f"f{i}", n) for i, n in enumerate(sizes))), ids, torch.bernoulli(z.sigmoid())


def best_test_auc(schema, ids, y, **options):
    """Train beside a factorisation machine and a small perceptron; test AUC at the epoch of the best validation AUC."""
    module = make(schema=schema, dim=16, **options)
    interactions = [FM(module.fields), MLP(module.fields, hidden=(64,), batch_norm=True)]
    model = Model(schema, module, KeepAll(module.fields), {}, interactions, Head(schema, interactions))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    best = (0.0, 0.0)
    for _ in range(6):
        for rows in torch.randperm(120_000).split(2048):
            optimizer.zero_grad()
            logit = model.train().logits(ids[rows])["label"]
            torch.nn.functional.binary_cross_entropy_with_logits(logit, y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            logit = model.eval().logits(ids[120_000:])["label"]
        both = [
            binary_auroc(logit[part], y[120_000:][part].int()).item() for part in (slice(20_000), slice(20_000, None))
        ]
        best = max(best, (both[0], both[1]))
    return best[1]


@pytest.mark.slow
def test_sharing_beats_private_tables_of_the_same_size():
    """With a tenth of the numbers, fields of few ids have hardly a row each in tables of their own."""
    schema, ids, y = planted()
    tenth = sum(field.rows for field in schema.fields) // 10
    private = best_test_auc(schema, ids, y, rows=tenth, chunks=1, private=True)
    shared = [best_test_auc(schema, ids, y, rows=chunks * tenth, chunks=chunks) for chunks in (1, 2)]
    assert min(shared) - private >= 0.06


RECIPE = """
data:
  source: {{use: simulated, rows: 6000, seed: 3}}
  label: y
  categorical:
    user: {{hash_buckets: 4611686018427387904}}
    item: {{hash_buckets: 4611686018427387904}}
    category: {{}}
    hour: {{}}
model:
  embedding: {{use: unified, dim: 8, {size}}}
  interaction: fm
train: {{epochs: 1, batch_size: 512, learning_rate: 0.01, seed: 1}}
stages: [{{use: fit}}, {{use: prune}}, {{use: evaluate}}, {{use: export}}]
"""


def run(*words):
    app([str(word) for word in words], standalone_mode=False)


def test_raw_values_that_training_never_saw_have_vectors(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(size="rows: 2000"))
    run("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["test"]
    assert scores["auc"] > 0.5
    run("simulate", "--out", tmp_path / "logs", "--rows", 300)
    logs = pl.read_parquet(tmp_path / "logs" / "log" / "*.parquet").head(2)
    new = pl.concat([logs.head(1).with_columns(user=pl.lit(10**9 + k, logs.schema["user"])) for k in range(20)])
    new.write_parquet(tmp_path / "new.parquet")
    run("predict", tmp_path / "run", "--data", tmp_path / "new.parquet", "--out", tmp_path / "scores.parquet")
    assert pl.read_parquet(tmp_path / "scores.parquet")["score"].n_unique() == 20


def test_a_budget_that_cannot_be_is_told_before_training(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(size="budget: 0.2"))
    with pytest.raises(RecipeError, match=r"r.yaml.*never counted; give `rows` instead"):
        run("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "1-fit").exists()
