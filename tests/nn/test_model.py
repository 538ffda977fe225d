"""The whole model against the same computation written field by field, and pruning end to end."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recsys.contracts import Batch, EncodedSchema, Field, History, Selection
from recsys.errors import PluginError, RecipeError
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP, CrossNet
from recsys.nn.model import Model, TensorModel, Vectors
from recsys.nn.selection import KeepAll
from recsys.nn.sequence import MeanPool
from recsys.nn.table import Table

DIM = 4
SCHEMA = EncodedSchema(
    fields=(Field("user", 30), Field("price", 2, numeric=True), Field("item", 40)),
    histories=(
        History("past", (Field("item", 40, shares="item"), Field("shop", 8)), 5, ("item", "user")),
        History("tags", (Field("tag", 9),), 4),
    ),
    tasks=("click", "buy"),
)


class DotPool(nn.Module):
    """Weights events by their product with the target: what shows that the right target arrives."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, target, history, length):
        valid = torch.arange(history.shape[1]) < length.unsqueeze(1)
        return (valid.unsqueeze(-1) * history * (history @ target.unsqueeze(-1))).sum(1)


def make(wide=True, parts=None, selector=None, seed=0):
    torch.manual_seed(seed)
    table = Table(SCHEMA, dim=DIM, init_std=0.5)
    fields = Model.consumer_fields(SCHEMA, table)
    if parts is None:
        parts = [FM(fields), MLP(fields, hidden=(6,)), CrossNet(fields, layers=2)]
    head = Head(SCHEMA, parts, wide=wide)
    for p in head.parameters():
        nn.init.normal_(p)
    sequences = {"past": DotPool(2 * DIM)}
    return Model(SCHEMA, table, selector or KeepAll(table.fields), sequences, parts, head).eval()


def make_batch(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ints(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    ids = torch.stack([ints(30, rows), ints(2, rows), ints(40, rows)], 1)
    past = torch.stack([ints(40, rows, 5), ints(8, rows, 5)], 2)
    history = {"past": (past, ints(6, rows)), "tags": (ints(9, rows, 4, 1), ints(5, rows))}
    values = torch.ones(rows, 3)
    values[:, 1] = torch.rand(rows, generator=g)
    label = {t: ints(2, rows).float() for t in SCHEMA.tasks}
    return Batch(ids, values, history, label)


def take(batch, rows):
    history = {k: (i[rows], n[rows]) for k, (i, n) in batch.history.items()}
    return Batch(batch.ids[rows], batch.values[rows], history)


def test_every_part_reaches_the_logit_as_the_formula_says():
    model, batch = make(), make_batch()
    w = model.embedding.weight
    user, price, item, shop, tag = w.split([30, 2, 40, 8, 9])
    fm, mlp, cross = model.interactions
    for b in range(len(batch)):
        i, x = batch.ids[b].tolist(), batch.values[b, 1]
        e = [user[i[0]], price[i[1]] * (x if i[1] == 1 else 1), item[i[2]]]
        target = torch.cat([e[2], e[0]])
        past, n = batch.history["past"][0][b].tolist(), int(batch.history["past"][1][b])
        events = [torch.cat([item[p], shop[s]]) for p, s in past[:n]]
        pooled = sum((h * (h @ target) for h in events), torch.zeros(2 * DIM))
        tags, n = batch.history["tags"][0][b, :, 0].tolist(), int(batch.history["tags"][1][b])
        mean = torch.stack([tag[t] for t in tags[:n]]).mean(0) if n else torch.zeros(DIM)
        matrix = torch.stack([*e, pooled[:DIM], pooled[DIM:], mean]).unsqueeze(0)
        h = torch.cat([mlp(matrix), cross(matrix)], 1)[0]
        first = model.head.wide.weight
        wide = first[i[0]] + first[30 + i[1]] * (x if i[1] == 1 else 1) + first[32 + i[2]]
        for t, task in enumerate(SCHEMA.tasks):
            want = model.head.weight[t] @ h + fm(matrix)[0, 0] + wide[t] + model.head.bias[t]
            assert model(batch)[task][b].item() == pytest.approx(want.item(), abs=1e-4)


def test_interactions_see_fields_then_history_columns():
    fields = Model.consumer_fields(SCHEMA, Table(SCHEMA, dim=DIM))
    assert fields.names == ("user", "price", "item", "past.item", "past.shop", "tags.tag")
    assert fields.rows == (30, 2, 40, 40, 8, 9)
    assert fields.dim == DIM


def test_a_model_of_logits_only_has_just_the_bias_in_its_head():
    fields = Model.consumer_fields(SCHEMA, Table(SCHEMA, dim=DIM))
    head = Head(SCHEMA, [FM(fields)])
    assert [tuple(p.shape) for p in head.parameters()] == [(2,)]


class HalfGate(nn.Module):
    """A selector that doubles everything and has a parameter, a penalty and an opinion."""

    def __init__(self, fields):
        super().__init__()
        self.fields = fields
        self.gate = nn.Parameter(torch.full((len(fields),), 2.0))

    def forward(self, e, ids):
        return e * self.gate.view(1, -1, 1)

    def penalty(self):
        return self.gate.sum()

    def anneal(self, progress):
        pass

    def kept(self):
        return Selection(self.fields.names[:2])

    def scores(self):
        return {}


def test_the_selector_gates_scalar_fields_after_the_target_was_taken():
    plain = make()
    gated = make(selector=HalfGate(plain.embedding.fields))
    batch = make_batch()
    inputs = (batch.ids, batch.values, batch.history)
    assert torch.equal(gated.represent(*inputs)[:, :3], 2 * plain.represent(*inputs)[:, :3])
    assert torch.equal(gated.represent(*inputs)[:, 3:], plain.represent(*inputs)[:, 3:])
    assert gated.penalty().item() == 6.0
    assert plain.penalty().item() == 0.0


class Taught(nn.Module):
    """Passes on what it is; its loss is a number per batch."""

    def __init__(self, part, share):
        super().__init__()
        self.part, self.share = part, share
        self.width, self.is_logit = part.width, getattr(part, "is_logit", False)

    def forward(self, *inputs):
        return self.part(*inputs)

    def auxiliary(self, batch):
        return self.share * batch.label["click"].sum()


def test_the_losses_of_the_parts_add_up():
    plain, batch = make(), make_batch(rows=8)
    assert (clicks := batch.label["click"].sum().item()) > 0
    assert plain.auxiliary(batch).tolist() == 0.0
    fm, mlp, cross = plain.interactions
    taught = make(parts=[Taught(fm, 1.0), mlp, Taught(cross, 10.0)])
    taught.sequences[0] = Taught(taught.sequences[0], 100.0)
    taught.embedding.auxiliary = lambda batch: 1000.0 * batch.label["click"].sum()
    assert taught.auxiliary(batch).tolist() == 1111.0 * clicks


class Masked(nn.Module):
    """The whole embedding with the dropped parts of its output multiplied by zero: the slow reference of pruning."""

    def __init__(self, table, selection):
        super().__init__()
        self.table, self.fields, self.selection = table, table.fields, selection

    def forward(self, ids, values):
        e = self.table(ids, values)
        gates = []
        for f, name in enumerate(self.fields.names):
            rows = self.selection.rows.get(name, torch.ones(self.fields.rows[f]))
            dims = self.selection.dims.get(name, torch.ones(DIM))
            gates.append(rows[ids[:, f]].unsqueeze(1) * dims * float(name in self.selection.fields))
        return e * torch.stack(gates, 1)

    def history(self, group, ids):
        return self.table.history(group, ids)


@st.composite
def selections(draw):
    def bits(n):
        return torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))

    names = ("user", "price", "item")
    sizes = {"user": 30, "price": 2, "item": 40}
    return Selection(
        tuple(n for n in names if draw(st.integers(0, 3))),
        {n: bits(sizes[n]) for n in names if draw(st.booleans())},
        {n: bits(DIM) for n in names if draw(st.booleans())},
    )


@settings(max_examples=30, deadline=None)
@given(selections(), st.integers(0, 1000))
def test_pruned_predictions_are_the_masked_ones_bit_for_bit(selection, seed):
    model, batch = make(seed=seed), make_batch(rows=32, seed=seed)
    masked = copy.deepcopy(model)
    masked.embedding = Masked(model.embedding, selection)
    before = copy.deepcopy(model.state_dict())
    got, want = model.prune(selection)(batch), masked(batch)
    for task in SCHEMA.tasks:
        assert torch.equal(got[task], want[task])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_pruning_makes_the_model_smaller_and_drops_the_selector():
    model = make(selector=HalfGate(make().embedding.fields))
    small = model.prune(Selection(("user",), {"user": torch.arange(30) < 5}))
    assert isinstance(small.selector, KeepAll)
    # 25 user rows and the price block of 2 are gone; the items stay for the history that reads them. 4-byte
    # numbers; the map and the places of 6 columns are what comes in exchange.
    assert small.embedding.flat.numel() == DIM * (1 + 5 + 40 + 8 + 9)
    assert small.bytes() < model.bytes()
    shared = {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_bytes_are_those_of_what_must_be_kept():
    model = make()
    assert model.bytes() == sum(4 * p.numel() for p in model.parameters())


def test_no_row_sees_another():
    model, batch = make(), make_batch()
    whole = model(batch)
    for b in range(len(batch)):
        alone = model(take(batch, slice(b, b + 1)))
        for task in SCHEMA.tasks:
            assert torch.allclose(alone[task][0], whole[task][b], atol=1e-5)


def test_more_padding_changes_nothing():
    model, batch = make(), make_batch()
    longer = {
        k: (torch.cat([i, torch.full_like(i[:, :1], 3)], 1), n) for k, (i, n) in batch.history.items()
    }  # what stands behind the end is not even null
    assert torch.equal(model.logits(batch.ids, batch.values, longer)["click"], model(batch)["click"])


def test_logits_are_float32_under_autocast():
    model, batch = make(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch)["click"]
    assert half.dtype == torch.float32
    assert torch.allclose(half, model(batch)["click"], rtol=0.1, atol=0.3)


def test_a_head_in_half_precision_still_adds_up_in_float32():
    fields = Model.consumer_fields(SCHEMA, Table(SCHEMA, dim=DIM))
    head = Head(SCHEMA, [FM(fields)]).bfloat16()
    parts = torch.tensor([[256.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)  # 259 has no bfloat16
    logit = head([parts], torch.zeros(1, 3, dtype=torch.int64), None)["click"]
    assert logit.dtype == torch.float32
    assert logit.item() == 259.0


@pytest.mark.parametrize("pruned", [False, True])
def test_export_with_any_batch_size_and_history_length(pruned):
    model = make()
    model = model.prune(Selection(("user", "item"), {"user": torch.arange(30) < 9})) if pruned else model
    batch, any_size = make_batch(), torch.export.Dim.DYNAMIC
    lists = ({0: any_size, 1: any_size}, {0: any_size})
    shapes = ({0: any_size}, {0: any_size}, {"past": lists, "tags": lists})
    program = torch.export.export(
        TensorModel(model), (batch.ids, batch.values, dict(batch.history)), dynamic_shapes=shapes
    )
    other = make_batch(rows=13, seed=5)
    history = {k: (torch.cat([i, i], 1), n) for k, (i, n) in other.history.items()}
    got = program.module()(other.ids, other.values, history)
    for task, logit in model.logits(other.ids, other.values, history).items():
        assert torch.allclose(got[task], logit, atol=1e-5)


def test_the_graph_does_not_grow_with_the_fields():
    def nodes(count):
        schema = EncodedSchema(tuple(Field(f"f{i}", 5) for i in range(count)))
        table = Table(schema, dim=2)
        parts = [FM(table.fields), MLP(table.fields, hidden=(3,))]
        model = Model(schema, table, KeepAll(table.fields), {}, parts, Head(schema, parts, wide=True))
        program = torch.export.export(TensorModel(model), (torch.zeros(4, count, dtype=torch.int64),))
        return len(program.graph.nodes)

    assert nodes(2) == nodes(30)


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        model = make()
    assert model.bytes() == make().bytes()
    assert all(p.device.type == "meta" for p in model.parameters())


def test_explanations_carry_their_layer():
    explained = make().explain(make_batch())
    assert set(explained) == {"0.FM.pairs", "2.CrossNet.cross"}
    assert explained["0.FM.pairs"].shape == (6, 6, 6)


def test_sequences_must_fit_the_histories():
    table = Table(SCHEMA, dim=DIM)
    fields = Model.consumer_fields(SCHEMA, table)
    parts = [FM(fields)]

    def build(sequences, schema=SCHEMA):
        return Model(schema, table, KeepAll(table.fields), sequences, parts, Head(schema, parts))

    with pytest.raises(RecipeError, match="'past' has a target"):
        build({})
    with pytest.raises(RecipeError, match="given for 'pats'"):
        build({"past": MeanPool(8), "pats": MeanPool(8)})


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("interaction", lambda y: y.unsqueeze(1), "MLP gave [6, 1, 6] for a batch of 6 rows, expected [B, 6]"),
        ("interaction", lambda y: y[:, :2], "MLP gave [6, 2] for a batch of 6 rows, expected [B, 6]"),
        ("selector", lambda y: y[:, :1], "KeepAll gave [6, 1, 4] for a batch of 6 rows, expected [B, {f}, 4]"),
        ("embedding", lambda y: y.flatten(1), "Table gave [6, {w}] for a batch of 6 rows, expected [B, {f}, 4]"),
        ("sequence", lambda y: y[:, :1], "DotPool gave [6, 1] for a batch of 6 rows, expected [B, 8]"),
    ],
)
def test_a_part_that_gives_a_wrong_shape_is_named(part, spoil, message):
    model = make()
    parts = {"interaction": model.interactions[1], "sequence": model.sequences[0]}
    parts |= {"selector": model.selector, "embedding": model.embedding}
    parts[part].register_forward_hook(lambda module, inputs, output: spoil(output))
    f = len(SCHEMA.fields)
    with pytest.raises(PluginError) as caught:
        model(make_batch())
    assert str(caught.value) == message.format(f=f, w=DIM * f)


EDGES = {
    "one field": EncodedSchema((Field("a", 5),)),
    "one row": EncodedSchema((Field("a", 1), Field("b", 2))),
    "only numbers": EncodedSchema((Field("x", 2, numeric=True), Field("y", 2, numeric=True))),
    "only a bag": EncodedSchema((), (History("tags", (Field("tag", 6),), 3),)),
    "two tasks": EncodedSchema(
        (Field("a", 5), Field("x", 2, numeric=True)),
        (History("past", (Field("a", 5, shares="a"),), 3, ("a",)),),
        ("t", "u"),
    ),
}


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("schema", EDGES.values(), ids=EDGES)
def test_schemas_at_the_edge_predict_train_and_are_pruned_twice(schema, dim):
    torch.manual_seed(0)
    table = Table(schema, dim=dim, init_std=0.5)
    fields = Model.consumer_fields(schema, table)
    parts = [FM(fields), MLP(fields, hidden=(6,)), CrossNet(fields, layers=2)]
    sequences = {h.name: DotPool(dim * len(h.columns)) for h in schema.histories if h.target}
    model = Model(schema, table, KeepAll(table.fields), sequences, parts, Head(schema, parts, wide=True))

    def batch(rows):
        ids = torch.arange(-3, -3 + rows * len(schema.fields)).view(rows, len(schema.fields))  # wrong ids among them
        values = torch.linspace(-1, 1, ids.numel()).view(ids.shape) if schema.has_numeric else None
        events = {h.name: (torch.arange(rows * 2).view(rows, 2, 1), torch.arange(rows) % 3) for h in schema.histories}
        return Batch(ids, values, events)

    keep = Selection(
        fields.names[:1] if schema.fields else (),
        {c.name: torch.arange(c.rows) % 2 == 0 for c in table.layout.columns},
    )
    narrow = Selection(keep.fields, {}, {c.name: torch.arange(dim) < max(1, dim - 1) for c in table.layout.columns})
    once = model.prune(keep)
    for m in (model, once, once.prune(narrow)):
        out = m(batch(6))
        assert set(out) == set(schema.tasks)
        torch.stack([*out.values()]).sum().backward()
        assert all(v.shape == (6,) and bool(v.isfinite().all()) for v in out.values())
        m.eval()
        for task, logit in m(batch(6)).items():
            alone = torch.cat([m(_row(batch(6), i))[task] for i in range(6)])
            torch.testing.assert_close(logit, alone)
        assert [len(v) for v in m(batch(0)).values()] == [0] * len(schema.tasks)


def _row(batch, i):
    history = {g: (ids[i : i + 1], n[i : i + 1]) for g, (ids, n) in batch.history.items()}
    return Batch(batch.ids[i : i + 1], None if batch.values is None else batch.values[i : i + 1], history)


@pytest.mark.parametrize("field", [0, 1, 2])
def test_vectors_of_another_row_in_the_place_of_a_field_are_that_row_s_value(field):
    """In parts, with one field's vectors swapped, as with its ids swapped; a target's history sees them too."""
    model, batch, other = make(), make_batch(), make_batch(seed=1)
    ids, values = batch.ids.clone(), batch.values.clone()
    ids[:, field], values[:, field] = other.ids[:, field], other.values[:, field]
    vectors = model.look_up(batch.ids, batch.values, batch.history)
    e = vectors.fields.clone()
    e[:, field] = model.embedding(other.ids, other.values)[:, field]
    got = model.decide(model.combine(Vectors(e, vectors.histories), ids), ids, values)
    want = model.logits(ids, values, batch.history)
    for task in SCHEMA.tasks:
        assert torch.equal(got[task], want[task])
        assert not torch.equal(got[task], model(batch)[task])
