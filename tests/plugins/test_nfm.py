"""NFM against the pairs it pools."""

import itertools

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.nn.interaction import FM
from recsys.testing import contract
from recsys_nfm import NFM

OPTIONS = [{}, {"hidden": (6, 4), "batch_norm": True, "dropout": 0.2, "pooled_dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: NFM(f, **options))
    assert_small_graph(lambda f: NFM(f, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_pairs(options):
    model = randomised(NFM(fields(4, 3), **options))

    def loop(row):
        return mlp_loop(model.stack, sum(row[i] * row[j] for i, j in itertools.combinations(range(4), 2)))

    assert_equal_to_loop(model, loop, vectors(5, 4, 3))


def test_without_layers_its_sum_is_the_factorisation_machine():
    e = vectors(3, 5, 4)
    model = NFM(fields(5, 4), hidden=())
    assert torch.allclose(model(e).sum(1, keepdim=True), FM(fields(5, 4))(e), atol=1e-12)
    assert torch.equal(model.explain(e)["pooled"], model(e))


def test_both_dropouts_work_in_training_only():
    torch.manual_seed(0)
    e = vectors(6, 5, 4).detach().float()
    for options in ({"dropout": 0.5}, {"pooled_dropout": 0.5}):
        model = NFM(fields(5, 4), **options)
        assert not torch.equal(model(e), model(e))
        assert torch.equal(model.eval()(e), model(e))


def test_it_learns_xor():
    assert xor_auc(lambda f: NFM(f, hidden=(16,))) > 0.99
