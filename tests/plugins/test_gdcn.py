"""The gated cross network against its recursion, and against the ungated one."""

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.nn.interaction import CrossNet
from recsys.testing import contract
from recsys_gdcn import GDCN

OPTIONS = [{"layers": 2}, {"layers": 2, "bias": "uniform", "hidden": (7, 5), "batch_norm": True, "dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: GDCN(f, **options))
    assert_small_graph(lambda f: GDCN(f, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_recursion(options):
    model = randomised(GDCN(fields(3, 2), **options))

    def loop(row):
        x0 = x = row.flatten()
        for cross, gate in zip(model.crosses, model.gates, strict=True):
            y = []
            for i in range(6):
                score = sum(gate.weight[i, j] * x[j] for j in range(6))
                value = sum(cross.weight[i, j] * x[j] for j in range(6)) + cross.bias[i]
                y.append(x0[i] * value / (1 + (-score).exp()) + x[i])
            x = torch.stack(y)
        return mlp_loop(model.stack, x)

    assert_equal_to_loop(model, loop, vectors(4, 3, 2))


def test_with_gates_that_are_constant_it_is_the_cross_network():
    gated, plain = randomised(GDCN(fields(3, 2), layers=2)), randomised(CrossNet(fields(3, 2), layers=2))
    e = vectors(4, 3, 2)
    with torch.no_grad():
        for cross, gate, outer in zip(gated.crosses, gated.gates, plain.outer, strict=True):
            gate.weight.zero_()  # every gate is one half
            cross.weight.copy_(2 * outer.weight)
            cross.bias.copy_(2 * outer.bias)
    assert torch.allclose(gated(e), plain(e), atol=1e-12)
    assert torch.equal(gated.explain(e)["cross"], 2 * plain.explain(e)["cross"])


def test_start_and_parameters():
    torch.manual_seed(0)
    assert not GDCN(fields(3, 2)).crosses[0].bias.any()
    start = GDCN(fields(10, 100), layers=1, bias="uniform").crosses[0].bias
    assert start.min() >= 0
    assert start.mean().item() == pytest.approx(0.5, abs=0.05)
    assert sum(p.numel() for p in GDCN(fields(10, 8), layers=3).parameters()) == 3 * (2 * 80 * 80 + 80)


def test_crosses_alone_learn_xor():
    assert xor_auc(GDCN) > 0.99
