"""UBPR and UPL on exposure draws of a world with known truth: unbiased, where what is nearly them is not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs_world import ITEMS, USERS, pairs_world
from torch import nn

from recsys.abilities import Weighing
from recsys.contracts import Batch, EncodedSchema, Field
from recsys.testing import contract
from recsys.train.weights import SIZE, weighed, weight_facts
from recsys_ubpr import UBPR, UPL

REPETITIONS, PAIRS = 200, 15_000
SCHEMA = EncodedSchema((Field("user", 5), Field("item", 7)), (), ("label",), ("propensity",))


def batch(y, theta, item, negatives, ids=None):
    rows = len(y)
    context = {"propensity": theta, "item": item}
    ids = torch.zeros(rows, 1).long() if ids is None else ids
    return Batch(ids, label={"label": y}, context=context, negatives=negatives)


def random_batch(logged, negatives, seed):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    y = torch.randint(0, 2, (rows,), generator=random).double()
    theta = 0.05 + 0.95 * torch.rand(rows, generator=random).double()
    item = torch.randint(2, 6, (rows,), generator=random)
    x = torch.randn(rows, generator=random).double().mul(2).requires_grad_()
    return x, batch(y, theta, item, negatives)


@pytest.mark.parametrize(("beta", "floor"), [(None, 0.0), (0.005, 0.0), (0.0, 0.2), (0.3, 0.5)])
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_ubpr_and_its_gradient_are_those_of_the_loops(beta, floor, logged, negatives, seed):
    x, given_rows = random_batch(logged, negatives, seed)
    theta = given_rows.context["propensity"].requires_grad_()
    loss = UBPR(("label",), beta=beta, floor=floor)({"label": x}, given_rows)
    (slope,) = torch.autograd.grad(loss, x) if loss.requires_grad else (torch.zeros_like(x),)
    z, y = x.tolist(), given_rows.label["label"].tolist()
    t = [max(v, floor) for v in theta.tolist()]
    item = given_rows.context["item"].tolist()
    total, gradient = 0.0, [0.0] * len(z)
    for i in range(logged):
        for k in range(negatives):
            j = logged + i * negatives + k
            if item[i] == item[j]:
                continue
            w = y[i] / t[i] * (1 - y[j] / t[j])
            pair = w * math.log1p(math.exp(z[j] - z[i]))
            if beta is not None and pair < -beta:
                total -= beta
                continue
            total += pair
            d = w / (1 + math.exp(z[i] - z[j]))
            gradient[i] -= d
            gradient[j] += d
    pairs = logged * negatives
    assert float(loss.detach()) == pytest.approx(total / pairs, rel=1e-9, abs=1e-12)
    assert slope.tolist() == pytest.approx([g / pairs for g in gradient], rel=1e-9, abs=1e-12)
    assert theta.grad is None


@pytest.fixture(scope="module")
def world():
    return pairs_world()


@pytest.fixture(scope="module")
def chosen():
    """Pairs of two items of a user."""
    random = np.random.default_rng(5)
    u = random.integers(0, USERS, PAIRS)
    i = random.integers(0, ITEMS, PAIRS)
    return u, i, (i + random.integers(1, ITEMS, PAIRS)) % ITEMS


def draws_of(world, chosen, losses):
    """Every loss over the repetitions of exposure and relevance, `[losses, repetitions]`, and what they should be."""
    u, i, j = chosen

    def both(value):
        return torch.from_numpy(np.concatenate([value[u, i], value[u, j]]))

    x, theta = both(world.x), both(world.theta)
    item = torch.from_numpy(np.concatenate([i, j])) + 2
    users, items = np.concatenate([u, u]), np.concatenate([i, j])
    found = []
    for r in range(REPETITIONS):
        y = torch.from_numpy(world.labels(r, users, items)).double()
        found.append([float(loss({"label": x}, batch(y, theta, item, 1))) for loss in losses])
    pair = np.logaddexp(0.0, world.x[u, j] - world.x[u, i])
    return np.array(found).T, float((world.gamma[u, i] * (1 - world.gamma[u, j]) * pair).mean())


def off(sample, ideal):
    """How far the mean is from the ideal, in standard errors."""
    return (sample.mean() - ideal) / (sample.std(ddof=1) / math.sqrt(len(sample)))


class Known(nn.Module):
    """Gives the second model's logits."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, rows):
        return {"label": self.logit}


def known_upl(gamma):
    """The ranking term alone, with an estimate of relevance that is given."""
    loss = UPL(("label",), SCHEMA)
    loss.head = Known(torch.log(gamma / (1 - gamma)))

    def ranking(logits, rows):
        head, ratio = loss.head.logit[PAIRS:], (rows.label["label"] / rows.context["propensity"])[PAIRS:]
        return loss(logits, rows) - (nn.functional.softplus(head) - ratio * head).mean()

    return ranking


def test_ubpr_and_upl_are_unbiased_and_their_fakes_are_not(world, chosen):
    u, i, j = chosen
    gamma = torch.from_numpy(np.concatenate([world.gamma[u, i], world.gamma[u, j]]))

    def plain(logits, rows):
        y = rows.label["label"]
        pair = nn.functional.softplus(logits["label"][PAIRS:] - logits["label"][:PAIRS])
        return (y[:PAIRS] * (1 - y[PAIRS:]) * pair).mean()

    def clicked_only(logits, rows):  # propensity of the positive, every other item a negative
        y, theta = rows.label["label"], rows.context["propensity"]
        pair = nn.functional.softplus(logits["label"][PAIRS:] - logits["label"][:PAIRS])
        return (y[:PAIRS] / theta[:PAIRS] * pair).mean()

    losses = [UBPR(("label",), beta=None), known_upl(gamma), UBPR(("label",), beta=0.0), plain, clicked_only]
    (ubpr, upl, clamped, bpr, ips), ideal = draws_of(world, chosen, losses)
    assert abs(off(ubpr, ideal)) < 4
    assert abs(off(upl, ideal)) < 4
    assert off(clamped, ideal) > 10
    assert abs(off(bpr, ideal)) > 10
    assert off(ips, ideal) > 10
    assert upl.std() < 0.5 * ubpr.std()


def test_upl_with_a_wrong_estimate_is_biased(world, chosen):
    half = torch.full((2 * PAIRS,), 0.05).double()
    (wrong,), ideal = draws_of(world, chosen, [known_upl(half)])
    assert abs(off(wrong, ideal)) > 10


@pytest.mark.parametrize("loss", [UBPR(("label",), floor=0.2), UPL(("label",), SCHEMA, floor=0.2)])
def test_the_weights_that_training_watches_are_those_of_clicked_rows_of_both_sides(loss):
    """Catches a loss that training does not see as one of weights, and weights of rows that have none."""
    assert isinstance(loss, Weighing)
    given_rows = batch(torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.1, 0.1, 0.5, 0.3]), torch.arange(4), 1)
    raw, used = loss.weights(given_rows)
    assert raw.tolist() == pytest.approx([10.0, 0, 2, 0])
    assert used.tolist() == pytest.approx([5.0, 0, 2, 0])
    facts = weight_facts(weighed(torch.zeros(SIZE, dtype=torch.float64), raw, used, given_rows))
    assert facts["ess"] == pytest.approx(12**2 / 104)
    assert facts["clipped"] == 0.5


def test_an_item_against_itself_is_left_out():
    x = torch.tensor([1.0, 2.0, 1.0, 3.0]).double()
    y, theta = torch.ones(4).double(), torch.full((4,), 0.25).double()
    same = batch(y, theta, torch.tensor([4, 5, 4, 5]), 1)
    assert float(UBPR(("label",), beta=None)({"label": x}, same)) == 0.0
    other = batch(y, theta, torch.tensor([4, 5, 5, 5]), 1)
    assert float(UBPR(("label",), beta=None)({"label": x}, other)) == pytest.approx(4 * (1 - 4) * math.log(2) / 2)


def test_the_ranking_term_of_upl_does_not_move_its_estimate_and_the_other_way_round():
    torch.manual_seed(0)
    loss = UPL(("label",), SCHEMA, dim=3).double()
    y = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    ids = torch.tensor([[2, 2], [3, 3], [2, 4], [3, 5]])
    rows = batch(y, torch.full((4,), 0.4).double(), ids[:, 1], 1, ids)
    x = torch.randn(4).double().requires_grad_()
    loss({"label": x}, rows).backward()
    first = [p.grad.clone() for p in loss.head.parameters()]
    head = loss.head(rows)["label"].detach()
    loss.zero_grad()
    loss({"label": 3.0 * x.detach() - 1.0}, rows).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, loss.head.parameters(), strict=True))
    # And what it learns by is σ(x') − Y/θ of the sampled rows.
    bias = loss.head.head.bias.grad
    wanted = (head.sigmoid() - y / 0.4)[2:].mean()
    assert float(bias) == pytest.approx(float(wanted), rel=1e-6)
    g, weight = head.sigmoid()[2:], []
    for k in range(2):
        weight.append(float(y[k]) / 0.4 * (1 - float(y[2 + k])) * (1 - float(g[k])) / (1 - 0.4 * float(g[k]) + 1e-5))
    d = [-weight[k] / (1 + math.exp(float(x.detach()[k] - x.detach()[2 + k]))) / 2 for k in range(2)]
    assert x.grad.tolist() == pytest.approx([*d, *(-v for v in d)], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"beta": None, "floor": 0.1}])
def test_contract_ubpr(options):
    contract.without("bce_equality")("loss", UBPR, **options)


def test_contract_upl():
    contract.without("bce_equality")("loss", UPL, dim=4)
