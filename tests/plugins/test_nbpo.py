"""NBPO: its four gradients in closed form, its limits, its start, and what repeats of a positive weigh."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from recsys.contracts import Batch, EncodedSchema, Field
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_nbpo import NBPO, positive_loss, sampled_loss

SCHEMA = EncodedSchema((Field("f0", 5), Field("user", 30), Field("item", 40)), (), ("label",))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slopes(loss, x, g):
    """∂x and ∂g of an elementwise loss."""
    a, b = (torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in (x, g))
    found = torch.autograd.grad(loss(a, b), (a, b), allow_unused=True)
    return [0.0 if s is None else float(s) for s in found]


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_the_four_gradients_are_those_of_the_updates(x, g):
    phi = sigmoid(g)
    down_x, down_g = slopes(lambda a, b: positive_loss(a, b, "nbpo"), x, g)
    assert down_x == pytest.approx(-(1 - phi) * sigmoid(-x), abs=1e-12)
    assert down_g == pytest.approx(phi * sigmoid(x), abs=1e-12)
    down_x, down_g = slopes(lambda a, b: sampled_loss(a, b, "nbpo"), x, g)
    assert down_x == pytest.approx(-(phi * sigmoid(-x) - sigmoid(x)), abs=1e-12)
    assert down_g == pytest.approx(-(1 - phi) * sigmoid(x), abs=1e-12)


def test_without_the_stops_the_gradients_are_others():
    def leaky(x, g):
        return -(logsigmoid(-x) + g.sigmoid() * logsigmoid(x) + x.sigmoid() * logsigmoid(g))

    x, g = 0.7, -1.3
    sound = slopes(lambda a, b: sampled_loss(a, b, "nbpo"), x, g)
    assert abs(slopes(leaky, x, g)[0] - sound[0]) > 0.1
    assert abs(slopes(leaky, x, g)[1] - sound[1]) > 0.01


@pytest.mark.parametrize("form", ["exact", "sum"])
@pytest.mark.parametrize("which", [positive_loss, sampled_loss])
@given(x=st.floats(-6, 6), g=st.floats(-6, 6))
def test_the_other_forms_are_the_likelihood(form, which, x, g):
    phi = sigmoid(g)
    likelihood = (1 - phi) * sigmoid(x) if which is positive_loss else sigmoid(-x) + phi * sigmoid(x)
    wanted = -math.log(likelihood) if form == "exact" else -likelihood
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (x, g))
    assert float(which(a, b, form)) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    h = 1e-6
    for at, slope in enumerate(slopes(lambda a, b: which(a, b, form), x, g)):
        moved = [[v + (side * h if k == at else 0.0) for k, v in enumerate((x, g))] for side in (1, -1)]
        up, down = (float(which(*torch.tensor(m, dtype=torch.float64), form)) for m in moved)
        assert slope == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-8)


@given(st.floats(-8, 8))
def test_without_flips_the_gradients_are_those_of_bpo(x):
    for which in (positive_loss, sampled_loss):
        wanted = slopes(lambda a, b, w=which: w(a, b, "bpo"), x, 0.0)[0]
        for form in ("nbpo", "exact"):
            slope = slopes(lambda a, b, w=which, f=form: w(a, b, f), x, -40.0)[0]
            assert slope == pytest.approx(wanted, abs=1e-9)
        a, b = torch.tensor(x).double(), torch.tensor(-40.0).double()
        assert float(which(a, b, "exact")) == pytest.approx(float(which(a, b, "bpo")), abs=1e-9)


def test_a_negative_that_is_surely_flipped_pushes_neither_way_at_the_middle():
    for x in (-2.0, 0.0, 1.5):
        wanted = -(sigmoid(-x) - sigmoid(x))
        assert slopes(lambda a, b: sampled_loss(a, b, "nbpo"), x, 40.0)[0] == pytest.approx(wanted, abs=1e-12)


def batch(logged, negatives, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    ids = torch.stack([torch.randint(2, n, (rows,), generator=random) for n in (5, 30, 40)], 1)
    label = torch.cat([torch.ones(logged), torch.zeros(logged * negatives)]).double()
    return torch.randn(rows, generator=random).double(), Batch(ids, label={"label": label}, negatives=negatives)


@pytest.mark.parametrize("form", ["nbpo", "exact", "sum", "bpo"])
def test_the_loss_is_the_mean_over_pairs(form):
    torch.manual_seed(2)
    loss = NBPO(("label",), SCHEMA, dim=4, form=form, start=1.0).double()
    x, rows = batch(3, 2)
    rows.label["label"][1] = 0.0  # a logged row that is no positive
    rows.label["label"][4] = 1.0  # a sampled one that is known to be
    total = 0.0
    for i in range(3):
        for k in range(2):
            j = 3 + 2 * i + k
            if rows.label["label"][i] == 1 and rows.label["label"][j] == 0:
                g = [0.0, 0.0]
                if form != "bpo":
                    p, q = loss.flips
                    g = [float((p[rows.ids[n, 1]] * q[rows.ids[n, 2]]).sum()) for n in (i, j)]
                a, b, g_i, g_j = (torch.tensor(v).double() for v in (float(x[i]), float(x[j]), *g))
                total += float(positive_loss(a, g_i, form)) + float(sampled_loss(b, g_j, form))
    assert float(loss({"label": x}, rows)) == pytest.approx(total / 6, rel=1e-9)


def test_training_begins_as_without_flips():
    torch.manual_seed(0)
    loss = NBPO(("label",), SCHEMA)
    _, rows = batch(200, 4)
    phi = loss.flip_logit(rows).sigmoid()
    assert float(phi.mean()) < 0.01
    assert float(loss.flip_logit(rows).mean()) == pytest.approx(-6.25, abs=0.5)


def test_a_positive_weighs_as_much_as_all_rows_sampled_for_it():
    """In the sum over pairs it is repeated m times."""
    torch.manual_seed(0)
    loss = NBPO(("label",), SCHEMA, dim=4).double()
    found = []
    for negatives in (1, 4):
        _, rows = batch(5, negatives)
        rows.ids[:5] = torch.tensor([2, 3, 4])
        x = torch.zeros(len(rows), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss({"label": x}, rows) * 5 * negatives, x)
        found.append(slope[:5])
    assert found[1].tolist() == pytest.approx((4 * found[0]).tolist(), rel=1e-9)


def test_the_flips_are_left_out_of_a_loss_without_them():
    x, rows = batch(2, 1)
    plain, decayed = (NBPO(("label",), SCHEMA, form="bpo", l2=l2).double() for l2 in (0.0, 0.3))
    assert float(plain({"label": x}, rows)) == float(decayed({"label": x}, rows))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.9])
def test_a_flip_that_nothing_holds_settles_at_one_minus_the_rate_of_positives(rate):
    """Whatever the truth is: what makes of it a probability of flips is low rank, and that it starts near 0."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    g = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x, g], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        (rate * positive_loss(x, g, "nbpo") + (1 - rate) * sampled_loss(x, g, "nbpo")).backward()
        optimizer.step()
    assert float(g.detach().sigmoid()) == pytest.approx(1 - rate, abs=0.01)


def settled(form, liked, flip):
    """σ(x) where the gradients of a pair's rows meet, with the true flip given; by bisection."""
    rate, g = liked * (1 - flip), math.log(flip / (1 - flip))
    low, high = -30.0, 30.0
    for _ in range(60):
        x = (low + high) / 2
        up = rate * slopes(lambda a, b: positive_loss(a, b, form), x, g)[0]
        up += (1 - rate) * slopes(lambda a, b: sampled_loss(a, b, form), x, g)[0]
        low, high = (x, high) if up < 0 else (low, x)
    return sigmoid(low)


@given(st.floats(0.02, 0.95), st.floats(0.02, 0.95))
def test_given_the_true_flips_the_likelihood_finds_the_truth_and_the_surrogate_does_not(liked, flip):
    assert settled("exact", liked, flip) == pytest.approx(liked, abs=1e-6)
    rate = liked * (1 - flip)
    odds = (rate * (1 - flip) + (1 - rate) * flip) / (1 - rate)
    assert settled("nbpo", liked, flip) == pytest.approx(odds / (1 + odds), abs=1e-6)


def test_true_flips_can_turn_the_order_of_the_surrogate_round():
    """Even one who knows the flips would not rank by `nbpo`: a disliked pair that is often lost comes first."""
    assert settled("nbpo", 0.05, 0.9) > settled("nbpo", 0.3, 0.1)
    assert settled("bpo", 0.05, 0.9) < settled("bpo", 0.3, 0.1)


def test_the_decay_is_over_the_whole_tables():
    torch.manual_seed(0)
    x, rows = batch(2, 1)
    plain, decayed = (NBPO(("label",), SCHEMA, dim=4, l2=l2).double() for l2 in (0.0, 0.3))
    decayed.load_state_dict(plain.state_dict())
    gap = float((decayed({"label": x}, rows) - plain({"label": x}, rows)).detach())
    assert gap == pytest.approx(0.15 * sum(float(t.detach().square().sum()) for t in plain.flips), rel=1e-9)


@pytest.mark.parametrize("form", ["nbpo", "exact", "bpo"])
def test_contract(form):
    contract.without("bce_equality")("loss", NBPO, user="f0", item="f1", form=form)


def test_fields_are_checked():
    with pytest.raises(RecipeError, match=r"loss\.item: no field 'film'"):
        NBPO(("label",), SCHEMA, item="film")
