"""ESMM and ESCM² against the formulas in double precision, planted conversions, and the mistakes known of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.abilities import Summing
from recsys.api import product_bce
from recsys.contracts import Batch, EncodedSchema, Field
from recsys.data.simulate_random import Draws
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_esmm import ESCM2, ESMM

TASKS = ("click", "conversion")
SCHEMA = EncodedSchema((Field("a", 5), Field("b", 6)), (), TASKS)
numbers = st.floats(-30, 30)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def batch(o, z, weight=None):
    o, z = torch.as_tensor(o).double(), torch.as_tensor(z).double()
    ids = torch.arange(len(o)).remainder(5)[:, None].repeat(1, 2)
    context = {} if weight is None else {"weight": torch.as_tensor(weight).double()}
    return Batch(ids, label={"click": o, "conversion": z}, context=context)


def logits(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {t: torch.randn(rows, dtype=torch.float64, generator=g).mul(1.5).requires_grad_() for t in TASKS}


def gradients(value, given):
    return {
        t: g for t, g in zip(given, torch.autograd.grad(value, list(given.values()), allow_unused=True), strict=True)
    }


@settings(max_examples=100, deadline=None)
@given(numbers, numbers, st.integers(0, 1))
def test_the_loss_of_a_product_is_exact_where_the_naive_one_is(a, b, y):
    p = sigma(a) * sigma(b)
    want = -math.log(p) if y else -math.log(sigma(-a) + sigma(a) * sigma(-b))
    got = product_bce(*(torch.tensor([v], dtype=torch.float64) for v in (a, b, float(y))))
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_esmm_is_the_sum_of_its_two_terms_row_by_row():
    o, z, w = [1, 1, 0, 0], [1, 0, 0, 1], [1.0, 2.0, 0.5, 3.0]
    given = logits(4)
    total = 0.0
    for row in range(4):
        p, q = sigma(given["click"][row].item()), sigma(given["conversion"][row].item())
        both = o[row] * z[row]
        total -= w[row] * (math.log(p) if o[row] else math.log(1 - p))
        total -= w[row] * (math.log(p * q) if both else math.log(1 - p * q))
    assert ESMM(TASKS)(given, batch(o, z, w)).item() == pytest.approx(total / 4, rel=1e-12)


def test_rows_without_a_click_teach_the_conversion_in_esmm_and_their_label_is_not_read():
    given = logits(6)
    o = [1, 1, 0, 0, 0, 1]
    found = gradients(ESMM(TASKS)(given, batch(o, [1, 0, 0, 0, 0, 0])), given)
    p, q = (torch.sigmoid(given[t].detach()) for t in TASKS)
    both = torch.tensor([1.0, 0, 0, 0, 0, 0])
    # d/db of −log(1 − pq) is p q (1 − q) / (1 − p q), and of −log(pq) it is −(1 − q).
    want = torch.where(both > 0, q - 1, p * q * (1 - q) / (1 - p * q)) / 6
    torch.testing.assert_close(found["conversion"], want.double())
    assert bool((found["conversion"][2:5] > 0).all())
    garbage = ESMM(TASKS)(given, batch(o, [1, 0, 1, 1, 1, 0]))
    assert garbage.item() == ESMM(TASKS)(given, batch(o, [1, 0, 0, 0, 0, 0])).item()


def test_with_certain_clicks_the_product_is_the_conversion_alone():
    given = {"click": torch.full((5,), 40.0, dtype=torch.float64), "conversion": logits(5)["conversion"]}
    z = [1, 0, 0, 1, 0]
    plain = torch.nn.functional.binary_cross_entropy_with_logits(given["conversion"], torch.tensor(z).double())
    assert ESMM(TASKS)(given, batch([1] * 5, z)).item() == pytest.approx(plain.item(), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"form": "dr"}, {"form": "dr", "imputation": "error"}])
def test_escm2_with_strength_zero_is_esmm(options):
    given, data = logits(8), batch([1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0])
    torch.manual_seed(0)
    loss = ESCM2(TASKS, SCHEMA, strength=0.0, product_strength=1.0, **options)
    assert loss(given, data).item() == pytest.approx(ESMM(TASKS)(given, data).item(), rel=1e-12)


@pytest.mark.parametrize(("form", "imputation"), [("ips", "error"), ("dr", "error"), ("dr", "soft_label")])
def test_gradients_of_escm2_are_the_closed_forms_and_none_reaches_the_click(form, imputation):
    given, o, z = logits(8), [1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 1]
    torch.manual_seed(0)
    loss = ESCM2(TASKS, SCHEMA, form=form, imputation=imputation).double()
    if loss.head is not None:
        torch.nn.init.normal_(loss.head.weight)
    data = batch(o, z)
    found = gradients(loss.parts(given, data)["conversion"], given)
    assert found["click"] is None or not found["click"].any()
    click, x = (given[t].detach() for t in TASKS)
    weight = torch.tensor(o) / torch.sigmoid(click)
    want = (torch.sigmoid(x) - torch.tensor(z)) * weight
    if imputation == "soft_label":
        imagined = torch.sigmoid(loss.head(data.ids, None).sum((1, 2)) + loss.bias).detach()
        want = torch.sigmoid(x) - imagined + (imagined - torch.tensor(z)) * weight
    torch.testing.assert_close(found["conversion"], want / 8)
    if form == "dr":
        parts = loss.parts(given, data)
        assert not any(torch.autograd.grad(parts["conversion"], loss.bias, allow_unused=True, retain_graph=True))
        assert all(g is None for g in gradients(parts["imputation"], given).values())
        (bias,) = torch.autograd.grad(parts["imputation"], loss.bias)
        assert bias.abs().item() > 0


def test_weights_stay_within_floor_and_cap():
    loss = ESCM2(TASKS, SCHEMA, floor=0.1, cap=5.0)
    found = loss.click_weights(torch.tensor([-9.0, math.log(0.15 / 0.85), 0.0]))
    torch.testing.assert_close(found, torch.tensor([5.0, 5.0, 2.0]))
    torch.testing.assert_close(
        ESCM2(TASKS, SCHEMA, floor=0.1).click_weights(torch.tensor([-9.0])), torch.tensor([10.0])
    )


def test_every_loss_of_clicked_rows_can_be_imputed():
    """A head that ends in a sigmoid cannot say an error above 1."""
    torch.manual_seed(0)
    loss = ESCM2(TASKS, SCHEMA, form="dr", imputation="error").double()
    given = {t: torch.full((40,), v, dtype=torch.float64) for t, v in (("click", 0.0), ("conversion", -3.0))}
    data = batch([1] * 40, [1] * 40)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(given, data).backward()
        optimizer.step()
    parts = loss.parts(given, data)
    assert math.log1p(math.exp(3)) > 3
    assert parts["imputation"].item() < 1e-3
    assert parts["conversion"].item() == pytest.approx(math.log1p(math.exp(3)), abs=1e-3)


def world():
    users, items = 400, 300
    p = Draws.span(11, 0, users * 8).normal(1).reshape(users, 8) / 8**0.25
    q = Draws.span(11, 0, items * 8).normal(2).reshape(items, 8) / 8**0.25
    taste = (p @ q.T).ravel()
    rho = taste - 1.2
    popular = np.tile(-0.7 * np.log(np.arange(items) + 1.0), users)
    theta = np.clip(1 / (1 + np.exp(-(1 + 1.2 * popular + 0.5 * taste))), 0.01, 0.95)
    gamma = 1 / (1 + np.exp(-rho))
    x = 0.7 * rho + 0.3 * np.random.default_rng(0).normal(size=(users, items)).ravel()
    return gamma, theta, x


def test_the_weighted_loss_is_unbiased_for_all_impressions_and_the_known_mistakes_are_not():
    gamma, theta, x = world()
    n = len(x)
    ideal = float((np.logaddexp(0, x) - gamma * x).mean())
    assert ideal == pytest.approx(0.52635, abs=2e-4)  # of the predictor, whatever is clicked
    given = {"click": torch.from_numpy(np.log(theta / (1 - theta))), "conversion": torch.from_numpy(x)}
    torch.manual_seed(0)
    losses = {
        "ips": ESCM2(TASKS, SCHEMA, cap=1000.0),
        "dr": ESCM2(TASKS, SCHEMA, form="dr", cap=1000.0),
        "dr_error": ESCM2(TASKS, SCHEMA, form="dr", imputation="error", cap=1000.0),
    }
    draws: dict[str, list[float]] = {name: [] for name in (*losses, "clicked_only", "not_inverted", "unweighted_dr")}
    rows = Draws.span(11, 0, n)
    for r in range(40):
        o, z = rows.uniform(101 + 2 * r) < theta, rows.uniform(100 + 2 * r) < gamma
        data = batch(o, z)
        for name, loss in losses.items():
            with torch.no_grad():
                draws[name].append(loss.parts(given, data)["conversion"].item())
        error = np.logaddexp(0, x) - z * x
        draws["clicked_only"].append(error[o].mean())
        draws["not_inverted"].append((o * error / (theta * o.mean() ** 2)).mean())
        draws["unweighted_dr"].append((0.2 + o * (error / theta - 0.2)).mean())
    for name, values in draws.items():
        gap = (np.mean(values) - ideal) / (np.std(values, ddof=1) / math.sqrt(len(values)))
        assert (abs(gap) < 4) if name in losses else (abs(gap) > 10), (name, gap)


def settled(loss, clicks, data):
    """The conversion logit, one for all rows, at which the loss is least, by bisection of its slope."""
    low, high = -12.0, 12.0
    for _ in range(60):
        middle = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss({"click": clicks, "conversion": middle.expand(len(clicks))}, data), middle)
        low, high = ((low + high) / 2, high) if slope < 0 else (low, (low + high) / 2)
    return sigma((low + high) / 2)


def test_what_inputs_do_not_tell_makes_esmm_too_sure_and_weights_that_know_it_do_not():
    """Rows look alike, but a trait makes both click and conversion likelier: E[σ(b)] is to be the planted mean."""
    random = np.random.default_rng(5)
    trait = random.random(400_000) < 0.5
    p, q = np.where(trait, 0.6, 0.1), np.where(trait, 0.5, 0.1)
    o, z = random.random(len(p)) < p, random.random(len(q)) < q
    data = batch(o, z)
    blind = torch.full((len(p),), float(np.log(o.mean() / (1 - o.mean()))), dtype=torch.float64)
    knowing = torch.from_numpy(np.log(p / (1 - p)))
    error = math.sqrt(0.25 / o.sum())
    esmm = settled(ESMM(TASKS), blind, data)
    assert esmm == pytest.approx((p * q).sum() / p.sum(), abs=4 * error)  # P(z | click), not P(z)
    assert esmm - q.mean() > 40 * error
    weighted = ESCM2(TASKS, SCHEMA, strength=1.0, product_strength=0.0)
    assert settled(weighted, knowing, data) == pytest.approx(q.mean(), abs=8 * error)
    assert settled(weighted, blind, data) == pytest.approx(esmm, abs=1e-6)  # weights that do not know it


def test_a_half_batch_twice_is_the_whole_and_rows_may_stand_in_any_order():
    given, o, z = logits(8), torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]), torch.tensor([1, 0, 0, 0, 1, 0, 0, 0])
    loss = ESCM2(TASKS, SCHEMA)
    whole = loss(given, batch(o, z)).item()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert loss({t: v[order] for t, v in given.items()}, batch(o[order], z[order])).item() == pytest.approx(whole)
    halves = [loss({t: v[h] for t, v in given.items()}, batch(o[h], z[h])).item() for h in (slice(4), slice(4, 8))]
    assert sum(halves) / 2 == pytest.approx(whole)


def test_what_is_told_of_the_weights_is_of_clicked_rows():
    loss, given = ESCM2(TASKS, SCHEMA, floor=0.1), logits(8)
    given["click"] = torch.tensor([-9.0, 0.0, 1.0, -1.0, 2.0, -9.0, 0.5, 0.0], dtype=torch.float64)
    o = [1, 1, 0, 0, 1, 0, 1, 0]
    assert isinstance(loss, Summing)
    total = loss.sums()
    for half in (slice(4), slice(4, 8)):
        loss({t: v[half] for t, v in given.items()}, batch(o[half], o[half]))
        total = total + loss.sums()
    w = [10.0, 2.0, 1 / sigma(2.0), 1 / sigma(0.5)]
    want = {
        "weight_mean": sum(w) / 4,
        "weight_ess_share": sum(w) ** 2 / sum(v * v for v in w) / 4,
        "weight_bounded": 0.25,
    }
    assert loss.facts(total) == pytest.approx(want)
    assert all(math.isnan(v) for v in loss.facts(torch.zeros(4)).values())


def test_a_missing_task_is_named():
    with pytest.raises(RecipeError, match=r"no task 'buy'; tasks \(data.label\): click, conversion"):
        ESMM(TASKS, conversion="buy")
    with pytest.raises(RecipeError, match="both the task 'click'"):
        ESCM2(TASKS, SCHEMA, conversion="click")


@pytest.mark.parametrize("options", [{}, {"form": "dr"}, {"form": "dr", "imputation": "error"}])
def test_float32_from_half_precision_and_finite_at_extremes(options):
    torch.manual_seed(0)
    loss = ESCM2(TASKS, SCHEMA, **options)
    half = {t: v.detach().bfloat16() for t, v in logits(8).items()}
    data = batch([1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(half, data)
    assert under.dtype == torch.float32
    assert under.item() == pytest.approx(loss({t: v.float() for t, v in half.items()}, data).item(), rel=1e-5)
    for o, z in (([0] * 4, [0] * 4), ([1] * 4, [1] * 4)):
        given = {t: torch.tensor([60.0, -60.0, 0.0, 60.0], requires_grad=True) for t in TASKS}
        value = loss(given, batch(o, z))
        value.backward()
        assert math.isfinite(value.item())
        assert all(bool(torch.isfinite(v.grad).all()) for v in given.values())


@pytest.mark.parametrize("options", [{}, {"form": "dr"}, {"form": "dr", "imputation": "error"}])
def test_contract(options):
    # The kit's tasks bear other names, and one of its batches has one task alone.
    kit = contract.without("bce_equality", "float32_scalar", "needs", "gradients", "pure")
    kit("loss", ESCM2, click="click", conversion="buy", **options)
