"""Weights of rows against formulas written out by hand, and what is told of them against whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.errors import RecipeError
from recsys.train.weights import SIZE, WeightMode, flattened, make_weight, merged, weighed, weight_facts

THETAS = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=30)
MODES: list[tuple[WeightMode, float | None]] = [
    ("none", None),
    ("floor", 0.05),
    ("cap", 7.0),
    ("power", 0.4),
    ("shrink", 9.0),
    ("selfnorm", None),
]


def by_hand(thetas: list[float], mode: str, value: float | None) -> list[float]:
    plain = [1 / t for t in thetas]
    v = value or 0.0
    if mode == "floor":
        return [1 / max(t, v) for t in thetas]
    if mode == "cap":
        return [min(w, v) for w in plain]
    if mode == "power":
        return [t**-v for t in thetas]
    if mode == "shrink":
        return [w * v / (w * w + v) for w in plain]
    if mode == "selfnorm":
        return [w / (sum(plain) / len(plain)) for w in plain]
    return plain


@pytest.mark.parametrize(("mode", "value"), MODES)
@given(thetas=THETAS)
def test_every_mode_is_its_formula(mode: WeightMode, value: float | None, thetas: list[float]) -> None:
    found = make_weight(torch.tensor(thetas, dtype=torch.float64), mode, value)
    np.testing.assert_allclose(found.numpy(), by_hand(thetas, mode, value), rtol=1e-12)


@pytest.mark.parametrize(("mode", "value"), MODES)
def test_float32_under_autocast_and_no_gradient_to_theta(mode: WeightMode, value: float | None) -> None:
    theta = torch.tensor([0.3, 0.01, 0.77], requires_grad=True)
    wanted = make_weight(theta, mode, value)
    with torch.autocast("cpu", torch.bfloat16):
        found = make_weight(theta, mode, value)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not found.requires_grad


def test_rows_that_do_not_count_weigh_nothing_and_leave_the_mean_alone() -> None:
    theta, rows = torch.tensor([0.5, 0.001, 0.25]), torch.tensor([1, 0, 1])
    assert make_weight(theta, "selfnorm", rows=rows).tolist() == pytest.approx([2 / 3, 0.0, 4 / 3])
    assert make_weight(theta, rows=rows).tolist() == [2.0, 0.0, 4.0]
    assert make_weight(theta, "selfnorm", rows=torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("mode", "value", "message"),
    [
        ("flor", 0.1, "unknown weight mode 'flor'. Did you mean 'floor'?"),
        ("none", 0.1, "'none' takes no value, got 0.1"),
        ("floor", None, r"a least propensity in \(0, 1\], got None"),
        ("floor", 1.5, r"a least propensity in \(0, 1\], got 1.5"),
        ("cap", 0.5, "a largest weight ≥ 1, got 0.5"),
        ("power", 1.5, r"an exponent in \[0, 1\], got 1.5"),
        ("shrink", 0.0, "a number > 0, got 0.0"),
        ("cap", math.inf, "a largest weight ≥ 1, got inf"),
    ],
)
def test_wrong_options(mode: WeightMode, value: float | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        make_weight(torch.ones(2), mode, value)


def empty() -> torch.Tensor:
    return torch.zeros(SIZE, dtype=torch.float64)


def test_facts_are_those_of_the_whole_epoch_however_it_is_cut() -> None:
    """Three ranks, batches of several sizes: the same as numpy says of all rows at once."""
    random = np.random.default_rng(4)
    theta = random.beta(1, 8, 9000).clip(1e-4, 1)
    observed = (random.random(9000) < theta).astype(np.int64)
    raw = np.where(observed == 1, 1 / theta, 0.0)
    used = np.minimum(raw, 20.0)
    parts = []
    for rank in range(3):
        sums = empty()
        for own in np.array_split(np.arange(rank, 9000, 3), 7 + rank):
            context = {"observed": torch.tensor(observed[own]), "propensity": torch.tensor(theta[own]).float()}
            batch = Batch(torch.zeros(len(own), 1, dtype=torch.int64), context=context)
            sums = weighed(sums, torch.tensor(raw[own]), torch.tensor(used[own]), batch)
        parts.append(sums)
    facts = weight_facts(merged(torch.stack(parts)))
    some = raw[raw > 0]
    assert facts["ess"] == pytest.approx(some.sum() ** 2 / (some**2).sum())
    assert facts["ess_share"] == pytest.approx(facts["ess"] / len(some))
    assert facts["max_share"] == pytest.approx(some.max() / some.sum())
    assert facts["clipped"] == pytest.approx((some > 20).mean())
    top = np.sort(some)[::-1]
    whole = len(some) // 100
    exact = (top[:whole].sum() + (len(some) / 100 - whole) * top[whole]) / some.sum()
    assert facts["top_share"] == pytest.approx(exact, rel=0.015)
    ratio = observed / theta
    z = (ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio)))
    assert facts["calibration_z"] == pytest.approx(z, abs=1e-3)
    assert abs(z) < 4


def test_a_wrong_propensity_shows_in_the_calibration() -> None:
    random = np.random.default_rng(5)
    theta = random.uniform(0.05, 0.5, 20000)
    observed = torch.tensor((random.random(20000) < theta).astype(np.int64))
    for scale, fits in ((1.0, True), (0.8, False)):
        context = {"observed": observed, "propensity": torch.tensor(theta * scale).float()}
        batch = Batch(torch.zeros(20000, 1, dtype=torch.int64), context=context)
        weights = make_weight(context["propensity"], rows=observed)
        facts = weight_facts(weighed(empty(), weights, weights, batch))
        assert (abs(facts["calibration_z"]) < 4) == fits


def test_equal_weights_and_none() -> None:
    batch = Batch(torch.zeros(500, 1, dtype=torch.int64))
    weights = torch.full((500,), 3.0)
    facts = weight_facts(weighed(empty(), weights, weights, batch))
    assert facts["ess"] == pytest.approx(500)
    assert facts["top_share"] == pytest.approx(0.01)
    assert facts["clipped"] == 0
    assert "calibration_z" not in facts
    assert weight_facts(weighed(empty(), torch.zeros(500), torch.zeros(500), batch)) == {}


def test_weights_that_are_all_beyond_their_bound_are_told_and_those_that_are_only_made_smaller_are_not() -> None:
    batch = Batch(torch.zeros(40, 1, dtype=torch.int64))
    theta = torch.linspace(0.001, 0.04, 40)
    rows = (torch.arange(40) % 2).float()
    raw = make_weight(theta, rows=rows)

    def told(used: torch.Tensor, raw: torch.Tensor = raw) -> str | None:
        sums = empty()
        for half in (slice(20), slice(20, 40)):
            sums = weighed(sums, raw[half], used[half], batch)
        return flattened(sums)

    mean = raw[1::2].mean().item()
    said = told(make_weight(theta, "floor", 0.05, rows=rows))
    assert said is not None
    assert said.startswith(f"all 20 weights, {mean:,.4g} on the average, lie beyond their bound and count as 20:")
    assert told(make_weight(theta, "floor", 0.03, rows=rows)) is None
    assert told(make_weight(theta, "power", 0.5, rows=rows)) is None
    assert told(make_weight(theta, "selfnorm", rows=rows)) is None
    equal = torch.full((40,), 25.0)
    assert told(equal.clamp(max=20), equal) is None  # nothing is lost where all propensities are the same
