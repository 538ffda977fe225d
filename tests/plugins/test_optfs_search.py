"""OptFS at work: under other parts, on logs with planted noise values, in whole runs."""

import json

import pytest
import torch
from composition import OPTIONS, REGISTRY
from rich.console import Console
from safetensors.torch import load_file

from recsys.api import EncodedSchema, Field, Table, build_optimizer
from recsys.contracts import Batch
from recsys.data.batches import EvalBatches
from recsys.data.prepare import prepare
from recsys.nn.head import Head
from recsys.nn.interaction import MLP
from recsys.nn.layout import Layout
from recsys.nn.model import Model
from recsys.nn.reorder import renumbered
from recsys.nn.selection import both
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root, load_trained
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.testing import samples
from recsys.train.distributed import World
from recsys.train.losses import BCE
from recsys_optfs import OptFS


@pytest.mark.parametrize("embedding", ["table", "unified", "optembed"])
@pytest.mark.parametrize("interaction", ["fm", "mlp", "cross", "autoint", "armnet"])
def test_it_trains_with_any_other_part_is_pruned_and_predicts(embedding, interaction):
    torch.manual_seed(1)
    schema = EncodedSchema((Field("a", 90), Field("b", 60), Field("x", 2, numeric=True), Field("c", 30)))
    table = REGISTRY.build("embedding", {"use": embedding, "dim": 8} | OPTIONS.get(embedding, {}), schema, where="e")
    made = REGISTRY.build("selector", {"use": "optfs", "rate": 0.2, "penalty": 1e-3}, table.fields, where="s")
    parts = [REGISTRY.build("interaction", interaction, Model.consumer_fields(schema, table), where="i")]
    model = Model(schema, table, made, {}, parts, Head(schema, parts)).train()
    torch.nn.init.normal_(made.gate, std=0.3)
    before = made.gate.detach().clone()
    train(model, [samples.batch(32, schema, seed) for seed in range(2)], lr=0.05)
    assert bool((made.gate != before).all()), "the penalty moves every gate, seen or not"
    model.eval()
    made.anneal(1.0)
    kept, batch = model.kept(), samples.batch(40, schema, seed=9)
    small = model.prune(kept)
    with torch.no_grad():
        x = model.embedding(batch.ids, batch.values)
        for f, gates in enumerate(made.gate.split(list(table.fields.rows))):
            gate = (gates > 0)[batch.ids[:, f]]
            x[:, f] *= (gate.float() * made.factor()).unsqueeze(1)
        assert torch.equal(small.represent(batch.ids, batch.values), x)
        assert torch.equal(small(batch)["label"], model(batch)["label"])
    if embedding == "optembed":
        assert all(torch.equal(kept.rows[n], both(made.kept(), table.kept()).rows[n]) for n in kept.rows)
    train(small.train(), [samples.batch(32, schema, 3)], lr=0.05)


def train(model, batches, lr, total=None, first=0):
    """One step for each batch, of `total` in the search."""
    optimizer, loss = build_optimizer(model.parameter_groups(), lr=lr), BCE(model.schema.tasks)
    for step, batch in enumerate(batches):
        model.selector.anneal((first + step) / (total or len(batches)))
        optimizer.zero_grad()
        model.objective(loss, batch).backward()
        optimizer.step()
        for part in model.stepped():
            part.after_step()
            for parameter in part.own_parameters():
                parameter.grad = None


def planted(seed, rows=24_000):
    """A field of which half of the values move the label and the others do nothing; beside it one that does."""
    numbers = torch.Generator().manual_seed(seed)
    useful = torch.rand(82, generator=numbers) < 0.5
    useful[:2] = False
    sign = torch.where(torch.rand(82, generator=numbers) < 0.5, 1.0, -1.0)
    effect = useful * sign * (1 + 0.5 * torch.rand(82, generator=numbers))
    other = torch.randn(22, generator=numbers)
    ids = torch.stack([torch.randint(2, size, (rows,), generator=numbers) for size in (82, 22)], 1)
    chance = (effect[ids[:, 0]] + other[ids[:, 1]]).sigmoid()
    label = (torch.rand(rows, generator=numbers) < chance).float()
    return EncodedSchema((Field("mixed", 82), Field("other", 22))), ids, label, useful


def found(seed, **options):
    """The kept values of the mixed field after a search, and those that it should keep."""
    schema, ids, label, useful = planted(seed)
    torch.manual_seed(seed)
    table = Table(schema, dim=8)
    parts = [MLP(Model.consumer_fields(schema, table), hidden=(16,))]
    made = OptFS(table.fields, temperature=50.0, epochs=6, **options)
    model = Model(schema, table, made, {}, parts, Head(schema, parts)).train()
    order = torch.cat([torch.randperm(len(ids)) for _ in range(6)]).split(500)
    train(model, [Batch(ids[b], label={"label": label[b]}) for b in order], lr=5e-3)
    return made.kept().rows["mixed"], useful


@pytest.mark.parametrize("options", [{"penalty": 1e-4, "rate": 2e-2}, {"fall": 0.8, "rate": 1e-2}])
@pytest.mark.parametrize("seed", range(3))
def test_noise_values_within_a_useful_field_go_and_the_others_stay(seed, options):
    kept, useful = found(seed, **options)
    hits = int((kept & useful).sum())
    assert hits / int(kept.sum()) >= 0.9
    assert hits / int(useful.sum()) >= 0.9
    assert int(useful.sum()) / 80 < 0.65, "whoever keeps the field, or drops it, is wrong about half of the values"


def test_the_larger_the_penalty_the_fewer_values_stay():
    counts = [int(found(0, penalty=penalty, rate=1e-2)[0].sum()) for penalty in (1e-6, 1e-5, 1e-4, 1e-3)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1]


def start(tmp_path, *changes):
    registry = load_registry()
    base = ("data.source.rows=4000", "train.batch_size=256", "model.selector.use=optfs", "model.embedding.dim=4")
    options = ("model.selector.penalty=1e-4", "model.selector.rate=3e-2", "model.selector.epochs=3")
    changes = (*base, *options, "model.selector.temperature=20", "train.learning_rate=1e-2", *changes)
    recipe = load_recipe(find_recipe("quickstart"), registry, changes)
    prepared = prepare(recipe.data, build_source(recipe, registry, data_root(recipe, None)), tmp_path / "cache")

    def build():
        console = Console(file=(tmp_path / "log.txt").open("w"), width=200)
        folder = tmp_path / "run"
        return build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)

    return build, recipe, registry


STAGES = (
    "[{use: fit, name: search, epochs: 3, patience: 1, snapshot_epoch: 1}, {use: rewind, to: search}, {use: prune}, "
    "{use: fit, name: retrain, epochs: 1}, {use: evaluate, metrics: [auc]}, {use: export}]"
)


def test_a_run_searches_to_the_end_rewinds_prunes_and_trains_what_is_left(tmp_path):
    build, recipe, registry = start(tmp_path, f"stages={STAGES}")
    run = build()
    run_stages(run, recipe, registry)
    run.console.file.flush()
    told = (tmp_path / "log.txt").read_text()
    folder = tmp_path / "run"
    history = json.loads((folder / "1-search" / "history.json").read_text())
    assert history["best_epoch"] == len(history["epochs"]) == 3, "the last gates count"
    searched, snapshot = (load_file(folder / "1-search" / f"{name}.safetensors") for name in ("model", "snapshot"))
    rewound = load_file(folder / "2-rewind" / "model.safetensors")
    for name, tensor in rewound.items():
        assert torch.equal(tensor, (searched if name.startswith("selector.") else snapshot)[name]), name
    assert not torch.equal(searched["selector.gate"], snapshot["selector.gate"])
    assert not torch.equal(searched["embedding.weight"], snapshot["embedding.weight"])
    assert float(searched["selector.level"]) == 2

    decided, pruned = build(), build()
    decided.model.load_state_dict(rewound)
    decided.model.selector.anneal(1.0)
    kept = decided.model.kept()
    assert 0 < sum(int(m.sum()) for m in kept.rows.values()) < len(rewound["selector.gate"])
    pruned.model = pruned.model.prune(kept)
    pruned.model.load_state_dict(load_file(folder / "3-prune" / "model.safetensors"))
    batch = next(iter(EvalBatches(run.splits["test"], 10**6)))[1]
    task = run.schema.tasks[0]
    assert torch.equal(pruned.model.eval()(batch)[task], decided.model.eval()(batch)[task])
    assert run.model.selector.factor() == pytest.approx(1.60653, abs=1e-5)
    assert run.model.embedding.flat.numel() < rewound["embedding.weight"].numel()

    assert "the gate of a value that is never seen goes from 0.5 to -" in told
    assert f"optfs keeps {sum(int(m.sum()) for m in kept.rows.values())} of {len(rewound['selector.gate'])} " in told
    _, exported, _ = load_trained(folder / "export", registry, Console(quiet=True))
    sent = exported.encoder.schema
    assert [f.rows for f in sent.fields] == [f.rows for f in run.schema.fields]
    assert exported.model.selector.factor() == run.model.selector.factor()
    orders = run.model.row_order() if "kept values first" in told else None
    moved = batch if orders is None else renumbered(batch, Layout.of(run.schema), orders)
    assert torch.equal(exported.model.eval()(moved)[task], run.model.eval()(batch)[task])


def test_a_search_too_short_for_its_penalty_is_warned_of(tmp_path):
    build, recipe, registry = start(tmp_path, "model.selector.penalty=1e-12", "stages=[{use: fit, epochs: 1}]")
    run = build()
    run_stages(run, recipe, registry)
    run.console.file.flush()
    assert "so rare values will hardly go; raise `penalty` or `rate`" in (tmp_path / "log.txt").read_text()
