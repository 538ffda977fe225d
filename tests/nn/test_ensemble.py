"""An ensemble against its members, each built and trained as a model of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export

from recsys.contracts import Batch, EncodedSchema, Field, Selection
from recsys.errors import RecipeError
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP, CrossNet
from recsys.nn.model import Model, TensorModel
from recsys.nn.selection import KeepAll
from recsys.nn.table import Table
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_model
from recsys.recipe.check import load_recipe

SCHEMA = EncodedSchema((Field("a", 7), Field("x", 2, numeric=True), Field("b", 5)), tasks=("click", "buy"))
DIM = 4


def make(members, dim=DIM, wide=True, schema=SCHEMA):
    torch.manual_seed(members)
    table = Table(schema, dim=dim * members, init_std=0.5)
    fields = Model.consumer_fields(schema, table, members)
    parts = [part for _ in range(members) for part in (FM(fields), MLP(fields, hidden=(6,)), CrossNet(fields))]
    head = Head(schema, parts, wide=wide, members=members)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    return Model(schema, table, KeepAll(table.fields), {}, parts, head).double()


def alone(model, m):
    """Member m as a model of its own, with copies of its weights."""
    own = make(1, wide=model.head.wide is not None, schema=model.schema)
    tasks = len(model.schema.tasks)
    mine = slice(m * tasks, (m + 1) * tasks)
    with torch.no_grad():
        own.embedding.weight.copy_(model.embedding.weight[:, m * DIM : (m + 1) * DIM])
        for i in range(3):
            own.interactions[i].load_state_dict(model.interactions[3 * m + i].state_dict())
        own.head.bias.copy_(model.head.bias[mine])
        own.head.weight.copy_(model.head.weight[mine])
        if own.head.wide is not None:
            own.head.wide.weight.copy_(model.head.wide.weight[:, mine])
    return own


def batch(rows=6, seed=0, schema=SCHEMA):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, f.rows, (rows,), generator=g) for f in schema.fields], 1)
    values = torch.rand(rows, len(schema.fields), generator=g).double()
    label = {t: torch.randint(0, 2, (rows,), generator=g).float() for t in schema.tasks}
    return Batch(ids, values, label=label)


def loss(logits, rows):
    """Binary cross-entropy in double precision."""
    terms = [torch.nn.functional.softplus(z) - rows.label[t].double() * z for t, z in logits.items()]
    return torch.stack(terms).mean()


@settings(max_examples=15, deadline=None)
@given(members=st.integers(1, 4), wide=st.booleans(), seed=st.integers(0, 5))
def test_its_logit_is_the_mean_of_its_members_and_each_learns_as_if_alone(members, wide, seed):
    model, rows = make(members, wide=wide), batch(seed=seed)
    each = model.each(rows)
    assert len(each) == members
    torch.stack([loss(logits, rows) for logits in each]).mean().backward()
    models = [alone(model, m) for m in range(members)]
    for task in SCHEMA.tasks:
        mean = sum(m(rows)[task] for m in models) / members
        torch.testing.assert_close(model(rows)[task], mean, rtol=1e-12, atol=1e-12)
    for m, own in enumerate(models):
        loss(own(rows), rows).backward()
        pairs = [(model.embedding.weight.grad[:, m * DIM : (m + 1) * DIM], own.embedding.weight.grad)]
        for i in range(3):
            ours, theirs = (list(p.parameters()) for p in (model.interactions[3 * m + i], own.interactions[i]))
            pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
        mine = slice(m * 2, (m + 1) * 2)
        pairs += [
            (model.head.bias.grad[mine], own.head.bias.grad),
            (model.head.weight.grad[mine], own.head.weight.grad),
        ]
        if wide:
            pairs.append((model.head.wide.weight.grad[:, mine], own.head.wide.weight.grad))
        for ours, theirs in pairs:
            torch.testing.assert_close(ours * members, theirs, rtol=1e-10, atol=1e-12)


def test_the_loss_of_the_mean_is_not_what_is_learned():
    """What a fake would do: train the mean of the logits, so that the members lean on each other."""
    model, rows = make(3), batch()
    each = torch.stack([loss(logits, rows) for logits in model.each(rows)]).mean()
    assert float((each - loss(model(rows), rows)).detach()) > 1e-3  # by convexity it is larger


def test_pruned_it_gives_the_masked_predictions_and_its_graph_takes_any_batch():
    model = make(2).eval()
    keep = Selection(("a", "x", "b"), {"a": torch.arange(7) % 3 > 0}, {"b": torch.arange(2 * DIM) > 2})
    small = model.prune(keep)
    masked = make(2).eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        a, b = masked.embedding.weight[:7], masked.embedding.weight[9:]
        a[~keep.rows["a"]] = 0
        b[:, ~keep.dims["b"]] = 0
    rows = batch(9)
    for task, logit in small(rows).items():
        torch.testing.assert_close(logit, masked(rows)[task], rtol=0, atol=0)
    rows_of = {0: Dim("batch", min=1)}
    example = batch(5)
    program = export(TensorModel(model), (example.ids, example.values), dynamic_shapes=(rows_of, rows_of))
    for task, logit in program.module()(rows.ids, rows.values).items():
        torch.testing.assert_close(logit, model(rows)[task])


RECIPE = """
data:
  source: {{use: simulated, rows: 2000}}
  label: y
  categorical: [user, item, device]
model:
  embedding: {{use: table, dim: {dim}}}
  interaction: [fm, {{use: mlp, hidden: [8]}}]
  head: {{wide: true, ensemble: 3}}
"""


def test_a_recipe_builds_members_with_different_weights_and_says_what_does_not_divide(tmp_path):
    registry = load_registry()
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(dim=12))
    schema = EncodedSchema((Field("user", 9), Field("item", 9), Field("device", 4)), tasks=("y",))
    model = build_model(load_recipe(file, registry), registry, schema, 0)
    assert len(model.interactions) == 6
    assert model.head.wide.weight.shape == (22, 3)
    first, second = model.interactions[1].stack.layers[0], model.interactions[3].stack.layers[0]
    assert first.weight.shape == (8, 12)
    assert not torch.equal(first.weight, second.weight)
    file.write_text(RECIPE.format(dim=10))
    with pytest.raises(RecipeError, match=r"r.yaml:\d+.*ensemble: an embedding of 10 .* such as 9 or 12"):
        build_model(load_recipe(file, registry), registry, schema, 0)
