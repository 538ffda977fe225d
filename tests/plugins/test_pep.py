"""PEP against a loop over single numbers: the soft threshold and its gradients, what is left, budgets, whole runs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from recsys.api import EncodedSchema, Field, History, Selection
from recsys.data.prepare import prepare
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.testing import contract, samples
from recsys.train.distributed import World
from recsys_pep import PEP

SCHEMA = EncodedSchema(
    (Field("item", 9), Field("price", 2, numeric=True), Field("city", 5), Field("twin", 5, shares="city")),
    (History("past", (Field("seen", 9, shares="item"), Field("shop", 4)), 3, ("item", "city")),),
)
STARTS = {"item": 0, "price": 9, "city": 11, "twin": 11, "past.seen": 0, "past.shop": 16}
DIM = 3
GRANULARITIES = ("global", "dim", "feature", "feature_dim")


def table(granularity="feature_dim", seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": DIM, "init_std": 0.5, "threshold_init": -1.0} | options
    made = PEP(SCHEMA, granularity=granularity, **given).double()
    torch.nn.init.normal_(made.s, mean=-1.0, std=0.5)
    return made


def threshold(made, row, k):
    """σ(s) of one number, spelled out."""
    i = row if made.s.shape[0] > 1 else 0
    j = k if made.s.shape[1] > 1 else 0
    return 1 / (1 + torch.exp(-made.speed * made.s[i, j]))


def number(made, row, k):
    v = made.weight[row, k]
    size = abs(v) - threshold(made, row, k)
    return (torch.sign(v) * size) if size > 0 else 0 * v


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_contract(granularity):
    contract("embedding", PEP, granularity=granularity, threshold_init=-2.0, init_std=0.5)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(GRANULARITIES), st.integers(0, 5), st.sampled_from([1.0, 3.0]))
def test_vectors_and_gradients_are_those_of_the_loop(granularity, seed, speed):
    made = table(granularity, seed, threshold_speed=speed).train()
    b = samples.batch(5, SCHEMA, seed)
    got = made(b.ids, b.values.double())
    past = made.history("past", b.history["past"][0])
    want = []
    for i in range(len(b)):
        for f, name in enumerate(("item", "price", "city", "twin")):
            identity, value = int(b.ids[i, f]), float(b.values[i, f].double())
            factor = value if name == "price" and identity else 1.0
            want += [number(made, STARTS[name] + identity, k) * factor for k in range(DIM)]
    for events in b.history["past"][0].tolist():
        for event in events:
            for n, e in zip(("past.seen", "past.shop"), event, strict=True):
                want += [number(made, STARTS[n] + e, k) for k in range(DIM)]
    want = torch.stack(want)
    flat = torch.cat([got.flatten(), past.flatten()])
    assert (flat - want).abs().max() <= 1e-12
    above = torch.randn(flat.shape, dtype=torch.float64)
    leaves = [made.weight, made.s]
    ours = torch.autograd.grad((flat * above).sum(), leaves)
    theirs = torch.autograd.grad((want * above).sum(), leaves)
    for a, c in zip(ours, theirs, strict=True):
        assert (a - c).abs().max() <= 1e-10
    assert ours[1].shape == made.s.shape


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(GRANULARITIES), st.integers(0, 9))
def test_pruned_is_what_evaluation_shows_and_only_that_is_stored(granularity, seed):
    made = table(granularity, seed).eval()
    small = made.prune(made.kept()).eval()
    b = samples.batch(20, SCHEMA, seed)
    events = b.history["past"][0]
    # A sigmoid of one row and of a whole table can differ in the last bit; what is zero is the same.
    pairs = [
        (small(b.ids, b.values.double()), made(b.ids, b.values.double())),
        (small.history("past", events), made.history("past", events)),
    ]
    for got, shown in pairs:
        assert torch.equal(got != 0, shown != 0)
        assert (got - shown).abs().max() <= 1e-15 * max(1.0, float(shown.detach().abs().max()))
    made.set_extra_state(made.decision()["_extra_state"])
    decided = made.prune(made.kept()).eval()
    assert torch.equal(decided(b.ids, b.values.double()), made(b.ids, b.values.double()))
    assert torch.equal(decided.history("past", events), made.history("past", events))
    assert sum(t.nbytes for n, t in small.export_tables().items() if n != "flat") + 4 * small.flat.numel() == made.size(
        made.left()
    )


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 1.2), st.integers(0, 9))
def test_within_a_budget_the_largest_are_left(budget, seed):
    torch.manual_seed(seed)
    schema = EncodedSchema((Field("a", 300), Field("b", 200)))
    made = PEP(schema, dim=8, init_std=0.5, threshold_init=-2.0, budget=budget)
    left, shown = made.left(), made.shrunk().abs()
    small = made.prune(made.kept())
    assert sum(t.nbytes for t in small.export_tables().values()) <= max(budget * 4 * 500 * 8, 0)
    assert not (left & (shown == 0)).any()
    gone = ~left & (shown > 0)
    assert made.reached() == (not bool(gone.any()))
    if bool(gone.any()) and bool(left.any()):
        assert float(shown[left].min()) >= float(shown[gone].max())


def test_a_decision_fixes_what_is_left_and_frees_the_sizes():
    made = table().eval()
    left = made.left().clone()
    state = made.state_dict() | dict(made.decision())
    fresh = table(seed=5)
    first = fresh.weight.detach().clone()
    fresh.load_state_dict(made.state_dict() | {"weight": first, "s": fresh.s.detach()} | dict(made.decision()))
    assert torch.equal(fresh.left(), left)
    assert torch.equal(fresh.shrunk(), first * left), "the numbers have their first values, not thresholded ones"
    assert not fresh.s.requires_grad
    assert fresh.reached() is None
    assert "_extra_state" in state
    again = table(seed=6)
    again.load_state_dict(made.state_dict())
    assert again.mask is None, "without a decision there is none afterwards"


def start(tmp_path, *changes):
    registry = load_registry()
    base = ("data.source.rows=6000", "train.batch_size=256", "model.embedding.use=pep", "model.embedding.dim=8")
    options = ("model.embedding.threshold_init=-6", "model.embedding.threshold_speed=40", "train.embedding_l2=1e-3")
    recipe = load_recipe(find_recipe("quickstart"), registry, [*base, *options, "train.learning_rate=1e-2", *changes])
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build():
        console = Console(file=(tmp_path / "log.txt").open("w"), width=200)
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    return build, recipe, registry


STAGES = "[{use: fit, name: search}, {use: reset}, {use: prune}, {use: fit, name: retrain, epochs: 1}, {use: evaluate}]"


def test_a_search_ends_at_the_budget_and_the_rest_is_trained_from_its_first_values(tmp_path):
    build, recipe, registry = start(
        tmp_path, f"stages={STAGES}", "train.epochs=30", "train.patience=1", "model.embedding.budget=0.6"
    )
    run = build()
    whole, first = run.model.embedding.weight.nbytes, run.model.embedding.weight.detach().clone()
    run_stages(run, recipe, registry)
    folder = tmp_path / "run"
    epochs = json.loads((folder / "1-search" / "history.json").read_text())
    assert epochs["best_epoch"] == len(epochs["epochs"]) < 30, "it ends with the first epoch within the budget"
    held = sum(t.nbytes for t in run.model.embedding.export_tables().values())
    assert held <= 0.6 * whole
    searched = build()
    searched.model.load_state_dict(load_file(folder / "1-search" / "model.safetensors"))
    left = searched.model.embedding.left()
    assert 0 < int(left.sum()) < left.numel()
    pruned = build()
    columns = pruned.model.embedding.layout.columns
    parts = dict(zip([c.name for c in columns], torch.split(left, [c.rows for c in columns]), strict=True))
    pruned.model = pruned.model.prune(Selection(tuple(parts), elements=parts))
    pruned.model.load_state_dict(load_file(folder / "3-prune" / "model.safetensors"))
    ids = torch.arange(50).unsqueeze(1).expand(-1, len(columns)).contiguous()
    fresh = build()
    with torch.no_grad():
        fresh.model.embedding.weight.copy_(first * left)
        fresh.model.embedding.s.fill_(-1e9)
    values = torch.ones(ids.shape)
    assert torch.equal(pruned.model.embedding(ids, values), fresh.model.embedding.eval()(ids, values))


def test_a_budget_out_of_reach_is_told_and_met_by_the_largest(tmp_path):
    build, recipe, registry = start(
        tmp_path,
        f"stages={STAGES}",
        "train.epochs=1",
        "model.embedding.budget=0.3",
        "model.embedding.threshold_init=-150",
        "model.embedding.threshold_speed=1",
    )
    run = build()
    whole = run.model.embedding.weight.nbytes
    run_stages(run, recipe, registry)
    assert sum(t.nbytes for t in run.model.embedding.export_tables().values()) <= 0.3 * whole
    run.console.file.flush()
    assert "still above the budget" in (tmp_path / "log.txt").read_text()
