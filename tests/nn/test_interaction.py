"""FM, MLP and the cross network against their formulas written as loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Fields
from recsys.errors import DataError
from recsys.nn.interaction import FM, MLP, CrossNet
from recsys.nn.mlp import MLPBlock

DOUBLE = {"dtype": torch.float64}


def fields(count, dim):
    return Fields(tuple(f"f{i}" for i in range(count)), (10,) * count, dim)


def randomised(module, std=0.5):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module.double().eval()


ALL = [
    lambda f: FM(f),
    lambda f: MLP(f, hidden=(5, 3), batch_norm=True, dropout=0.5),
    lambda f: CrossNet(f, layers=2),
    lambda f: CrossNet(f, layers=2, rank=2),
]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_fm_is_the_double_loop_over_pairs(rows, count, dim, seed):
    e = torch.randn(rows, count, dim, generator=torch.Generator().manual_seed(seed), **DOUBLE)
    want = torch.zeros(rows, 1, **DOUBLE)
    for i, j in itertools.combinations(range(count), 2):
        want[:, 0] += (e[:, i] * e[:, j]).sum(1)
    assert torch.allclose(FM(fields(count, dim))(e), want, atol=1e-12)


def test_fm_explains_what_each_pair_adds():
    e = torch.randn(3, 5, 4, **DOUBLE)
    model = FM(fields(5, 4))
    pairs = model.explain(e)["pairs"]
    assert torch.allclose(pairs.sum((1, 2)) / 2, model(e)[:, 0])
    assert torch.equal(pairs.diagonal(dim1=1, dim2=2), torch.zeros(3, 5, **DOUBLE))


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_is_the_loop_over_coordinates(rank):
    torch.manual_seed(0)
    model = randomised(CrossNet(fields(3, 2), layers=3, rank=rank))
    e = torch.randn(4, 3, 2, **DOUBLE)
    out = model(e)
    for b in range(4):
        x0 = e[b].flatten().tolist()
        x = list(x0)
        for inner, outer in zip(model.inner, model.outer, strict=True):
            w = outer.weight if rank is None else outer.weight @ inner.weight
            crossed = [sum(w[i, j].item() * x[j] for j in range(6)) + outer.bias[i].item() for i in range(6)]
            x = [x0[i] * crossed[i] + x[i] for i in range(6)]
        assert torch.allclose(out[b], torch.tensor(x, **DOUBLE), atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cross_is_a_polynomial_of_degree_layers_plus_one(layers):
    torch.manual_seed(0)
    model = randomised(CrossNet(fields(2, 2), layers=layers))
    t = torch.linspace(-1, 1, 24, **DOUBLE)
    direction = torch.randn(2, 2, **DOUBLE)
    values = model(t.view(-1, 1, 1) * direction)[:, 0]
    powers = torch.stack([t**k for k in range(9)], 1)
    coefficients = torch.linalg.lstsq(powers, values.unsqueeze(1)).solution[:, 0]
    assert coefficients[layers + 1].abs() > 1e-4
    assert coefficients[layers + 2 :].abs().max() < 1e-10


def test_cross_explains_the_weight_between_two_fields():
    torch.manual_seed(0)
    for rank in (None, 3):
        model = randomised(CrossNet(fields(3, 2), layers=2, rank=rank))
        norms = model.explain(torch.zeros(1, 3, 2))["cross"]
        assert norms.shape == (2, 3, 3)
        inner, outer = model.inner[1], model.outer[1]
        w = outer.weight if rank is None else outer.weight @ inner.weight
        assert norms[1, 2, 0].item() == pytest.approx(w[4:6, 0:2].norm().item())


def test_low_rank_has_fewer_parameters():
    whole, low = CrossNet(fields(10, 8), layers=2), CrossNet(fields(10, 8), layers=2, rank=4)
    assert sum(p.numel() for p in whole.parameters()) == 2 * (80 * 80 + 80)
    assert sum(p.numel() for p in low.parameters()) == 2 * (80 * 4 + 4 * 80 + 80)


def test_mlp_is_linear_norm_activation_in_this_order():
    torch.manual_seed(0)
    model = randomised(MLP(fields(3, 2), hidden=(5, 4), activation="tanh", batch_norm=True, dropout=0.3))
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm1d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    e = torch.randn(6, 3, 2, **DOUBLE)
    h = e.flatten(1)
    modules = list(model.stack.layers)
    for dense, norm in ((modules[0], modules[1]), (modules[4], modules[5])):
        h = h @ dense.weight.T + dense.bias
        h = (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        h = torch.tanh(h)
    assert torch.allclose(model(e), h, atol=1e-12)


def test_dropout_keeps_the_mean_and_stops_in_evaluation():
    torch.manual_seed(0)
    block = MLPBlock(4, (2000,), activation="relu", dropout=0.25)
    x = torch.randn(1, 4)
    whole = block.eval()(x)
    dropped = block.train()(x)
    alive = whole > 0
    assert (dropped[alive] == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)
    kept = alive & (dropped != 0)
    assert torch.allclose(dropped[kept], whole[kept] / 0.75)


def test_batch_norm_refuses_one_training_row_and_says_what_to_do():
    model = MLP(fields(2, 2), hidden=(3,), batch_norm=True)
    with pytest.raises(DataError, match="batch size of at least 2"):
        model(torch.randn(1, 2, 2))
    assert model.eval()(torch.randn(1, 2, 2)).shape == (1, 3)
    MLP(fields(2, 2), hidden=(3,))(torch.randn(1, 2, 2))


def test_weights_start_xavier_normal_and_biases_at_zero():
    torch.manual_seed(0)
    layers = [MLP(fields(10, 16), hidden=(300,)).stack.layers[0], CrossNet(fields(10, 16), layers=1).outer[0]]
    for layer in layers:
        want = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(want, rel=0.03)
        assert not layer.bias.any()


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("count", [1, 4])
def test_no_row_sees_another_and_one_field_is_enough(build, count):
    torch.manual_seed(0)
    model = randomised(build(fields(count, 3)))
    e = torch.randn(6, count, 3, **DOUBLE)
    whole = model(e)
    assert whole.shape == (6, model.width)
    for b in range(6):
        assert torch.allclose(model(e[b : b + 1])[0], whole[b], atol=1e-12)


@pytest.mark.parametrize("build", ALL)
def test_gradients_are_those_of_finite_differences(build):
    torch.manual_seed(0)
    model = randomised(build(fields(2, 2)))
    e = torch.randn(2, 2, 2, requires_grad=True, **DOUBLE)
    assert torch.autograd.gradcheck(model, (e,))


@pytest.mark.parametrize("build", ALL)
def test_half_precision_stays_near(build):
    torch.manual_seed(0)
    model = randomised(build(fields(4, 8)), std=0.2).float()
    e = torch.randn(16, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(e).float()
    full = model(e)
    assert (half - full).norm() / full.norm() < 2e-2


@pytest.mark.parametrize("build", ALL)
def test_the_exported_graph_does_not_grow_with_the_fields(build):
    def nodes(count):
        model = build(fields(count, 4)).eval()
        batch = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(model, (torch.randn(6, count, 4),), dynamic_shapes=(batch,))
        e = torch.randn(11, count, 4)
        assert torch.allclose(program.module()(e), model(e), atol=1e-6)
        return len(program.graph.nodes)

    assert nodes(3) == nodes(12)
