"""CIN against its sum over maps, fields and fields, and the degree of every layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interactions import DOUBLE, assert_equal_to_loop, assert_small_graph, fields, randomised, vectors, xor_auc

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_xdeepfm import CIN, _mix_first, _outer_first

OPTIONS = [
    {"maps": (6, 4)},
    {"maps": (2, 7, 3), "bias": True},
    {"maps": (4, 6, 3), "split_half": True, "activation": "sigmoid", "bias": True},
    {"maps": (3, 5), "activation": "relu"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: CIN(f, **options))
    assert_small_graph(lambda f: CIN(f, **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_the_sum(options, count):
    model = randomised(CIN(fields(count, 3), **options))
    act = {"sigmoid": torch.sigmoid, "relu": torch.relu}.get(options.get("activation"), lambda x: x)

    def loop(row):
        x, out = list(row), []
        for k, weight in enumerate(model.weights):
            maps = []
            for h in range(weight.shape[0]):
                total = sum(weight[h, i, j] * x[i] * row[j] for i in range(len(x)) for j in range(count))
                maps.append(act(total + model.biases[k][h] if options.get("bias") else total))
            if options.get("split_half") and k < len(model.weights) - 1:
                x, maps = maps[: len(maps) // 2], maps[len(maps) // 2 :]
            else:
                x = maps
            out += [m.sum() for m in maps]
        return torch.stack(out)

    assert_equal_to_loop(model, loop, vectors(3, count, 3))


def test_layer_k_has_degree_k_plus_one():
    model = randomised(CIN(fields(4, 3), maps=(2, 3, 2)))
    e = vectors(3, 4, 3)
    once, twice = model(e).split((2, 3, 2), 1), model(2 * e).split((2, 3, 2), 1)
    for k, (a, b) in enumerate(zip(once, twice, strict=True), 1):
        assert torch.allclose(b, 2 ** (k + 1) * a, rtol=1e-10)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_both_orders_of_the_product_are_the_same_sum(maps, i, j):
    torch.manual_seed(0)
    w, a, b = (torch.randn(*s, dtype=DOUBLE) for s in ((maps, i, j), (i, 4), (j, 4)))
    want = torch.einsum("hij,in,jn->hn", w, a, b)
    assert torch.allclose(_outer_first(w, a, b), want, atol=1e-12)
    assert torch.allclose(_mix_first(w, a, b), want, atol=1e-12)


def test_parameters_permutation_and_explanation():
    model = randomised(CIN(fields(10, 4), maps=(64,), bias=True))
    assert sum(p.numel() for p in model.parameters()) == 64 * 100 + 64
    e, order = vectors(2, 10, 4), torch.randperm(10)
    other = randomised(CIN(fields(10, 4), maps=(64,), bias=True))
    with torch.no_grad():
        other.weights[0].copy_(model.weights[0][:, order][:, :, order])
    assert torch.allclose(other(e[:, order]), model(e), atol=1e-10)
    w = model.weights[0]
    pairs = model.explain(e)["pairs"]
    assert pairs[2, 7].item() == pytest.approx((w[:, 2, 7] + w[:, 7, 2]).square().sum().sqrt().item())


def test_maps_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="at least one layer"):
        CIN(fields(2, 2), maps=())
    with pytest.raises(RecipeError, match=r"\[3, 4\] cannot be split in halves"):
        CIN(fields(2, 2), maps=(3, 4), split_half=True)


def test_it_learns_xor():
    assert xor_auc(lambda f: CIN(f, maps=(8, 8))) > 0.99
