"""The cross network of DCN against its recursion, layer by layer."""

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

from recsys.testing import contract
from recsys_dcn import CrossVector


def stacked(f):
    return CrossVector(f, layers=2, hidden=(7, 5), batch_norm=True, dropout=0.3)


@pytest.mark.parametrize("build", [CrossVector, stacked])
def test_contract(build):
    contract("interaction", build)
    assert_small_graph(build)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("hidden", [(), (5, 3)])
def test_outputs_and_gradients_are_those_of_the_recursion(layers, hidden):
    model = randomised(CrossVector(fields(3, 2), layers=layers, hidden=hidden, batch_norm=True))

    def loop(row):
        x0 = x = row.flatten()
        for w, b in zip(model.weight, model.bias, strict=True):
            product = sum(w[i] * x[i] for i in range(6))
            x = torch.stack([x0[i] * product + b[i] + x[i] for i in range(6)])
        return mlp_loop(model.stack, x)

    assert_equal_to_loop(model, loop, vectors(4, 3, 2))


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_it_is_a_polynomial_of_degree_layers_plus_one(layers):
    model = randomised(CrossVector(fields(2, 2), layers=layers))
    t = torch.linspace(-1, 1, 24, dtype=DOUBLE)
    direction = torch.ones(2, 2, dtype=DOUBLE)
    values = model(t.view(-1, 1, 1) * direction)[:, 0]
    powers = torch.stack([t**k for k in range(9)], 1)
    found = torch.linalg.lstsq(powers, values.detach().unsqueeze(1)).solution[:, 0]
    assert found[layers + 1].abs() > 1e-4
    assert found[layers + 2 :].abs().max() < 1e-10


def test_parameters_are_two_vectors_per_layer():
    model = CrossVector(fields(10, 8), layers=3)
    assert sum(p.numel() for p in model.parameters()) == 3 * 2 * 80
    assert model.explain(torch.zeros(1, 10, 8))["weights"][1, 2].item() == pytest.approx(
        model.weight[1, 16:24].norm().item()
    )


def test_crosses_alone_learn_xor():
    assert xor_auc(lambda f: CrossVector(f, layers=3), steps=300) > 0.95
