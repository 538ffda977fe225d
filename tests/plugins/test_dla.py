"""The dual learning algorithm against a loop over slates, its invariances, and planted looks."""

import math

import numpy as np
import pytest
import torch
from slates import LOOK, SHOWN, draw, learned, naive

from recsys.abilities import Summing
from recsys.contracts import Batch
from recsys.testing import contract
from recsys_dla import DLA


def batch(group, position, click, weight=None):
    context = {"group": torch.tensor(group), "position": torch.tensor(position)}
    if weight is not None:
        context["weight"] = torch.tensor(weight, dtype=torch.float64)
    label = {"label": torch.tensor(click, dtype=torch.float64)}
    return Batch(torch.zeros(len(group), 1, dtype=torch.int64), label=label, context=context)


# Slates of 3, 1 and 4 rows; the rows of the last one do not stand in the order that they were shown in.
GROUP = [7, 7, 7, 2, 9, 9, 9, 9]
PLACE = [0, 1, 2, 1, 3, 0, 1, 6]
CLICK = [0, 1, 1, 1, 1, 0, 0, 1]
WEIGHT = [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0, 1.0]


def made(cap=100.0):
    torch.manual_seed(0)
    loss = DLA(("label",), positions=4, cap=cap).double()
    torch.nn.init.normal_(loss.scores)
    f = torch.randn(8, dtype=torch.float64).requires_grad_()
    return loss, f


def by_loop(f, g, cap):
    """The loss, and its two gradients worked out by hand: weights are constants in them."""
    total, by_f, by_g = 0.0, [0.0] * 8, [0.0] * 4
    for slate in dict.fromkeys(GROUP):
        own = [i for i in range(8) if GROUP[i] == slate]
        first = min(own, key=lambda i: PLACE[i])
        place = {i: min(PLACE[i], 3) for i in own}
        p = {i: math.exp(f[i]) / sum(math.exp(f[j]) for j in own) for i in own}
        v = {i: math.exp(g[place[i]]) / sum(math.exp(g[place[j]]) for j in own) for i in own}
        for i in own:
            look = CLICK[i] * WEIGHT[i] * min(math.exp(g[0] - g[place[i]]), cap)
            liking = CLICK[i] * WEIGHT[i] * min(p[first] / p[i], cap)
            total -= look * math.log(p[i]) + liking * math.log(v[i])
            for j in own:
                by_f[j] += look * (p[j] - (i == j))
                by_g[place[j]] += liking * (v[j] - (i == j))
    return total / 8, [x / 8 for x in by_f], [x / 8 for x in by_g[1:]]


@pytest.mark.parametrize("cap", [100.0, 1.2])
def test_loss_and_gradients_are_those_of_a_loop_over_slates(cap):
    loss, f = made(cap)
    value = loss({"label": f}, batch(GROUP, PLACE, CLICK, WEIGHT))
    value.backward()
    total, by_f, by_g = by_loop(f.tolist(), [0.0, *loss.scores.tolist()], cap)
    assert value.item() == pytest.approx(total, rel=1e-12)
    assert f.grad.tolist() == pytest.approx(by_f, rel=1e-9, abs=1e-14)
    assert loss.scores.grad.tolist() == pytest.approx(by_g, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("cap", [100.0, 1.2])
def test_what_is_told_of_the_weights_of_clicks(cap):
    loss, f = made(cap)
    assert isinstance(loss, Summing)
    total = loss.sums()
    for part in (slice(4), slice(4, 8)):
        loss({"label": f[part]}, batch(GROUP[part], PLACE[part], CLICK[part]))
        total = total + loss.sums()
    g = [0.0, *loss.scores.tolist()]
    w = [min(math.exp(-g[min(PLACE[i], 3)]), cap) for i in range(8) if CLICK[i]]
    want = {"look_mean": sum(w) / len(w), "look_ess_share": sum(w) ** 2 / sum(v * v for v in w) / len(w)}
    assert loss.facts(total) == pytest.approx(want)
    assert all(math.isnan(v) for v in loss.facts(torch.zeros(3)).values())


def test_slates_without_a_click_add_nothing_and_what_is_added_to_all_logits_of_a_slate_is_not_seen():
    loss, f = made()
    empty = [0, 0, 0, 1, 0, 0, 0, 0]  # a slate of a single row has no order to learn
    value = loss({"label": f}, batch(GROUP, PLACE, empty))
    value.backward()
    assert value.item() == 0.0
    assert not f.grad.any()
    assert not loss.scores.grad.any()
    whole = loss({"label": f}, batch(GROUP, PLACE, CLICK)).item()
    moved = f.detach() + torch.tensor(GROUP) * 1.5
    assert loss({"label": moved}, batch(GROUP, PLACE, CLICK)).item() == pytest.approx(whole, rel=1e-9)


def test_with_equal_looks_the_model_learns_from_the_plain_softmax_of_slates():
    loss, f = made()
    torch.nn.init.zeros_(loss.scores)
    loss({"label": f}, batch(GROUP, PLACE, CLICK)).backward()
    x = f.detach().clone().requires_grad_()
    parts = [x[:3].log_softmax(0), x[3:4].log_softmax(0), x[4:].log_softmax(0)]
    (-(torch.cat(parts) * torch.tensor(CLICK)).sum() / 8).backward()
    torch.testing.assert_close(f.grad, x.grad)


def test_where_all_stand_at_one_place_both_weights_are_those_of_equals():
    loss, f = made()
    group, click = [1, 1, 1, 4, 4], [1, 0, 1, 0, 1]
    x = f.detach()[:5].requires_grad_()
    loss({"label": x}, batch(group, [0] * 5, click)).backward()
    y = x.detach().clone().requires_grad_()
    parts = torch.cat([y[:3].log_softmax(0), y[3:].log_softmax(0)])
    (-(parts * torch.tensor(click)).sum() / 5).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert loss.scores.grad is None or not loss.scores.grad.any()


@pytest.mark.parametrize("click", [[0] * 8, [1] * 8])
def test_finite_where_logits_are_extreme(click):
    loss = DLA(("label",), positions=4)
    loss.scores.data.copy_(torch.tensor([80.0, -80.0, 0.0]))
    f = torch.tensor([90.0, -90.0, 0, 90, -90, 90, 0, -90], requires_grad=True)
    value = loss({"label": f}, batch(GROUP, PLACE, click))
    value.backward()
    assert math.isfinite(value.item())
    assert bool(torch.isfinite(f.grad).all())
    assert bool(torch.isfinite(loss.scores.grad).all())


def test_slates_may_come_in_any_order_and_two_halves_make_the_whole():
    loss, f = made()
    whole = loss({"label": f}, batch(GROUP, PLACE, CLICK)).item()
    order = [4, 5, 6, 7, 3, 0, 1, 2]
    data = batch(*([column[i] for i in order] for column in (GROUP, PLACE, CLICK)))
    assert loss({"label": f[order]}, data).item() == pytest.approx(whole, rel=1e-12)
    halves = [loss({"label": f[h]}, batch(GROUP[h], PLACE[h], CLICK[h])).item() for h in (slice(4), slice(4, 8))]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-12)


def test_planted_looks_are_found_where_the_rate_of_clicks_is_far_off():
    slates = draw(120_000)
    assert np.abs(naive(slates) - LOOK)[1:].max() > 0.05
    loss = DLA(("label",), positions=SHOWN)
    liked = learned(slates, loss, epochs=8)
    assert np.abs(loss.examination().numpy() - LOOK).max() < 0.01
    # Logits of a softmax are known up to a constant: they are the logarithms of what is liked.
    gap = (liked.logit() - slates.liked.log()) - (liked.logit() - slates.liked.log()).mean()
    assert gap.abs().mean().item() < 0.1


def test_tasks_are_averaged():
    torch.manual_seed(0)
    loss = DLA(("a", "b"), positions=4).double()
    given = {t: torch.randn(8, dtype=torch.float64) for t in ("a", "b")}
    label = {"a": torch.tensor(CLICK).double(), "b": torch.tensor(CLICK[::-1]).double()}
    data = batch(GROUP, PLACE, CLICK)
    whole = loss(given, Batch(data.ids, label=label, context=data.context)).item()
    one = [
        DLA((t,), positions=4).double()(given, Batch(data.ids, label=label, context=data.context)).item() for t in given
    ]
    assert whole == pytest.approx(sum(one) / 2, rel=1e-12)


def test_contract():
    # The kit's rows are slates of their own, most of them, and have no order to learn.
    contract.without("bce_equality", "gradients", "every_task")("loss", DLA)
