"""Rel-MF: unbiased in a known world, its variance and its bias by theory, gradients by hand, and fakes that fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from debias_world import IDEAL, world, z_score
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import Batch
from recsys.testing import contract
from recsys_relmf import RelMF


def batch(y: object, theta: object, **context: object) -> Batch:
    """Rows in float64."""
    y, theta = (torch.as_tensor(v, dtype=torch.float64) for v in (y, theta))
    more = {name: torch.as_tensor(value) for name, value in context.items()}
    return Batch(torch.zeros(len(y), 1, dtype=torch.int64), label={"y": y}, context={"propensity": theta, **more})


def value(loss: RelMF, z: object, rows: Batch) -> float:
    return float(loss({"y": torch.as_tensor(z, dtype=torch.float64)}, rows))


def slow(z, y, theta, floor=0.01, c=1.0, squared=False) -> float:
    """The published numerator and divisor, row by row."""
    above = below = 0.0
    for zi, yi, ti in zip(z, y, theta, strict=True):
        p = 1 / (1 + math.exp(-zi))
        one, zero = ((1 - p) ** 2, p**2) if squared else (-math.log(p), -math.log(1 - p))
        soft = yi / max(ti, floor)
        above += soft * one + c * (1 - soft) * zero
        below += yi + c * (1 - yi)
    return above / below


ROWS = st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 1), st.floats(0.001, 1.0)), min_size=1, max_size=12).map(
    lambda rows: tuple(map(list, zip(*rows, strict=True)))
)


def test_contract() -> None:
    contract("loss", RelMF)
    contract("loss", RelMF, non_negative=0.1, floor=0.5)
    contract.without("bce_equality")("loss", RelMF, error="squared")
    contract.without("bce_equality")("loss", RelMF, unlabelled=0.9)
    contract.without("bce_equality")("loss", RelMF, dual_unbiased=True)


@given(rows=ROWS, squared=st.booleans(), c=st.sampled_from([1.0, 0.9]), floor=st.sampled_from([0.001, 0.3, 1.0]))
def test_it_is_the_published_fraction(rows, squared: bool, c: float, floor: float) -> None:
    z, y, theta = rows
    loss = RelMF(("y",), error="squared" if squared else "bce", floor=floor, unlabelled=c)
    assert value(loss, z, batch(y, theta)) == pytest.approx(slow(z, y, theta, floor, c, squared), rel=1e-9, abs=1e-9)


@given(rows=ROWS)
def test_gradient_is_sigma_minus_the_soft_label_and_none_reaches_theta(rows) -> None:
    z, y, theta = (torch.tensor(v, dtype=torch.float64) for v in rows)
    z.requires_grad_()
    theta.requires_grad_()
    RelMF(("y",), floor=0.05)({"y": z}, batch(y, theta)).backward()
    assert theta.grad is None
    wanted = (torch.sigmoid(z) - y / theta.clamp(min=0.05)) / len(y)
    torch.testing.assert_close(z.grad, wanted.detach(), rtol=1e-9, atol=1e-12)


def test_gradients_of_squared_errors_against_finite_differences() -> None:
    torch.manual_seed(0)
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    rows = batch([1, 0, 1, 0, 0, 1, 0], [0.1, 0.2, 0.9, 0.5, 0.03, 0.4, 1])
    for options in ({"error": "squared"}, {"unlabelled": 0.8}, {"dual_unbiased": True}):
        loss = RelMF(("y",), **options)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss({"y": x}, rows), z, eps=1e-6, rtol=1e-6)


@given(rows=ROWS)
def test_a_propensity_of_one_and_a_floor_of_one_give_plain_losses(rows) -> None:
    z, y, theta = rows
    plain = slow(z, y, [1.0] * len(y))
    assert value(RelMF(("y",)), z, batch(y, [1.0] * len(y))) == pytest.approx(plain, rel=1e-9)
    assert value(RelMF(("y",), floor=1.0), z, batch(y, theta)) == pytest.approx(plain, rel=1e-9)
    squared = slow(z, y, [1.0] * len(y), squared=True)
    found = value(RelMF(("y",), error="squared"), z, batch(y, [1.0] * len(y)))
    assert found == pytest.approx(squared, rel=1e-9)


def test_rows_without_a_click_do_not_depend_on_theta_and_order_or_copies_change_nothing() -> None:
    z, loss = [0.3, -2.0, 1.0], RelMF(("y",))
    assert value(loss, z, batch([0, 0, 0], [0.9, 0.1, 0.5])) == value(loss, z, batch([0, 0, 0], [0.1, 0.7, 0.02]))
    rows, again = batch([1, 0, 1], [0.5, 0.2, 0.1]), batch([1, 1, 0] * 2, [0.1, 0.5, 0.2] * 2)
    assert value(loss, z, rows) == pytest.approx(value(loss, [1.0, 0.3, -2.0] * 2, again), rel=1e-12)


def test_it_cannot_run_away() -> None:
    """softplus(z) − w z has no least value for w > 1: beyond a logit of 15 there is nothing more to win."""
    loss = RelMF(("y",), floor=0.01)
    far = [value(loss, [z], batch([1], [0.02])) for z in (15.0, 40.0, 1e4)]
    assert far[0] == far[1] == far[2] == pytest.approx(15 - 50 * 15, rel=1e-4)
    z = torch.tensor([40.0, -40.0, 40.0], dtype=torch.float64, requires_grad=True)
    loss({"y": z}, batch([1, 1, 1], [0.02, 0.02, 1.0])).backward()
    assert z.grad is not None
    assert z.grad[0] == 0
    assert float(z.grad[1]) == pytest.approx(-50 / 3)  # what is wrong still learns


def test_non_negative_leaves_the_negative_part_of_a_batch_out() -> None:
    z, y, theta = [3.0, -1.0, 0.5], [1, 1, 0], [0.02, 0.5, 0.5]
    one, zero = [math.log1p(math.exp(-v)) for v in z], [math.log1p(math.exp(v)) for v in z]
    soft = [v / t for v, t in zip(y, theta, strict=True)]
    positive = sum(s * o for s, o in zip(soft, one, strict=True)) / 3
    negative = sum((1 - s) * n for s, n in zip(soft, zero, strict=True)) / 3
    assert negative < -0.1
    assert value(RelMF(("y",), non_negative=0.1), z, batch(y, theta)) == pytest.approx(positive)
    assert value(RelMF(("y",), non_negative=1e6), z, batch(y, theta)) == pytest.approx(positive + negative)


def test_row_weights_restore_a_population_that_was_sampled() -> None:
    """Positives taken three times as often as others, and weighed back by a third."""
    z, y, theta = [0.4, -0.3, 1.2], [1, 0, 0], [0.3, 0.2, 0.7]
    several = batch([1, 1, 1, 0, 0], [0.3] * 3 + [0.2, 0.7], weight=[5 / 9] * 3 + [5 / 3] * 2)
    found = value(RelMF(("y",)), [0.4] * 3 + [-0.3, 1.2], several)
    assert found == pytest.approx(value(RelMF(("y",)), z, batch(y, theta)))


def test_weights_are_the_soft_labels_before_and_after_the_floor() -> None:
    raw, used = RelMF(("y",), floor=0.1).weights(batch([1, 0, 1], [0.02, 0.5, 0.5]))
    assert raw.tolist() == pytest.approx([50, 0, 2])
    assert used.tolist() == pytest.approx([10, 0, 2])


@pytest.fixture(scope="module")
def repeated() -> dict[str, list[float]]:
    """The losses' values in each repetition of the known world."""
    w = world()
    losses = {
        "relmf": RelMF(("y",), floor=0.001),
        "clipped": RelMF(("y",), floor=0.1),
        "dual": RelMF(("y",), floor=0.001, dual_unbiased=True),
    }
    found: dict[str, list[float]] = {name: [] for name in (*losses, "naive", "both_classes")}
    for relevant, shown in w.draws():
        rows = batch(relevant * shown, w.theta)
        for name, loss in losses.items():
            found[name].append(value(loss, w.logit, rows))
        y = relevant * shown
        naive = y * w.one + (1 - y) * w.zero
        found["naive"].append(naive.mean())
        found["both_classes"].append((naive / w.theta).mean())  # a fake: unclicked rows weighed up too
    return found


def test_unbiased_in_the_known_world_where_fakes_are_not(repeated: dict[str, list[float]]) -> None:
    ideal = world().error.mean()
    assert ideal == pytest.approx(IDEAL, abs=5e-6)
    assert abs(z_score(repeated["relmf"], ideal)) < 4
    assert z_score(repeated["naive"], ideal) < -50
    assert z_score(repeated["both_classes"], ideal) > 10


def test_variance_and_bias_are_what_theory_says(repeated: dict[str, list[float]]) -> None:
    w = world()
    n, gap = len(w.gamma), w.one - w.zero
    spread = math.sqrt((w.gamma * (1 / w.theta - w.gamma) * gap**2).sum()) / n
    assert np.std(repeated["relmf"], ddof=1) == pytest.approx(spread, rel=0.15)
    bias = (np.where(w.theta < 0.1, w.gamma * (w.theta / 0.1 - 1), 0) * gap).mean()
    assert bias == pytest.approx(-0.0704, abs=1e-3)
    assert abs(z_score(repeated["clipped"], w.error.mean() + bias)) < 4
    click = w.theta * w.gamma
    clipped = math.sqrt((click * (1 - click) / np.maximum(w.theta, 0.1) ** 2 * gap**2).sum()) / n
    assert np.std(repeated["clipped"], ddof=1) == pytest.approx(clipped, rel=0.15)
    assert np.std(repeated["clipped"]) < 0.6 * np.std(repeated["relmf"])


def test_the_heuristic_is_biased_as_its_docstring_says(repeated: dict[str, list[float]]) -> None:
    w = world()
    rest = (1 - w.theta * w.gamma) / (1 - w.theta + 1e-6)
    wanted = (w.gamma * w.one + rest * w.zero).mean()
    assert abs(z_score(repeated["dual"], wanted)) < 4
    assert wanted == pytest.approx(0.71, abs=4e-3)
    assert z_score(repeated["dual"], w.error.mean()) > 10
    assert "HEURISTIC" in str(RelMF.__doc__)


@settings(max_examples=20)
@given(rows=ROWS)
def test_half_precision_costs_little(rows) -> None:
    z, y, theta = (torch.tensor(v) for v in rows)
    full = Batch(torch.zeros(len(y), 1, dtype=torch.int64), label={"y": y.float()}, context={"propensity": theta})
    loss = RelMF(("y",), floor=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss({"y": z.bfloat16()}, full)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(loss({"y": z.bfloat16().float()}, full)), rel=1e-5, abs=1e-5)
