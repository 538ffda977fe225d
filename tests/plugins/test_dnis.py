"""DNIS: gates against a loop, their gradient against the sum over rows, blocks, search steps, budgets, whole runs."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from recsys.api import EncodedSchema, Field, History, RecipeError, Table
from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.testing import contract, samples
from recsys.train.distributed import World
from recsys_dnis import DNIS, blocks_of

SCHEMA = EncodedSchema(
    (Field("item", 9), Field("price", 2, numeric=True), Field("city", 5), Field("twin", 5, shares="city")),
    (History("past", (Field("seen", 9, shares="item"), Field("shop", 4)), 3, ("item", "city")),),
)
STARTS = {"item": 0, "price": 9, "city": 11, "twin": 11, "past.seen": 0, "past.shop": 16}
ROWS, DIM = 20, 4
SPACES = ("free", "prefix", "block")


def table(space="free", seed=0, blocks=3, **options):
    torch.manual_seed(seed)
    made = DNIS(SCHEMA, **{"dim": DIM, "init_std": 0.5, "blocks": blocks, "space": space} | options).double()
    made.take_counts({c.name: torch.randint(0, 30, (c.rows,)) for c in made.layout.columns})
    with torch.no_grad():
        low, high = {"free": (0, 1), "prefix": (1, DIM), "block": (1, blocks)}[space]
        made.alpha.uniform_(low, high)
    return made


def gate(made, row, k):
    """One gate, spelled out."""
    block = int(made.block[row])
    if made.space == "free":
        return made.alpha[block, k]
    a, place = (made.alpha[block, 0], k) if made.space == "prefix" else (made.alpha[0, k], block)
    return torch.clamp(a - place, 0, 1)


def readings(b):
    """(place in the outputs, row of the table, factor) of all that a batch reads, and the outputs' number."""
    found = []
    for i in range(len(b)):
        for f, name in enumerate(("item", "price", "city", "twin")):
            identity, value = int(b.ids[i, f]), float(b.values[i, f].double())
            found.append((STARTS[name] + identity, value if name == "price" and identity else 1.0))
    for events in b.history["past"][0].tolist():
        for event in events:
            found += [(STARTS[n] + e, 1.0) for n, e in zip(("past.seen", "past.shop"), event, strict=True)]
    return found


def look_up(made, b):
    return torch.cat([made(b.ids, b.values.double()).flatten(), made.history("past", b.history["past"][0]).flatten()])


@pytest.mark.parametrize("space", SPACES)
def test_contract(space):
    def in_search(schema):
        made = DNIS(schema, space=space, blocks=2, dim=4, init_std=0.5)
        made.block[1::2] = 1
        with torch.no_grad():
            made.alpha.fill_({"free": 0.7, "prefix": 3.4, "block": 1.6}[space])
        return made

    contract("embedding", in_search)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SPACES), st.integers(0, 9))
def test_vectors_and_gradients_are_those_of_the_loop_and_of_the_closed_form(space, seed):
    made, b = table(space, seed), samples.batch(6, SCHEMA, seed)
    flat = look_up(made, b)
    read = readings(b)
    want = torch.stack([made.weight[row, k] * gate(made, row, k) * f for row, f in read for k in range(DIM)])
    assert (flat - want).abs().max() <= 1e-12
    above = torch.randn(flat.shape, dtype=torch.float64)
    ours = torch.autograd.grad((flat * above).sum(), [made.weight, made.alpha])
    theirs = torch.autograd.grad((want * above).sum(), [made.weight, made.alpha])
    for a, c in zip(ours, theirs, strict=True):
        assert (a - c).abs().max() <= 1e-12
    if space == "free":  # G_l = Σ over what is in block l of ∂L/∂x ∘ e
        closed = torch.zeros_like(made.alpha)
        for (row, f), slope in zip(read, above.view(-1, DIM), strict=True):
            closed[made.block[row].item()] += slope * made.weight[row].detach() * f
        assert (ours[1] - closed).abs().max() <= 1e-12


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("training", [True, False])
def test_before_a_search_it_is_the_table_to_the_last_bit(space, training):
    torch.manual_seed(3)
    plain = Table(SCHEMA, dim=DIM, init_std=0.5).train(training)
    torch.manual_seed(3)
    made = DNIS(SCHEMA, dim=DIM, init_std=0.5, space=space).train(training)
    b = samples.batch(9, SCHEMA)
    assert torch.equal(made(b.ids, b.values), plain(b.ids, b.values))
    assert torch.equal(made.history("past", b.history["past"][0]), plain.history("past", b.history["past"][0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 12))
def test_blocks_fall_in_frequency_and_never_divide_equal_counts(counts, blocks):
    found = blocks_of(torch.tensor(counts), blocks)
    assert len(found) == len(counts)
    used = sorted(set(found.tolist()))
    assert used == list(range(len(used))), "no block is empty"
    assert len(used) <= blocks
    members = [[c for c, b in zip(counts, found.tolist(), strict=True) if b == block] for block in used]
    for more, fewer in itertools.pairwise(members):
        assert min(more) > max(fewer)
    if len(set(counts)) == len(counts) >= blocks:
        sizes = [len(m) for m in members]
        assert max(sizes) - min(sizes) <= 1, "without equal counts the blocks are equal parts"


def test_twice_the_log_gives_the_same_blocks():
    counts = torch.randint(0, 9, (50,))
    assert torch.equal(blocks_of(counts, 5), blocks_of(2 * counts, 5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.001, 0.1))
def test_every_block_of_the_batch_moves_as_far_and_the_others_not_at_all(seed, rate):
    made, b = table("free", seed, l1=0.0), samples.batch(2, SCHEMA, seed)
    with torch.no_grad():
        made.alpha.uniform_(0.45, 0.55)
    before = made.alpha.detach().clone()
    (look_up(made, b).square().sum() * 1e-3).backward()
    absent = (made.alpha.grad == 0).all(1)
    sizes = made.alpha.grad.abs().mean(1)
    made.search_step(rate)
    moved = (made.alpha.detach() - before).abs()
    present = ~absent & (sizes > 1e-4)
    free = moved[present].max(1).values < 0.44  # nothing was clipped
    torch.testing.assert_close(
        moved[present][free].mean(1), torch.full((int(free.sum()),), rate, dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert not moved[absent].any()
    assert bool(made.alpha.isfinite().all())


@pytest.mark.parametrize("space", SPACES)
def test_gates_stay_within_their_limits_and_l1_closes_them(space):
    made = table(space, l1=1.0)
    for _ in range(200):
        made.alpha.grad = torch.full_like(made.alpha, 1e-9)
        made.search_step(0.1)
    low = 0.0 if space == "free" else 1.0
    assert bool((made.alpha == low).all())
    used = made.gates().sum(1 if space == "prefix" else 0)
    assert bool((used == low).all()), "a block keeps a dimension, a dimension a block"
    for _ in range(200):
        made.alpha.grad = torch.full_like(made.alpha, -5.0)
        made.search_step(0.1)
    assert bool((made.gates() == 1).all())


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SPACES), st.integers(0, 99), st.floats(0.45, 1.3))
def test_pruned_it_is_folded_within_the_budget_and_ranks_what_passed_the_gates(space, seed, budget):
    torch.manual_seed(seed)
    schema = EncodedSchema((Field("a", 120), Field("b", 80)))
    made = DNIS(schema, dim=8, init_std=0.5, blocks=4, space=space, budget=budget)
    made.take_counts({"a": torch.randint(0, 30, (120,)), "b": torch.randint(0, 30, (80,))})
    with torch.no_grad():
        made.alpha.uniform_(0, made.top).clamp_(0 if space == "free" else 1)
    made.eval()
    kept = made.kept()
    small = made.prune(kept).eval()
    assert sum(t.nbytes for t in small.export_tables().values()) <= budget * 4 * 200 * 8 * (1 + 1e-3)
    ids = torch.stack([torch.arange(120), torch.arange(120) % 80], 1)
    whole = made(ids)
    mask = torch.stack([kept.elements["a"], kept.elements["b"][torch.arange(120) % 80]], 1)
    assert torch.equal(small(ids), whole * mask)
    shown = torch.cat([made.read(0, torch.arange(120)), made.read(1, torch.arange(80))]).abs()
    left = torch.cat([kept.elements["a"], kept.elements["b"]])
    if bool(left.any()) and bool((~left & (shown > 0)).any()):
        assert float(shown[left].min()) >= float(shown[~left].max())


def test_a_huge_number_behind_a_tiny_gate_goes_first():
    schema = EncodedSchema((Field("a", 10),))
    made = DNIS(schema, dim=4, init_std=0.5, blocks=2, budget=0.9)
    made.take_counts({"a": torch.arange(10)})
    with torch.no_grad():
        made.weight[9] = 1000.0
        made.alpha[made.block[9].int()] = 1e-9
    kept = made.kept().elements["a"]
    assert not kept[9].any()
    assert kept[:5].sum() > 10


def test_without_counts_it_says_what_to_do():
    made = DNIS(SCHEMA, dim=DIM)
    for ask in (made.kept, lambda: made.search_step(0.1)):
        with pytest.raises(RecipeError, match="count_rows"):
            ask()


def test_a_budget_below_an_empty_table_is_refused():
    with pytest.raises(RecipeError, match="less than an empty one"):
        table(budget=1e-6).float().kept()


def start(tmp_path, *changes):
    registry = load_registry()
    base = ("data.source.rows=6000", "train.batch_size=256", "model.embedding.use=dnis", "model.embedding.dim=8")
    more = ("model.embedding.budget=0.4", "train.epochs=2", "train.learning_rate=1e-2")
    recipe = load_recipe(find_recipe("quickstart"), registry, [*base, *more, *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build():
        console = Console(file=(tmp_path / "log.txt").open("w"), width=200)
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    return build, recipe, registry


def test_its_own_stages_from_counts_to_the_retrained_table(tmp_path):
    stages = (
        "stages=[{use: count_rows}, {use: fit, name: warm}, {use: bilevel_fit, weights: tables, rate: 0.05}, "
        "{use: prune}, {use: fit, name: retrain}, {use: evaluate}]"
    )
    build, recipe, registry = start(tmp_path, stages)
    run = build()
    whole = run.model.embedding.weight.nbytes
    run_stages(run, recipe, registry)
    warm, searched = (
        load_file(tmp_path / "run" / stage / "model.safetensors") for stage in ("2-warm", "3-bilevel_fit")
    )
    assert bool((warm["embedding.alpha"] == 1).all()), "a fit stage leaves the gates alone"
    assert not torch.equal(searched["embedding.alpha"], warm["embedding.alpha"])
    networks = [n for n in warm if n.startswith("interactions.") and n.endswith(("weight", "bias"))]
    assert networks
    assert all(torch.equal(warm[n], searched[n]) for n in networks), "the search trains the tables alone"
    assert sum(t.nbytes for t in run.model.embedding.export_tables().values()) <= 0.4 * whole
    again = build()
    again.restore()
    valid = run.splits["valid"].read(0, 200)
    with torch.no_grad():
        assert torch.equal(again.model.eval()(valid)["label"], run.model.eval()(valid)["label"])


def test_labels_of_validation_rows_choose_the_gates(tmp_path):
    """Other validation labels, other gates; the weights of the warm start stay the same."""
    stages = "stages=[{use: count_rows}, {use: fit, name: warm, epochs: 1, patience: 0}, {use: bilevel_fit, epochs: 1}]"
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build, recipe, registry = start(tmp_path / name, stages)
        run = build()
        if name == "b":
            shards = run.splits["valid"]
            read = shards.read

            def flipped(low, high, read=read):
                batch = read(low, high)
                return batch.__class__(
                    batch.ids, batch.values, batch.history, {k: 1 - v for k, v in batch.label.items()}
                )

            gather = shards.gather

            def flipped_gather(rows, gather=gather):
                batch = gather(rows)
                return batch.__class__(
                    batch.ids, batch.values, batch.history, {k: 1 - v for k, v in batch.label.items()}
                )

            object.__setattr__(shards, "read", flipped)
            object.__setattr__(shards, "gather", flipped_gather)
        run_stages(run, recipe, registry)
        found.append(
            [load_file(tmp_path / name / "run" / s / "model.safetensors") for s in ("2-warm", "3-bilevel_fit")]
        )
        assert json.loads((tmp_path / name / "run" / "3-bilevel_fit" / "history.json").read_text())["best_epoch"] == 1
    (warm, one), (same, other) = found
    assert torch.equal(warm["embedding.weight"], same["embedding.weight"])
    assert not torch.equal(one["embedding.alpha"], other["embedding.alpha"])
