"""The mixture of low-rank crosses against the paper's form, expert by expert."""

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.testing import contract
from recsys_dcnv2_mix import DCNv2Mix

OPTIONS = [{}, {"experts": 1}, {"hidden": (7, 5), "batch_norm": True, "dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: DCNv2Mix(f, layers=2, rank=3, **options))
    assert_small_graph(lambda f: DCNv2Mix(f, layers=2, rank=3, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_paper(options):
    model = randomised(DCNv2Mix(fields(3, 2), layers=2, rank=3, **options))

    def loop(row):
        x0 = x = row.flatten()
        for layer in model.layers:
            scores = [0 * x.sum()] if model.gate is None else [g @ x for g in model.gate]
            shares = [s.exp() / sum(t.exp() for t in scores) for s in scores]
            total = 0
            for share, v, c, u in zip(shares, layer.down, layer.core, layer.up, strict=True):
                inner = torch.tanh(c @ torch.tanh(v @ x))
                total = total + share * (x0 * (u.T @ inner + layer.bias))
            x = total + x
        return mlp_loop(model.stack, x)

    assert_equal_to_loop(model, loop, vectors(4, 3, 2))


def test_gates_are_shares_of_each_row():
    model = randomised(DCNv2Mix(fields(3, 2), layers=2, experts=4))
    gates = model.explain(vectors(5, 3, 2))
    assert list(gates) == ["gates.0", "gates.1"]
    for share in gates.values():
        assert torch.allclose(share.sum(1), torch.ones_like(share[:, 0]))
        assert (share[0] - share[1]).abs().max() > 1e-3


def test_parameters_are_those_of_the_formula():
    model = DCNv2Mix(fields(10, 8), layers=2, rank=16, experts=4)
    assert sum(p.numel() for p in model.parameters()) == 2 * (4 * (2 * 80 * 16 + 16 * 16) + 80) + 4 * 80


def test_crosses_alone_learn_xor():
    assert xor_auc(lambda f: DCNv2Mix(f, layers=2, rank=8)) > 0.99
