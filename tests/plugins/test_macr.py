"""MACR: factors, counterfactual and the heads' own losses against formulas, and what c does to popular items."""

import math

import pytest
import torch

from recsys.api import Fields, label_bce
from recsys.contracts import Batch
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_macr import MACR

FIELDS = Fields(("user", "item", "other"), (9, 9, 9), 4)
C3 = Fields(("f0", "f1", "f2"), (5, 6, 7), 8)


def made(**options):
    torch.manual_seed(1)
    return MACR(FIELDS, **options).double()


def vectors(rows=6, seed=0):
    return torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(seed)).double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loops(part, e, c):
    item, user = part.heads.weight.tolist()
    found = []
    for row in e.tolist():
        u, i = row[0], row[1]
        k = sum(a * b for a, b in zip(u, i, strict=True))
        a_i = sigmoid(sum(a * b for a, b in zip(item, i, strict=True)))
        a_u = sigmoid(sum(a * b for a, b in zip(user, u, strict=True)))
        found.append((k - c) * a_i * a_u)
    return found


@pytest.mark.parametrize("c", [0.0, 30.0])
def test_logits_are_those_of_the_loops(c):
    part, e = made(c=c), vectors()
    assert part.train()(e)[:, 0].tolist() == pytest.approx(loops(part, e, 0.0), rel=1e-12)
    assert part.eval()(e)[:, 0].tolist() == pytest.approx(loops(part, e, c), rel=1e-12)


def test_the_heads_learn_by_their_own_loss_and_by_the_models():
    part, e = made(alpha=0.3, beta=0.7).train(), vectors()
    label = torch.tensor([1.0, 0, 0, 1, 1, 0]).double()
    rows = Batch(torch.zeros(6, 1).long(), label={"label": label})
    logit = part(e)[:, 0]
    (main,) = torch.autograd.grad(logit.sum(), part.heads.weight, retain_graph=True)
    assert bool((main != 0).all())
    (own,) = torch.autograd.grad(part.auxiliary(rows), part.heads.weight)
    item, user = part.heads.weight.detach()
    wanted = [torch.zeros(4).double(), torch.zeros(4).double()]
    for n in range(6):
        wanted[0] += 0.3 * ((e[n, 1] @ item).sigmoid() - label[n]) * e[n, 1] / 6
        wanted[1] += 0.7 * ((e[n, 0] @ user).sigmoid() - label[n]) * e[n, 0] / 6
    assert own.flatten().tolist() == pytest.approx(torch.cat(wanted).tolist(), rel=1e-9)


def test_without_branches_it_is_the_matrix_factorisation():
    part, e = made(branches=False), vectors()
    for mode in (part.train(), part.eval()):
        assert mode(e)[:, 0].tolist() == pytest.approx((e[:, 0] * e[:, 1]).sum(1).tolist())
    assert list(part.parameters()) == []
    label = torch.tensor([1.0, 0, 0, 1, 1, 0]).double()
    rows = Batch(torch.zeros(6, 1).long(), label={"label": label})
    assert float(part.auxiliary(rows)) == 0.0
    assert float(label_bce(part(e)[:, 0], rows)) > 0


def test_a_larger_c_ranks_popular_items_lower_and_none_as_training_does():
    """Items that differ in what their head says of them: the higher that is, the lower they come as c grows."""
    torch.manual_seed(3)
    items = torch.randn(200, 4).double()
    e = torch.stack([torch.ones(200, 4).double() * 0.3, items, torch.zeros(200, 4).double()], 1)
    popular = None
    ranks = []
    for c in (0.0, 1.0, 3.0, 10.0):
        part = made(c=c).eval()
        popular = part.explain(e)["item"].topk(40).indices if popular is None else popular
        rank = (-part(e)[:, 0]).argsort().argsort().double()
        ranks.append(float(rank[popular].mean()))
        if c == 0.0:
            assert torch.equal(part(e)[:, 0].argsort(), part.train()(e)[:, 0].argsort())
    assert ranks == sorted(ranks)
    assert ranks[-1] > ranks[0] + 30


@pytest.mark.parametrize("options", [{}, {"c": 0.0, "alpha": 0.01}, {"branches": False}])
def test_contract(options):
    contract("interaction", MACR, user="f0", item="f1", **options)


def test_fields_are_checked():
    with pytest.raises(RecipeError, match=r"model.interaction.item: no field 'film'"):
        MACR(FIELDS, item="film")
