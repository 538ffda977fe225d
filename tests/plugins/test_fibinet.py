"""FiBiNET against its equations, pair by pair."""

import itertools

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_fibinet import FiBiNET, PairCross

KINDS = ["all", "each", "pair"]


@pytest.mark.parametrize("bilinear", KINDS)
def test_contract(bilinear):
    contract("interaction", lambda f: FiBiNET(f, bilinear=bilinear, hidden=(6,)))
    assert_small_graph(lambda f: FiBiNET(f, bilinear=bilinear, hidden=(6,)))


@pytest.mark.parametrize("bilinear", KINDS)
def test_outputs_and_gradients_are_those_of_the_pairs(bilinear):
    model = randomised(FiBiNET(fields(4, 2), bilinear=bilinear, reduction=2, hidden=(6, 3), batch_norm=True))

    def crosses(cross, e):
        out = []
        for k, (i, j) in enumerate(itertools.combinations(range(4), 2)):
            w = cross.weight[{"all": 0, "each": i, "pair": k}[bilinear]]
            out += [sum(e[i, c] * w[c, d] for c in range(2)) * e[j, d] for d in range(2)]
        return out

    def loop(row):
        z = torch.stack([row[f].sum() / 2 for f in range(4)])
        a = torch.relu(model.excite.weight @ torch.relu(model.squeeze.weight @ z))
        v = torch.stack([a[f] * row[f] for f in range(4)])
        return mlp_loop(model.stack, torch.stack(crosses(model.plain, row) + crosses(model.weighed, v)))

    assert_equal_to_loop(model, loop, vectors(5, 4, 2))


def test_tied_weights_make_all_kinds_the_same():
    e = vectors(3, 5, 4)
    crosses = {kind: randomised(PairCross(5, 4, kind)) for kind in KINDS}
    with torch.no_grad():
        for kind in ("each", "pair"):
            crosses[kind].weight.copy_(crosses["all"].weight.expand_as(crosses[kind].weight))
    assert torch.allclose(crosses["each"](e), crosses["all"](e), atol=1e-12)
    assert torch.allclose(crosses["pair"](e), crosses["all"](e), atol=1e-12)
    with torch.no_grad():
        crosses["pair"].weight.copy_(torch.eye(4))
    first, second = torch.triu_indices(5, 5, offset=1)
    assert torch.equal(crosses["pair"](e), e[:, first] * e[:, second])


def test_no_field_is_born_without_importance():
    for seed in range(5):
        torch.manual_seed(seed)
        model = FiBiNET(fields(3, 4))  # one inner unit: it decides for all fields
        e = vectors(50, 3, 4).detach().float()
        assert (model.importance(e).amax(0) > 0).all()


def test_parameters_importance_and_too_few_fields():
    counts = {"all": 1, "each": 9, "pair": 45}
    for kind, matrices in counts.items():
        model = FiBiNET(fields(10, 10), bilinear=kind, reduction=2, hidden=(400,))
        assert sum(p.numel() for p in model.parameters()) == 2 * 10 * 5 + 2 * matrices * 100 + 900 * 400 + 400
    model = randomised(FiBiNET(fields(4, 2)))
    importance = model.explain(vectors(5, 4, 2))["importance"]
    assert (importance >= 0).all()
    assert importance.max() > 0
    with pytest.raises(RecipeError, match="at least two"):
        FiBiNET(fields(1, 4))


def test_it_learns_xor():
    assert xor_auc(lambda f: FiBiNET(f, hidden=(16,))) > 0.99
