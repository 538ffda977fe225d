"""IPS and SNIPS: unbiased in a known world, what each is invariant to, the running divisor, and fakes that fail."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from debias_world import world, z_score
from hypothesis import given
from hypothesis import strategies as st

from recsys.api import Batch, RecipeError
from recsys.testing import contract
from recsys_ips import IPS, SNIPS


def batch(y: object, theta: object, **context: object) -> Batch:
    """Rows in float64."""
    y, theta = (torch.as_tensor(v, dtype=torch.float64) for v in (y, theta))
    more = {name: torch.as_tensor(value) for name, value in context.items()}
    return Batch(torch.zeros(len(y), 1, dtype=torch.int64), label={"y": y}, context={"propensity": theta, **more})


def value(loss: object, z: object, rows: Batch) -> float:
    return float(loss({"y": torch.as_tensor(z, dtype=torch.float64)}, rows))  # type: ignore[operator]


def bce(z: float, y: float) -> float:
    return math.log1p(math.exp(-abs(z))) + max(z, 0) - y * z


ROWS = st.lists(
    st.tuples(st.floats(-9, 9), st.integers(0, 1), st.floats(0.01, 1.0), st.integers(0, 1)), min_size=1, max_size=12
).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))


def test_contract() -> None:
    for loss in (IPS, SNIPS):
        contract("loss", loss)
        contract("loss", loss, mode="none")
        contract("loss", loss, mode="cap", value=3.0)
    contract("loss", IPS, mode="selfnorm")
    contract("loss", SNIPS, decay=0.0)
    contract.without("bce_equality")("loss", IPS, exposure=0.5)


@given(rows=ROWS)
def test_against_loops(rows) -> None:
    z, y, theta, o = rows
    above = below = 0.0
    for zi, yi, ti, oi in zip(z, y, theta, o, strict=True):
        if oi:
            above += bce(zi, yi) / max(ti, 0.05)
            below += 1 / max(ti, 0.05)
    given_rows = batch(y, theta, observed=o)
    assert value(IPS(("y",)), z, given_rows) == pytest.approx(above / len(z), rel=1e-9, abs=1e-12)
    wanted = above / below if below else 0.0
    assert value(SNIPS(("y",), decay=0.0), z, given_rows) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@given(rows=ROWS)
def test_what_was_not_observed_is_not_looked_at(rows) -> None:
    z, y, theta, o = rows
    other = [yi if oi else 1 - yi for yi, oi in zip(y, o, strict=True)]
    for loss in (IPS(("y",)), SNIPS(("y",), decay=0.0)):
        assert value(loss, z, batch(y, theta, observed=o)) == value(loss, z, batch(other, theta, observed=o))


def test_propensities_of_one_give_plain_means() -> None:
    z, y, o = [0.5, -1.0, 2.0, 0.1], [1, 0, 1, 0], [1, 1, 0, 1]
    mean = sum(bce(a, b) for a, b, c in zip(z, y, o, strict=True) if c) / 3
    rows = batch(y, [1.0] * 4, observed=o)
    assert value(SNIPS(("y",), decay=0.0), z, rows) == pytest.approx(mean)
    assert value(IPS(("y",)), z, rows) == pytest.approx(0.75 * mean)
    alone = batch([1, 0, 0], [1.0] * 3)
    assert value(IPS(("y",), exposure=0.75), [0.5, -1.0, 0.1], alone) == pytest.approx(0.75 * mean)


def test_propensities_too_large_by_a_factor_scale_ips_and_not_snips() -> None:
    z, y, theta = [0.5, -1.0, 2.0], [1, 0, 1], [0.2, 0.6, 0.1]
    some, more = batch(y, theta), batch(y, [t * 1.5 for t in theta])
    ips, snips = IPS(("y",), mode="none"), SNIPS(("y",), mode="none", decay=0.0)
    assert value(snips, z, more) == pytest.approx(value(snips, z, some), rel=1e-6)
    assert value(ips, z, more) == pytest.approx(value(ips, z, some) / 1.5)


def test_a_bound_can_only_lower_an_error_that_is_not_negative() -> None:
    z, rows = [0.5, -1.0, 2.0], batch([1, 0, 1], [0.02, 0.6, 0.1])
    free = value(IPS(("y",), mode="none"), z, rows)
    for mode, bound in (("floor", 0.3), ("cap", 4.0), ("power", 0.3), ("shrink", 5.0)):
        assert value(IPS(("y",), mode=mode, value=bound), z, rows) < free


def test_the_divisor_of_snips_is_a_running_mean_that_forgets() -> None:
    loss = SNIPS(("y",), mode="none", decay=0.8)
    mean = total = 0.0
    random = np.random.default_rng(0)
    for _ in range(12):
        theta, o, z = random.uniform(0.1, 1, 5), random.integers(0, 2, 5), random.normal(size=5)
        rows = batch([1, 0, 1, 1, 0], theta, observed=o)
        weight = o / theta
        mean, total = 0.8 * mean + 0.2 * weight.mean(), 0.8 * total + 0.2
        errors = sum(w * bce(a, b) for w, a, b in zip(weight, z, [1, 0, 1, 1, 0], strict=True))
        assert value(loss, z, rows) == pytest.approx(errors / 5 / (mean / total), rel=1e-5)
    kept = {name: t.clone() for name, t in loss.state_dict().items()}
    loss.eval()
    assert value(loss, z, rows) == pytest.approx(errors / 5 / (mean / total), rel=1e-5)
    assert all(torch.equal(t, kept[name]) for name, t in loss.state_dict().items())
    fresh = SNIPS(("y",), mode="none", decay=0.8).eval()
    fresh.load_state_dict(kept)
    assert value(fresh, z, rows) == value(loss, z, rows)


def test_no_gradient_reaches_theta_and_that_of_the_logits_is_right() -> None:
    rows = batch([1, 0, 1, 0], [0.2, 0.9, 0.04, 0.5], observed=[1, 1, 1, 0])
    theta = rows.context["propensity"].clone().requires_grad_()
    rows = replace(rows, context={**rows.context, "propensity": theta})
    for loss in (IPS(("y",)), SNIPS(("y",), decay=0.0)):
        z = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
        loss({"y": z}, rows).backward()
        weight = torch.tensor([5.0, 1 / 0.9, 20.0, 0.0], dtype=torch.float64)
        divisor = 4.0 if isinstance(loss, IPS) else float(weight.sum())
        wanted = weight * (torch.sigmoid(z) - rows.label["y"]) / divisor
        torch.testing.assert_close(z.grad, wanted.detach(), rtol=1e-6, atol=1e-12)
        assert theta.grad is None


def test_nothing_observed_is_a_loss_of_zero() -> None:
    rows = batch([1, 0], [0.2, 0.9], observed=[0, 0])
    for loss in (IPS(("y",)), SNIPS(("y",)), SNIPS(("y",), decay=0.0)):
        assert value(loss, [1.0, 2.0], rows) == 0.0


def test_a_mode_that_does_not_take_its_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="'power' takes an exponent"):
        IPS(("y",), mode="power", value=3.0)
    with pytest.raises(RecipeError, match="'none' takes no value"):
        SNIPS(("y",), mode="none", value=3.0)


def test_unbiased_in_the_known_world_where_fakes_are_not() -> None:
    w = world()
    ideal, n = w.error.mean(), len(w.theta)
    found: dict[str, list[float]] = {name: [] for name in ("ips", "snips", "naive", "no_o", "wrong")}
    ips, snips = IPS(("y",), mode="none"), SNIPS(("y",), mode="none", decay=0.0)
    for relevant, shown in w.draws():
        rows = batch(relevant, w.theta, observed=shown.astype(np.int64))
        found["ips"].append(value(ips, w.logit, rows))
        found["snips"].append(value(snips, w.logit, rows))
        errors = relevant * w.one + (1 - relevant) * w.zero
        found["naive"].append((errors * shown).sum() / shown.sum())
        found["no_o"].append((errors * shown / w.theta).sum() / shown.sum())  # the divisor of another method
        wrong = batch(relevant, np.full(n, w.theta.mean()), observed=shown.astype(np.int64))
        found["wrong"].append(value(ips, w.logit, wrong))
    assert abs(z_score(found["ips"], ideal)) < 4
    assert abs(z_score(found["snips"], ideal)) < 4
    assert np.std(found["snips"]) < np.std(found["ips"])
    assert np.std(found["ips"]) == pytest.approx(0.0097, rel=0.2)
    for fake in ("naive", "no_o", "wrong"):
        assert abs(z_score(found[fake], ideal)) > 10, fake


def test_a_constant_added_to_the_errors_shifts_snips_exactly() -> None:
    """Two logits ±a of label ½-like pairs: errors differ by a constant where labels are all 1."""
    theta, z = [0.2, 0.7, 0.05], torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
    rows = batch([0, 0, 0], theta)
    below = torch.log(torch.expm1(torch.nn.functional.softplus(z) + 0.8))  # softplus(below) = softplus(z) + .8
    snips, ips = SNIPS(("y",), mode="none", decay=0.0), IPS(("y",), mode="none")
    assert value(snips, below, rows) - value(snips, z, rows) == pytest.approx(0.8, rel=1e-6)
    assert value(ips, below, rows) - value(ips, z, rows) == pytest.approx(0.8 * sum(1 / t for t in theta) / 3)
