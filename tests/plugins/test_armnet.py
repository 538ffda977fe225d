"""ARM-Net against the paper's equations in loops, and tasks with a planted pattern."""

import functools
import itertools
import math

import pytest
import torch
from oracles import slow_entmax
from sklearn.metrics import roc_auc_score

from recsys.contracts import EncodedSchema, Field, Fields
from recsys.errors import RecipeError
from recsys.nn.head import Head
from recsys.nn.table import Table
from recsys.plugin.registry import load_registry
from recsys.testing import contract
from recsys_armnet import ARMNet, ARMNetPlus, ExponentialNeurons

OPTIONS = (
    {},
    {"preset": "paper"},
    {"alpha": 1.0},
    {"alpha": 1.7},
    {"alpha": 2.0, "hidden": ()},
    {"alpha": 2.5, "exponent_limit": None},
)


def fields(count, dim):
    return Fields(tuple(f"f{i}" for i in range(count)), (10,) * count, dim)


def slow_net(neurons, e, scaled):
    """y `[B, D, K·o]`, one row, neuron and field at a time: z̃_ij = q_iᵀ W e_j, w = z∘v, y_i = exp(Σ_j w_ij e_j)."""
    rows, count, dim = e.shape
    out = []
    for b in range(rows):
        row = []
        for k in range(neurons.query.shape[0]):
            for i in range(neurons.query.shape[1]):
                scores = []
                for j in range(count):
                    score = neurons.query[k, i] @ (neurons.attention[k].T @ e[b, j])
                    scores.append(score / math.sqrt(dim) if scaled else score)
                z = slow_entmax(torch.stack(scores), neurons.alpha)
                exponent = sum(z[j] * neurons.value[k, i, j] * e[b, j] for j in range(count))
                row.append(exponent.exp())
        out.append(torch.stack(row, 1))
    return torch.stack(out)


def test_it_compiles_as_one_graph_both_ways():
    torch.manual_seed(0)
    model = ARMNetPlus(fields(5, 8), alpha=1.5, heads=2, neurons=3)
    other = ARMNetPlus(fields(5, 8), alpha=1.5, heads=2, neurons=3)
    other.load_state_dict(model.state_dict())
    e = torch.randn(6, 5, 8, requires_grad=True)
    above = torch.randn(6, model.width)
    here, there = model(e), torch.compile(other, fullgraph=True, backend="eager")(e)
    assert torch.allclose(here, there, atol=1e-4)
    (ours,), (theirs,) = (torch.autograd.grad(out, e, above) for out in (here, there))
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.99, 3.01, -1.0, float("nan")])
def test_alpha_out_of_range_is_refused_by_its_place_in_the_recipe(alpha):
    with pytest.raises(RecipeError, match=r"model\.interaction\.alpha") as raised:
        load_registry().build("interaction", {"use": "armnet", "alpha": alpha}, fields(3, 4), where="model.interaction")
    assert len(str(raised.value).splitlines()) <= 2


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0, 2.5])
@pytest.mark.parametrize("scaled", [True, False])
def test_outputs_and_gradients_of_the_neurons_are_those_of_the_loop(alpha, scaled):
    torch.manual_seed(0)
    neurons = ExponentialNeurons(5, 4, 2, 3, alpha, scaled, None).double()
    for p in neurons.parameters():
        torch.nn.init.normal_(p, std=0.7)
    e = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    above = torch.randn(3, 4, 6, dtype=torch.float64)
    wanted_from = [e, *neurons.parameters()]
    fast, slow = neurons(e), slow_net(neurons, e, scaled)
    assert (fast - slow).abs().max() <= 1e-9
    fast_grads = torch.autograd.grad((fast * above).sum(), wanted_from)
    slow_grads = torch.autograd.grad((slow * above).sum(), wanted_from)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert (a - b).abs().max() <= 1e-9
    if alpha > 1:
        assert (neurons.gates(e) == 0).any()


@pytest.mark.parametrize("options", [{"preset": "official"}, {"preset": "paper"}, {"scale": True, "preset": "paper"}])
@pytest.mark.parametrize("training", [True, False])
def test_the_whole_layer_is_that_of_the_loop(options, training):
    torch.manual_seed(0)
    model = ARMNet(fields(4, 3), heads=2, neurons=2, hidden=(5,), batch_norm=False, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.train(training)
    e = torch.randn(3, 4, 3, dtype=torch.float64)
    y = slow_net(model.neurons, e, options["preset"] == "official" or "scale" in options)  # [B, D, K·o]
    if options["preset"] == "official":
        normal = []
        for i in range(4):
            values = y[:, :, i]
            mean, spread = (
                (values.mean(), values.var(correction=0)) if training else (0.0, torch.ones((), dtype=torch.float64))
            )
            normal.append((values - mean) / (spread + 1e-5).sqrt() * model.norm.weight[i] + model.norm.bias[i])
        y = torch.stack(normal, 2)
    (layer,) = (m for m in model.network.modules() if isinstance(m, torch.nn.Linear))
    slow = torch.relu(y.flatten(1) @ layer.weight.T + layer.bias)
    assert (model(e) - slow).abs().max() <= 1e-9


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 2.5])
def test_gradient_of_the_neurons_by_differences(alpha):
    torch.manual_seed(2)
    neurons = ExponentialNeurons(4, 3, 1, 2, alpha, True, None).double()
    e = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(neurons, (e,), atol=1e-5)


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0, 2.5, 1.0])
def test_a_neuron_depends_on_nothing_outside_its_support(alpha):
    torch.manual_seed(0)
    neurons = ExponentialNeurons(6, 4, 2, 3, alpha, False, None)
    e = torch.randn(3, 6, 4) * 2
    rows = [torch.autograd.functional.jacobian(lambda x: neurons(x)[0].sum(0), row[None])[:, 0] for row in e]
    slope = torch.stack(rows).abs().sum(3)  # [B, K·o, F]
    outside = neurons.gates(e).transpose(1, 2) == 0
    if alpha == 1.0:
        assert not outside.any()
        assert (slope > 0).all()
    else:
        assert 0.2 < outside.float().mean() < 0.9
        assert (slope[outside] == 0).all()
        assert (slope[~outside] > 0).all()


def test_zero_values_give_one_and_opposite_values_the_reciprocal():
    torch.manual_seed(0)
    neurons = ExponentialNeurons(5, 4, 2, 3, 1.5, True, None).double()
    e = torch.randn(3, 5, 4, dtype=torch.float64)
    y = neurons(e)
    with torch.no_grad():
        neurons.value.neg_()
    assert torch.allclose(neurons(e), 1 / y, rtol=1e-12)
    assert (y - 1).abs().max() > 0.1
    with torch.no_grad():
        neurons.value.zero_()
    assert torch.equal(neurons(e), torch.ones_like(y))


def test_fixed_gates_give_the_product_of_powers():
    torch.manual_seed(0)
    neurons = ExponentialNeurons(5, 4, 1, 3, 2.0, True, None).double()
    e = torch.randn(3, 5, 4, dtype=torch.float64)
    powers = torch.tensor([[2.0, -1, 0, 3, 1], [1, 1, 1, 1, 1], [0, 0, -2, 0, 0]], dtype=torch.float64)
    with torch.no_grad():
        neurons.query.zero_()  # all scores equal: each gate is 1/F
        neurons.value.copy_(5 * powers)
    product = (e.exp().unsqueeze(1) ** powers.view(1, 3, 5, 1)).prod(2)  # [B, o, D]
    assert torch.allclose(neurons(e).transpose(1, 2), product, rtol=1e-12)
    with torch.no_grad():
        neurons.query.fill_(50.0)
        neurons.attention.copy_(torch.eye(4))
        neurons.value.copy_(powers)
    chosen = e.sum(2).argmax(1)  # the scores are far apart: sparsemax takes the largest alone
    single = torch.stack([(e[b, j] * powers[:, j, None]).exp() for b, j in enumerate(chosen)])
    assert torch.allclose(neurons(e).transpose(1, 2), single, rtol=1e-12)


def test_values_are_the_same_for_all_rows_and_gates_are_not():
    torch.manual_seed(0)
    neurons = ExponentialNeurons(5, 4, 2, 3, 1.5, True, None).double()
    e = torch.randn(20, 5, 4, dtype=torch.float64)
    z, w = neurons.gates(e), neurons.weights(e)
    assert torch.allclose(w, z * neurons.value.flatten(0, 1).T)
    assert (z.std(0) > 1e-3).any()
    # A field orthogonal to all queries moves no gate, and so no weight.
    vectors = (neurons.query @ neurons.attention.transpose(1, 2)).flatten(0, 1)[:3]
    blind = torch.linalg.svd(vectors.detach()).Vh[-1]
    assert torch.allclose(neurons.weights(e + blind)[..., :3], w[..., :3], atol=1e-9)
    assert (neurons(e + blind) - neurons(e)).abs().max() > 1e-2


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_fields_in_another_order_with_their_values_give_the_same(preset):
    torch.manual_seed(0)
    model = ARMNet(fields(6, 4), preset=preset).double().eval()
    e = torch.randn(3, 6, 4, dtype=torch.float64)
    before = model(e)
    order = torch.randperm(6)
    assert (model(e[:, order]) - before).abs().max() > 1e-4
    with torch.no_grad():
        model.neurons.value.copy_(model.neurons.value[:, :, order].clone())
    assert torch.allclose(model(e[:, order]), before, atol=1e-12)


def test_the_sign_of_an_embedding_matters():
    torch.manual_seed(0)
    model = ARMNet(fields(4, 4)).eval()
    e = torch.randn(3, 4, 4)
    assert (model(e) - model(-e)).abs().max() > 1e-3


def test_plus_reads_two_tables_and_adds_two_logits():
    torch.manual_seed(0)
    schema = EncodedSchema(tuple(Field(f"f{i}", 9) for i in range(4)))
    model = ARMNetPlus(fields(4, 7), heads=2, neurons=3, hidden=(6,), mlp_hidden=(5,), mlp_dim=3).double().eval()
    head = Head(schema, [model]).double()
    e = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    logit = head([model(e)], torch.zeros(3, 4, dtype=torch.int64), None)["label"]
    w = head.weight[0]
    relations = model.relations(e[:, :, :4]) @ w[:6]
    network = model.network(e[:, :, 4:].flatten(1)) @ w[6:]
    assert torch.allclose(logit, relations + network + head.bias)
    (of_relations,) = torch.autograd.grad(model(e)[:, :6].sum(), e)
    (of_network,) = torch.autograd.grad(model(e)[:, 6:].sum(), e)
    assert not of_relations[:, :, 4:].any()
    assert not of_network[:, :, :4].any()
    assert of_relations[:, :, :4].any()
    assert of_network[:, :, 4:].any()


def test_embeddings_that_cannot_be_divided_are_refused():
    with pytest.raises(
        RecipeError, match="an embedding of 5 dimensions cannot be halved: make it even, or set mlp_dim"
    ):
        ARMNetPlus(fields(3, 5))
    with pytest.raises(RecipeError, match="mlp_dim is 4, must be below the embedding's 4 dimensions"):
        ARMNetPlus(fields(3, 4), mlp_dim=4)
    assert ARMNetPlus(fields(3, 5), mlp_dim=2).dims == [3, 2]


@pytest.mark.parametrize("make", [ARMNet, ARMNetPlus])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:5])
def test_large_embeddings_stay_finite_both_ways(make, autocast, options):
    torch.manual_seed(0)
    model = make(fields(10, 10), **options)
    e = (50 * torch.randn(64, 10, 10)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(e)
    out.float().square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(x.grad).all() for x in (e, *model.parameters()))


def test_exponents_keep_their_digits_under_autocast():
    torch.manual_seed(0)
    model = ARMNet(fields(10, 8), hidden=(), preset="paper").eval()
    e = 4 * torch.randn(30, 10, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(e)
    assert torch.equal(out, model(e))  # bfloat16 exponents of about ten would be off by some percent


@pytest.mark.parametrize("make", [ARMNet, ARMNetPlus])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7])
def test_shapes_are_known_without_numbers(make, alpha):
    with torch.device("meta"):
        model = make(fields(5, 8), alpha=alpha)
        assert model(torch.empty(7, 5, 8)).shape == (7, model.width)


@pytest.mark.parametrize("make", [ARMNet, ARMNetPlus])
@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_one_field_many_fields_and_no_row(make, count, rows):
    torch.manual_seed(0)
    model = make(fields(count, 8), heads=2, neurons=3).eval()
    e = torch.randn(rows, count, 8)
    assert model(e).shape == (rows, model.width)
    shown = model.explain(e)
    assert shown["weights"].shape == (rows, 6, count)
    if count == 1 and rows:
        inner = model if make is ARMNet else model.relations
        assert torch.equal(inner.neurons.gates(e[:, :, : 8 if make is ARMNet else 4]), torch.ones(rows, 1, 6))


@pytest.mark.parametrize(
    ("make", "options"),
    [(ARMNet, OPTIONS[0]), (ARMNet, OPTIONS[1]), (ARMNetPlus, OPTIONS[3]), (ARMNetPlus, OPTIONS[5])],
)
def test_the_contract_of_an_interaction_holds(make, options):
    contract("interaction", functools.partial(make, **options))


@pytest.mark.parametrize(("alpha", "count"), [(1.5, 5), (2.0, 66), (1.0, 5)])
def test_explanation_counts_supports_as_sets(alpha, count):
    torch.manual_seed(0)
    model = ARMNet(fields(count, 6), heads=2, neurons=3, alpha=alpha).eval()
    e = torch.randn(40, count, 6) * 2
    shown = model.explain(e)
    w = model.neurons.weights(e).transpose(1, 2)
    assert torch.allclose(shown["weights"], w)
    assert torch.allclose(shown["local_importance"], w.abs().sum(1))
    assert torch.allclose(shown["importance"], model.neurons.value.abs().sum((0, 1)))
    counted, sizes = {}, [0] * (count + 1)
    for b, i in itertools.product(range(40), range(6)):
        members = frozenset(torch.nonzero(shown["support"][b, i]).flatten().tolist())
        assert members == frozenset(torch.nonzero(w[b, i]).flatten().tolist())
        counted[members] = counted.get(members, 0) + 1 / 40
        sizes[len(members)] += 1 / 240
    best = sorted(counted.values(), reverse=True)[:20]
    assert torch.allclose(shown["term_neurons"], torch.tensor(best))
    for members, mean in zip(shown["terms"], shown["term_neurons"], strict=True):
        assert counted[frozenset(torch.nonzero(members).flatten().tolist())] == pytest.approx(float(mean))
    assert torch.allclose(shown["order"], torch.tensor(sizes))
    if alpha == 1.0:
        assert shown["terms"].all()
        assert shown["order"][-1] == pytest.approx(1.0)


def train(ids, y, rows, steps, lr=0.02, **options):
    """Fit all rows in every step; return the parts and the AUC."""
    torch.manual_seed(3)
    schema = EncodedSchema(tuple(Field(f"f{i}", rows) for i in range(ids.shape[1])))
    table = Table(schema, dim=8, init_std=0.3)
    model = ARMNet(table.fields, **options)
    head = Head(schema, [model])
    optimizer = torch.optim.Adam(torch.nn.ModuleList([table, model, head]).parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        logit = head([model(table(ids))], ids, None)["label"]
        torch.nn.functional.binary_cross_entropy_with_logits(logit, y).backward()
        optimizer.step()
    return table, model, roc_auc_score(y.numpy(), logit.detach().double().numpy())


def test_neurons_alone_solve_xor():
    ids = torch.cartesian_prod(*[torch.arange(4)] * 4)
    y = ((ids[:, 0] + ids[:, 1]) % 2).float()
    _, _, auc = train(ids, y, 4, 100, heads=2, neurons=8, alpha=1.5, hidden=())
    assert auc > 0.99
    linear = torch.nn.Linear(16, 1)  # the same on one-hot values, without crosses, learns nothing
    x = torch.nn.functional.one_hot(ids, 4).flatten(1).float()
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        logit = linear(x)[:, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(logit, y).backward()
        optimizer.step()
    assert roc_auc_score(y.numpy(), logit.detach().double().numpy()) < 0.6


def test_the_terms_of_a_planted_pattern_are_found():
    torch.manual_seed(0)
    ids = torch.randint(0, 3, (1000, 8))
    y = ((ids[:, 1] == ids[:, 3]) & (ids[:, 3] != ids[:, 6])).float()
    table, model, auc = train(ids, y, 3, 100, heads=1, neurons=8, alpha=1.5, hidden=())
    assert auc > 0.95
    shown = model.eval().explain(table(ids).detach())
    assert set(torch.topk(shown["local_importance"].mean(0), 3).indices.tolist()) == {1, 3, 6}
