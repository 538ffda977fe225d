"""OptFS against loops over values: gates, penalty, Adam, schedule; what pruning leaves."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.api import EncodedSchema, Field, Fields, History, RecipeError, Table
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.nn.sequence import MeanPool
from recsys.testing import contract, samples
from recsys_optfs import CHUNK, OptFS

SCHEMA = EncodedSchema(
    (Field("item", 9), Field("price", 2, numeric=True), Field("city", 5), Field("twin", 5, shares="city")),
    (History("past", (Field("seen", 9, shares="item"), Field("shop", 4)), 3, ("item", "city")),),
)
FIELDS = Fields(("item", "price", "city", "twin"), (9, 2, 5, 5), 4)
STARTS = (0, 9, 11, 16)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def selector(seed=0, progress=None, **options):
    torch.manual_seed(seed)
    made = OptFS(FIELDS, **{"temperature": 16.0, "penalty": 0.3, "epochs": 3} | options).double()
    torch.nn.init.normal_(made.gate, std=0.3)
    if progress is not None:
        made.anneal(progress)
    return made


@pytest.mark.parametrize("options", [{}, {"fall": 1.0}, {"penalty": 0.0}, {"epochs": 1}, {"start": -0.2}])
def test_contract(options):
    contract("selector", OptFS, temperature=20.0, **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.sampled_from([0.0, 0.4, 0.7]), st.sampled_from([None, 0.0, 0.8]))
def test_gates_and_gradients_are_those_of_the_loop(seed, progress, fall):
    made = selector(seed, progress, fall=fall)
    e = samples.vectors(7, 4, 4, seed).double().requires_grad_()
    ids = samples.ids(7, FIELDS, seed)
    ids[0] = torch.tensor([-3, 2, 5, 99])  # outside: read as unknown, or as missing where the field is numeric
    read = ids.clone()
    read[0] = torch.tensor([1, 0, 1, 1])
    tau = 16.0 ** (math.floor(progress * 3) / 2)
    above = samples.vectors(7, 4, 4, seed + 50).double()
    got = made(e, ids)
    ((got * above).sum() + made.penalty()).backward()
    want_g, gates, out, x = torch.zeros_like(made.gate), made.gate.tolist(), got.detach(), e.detach()
    for b in range(7):
        for f in range(4):
            row = STARTS[f] + int(read[b, f])
            height = gates[row] - (fall or 0.0) * float(made.progress)
            s, scale = sigmoid(tau * height), sigmoid(0.5)
            for k in range(4):
                assert abs(float(out[b, f, k]) - float(x[b, f, k]) * s / scale) <= 1e-9
                assert abs(float(e.grad[b, f, k]) - float(above[b, f, k]) * s / scale) <= 1e-9
                want_g[row] += float(above[b, f, k] * x[b, f, k]) * tau * s * (1 - s) / scale
    total = 0.0
    for row, g in enumerate(gates):
        s = sigmoid(tau * g)
        total += s * (fall is None)
        want_g[row] += 0.3 * tau * s * (1 - s) * (fall is None)
    assert abs(float(made.penalty().detach()) - 0.3 * total) <= 1e-9
    assert (made.gate.grad - want_g).abs().max() <= 1e-9


def test_the_penalty_reaches_every_value_also_across_chunks():
    made = OptFS(Fields(("a", "b"), (CHUNK + 5, 7), 2), penalty=2.0, temperature=4.0, epochs=2).double()
    made.anneal(0.5)
    torch.manual_seed(0)
    torch.nn.init.normal_(made.gate)
    value = made.penalty()
    (value * 3).backward()
    s = (4 * made.gate.detach()).sigmoid()
    torch.testing.assert_close(value, 2 * s.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(made.gate.grad, 3 * 2 * 4 * s * (1 - s), rtol=1e-12, atol=0)


@pytest.mark.parametrize("interaction", [FM, MLP])
def test_at_the_start_the_model_is_the_ungated_one(interaction):
    torch.manual_seed(0)
    table = Table(SCHEMA, dim=4, init_std=1.0)
    parts = [interaction(Model.consumer_fields(SCHEMA, table))]
    head, pools = Head(SCHEMA, parts), {"past": MeanPool(8)}
    batch = samples.batch(20, SCHEMA)
    plain = Model(SCHEMA, table, KeepAll(table.fields), pools, parts, head)(batch)["label"]
    gated = Model(SCHEMA, table, OptFS(table.fields), pools, parts, head)(batch)["label"]
    torch.testing.assert_close(gated, plain, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3000), st.sampled_from([10.0, 1e4]))
@example(49, 10, 10.0)  # 1 / 49 · 49 is less than 1
def test_the_temperature_rises_with_the_epoch_and_only_then(epochs, steps, last):
    made = OptFS(FIELDS, epochs=epochs, temperature=last)
    for epoch in range(epochs):
        want = last ** (epoch / (epochs - 1)) if epochs > 1 else 1.0
        for step in (0, steps // 2, steps - 1):
            made.anneal((epoch * steps + step) / (epochs * steps))
            before = copy.deepcopy(made.state_dict())
            made.eval()(samples.vectors(3, 4, 4), samples.ids(3, FIELDS))
            assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
            assert float(made.heat()) == pytest.approx(want, rel=1e-5)
    if (epochs, last) == (5, 1e4):
        assert want == 1e4


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1e-8, 1e-2]))
def test_gates_move_by_adam_and_rest_where_a_step_is_skipped(seed, eps):
    made = selector(seed, eps=eps, rate=0.01)
    g, m, v, done = made.gate.tolist(), [0.0] * 21, [0.0] * 21, 0
    for step in range(7):
        gradient = torch.zeros_like(made.gate) if step in (3, 4) else 1e-2 * torch.randn_like(made.gate)
        made.gate.grad = gradient.clone()
        made.after_step()
        if step in (3, 4):
            continue
        done += 1
        for i, d in enumerate(gradient.tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * d, 0.999 * v[i] + 0.001 * d * d
            g[i] -= 0.01 * (m[i] / (1 - 0.9**done)) / (math.sqrt(v[i] / (1 - 0.999**done)) + eps)
    assert (made.gate.detach() - torch.tensor(g, dtype=torch.float64)).abs().max() <= 1e-9
    made.gate.grad = None
    made.after_step()
    assert float(made.steps) == done


def test_a_selector_with_the_state_of_another_goes_on_to_the_same_bits():
    one = selector().float()
    for _ in range(3):
        one.gate.grad = torch.randn_like(one.gate)
        one.after_step()
    other = selector(seed=5).float()
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        gradient = torch.randn_like(one.gate)
        for made in (one, other):
            made.gate.grad = gradient.clone()
            made.after_step()
    assert torch.equal(one.gate, other.gate)


def test_a_model_holds_the_gates_but_not_what_adam_remembers():
    model, plain = whole_model(), whole_model()
    plain.selector = KeepAll(plain.embedding.fields)
    gates, schedule = 4 * 21, 4 + 8
    assert model.bytes() == plain.bytes() + gates + schedule


def search(made, steps):
    """Train the gates alone, on a row in which larger ones are better."""
    ids = torch.tensor([[2, 1, 2, 2]])
    for step in range(steps):
        made.anneal(step / steps)
        (made(torch.ones(1, 4, 4), ids).sum() * -0.1 + made.penalty()).backward()
        made.after_step()
        made.gate.grad = None
    return made


@pytest.mark.parametrize(("eps", "penalty"), [(1e-8, 3e-9), (1e-6, 1e-6), (1e-15, 1e-9)])
def test_a_value_never_seen_obeys_the_simulated_trajectory(eps, penalty):
    options = {"eps": eps, "penalty": penalty, "rate": 2e-3, "epochs": 4, "temperature": 30.0}
    made = search(OptFS(FIELDS, **options), 600)
    g, m, v = 0.5, 0.0, 0.0
    for step in range(600):
        tau = 30.0 ** ((step // 150) / 3)
        d = penalty * tau * sigmoid(tau * g) * (1 - sigmoid(tau * g))
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        g -= 2e-3 * (m / (1 - 0.9 ** (step + 1))) / (math.sqrt(v / (1 - 0.999 ** (step + 1))) + eps)
    assert g < 0.45
    assert made.untouched(600) == pytest.approx(g, abs=1e-9)
    assert made.gate.tolist()[3:9] == pytest.approx([g] * 6, abs=2e-3)
    assert float(made.gate[2].detach()) > 0.5, "the one that is seen goes its own way"


@pytest.mark.parametrize(
    ("options", "end", "sooner"),
    [
        ({"penalty": 2e-9, "temperature": 1e3, "epochs": 10}, -0.43, 0.44),
        ({"penalty": 5e-9, "temperature": 200.0, "epochs": 15}, -1.01, -0.21),
        ({}, -0.52, 0.42),
        ({"penalty": 2e-9, "temperature": 1e3, "epochs": 10, "eps": 1e-6}, 0.494, None),
        ({"penalty": 2e-9, "temperature": 1e3, "epochs": 10, "eps": 1e-15}, -3.2, None),
    ],
)
def test_eps_and_the_number_of_steps_decide_over_rare_values(options, end, sooner):
    """FM, DeepFM and DCN as published for Criteo, with epochs of its length and with a tenth of the steps."""
    made = OptFS(FIELDS, **options)
    assert made.untouched(8950 * made.epochs) == pytest.approx(end, abs=0.04 if end < -3 else 0.006)
    if sooner is not None:
        assert made.untouched(895 * made.epochs) == pytest.approx(sooner, abs=0.006)


@pytest.mark.parametrize("eps", [1e-8, 1e-4])
@pytest.mark.parametrize("steps", [40, 400])
def test_at_one_rate_neither_eps_nor_the_number_of_steps_counts(eps, steps):
    made = search(OptFS(FIELDS, fall=0.8, eps=eps, epochs=4, temperature=30.0), steps)
    assert torch.equal(made.gate.detach()[3:9], torch.full((6,), 0.5))
    assert made.height()[3:9].tolist() == pytest.approx([0.5 - 0.8 * (1 - 1 / steps)] * 6)
    assert made.untouched(steps) == pytest.approx(-0.3)
    assert not made.kept().rows["item"][3:].any()


def test_a_closed_gate_of_fm_takes_all_pairs_of_the_value():
    torch.manual_seed(0)
    e, ids = samples.vectors(6, 4, 4).double(), samples.ids(6, FIELDS)
    made = selector(progress=1.0)
    fm = FM(FIELDS)
    torch.nn.init.constant_(made.gate, 1.0)
    whole = fm(made(e, ids)).sum(1)
    with torch.no_grad():
        made.gate[int(ids[2, 0])] = -1.0
    change = whole - fm(made(e, ids)).sum(1)
    for b in range(6):
        pairs = sum(float(e[b, 0] @ e[b, f]) for f in (1, 2, 3)) * made.factor() ** 2
        assert float(change[b].detach()) == pytest.approx(pairs if ids[b, 0] == ids[2, 0] else 0.0, abs=1e-9)


def whole_model(seed=0):
    torch.manual_seed(seed)
    table = Table(SCHEMA, dim=4, init_std=1.0)
    made = OptFS(table.fields)
    torch.nn.init.normal_(made.gate)
    made.anneal(1.0)
    parts = [MLP(Model.consumer_fields(SCHEMA, table), hidden=(8,))]
    # The mean of the events does not read the target, which has the ungated vectors.
    return Model(SCHEMA, table, made, {"past": MeanPool(8)}, parts, Head(SCHEMA, parts, wide=True)).eval()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99))
def test_pruned_is_masked_bit_for_bit_and_smaller(seed):
    model = whole_model(seed)
    batch = samples.batch(50, SCHEMA, seed)
    kept = model.kept()
    small = model.prune(kept)
    assert torch.equal(small(batch)["label"], model(batch)["label"])
    assert small.selector.factor() == 1 / sigmoid(0.5) == pytest.approx(1.60653, abs=1e-5)
    rows = sum(t.numel() for t in model.embedding.export_tables().values())
    left = small.embedding.flat.numel()
    shops = 4  # the history's own vocabulary stays whole, and so do the items, which its events read
    assert (
        left
        == 4 * (1 + 9 + int(kept.rows["price"].sum()) * 1 + int((kept.rows["city"] | kept.rows["twin"]).sum()))
        + 4 * shops
    )
    assert left <= rows + 4
    again = small.prune(kept)
    assert torch.equal(again(batch)["label"], small(batch)["label"]), "the multiplier stays when pruned again"


def test_what_was_dropped_gets_no_gradient_and_the_multiplier_outlives_quantizing():
    torch.manual_seed(3)
    schema = EncodedSchema((Field("a", 40), Field("b", 30)))
    table = Table(schema, dim=4, init_std=1.0)
    made = OptFS(table.fields)
    torch.nn.init.normal_(made.gate)
    parts = [FM(table.fields)]
    model = Model(schema, table, made, {}, parts, Head(schema, parts))
    kept = model.kept()
    small = model.prune(kept).train()
    assert small.embedding.flat.numel() == 4 * (1 + int(kept.rows["a"].sum()) + int(kept.rows["b"].sum()))
    gone = torch.stack([(~kept.rows[n]).nonzero().squeeze(1)[:9] for n in ("a", "b")], 1)
    x = small.represent(gone)
    assert not x.any()
    (x * torch.randn_like(x)).sum().backward()
    assert not small.embedding.flat.grad.any()
    batch = samples.batch(30, schema)
    rounded = small.eval().quantized("float16")
    torch.testing.assert_close(rounded(batch)["label"], small(batch)["label"], rtol=1e-2, atol=1e-2)
    assert rounded.selector.factor() == made.factor()


def test_a_field_without_values_is_gone_and_hashed_fields_are_refused():
    made = selector()
    with torch.no_grad():
        made.gate[9:11] = -1.0
    assert "price" not in made.kept().fields
    assert torch.equal(made.scores()["city"], made.gate.detach()[11:16])
    with pytest.raises(RecipeError, match="'url' has 4,611,686,018,427,387,904 ids"):
        OptFS(Fields(("url",), (1 << 62,), 4))
