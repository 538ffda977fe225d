"""MGQE against a loop over single parts: codes, gradients, centroids that follow, bytes, pruning, whole runs."""

import json

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
    outputs,
    selections,
    size,
)
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from recsys.api import EncodedSchema, Field, RecipeError, Selection
from recsys.cli import app
from recsys.plugin.registry import load_registry
from recsys.testing import contract
from recsys_mgqe import MGQE, RATE, WINDOW

STARTS = {"u": 0, "x": 9, "i": 11, "j": 11, "one": 23, "h.i": 11, "h.s": 26}
ROWS = 32
LARGE = EncodedSchema((Field("a", 3000), Field("b", 500)))


def make(seed=0, schema=SCHEMA, **options):
    torch.manual_seed(seed)
    plain = {"dim": 6, "parts": 3, "centroids": 7, "rare_centroids": 3, "frequent_share": 0.4, "init_std": 1.0}
    made = MGQE(schema, **plain | options)
    made.take_counts({c.name: torch.randint(0, 30, (c.rows,)) for c in made.layout.columns})
    return made


def code(made, row, p):
    """The nearest centroid of one part of one row, spelled out."""
    least, found = None, None
    size = made.fields.dim // made.parts
    count = made.codebook.shape[1] if bool(made.frequent[row]) else made.rare
    for k in range(count):
        distance = sum(
            (float(made.weight.detach()[row, p * size + j]) - float(made.codebook.detach()[p, k, j])) ** 2
            for j in range(size)
        )
        if least is None or distance < least:
            least, found = distance, k
    return found


def readings(ids, values, events):
    """(row of the table, factor) of all that is read, in order."""
    found = []
    for b in range(len(ids)):
        for f, name in enumerate(SCALARS):
            i = int(as_read(name, ids[b, f]))
            found.append((STARTS[name] + i, float(values[b, f]) if name == "x" and i == 1 else 1.0))
    for event in events[0]:
        for k, name in enumerate(("h.i", "h.s")):
            found.append((STARTS[name] + int(as_read(name, event[k])), 1.0))
    return found


def look_up(made, ids, values, events):
    return torch.cat([made(ids, values).flatten(), made.history("h", events).flatten()])


@pytest.mark.parametrize(
    "options",
    [
        {"frequent_share": 1.0},
        {"dim": 6, "parts": 2, "centroids": 5, "rare_centroids": 2, "frequent_share": 0.5, "init_std": 1.0},
    ],
    ids=str,
)
def test_contract(options):
    def counted(schema):
        made = MGQE(schema, **options)
        made.frequent[::2] = True
        return made

    contract("embedding", counted)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6), (4, 2), (5, 1)]),
    st.sampled_from([(1, 1), (2, 1), (7, 3), (5, 5)]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(1, 18),
    st.integers(0, 99),
)
def test_vectors_and_gradients_are_those_of_the_loop(shape, centroids, share, rows, seed):
    (dim, parts), (count, rare) = shape, centroids
    made = make(seed, dim=dim, parts=parts, centroids=count, rare_centroids=rare, frequent_share=share).double()
    ids, values, events = every_id()
    ids, values, events = ids[-rows:], values[-rows:].double(), events[:, -rows:]
    read = readings(ids, values, events)
    codes = {row: [code(made, row, p) for p in range(parts)] for row, _ in read}
    want = [f * torch.cat([made.codebook[p, k] for p, k in enumerate(codes[row])]).detach() for row, f in read]
    for training in (False, True):
        flat = look_up(made.train(training), ids, values, events)
        assert (flat - torch.cat(want)).abs().max() <= 1e-12

    above = torch.randn(flat.shape, dtype=torch.float64)
    ((flat * above).sum() + 3.0 * made.penalty()).backward()
    straight = torch.zeros_like(made.weight)
    for (row, f), slope in zip(read, above.view(-1, dim), strict=True):
        straight[row] += f * slope  # as if the row itself had been read
    assert (made.weight.grad - straight).abs().max() <= 1e-11

    before, size, loss = made.codebook.detach().clone(), dim // parts, 0.0
    for p in range(parts):
        for k in range(count):
            having = [made.weight[row, p * size :][:size].detach() for row, _ in read if codes[row][p] == k]
            gap = before[p, k] - sum(having) / len(having) if having else torch.zeros(size)
            loss += float(gap.square().sum()) / (2 * parts * count)
            assert (made.codebook.grad[p, k] - 3.0 * gap / (parts * count)).abs().max() <= 1e-11
    look_up(made, ids, values, events)
    assert float(made.penalty().detach()) == pytest.approx(loss, abs=1e-12)
    made.codebook.grad /= 3.0
    made.after_step()
    moved = before - RATE * made.codebook.grad * parts * count
    assert (made.codebook - moved).abs().max() <= 1e-12


def test_the_loss_of_a_batch_is_of_that_batch_alone():
    made, (ids, values, events) = make().train(), every_id()
    look_up(made, ids, values, events)
    look_up(made, ids[:3], values[:3], events[:, :3])
    after_two = made.penalty()
    other = make().train()
    look_up(other, ids[:3], values[:3], events[:, :3])
    assert torch.equal(after_two, other.penalty())
    assert float(make().penalty()) == 0, "before any batch there is none"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=32, max_size=32), st.floats(0.02, 0.98))
def test_the_rows_of_the_most_training_rows_are_frequent_and_of_equal_ones_the_first(counts, share):
    made = make(frequent_share=share)

    def told(times):
        numbers = torch.tensor(counts) * times
        return {name: numbers[first:][: COLUMNS[name]] for name, first in STARTS.items()}

    made.take_counts(told(1))
    order = sorted(range(ROWS), key=lambda row: (-counts[row], row))
    assert made.frequent.nonzero().squeeze(1).tolist() == sorted(order[: max(1, round(share * ROWS))])
    before = made.frequent.clone()
    made.take_counts(told(2))
    assert torch.equal(made.frequent, before), "twice the log says the same"


def train(made, steps, ids, first=0, lr=0.05):
    optimizer = torch.optim.Adam([made.weight], lr=lr)
    made.train()
    for step in range(first, first + steps):
        numbers = torch.Generator().manual_seed(step)
        batch = torch.stack([x[torch.randint(len(x), (64,), generator=numbers)] for x in ids], 1)
        e = made(batch)
        loss = (e.sum((1, 2)) - (batch.sum(1) % 7).float() / 7).square().mean() + made.penalty()
        optimizer.zero_grad()
        made.codebook.grad = None
        loss.backward()
        optimizer.step()
        made.after_step()


def test_rare_rows_choose_among_the_first_and_stored_codes_are_of_all_ids_also_never_seen_ones():
    made = make(3, LARGE, dim=4, parts=2, centroids=40, rare_centroids=8, frequent_share=0.2, init_std=0.1)
    train(made, WINDOW + 50, (torch.arange(50), torch.arange(500)))
    stored = made.prune(Selection(("a", "b"))).codes
    assert stored.dtype == torch.uint8
    assert stored.shape == (3500, 2)
    rare = ~made.frequent
    assert int(stored[rare].max()) < 8
    assert int(stored[made.frequent].max()) >= 8, "frequent ones have more"
    for row in (*range(0, 50, 7), *range(50, 3000, 97), *range(3000, 3500, 31)):
        assert stored[row].tolist() == [code(made, row, p) for p in range(2)]


def test_who_else_is_read_changes_no_code():
    made = make(5, LARGE, dim=6, parts=2, centroids=64, rare_centroids=16, init_std=0.3).eval()
    ids = torch.stack([torch.arange(3000), torch.arange(3000) % 500], 1)
    whole = made(ids)
    small = made.prune(Selection(("a", "b")))
    assert torch.equal(small(ids), whole)
    for rows in (1, 2, 3, 17):
        assert torch.equal(torch.cat([made(x) for x in ids[:340].split(rows)]), whole[:340])
    assert torch.equal(made.train()(ids), whole), "and training shows the same, from one pass over the table"
    assert torch.equal(made(ids[:9]), whole[:9])


def test_centroids_that_nothing_uses_are_put_where_vectors_are():
    made = make(1, LARGE, dim=4, parts=2, centroids=32, rare_centroids=8, frequent_share=0.2, init_std=0.1)
    with torch.no_grad():
        made.codebook[:, 2:] += 100.0  # out of reach
    ids = (torch.arange(3000), torch.arange(500))
    train(made, WINDOW - 1, ids)
    assert not bool(made.used[:, 2:].any())
    assert bool((made.codebook[:, 2:] > 50).all())
    train(made, 1, ids, first=WINDOW - 1)
    assert not bool(made.used.any()), "what was used is asked anew"
    parts = made.weight.view(3500, 2, 2)
    for p in range(2):
        for k in range(2, 32):
            same = (parts[:, p] == made.codebook[p, k]).all(1)
            assert bool(same.any()), "a centroid lies on the part of a row"
            assert k < 8 or bool(made.frequent[same].all()), "of a frequent one, where rare rows do not look"
    train(made, 60, ids, first=WINDOW)
    assert float(made.used.float().mean()) > 0.5


def test_training_goes_on_from_its_state_to_the_last_bit():
    options = {"dim": 4, "parts": 2, "centroids": 32, "rare_centroids": 8, "init_std": 0.1}
    ids = (torch.arange(60), torch.arange(40))

    def steps(made, first, count):
        made.train()
        for step in range(first, first + count):
            numbers = torch.Generator().manual_seed(step)
            batch = torch.stack([torch.randint(len(x), (16,), generator=numbers) for x in ids], 1)
            made.zero_grad()
            (made(batch).sum((1, 2)).square().mean() + made.penalty()).backward()
            with torch.no_grad():
                made.weight -= 0.01 * made.weight.grad
            made.after_step()

    one, half = make(2, LARGE, **options), make(2, LARGE, **options)
    steps(one, 0, 2 * WINDOW + 20)
    steps(half, 0, WINDOW - 30)
    again = make(9, LARGE, **options)
    again.load_state_dict(half.state_dict())
    steps(again, WINDOW - 30, WINDOW + 50)
    for name, t in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(3, 0.4), (3, 1.0), (1, 0.0), (6, 0.4)]), selections(6), selections(6))
def test_pruned_is_masked_bit_for_bit(shape, one, other):
    parts, share = shape
    check_pruned(lambda: make(parts=parts, frequent_share=share), one, other)
    check_gradient_stays_inside(make(parts=parts, frequent_share=share), one)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(4, 1), (4, 2), (8, 8), (6, 3)]), st.integers(1, 256), st.data())
def test_a_row_takes_a_byte_for_each_part_beside_the_codebook(shape, count, data):
    dim, parts = shape
    rare = data.draw(st.integers(1, count))
    made = make(0, LARGE, dim=dim, parts=parts, centroids=count, rare_centroids=rare)
    small = made.prune(Selection(("a", "b")))
    constants = 3 * 8 * 2  # of two columns: rows, the id for wrong ones, the first row
    assert size(small) == held(small) == 3500 * parts + 4 * count * dim + constants
    assert size(small) == pytest.approx(len(save(small.state_dict())), rel=0.01, abs=300)
    half = torch.arange(3000) % 2 == 0
    fewer = small.prune(Selection(("a", "b"), {"a": half}))
    assert size(fewer) <= size(small) - 1500 * parts + 2 * 3500 / 8 + 3000 / 8 + 200


def test_parts_that_no_column_keeps_are_gone():
    made = make(0, LARGE, dim=6, parts=3)
    keep = torch.tensor([True, False, False, False, False, True])
    small = made.prune(Selection(("a", "b"), dims={"a": keep, "b": keep}))
    assert small.codes.shape == (3500, 2)
    assert small.codebook.shape == (2, 7, 2)
    ids = torch.stack([torch.arange(500), torch.arange(500)], 1)
    assert torch.equal(small(ids), made.eval()(ids) * keep)


def test_pruned_it_goes_on_learning_its_centroids_and_no_code():
    small = make(1).prune(Selection(SCALARS)).train()
    ids, values, events = every_id()
    codes = small.codes.clone()
    optimizer = torch.optim.Adam([p for p in small.parameters() if p.requires_grad], lr=0.01)
    first = None
    for _ in range(30):
        loss = (look_up(small, ids, values, events) - 0.3).square().mean()
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * first
    assert torch.equal(small.codes, codes)


def test_a_graph_takes_any_batch_also_after_pruning():
    made = make()
    check_export(made)
    check_export(made.prune(Selection(SCALARS)))
    check_export(made.prune(Selection(SCALARS[:-1], {"i": torch.arange(12) % 3 > 0}, {"u": torch.arange(6) < 5})))


def test_without_grades_the_counts_are_not_asked_for():
    made = MGQE(SCHEMA, dim=6, parts=3, frequent_share=1.0).train()
    scalar, _ = outputs(made)
    made.take_counts({})
    assert bool((scalar.sum() + made.penalty()).isfinite())
    graded = MGQE(SCHEMA, dim=6, parts=3).train()
    outputs(graded)
    with pytest.raises(RecipeError, match=r"put \{use: count_rows\} before the first fit stage"):
        graded.penalty()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 4}, "parts 4 does not divide dim 6; take one of 1, 2, 3, 6"),
        ({"centroids": 32, "rare_centroids": 33}, "rare_centroids 33 is more than centroids 32"),
        ({"centroids": 257}, "centroids"),
        ({"centroids": 0}, "centroids"),
        ({"frequent_share": 1.5}, "frequent_share"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        load_registry().build(
            "embedding", {"use": "mgqe", "dim": 6, "parts": 3, **options}, SCHEMA, where="model.embedding"
        )


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_its_own_stages_end_with_codes_and_come_back(tmp_path, share):
    options = ["model.embedding.dim=8", f"model.embedding.frequent_share={share}", "model.embedding.centroids=16"]
    options += ["model.embedding.rare_centroids=4", "data.source.rows=4000"]
    stages = "[{use: fit}, {use: prune}, {use: evaluate}, {use: export}]" if share == 1 else "null"
    out = tmp_path / "run"
    changes = [f"stages={stages}", "model.embedding=mgqe", *options, "train.epochs=2", "train.batch_size=256"]
    result = CliRunner().invoke(app, ["train", "quickstart", *changes, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output.splitlines()[-1])["metrics"]["test"]
    took = json.loads((next(out.glob("*-prune")) / "prune.json").read_text())
    fitted, small = (load_file(next(out.glob(f"*-{s}")) / "model.safetensors") for s in ("fit", "prune"))
    rows = len(fitted["embedding.weight"])
    assert small["embedding.codes"].shape == (rows, 4)
    freed = fitted["embedding.weight"].nbytes + rows - 4 * rows  # and the bools of which rows are frequent
    assert abs(took["bytes_before"] - took["bytes_after"] - freed) < 1000
    rare = ~fitted["embedding.frequent"]
    assert not bool((small["embedding.codes"][rare] >= 4).any())
    assert bool(rare.any()) == (share < 1)
    again = CliRunner().invoke(app, ["evaluate", str(out), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output.splitlines()[-1])["metrics"]["test"] == told
    assert torch.equal(load_file(out / "export" / "model.safetensors")["embedding.codes"], small["embedding.codes"])
