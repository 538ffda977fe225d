"""BPR against loops, its gradient against the closed form, what a logged 0 and a known positive add."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_bpr import BPR


def batch(logged, negatives, seed=0, weight=False):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    label = torch.randint(0, 2, (rows,), generator=random).double()
    context = {"weight": torch.rand(rows, generator=random).double()} if weight else {}
    given = Batch(torch.zeros(rows, 1).long(), label={"label": label}, context=context, negatives=negatives)
    return torch.randn(rows, generator=random).double().mul(3).requires_grad_(), given


def loops(x, given):
    m = given.negatives
    n = len(x) // (1 + m)
    y = given.label["label"]
    total, gradient = 0.0, [0.0] * len(x)
    for i in range(n):
        w = float(given.context["weight"][i]) if "weight" in given.context else 1.0
        for k in range(m):
            j = n + i * m + k
            if y[i] == 1 and y[j] == 0:
                d = float(x[i].detach() - x[j].detach())
                total += w * math.log1p(math.exp(-d)) / (n * m)
                slope = -w / (1 + math.exp(d)) / (n * m)
                gradient[i] += slope
                gradient[j] -= slope
    return total, gradient


@pytest.mark.parametrize("weight", [False, True])
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_loss_and_gradient_are_those_of_the_loops(weight, logged, negatives, seed):
    x, given = batch(logged, negatives, seed, weight)
    loss = BPR(("label",))({"label": x}, given)
    loss.backward()
    total, gradient = loops(x, given)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert x.grad.tolist() == pytest.approx(gradient, rel=1e-9, abs=1e-12)


def test_a_batch_twice_is_the_same_and_a_shift_of_a_users_logits_too():
    x, given = batch(3, 2, 4)
    loss = BPR(("label",))
    once = loss({"label": x}, given)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, *range(3, 9), *range(3, 9)])
    twice = replace(given, ids=given.ids[rows], label={"label": given.label["label"][rows]})
    assert float(loss({"label": x[rows]}, twice)) == pytest.approx(float(once), rel=1e-12)
    shift = torch.tensor([1.0, -2.0, 5.0]).double()
    moved = x + torch.cat([shift, shift.repeat_interleave(2)])
    assert float(loss({"label": moved}, given)) == pytest.approx(float(once), rel=1e-9)


def test_without_sampled_rows_it_says_what_is_missing():
    x, given = batch(4, 1)
    with pytest.raises(RecipeError, match="`sampling:`"):
        BPR(("label",))({"label": x}, replace(given, negatives=0))


def test_contract():
    contract.without("bce_equality")("loss", BPR)
