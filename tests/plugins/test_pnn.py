"""PNN against products taken pair by pair."""

import itertools

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.testing import contract
from recsys_pnn import PNN

KINDS = ["inner", "outer", "both"]


@pytest.mark.parametrize("product", KINDS)
def test_contract(product):
    contract("interaction", lambda f: PNN(f, product=product, hidden=(6, 5), dropout=0.2))
    assert_small_graph(lambda f: PNN(f, product=product, hidden=(6, 5)))


@pytest.mark.parametrize("product", KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_outputs_and_gradients_are_those_of_the_pairs(product, count):
    model = randomised(PNN(fields(count, 3), product=product, hidden=(6, 4), batch_norm=True))

    def loop(row):
        x = [row.flatten()]
        if product != "outer":
            x += [(row[i] * row[j]).sum().reshape(1) for i, j in itertools.combinations(range(count), 2)]
        if product != "inner":
            x.append(sum(torch.outer(row[i], row[j]) for i in range(count) for j in range(count)).flatten())
        return mlp_loop(model.stack, torch.cat(x))

    assert_equal_to_loop(model, loop, vectors(5, count, 3))


def test_parameters_are_the_published_count():
    model = PNN(fields(10, 10))
    stack = (100 + 45) * 400 + 2 * 400 * 400 + 3 * 400
    assert sum(p.numel() for p in model.parameters()) == stack
    assert stack + 401 + 53_890 == 433_491, "with the head and the embedding of the published run"


def test_permuting_fields_permutes_the_inner_products():
    model = randomised(PNN(fields(5, 3)))
    e, order = vectors(3, 5, 3), torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(model.explain(e[:, order])["inner"], model.explain(e)["inner"][:, order][:, :, order])


@pytest.mark.parametrize("product", KINDS)
def test_it_learns_xor(product):
    assert xor_auc(lambda f: PNN(f, product=product, hidden=(16,))) > 0.99
