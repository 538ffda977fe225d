"""Every installed embedding under every installed interaction: two steps of training, pruned, the same predictions."""

import pytest
import torch
from composition import EMBEDDINGS, INTERACTIONS, OPTIONS, REGISTRY

from recsys.abilities import Counting, Deciding
from recsys.contracts import EncodedSchema, Field, Selection
from recsys.nn.head import Head
from recsys.nn.model import Model
from recsys.nn.optim import build_optimizer
from recsys.nn.selection import KeepAll
from recsys.testing import samples
from recsys.train.losses import BCE

SCHEMA = EncodedSchema((Field("a", 90), Field("b", 60), Field("x", 2, numeric=True), Field("c", 30)))
DIM = 8


def build(embedding, interaction):
    torch.manual_seed(0)
    spec = {"use": embedding, "dim": DIM} | OPTIONS.get(embedding, {})
    table = REGISTRY.build("embedding", spec, SCHEMA, where="model.embedding")
    if isinstance(table, Counting):
        table.take_counts({f.name: 1 + torch.arange(f.rows).flip(0) % 7 for f in SCHEMA.fields})
    fields = Model.consumer_fields(SCHEMA, table)
    named = {"macr": {"user": "a", "item": "c"}, "two_tower": {"item": ["c"]}}  # they read fields by name
    wanted = {"use": interaction, **named.get(interaction, {})}
    part = REGISTRY.build("interaction", wanted, fields, where="model.interaction")
    return Model(SCHEMA, table, KeepAll(table.fields), {}, [part], Head(SCHEMA, [part], wide=True))


def train(model, steps=2):
    optimizer = build_optimizer(model.parameter_groups(), lr=0.05)
    loss = BCE(SCHEMA.tasks)
    model.train()
    for step in range(steps):
        batch = samples.batch(32, model.schema, seed=step)
        optimizer.zero_grad()
        value = model.objective(loss, batch)
        assert bool(value.isfinite())
        value.backward()
        optimizer.step()
        for part in model.stepped():
            part.after_step()


def masked(e, selection, names, ids):
    """`e [B, F, D]` with zeros for what the selection drops."""
    columns = []
    for f, name in enumerate(names):
        keep = torch.ones(e.shape[2], dtype=torch.bool).expand(len(e), -1)
        if name in selection.rows:
            keep = keep & selection.rows[name][ids[:, f]].unsqueeze(1)
        if name in selection.dims:
            keep = keep & selection.dims[name]
        if name in selection.elements:
            keep = keep & selection.elements[name][ids[:, f]]
        columns.append(e[:, f] * (keep & (name in selection.fields)))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_it_trains_is_pruned_and_predicts(embedding, interaction):
    model = build(embedding, interaction)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    moved = [n for n, p in model.embedding.named_parameters() if not torch.equal(p, before[f"embedding.{n}"])]
    assert moved, "training reaches the embedding"
    model.eval()
    selection = model.kept()
    if not isinstance(model.embedding, Deciding):  # something to prune: half of the first field's values
        first = SCHEMA.fields[0]
        selection = Selection(selection.fields, {first.name: torch.arange(first.rows) % 2 == 0})
    small = model.prune(selection)
    batch = samples.batch(40, SCHEMA, seed=9)
    with torch.no_grad():
        x = masked(model.embedding(batch.ids, batch.values), selection, model.embedding.fields.names, batch.ids)
        torch.testing.assert_close(small.embedding(batch.ids, batch.values), x)
        wanted = model.head([part(x) for part in model.interactions], batch.ids, batch.values)
        for task, logit in small(batch).items():
            assert bool(logit.isfinite().all())
            torch.testing.assert_close(logit, wanted[task], rtol=1e-5, atol=1e-6)
    # Where ids share rows, dropping some frees no row: it costs a bit each.
    assert small.bytes() <= model.bytes() + sum(f.rows for f in SCHEMA.fields)
