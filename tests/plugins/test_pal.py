"""PAL against its formula in double precision, and planted looks and likings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slates import LOOK, SHOWN, draw, learned, naive

from recsys.contracts import Batch
from recsys.testing import contract
from recsys.train.losses import BCE
from recsys_pal import PAL


def sigma(x):
    return 1 / (1 + math.exp(-x))


def batch(label, position, weight=None):
    context = {"position": torch.tensor(position)}
    if weight is not None:
        context["weight"] = torch.tensor(weight, dtype=torch.float64)
    return Batch(
        torch.zeros(len(label), 1, dtype=torch.int64), label={"label": torch.tensor(label).double()}, context=context
    )


row = st.tuples(st.floats(-20, 20), st.integers(0, 1), st.integers(0, 6), st.floats(0, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(row, min_size=1, max_size=6),
    st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    st.sampled_from(["product", "sum"]),
)
@example([(18.0, 1, 2, 1.0), (20.5, 1, 0, 2.0)], [0.0, 3.0, 0.0], "sum")
def test_loss_and_gradients_row_by_row(rows, bias, form):
    xs, ys, places, weights = (list(column) for column in zip(*rows, strict=True))
    loss = PAL(("label",), positions=4, form=form).double()
    loss.bias.data.copy_(torch.tensor(bias, dtype=torch.float64))
    x = torch.tensor(xs, dtype=torch.float64, requires_grad=True)
    value = loss({"label": x}, batch(ys, places, weights))
    value.backward()
    total, by_logit, by_bias = 0.0, [], [0.0] * 3
    for z, y, k, w in rows:
        k = min(k, 3)
        a = math.inf if k == 0 else bias[k - 1]
        seen = 1.0 if k == 0 else sigma(a)
        if form == "sum":
            q = z + (0.0 if k == 0 else a)
            total += w * (max(q, 0) + math.log1p(math.exp(-abs(q))) - y * q)
            by_logit.append(w * (sigma(q) - y))
            slope = w * (sigma(q) - y)
        else:
            p = seen * sigma(z)
            miss = sigma(-z) if k == 0 else sigma(-a) + seen * sigma(-z)
            total -= w * (math.log(p) if y else math.log(miss))
            by_logit.append(w * (-sigma(-z) if y else p * sigma(-z) / miss))
            slope = 0.0 if k == 0 else w * (-sigma(-a) if y else p * sigma(-a) / miss)
        if k:
            by_bias[k - 1] += slope
    assert value.item() == pytest.approx(total / len(rows), rel=1e-9, abs=1e-12)
    assert x.grad.tolist() == pytest.approx([v / len(rows) for v in by_logit], rel=1e-7, abs=1e-12)
    assert loss.bias.grad.tolist() == pytest.approx([v / len(rows) for v in by_bias], rel=1e-7, abs=1e-12)


def test_the_first_position_is_plain_cross_entropy_and_teaches_no_bias():
    loss = PAL(("label",), positions=3)
    x = torch.tensor([0.3, -2.0], requires_grad=True)
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, torch.tensor([1.0, 0.0]))
    value = loss({"label": x}, batch([1, 0], [0, 0]))
    assert value.item() == pytest.approx(want.item())
    value.backward()
    assert not loss.bias.grad.any()
    assert PAL(("label",), positions=3, first=1)({"label": x}, batch([1, 0], [1, 1])).item() == pytest.approx(
        want.item()
    )


@given(st.floats(-4, 4), st.lists(st.floats(-8, 8), min_size=2, max_size=6))
def test_where_all_places_are_alike_a_click_is_a_fixed_share_of_a_liking(a, xs):
    """Catches a factor that depends on the logit: the loss of a click is −log σ(x) and a constant."""
    loss = PAL(("label",), positions=3).double()
    loss.bias.data.fill_(a)
    places = [1 + i % 2 for i in range(len(xs))]
    x = torch.tensor(xs, dtype=torch.float64)
    clicked = loss({"label": x}, batch([1] * len(xs), places))
    plain = -torch.nn.functional.logsigmoid(x).mean()
    assert clicked.item() - plain.item() == pytest.approx(math.log1p(math.exp(-a)), rel=1e-9)
    loss.bias.data.fill_(40.0)  # as good as seen
    label = [i % 2 for i in range(len(xs))]
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, torch.tensor(label).double())
    assert loss({"label": x}, batch(label, places)).item() == pytest.approx(want.item(), rel=1e-9)


@pytest.mark.parametrize("form", ["product", "sum"])
@pytest.mark.parametrize("label", [[0] * 4, [1] * 4])
def test_finite_where_logits_are_extreme(form, label):
    loss = PAL(("label",), positions=4, form=form)
    loss.bias.data.copy_(torch.tensor([90.0, -90.0, 0.0]))
    x = torch.tensor([90.0, -90.0, 90.0, -90.0], requires_grad=True)
    value = loss({"label": x}, batch(label, [0, 1, 2, 3]))
    value.backward()
    assert math.isfinite(value.item())
    assert bool(torch.isfinite(x.grad).all())
    assert bool(torch.isfinite(loss.bias.grad).all())


def test_only_positions_are_read_so_no_item_can_hide_in_the_look():
    loss = PAL(("label",), positions=4)
    data = batch([1, 0, 0, 1], [0, 1, 2, 3])
    other = Batch(data.ids + 7, values=torch.randn(4, 1), label=data.label, context=data.context)
    x = torch.randn(4)
    assert torch.equal(loss({"label": x}, data), loss({"label": x}, other))


def test_planted_looks_and_likings_are_found_where_blind_training_is_far_off():
    slates = draw(120_000, whim=1.0)
    assert np.abs(naive(slates) - LOOK)[1:].max() > 0.05
    loss = PAL(("label",), positions=SHOWN)
    liked = learned(slates, loss)
    assert np.abs(loss.examination().numpy() / LOOK - 1).max() < 0.05
    assert np.abs(loss.examination().numpy() - LOOK).max() < 0.01
    assert (liked - slates.liked).abs().mean().item() < 0.02
    blind = learned(slates, BCE(("label",)))
    assert (blind - slates.liked).abs().mean().item() > 0.05
    # What is served has no position in it, and orders the items of slates nobody has chosen better.
    assert right_pairs(liked, slates.liked) > right_pairs(blind, slates.liked)


def right_pairs(found, truth):
    """The share of pairs of items that are in the right order."""
    return (((found[:, None] > found) == (truth[:, None] > truth)).double().mean()).item()


def test_contract():
    contract.without("bce_equality")("loss", PAL)
    contract.without("bce_equality")("loss", PAL, form="sum", positions=3)
