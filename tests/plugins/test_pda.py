"""PDA: scores and gradients against the formula, popularity that moves training and not ranking, forecasts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_bpr import BPR
from recsys_pda import PDA, adjusted, forecast


def batch(logged, negatives, seed, popularity=None):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    label = torch.randint(0, 2, (rows,), generator=random).double()
    m = torch.rand(rows, generator=random).double() if popularity is None else popularity
    given = Batch(torch.zeros(rows, 1).long(), label={"label": label}, context={"popularity": m}, negatives=negatives)
    return torch.randn(rows, generator=random).double().mul(2).requires_grad_(), given


def elu1(x):
    return x + 1 if x > 0 else math.exp(x)


@pytest.mark.parametrize("power", [0.0, 0.02, 0.5, 2.0])
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_loss_and_gradient_are_those_of_the_loops(power, logged, negatives, seed):
    x, rows = batch(logged, negatives, seed)
    m = rows.context["popularity"].requires_grad_()
    loss = PDA(("label",), power=power)({"label": x}, rows)
    loss.backward()
    z, y, pop = x.tolist(), rows.label["label"].tolist(), m.tolist()
    total, gradient = 0.0, [0.0] * len(z)
    for i in range(logged):
        for k in range(negatives):
            j = logged + i * negatives + k
            if y[i] == 1 and y[j] == 0:
                s_i, s_j = elu1(z[i]) * pop[i] ** power, elu1(z[j]) * pop[j] ** power
                total += math.log1p(math.exp(s_j - s_i))
                slope = -1 / (1 + math.exp(s_i - s_j))
                gradient[i] += slope * min(1.0, math.exp(z[i])) * pop[i] ** power
                gradient[j] -= slope * min(1.0, math.exp(z[j])) * pop[j] ** power
    pairs = logged * negatives
    assert float(loss.detach()) == pytest.approx(total / pairs, rel=1e-9, abs=1e-12)
    assert x.grad.tolist() == pytest.approx([g / pairs for g in gradient], rel=1e-8, abs=1e-12)
    assert m.grad is None


@given(st.floats(-20, 20), st.floats(0.01, 0.98), st.floats(0.01, 2))
def test_a_score_rises_with_popularity_and_never_turns_its_sign(x, m, power):
    low, high = (adjusted(torch.tensor(x).double(), torch.tensor(p).double(), power) for p in (m, m + 0.01))
    assert 0 < float(low) < float(high)


def test_without_power_it_is_bpr_of_the_match():
    x, rows = batch(4, 2, 3)
    plain = BPR(("label",))({"label": torch.nn.functional.elu(x) + 1}, rows)
    assert float(PDA(("label",), power=0.0)({"label": x}, rows).detach()) == pytest.approx(float(plain.detach()))


def test_the_least_popular_item_of_a_slot_does_not_learn():
    popularity = torch.tensor([0.0, 0.7, 0.4, 0.0]).double()
    x, rows = batch(2, 1, 0, popularity)
    rows.label["label"].copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    PDA(("label",))({"label": x}, rows).backward()
    assert [g == 0 for g in x.grad.tolist()] == [True, False, False, True]


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_without_a_pair_there_is_no_loss_and_extremes_are_finite(label):
    x, rows = batch(3, 2, 1)
    rows.label["label"].fill_(label)
    assert PDA(("label",))({"label": x}, rows).item() == 0.0
    rows.label["label"][:3] = 1.0
    rows.label["label"][3:] = 0.0
    wild = (200 * x.detach()).requires_grad_()
    value = PDA(("label",))({"label": wild}, rows)
    value.backward()
    assert math.isfinite(value.item())
    assert bool(torch.isfinite(wild.grad).all())


def test_the_match_ranks_alike_whatever_the_popularity():
    x = torch.linspace(-6, 6, 50).double()
    pd = adjusted(x, torch.ones(50), 0.5)
    assert bool((pd.diff() > 0).all())
    noisy = adjusted(x, torch.rand(50, generator=torch.Generator().manual_seed(1)), 0.5)
    assert not bool((noisy.diff() > 0).all())


def test_a_forecast_goes_on_half_way_and_stays_inside():
    last, before = torch.tensor([0.5, 0.9, 0.01]), torch.tensor([0.3, 0.2, 0.9])
    assert forecast(last, before).tolist() == pytest.approx([0.6, 1.0, 1e-9])


def test_contract():
    contract.without("bce_equality")("loss", PDA)


def test_a_negative_power_is_refused():
    with pytest.raises(RecipeError, match="power"):
        PDA(("label",), power=-0.1)
