"""FwFM against the double loop over pairs of fields."""

import itertools

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, randomised, vectors, xor_auc

from recsys.errors import RecipeError
from recsys.nn.interaction import FM
from recsys.testing import contract
from recsys_fwfm import FwFM

LINEAR = ["field", "value", "none"]


@pytest.mark.parametrize("linear", LINEAR)
def test_contract(linear):
    contract("interaction", lambda f: FwFM(f, linear=linear))
    assert_small_graph(lambda f: FwFM(f, linear=linear))


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_the_loop(linear, count):
    if linear == "none" and count == 1:
        return  # nothing is left
    model = randomised(FwFM(fields(count, 6), linear=linear))

    def loop(row):
        v = row[:, :3] if linear == "value" else row
        total = 0 * row.sum() + 0 * model.weight.sum()
        for r, (i, j) in zip(model.weight, itertools.combinations(range(count), 2), strict=True):
            total = total + r * sum(v[i, d] * v[j, d] for d in range(v.shape[1]))
        for i in range(count):
            for d in range(v.shape[1]):
                if linear == "field":
                    total = total + v[i, d] * model.field[i, d]
                elif linear == "value":
                    total = total + v[i, d] * row[i, 3 + d]
        return total.reshape(1)

    assert_equal_to_loop(model, loop, vectors(3, count, 6))


def test_with_weights_of_one_it_is_the_factorisation_machine():
    model = randomised(FwFM(fields(5, 4), linear="none"))
    torch.nn.init.ones_(model.weight)
    e = vectors(3, 5, 4)
    assert torch.allclose(model(e), FM(fields(5, 4))(e), atol=1e-12)


def test_permuting_fields_with_their_weights_changes_nothing():
    model = randomised(FwFM(fields(5, 4)))
    e, order = vectors(3, 5, 4), torch.tensor([3, 0, 4, 1, 2])
    other = randomised(FwFM(fields(5, 4)))
    symmetric = (model.matrix() + model.matrix().T)[order][:, order]
    with torch.no_grad():
        other.weight.copy_(symmetric.flatten()[other.pairs])
        other.field.copy_(model.field[order])
    assert torch.allclose(other(e[:, order]), model(e), atol=1e-12)


def test_parameters_explanation_and_odd_halves():
    model = randomised(FwFM(fields(10, 4)))
    assert sum(p.numel() for p in model.parameters()) == 10 * 9 // 2 + 10 * 4
    e = vectors(3, 10, 4)
    shown = model.explain(e)
    assert torch.equal(shown["weights"], shown["weights"].T)
    first_order = (e * model.field).sum((1, 2))
    assert torch.allclose(shown["pairs"].sum((1, 2)) / 2 + first_order, model(e)[:, 0])
    with pytest.raises(RecipeError, match="dimension is 5: make it even"):
        FwFM(fields(3, 5), linear="value")


def test_it_learns_xor():
    assert xor_auc(FwFM) > 0.99
