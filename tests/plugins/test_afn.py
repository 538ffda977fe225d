"""AFN against its products of powers, and what only logarithms do."""

import pytest
import torch
from interactions import (
    DOUBLE,
    assert_equal_to_loop,
    assert_small_graph,
    fields,
    mlp_loop,
    randomised,
    vectors,
    xor_auc,
)

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_afn import AFN, AFNPlus, LogarithmicLayer

SMALL = {"neurons": 5, "hidden": (6, 4)}
OPTIONS = [{}, {"batch_norm": True, "dropout": 0.3, "floor": 0.05}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [AFN, AFNPlus])
def test_contract(kind, options):
    contract("interaction", lambda f: kind(f, **SMALL, **options))
    assert_small_graph(lambda f: kind(f, **SMALL, **options))


def normalised(x, norm, channel):
    return (x - norm.running_mean[channel]) / (norm.running_var[channel] + norm.eps).sqrt() * norm.weight[
        channel
    ] + norm.bias[channel]


def loop_of(model):
    layer = model.products

    def loop(row):
        count, dim = row.shape
        logs = [normalised(row[f].abs().clamp(min=layer.floor).log(), layer.log_norm, f) for f in range(count)]
        crossed = []
        for d in range(dim):
            for j, w in enumerate(layer.orders.weight):
                power = sum(w[f] * logs[f][d] for f in range(count)).exp()
                crossed.append(normalised(power, layer.exp_norm, j))
        return mlp_loop(model.stack, torch.stack(crossed))

    return loop


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_products(options):
    model = randomised(AFN(fields(3, 2), **SMALL, **options), std=0.3)
    assert_equal_to_loop(model, loop_of(model), vectors(4, 3, 2))


def test_plus_reads_one_half_of_the_embedding_and_the_perceptron_the_other():
    model = randomised(AFNPlus(fields(3, 4), **SMALL, deep_hidden=(3,)), std=0.3)

    def loop(row):
        return torch.cat([loop_of(model.afn)(row[:, :2]), mlp_loop(model.deep, row[:, 2:].flatten())])

    assert_equal_to_loop(model, loop, vectors(4, 3, 4))
    with pytest.raises(RecipeError, match="its dimension 5 must be even"):
        AFNPlus(fields(3, 5))


def test_whole_orders_give_the_cross_of_absolute_values():
    layer = LogarithmicLayer(3, 2, 1e-5).double().eval()
    layer.log_norm.eps = layer.exp_norm.eps = 0.0
    with torch.no_grad():
        layer.orders.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]]))
    e = vectors(4, 3, 2)
    a, b, c = e.abs().unbind(1)  # each [B, D]
    got = layer(e).view(4, 2, 2)
    assert torch.allclose(got[..., 0], a * b**2)
    assert torch.allclose(got[..., 1], c**3 / b)


def test_signs_are_lost_and_normalisation_is_per_field_and_neuron():
    model = AFN(fields(3, 2), **SMALL).double()
    e = vectors(50, 3, 2)
    assert torch.equal(model.eval()(e), model(-e))
    layer = model.products.train()
    scaled = e * torch.tensor([1.0, 7.0, 0.1], dtype=DOUBLE).view(1, 3, 1)
    assert torch.allclose(layer(e), layer(scaled), atol=1e-3), "a factor is a shift of the logarithm"


def test_the_logarithm_stays_in_single_precision_under_autocast():
    layer = randomised(LogarithmicLayer(6, 4, 1e-5), std=1.0).float()
    e = vectors(8, 6, 4).detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(e.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, layer(e.bfloat16().float()))


def test_parameters_and_learning():
    model = AFN(fields(10, 10), neurons=50, hidden=(400,))
    assert sum(p.numel() for p in model.parameters()) == 50 * 10 + 2 * (10 + 50) + 500 * 400 + 400
    assert xor_auc(lambda f: AFN(f, neurons=16, hidden=(32,))) > 0.95
