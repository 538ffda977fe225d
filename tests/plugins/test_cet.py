"""CET: the published weights, who learns from which loss, and what an exchange of the two models changes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.abilities import Summing
from recsys.contracts import Batch, EncodedSchema, Field
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_cet import CET

SCHEMA = EncodedSchema((Field("user", 9), Field("item", 12)), (), ("label",))


def made(**options):
    torch.manual_seed(1)
    return CET(("label",), SCHEMA, dim=3, **options).double()


def batch(logged=4, negatives=2, seed=0, labels=None):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    ids = torch.stack([torch.randint(2, n, (rows,), generator=random) for n in (9, 12)], 1)
    label = torch.cat([torch.ones(logged), torch.zeros(logged * negatives)]).double() if labels is None else labels
    return Batch(ids, label={"label": label}, negatives=negatives)


def values(rows, seed, scale=3.0):
    return scale * torch.randn(rows, generator=torch.Generator().manual_seed(seed)).double()


def loops(x, other, rows, tau, selfnorm=False):
    m = rows.negatives
    n = len(x) // (1 + m)
    y = rows.label["label"].tolist()
    weights = {
        (i, k): 1 / (1 - 1 / (1 + math.exp(-float(other[n + i * m + k]) / tau))) for i in range(n) for k in range(m)
    }
    mean = sum(weights.values()) / (n * m) if selfnorm else 1.0
    total = 0.0
    for (i, k), w in weights.items():
        j = n + i * m + k
        if y[i] == 1 and y[j] == 0:
            total += w / mean * math.log1p(math.exp(float(x[j] - x[i])))
    return total / (n * m)


@pytest.mark.parametrize("selfnorm", [False, True])
@given(st.integers(1, 5), st.integers(1, 3), st.floats(0.5, 20), st.integers(0, 99))
def test_both_losses_are_those_of_the_loops(selfnorm, logged, negatives, tau, seed):
    labels = torch.randint(0, 2, (logged * (1 + negatives),), generator=torch.Generator().manual_seed(seed)).double()
    rows = batch(logged, negatives, seed, labels)
    r, s = values(len(rows), seed), values(len(rows), seed + 1000)
    ranker, observer = made(tau=tau, selfnorm=selfnorm).both(r, s, rows, "label")
    assert float(ranker) == pytest.approx(loops(r, s, rows, tau, selfnorm), rel=1e-9, abs=1e-12)
    assert float(observer) == pytest.approx(loops(s, r, rows, tau, selfnorm), rel=1e-9, abs=1e-12)


def test_weights_at_zero_and_at_an_endless_temperature_are_two():
    rows = batch()
    zero = torch.zeros(len(rows)).double()
    ranker, _ = made().both(zero, zero, rows, "label")
    assert float(ranker) == pytest.approx(2 * math.log(2))
    assert made(tau=1e9).weight(values(50, 3)).tolist() == pytest.approx([2.0] * 50)
    assert made(tau=10.0).weight(torch.tensor([-10.0, 10.0])).tolist() == pytest.approx([1.37, 3.72], abs=0.005)


def test_exchanging_the_models_exchanges_the_losses():
    rows, r, s = batch(), values(12, 1), values(12, 2)
    one, other = made().both(r, s, rows, "label"), made().both(s, r, rows, "label")
    assert [float(v) for v in one] == [float(v) for v in reversed(other)]


def test_neither_loss_moves_the_model_that_only_weighs():
    rows = batch()
    r, s = values(12, 1).requires_grad_(), values(12, 2).requires_grad_()
    ranker, observer = made().both(r, s, rows, "label")
    for loss, own, other in ((ranker, r, s), (observer, s, r)):
        mine, foreign = torch.autograd.grad(loss, (own, other), allow_unused=True, retain_graph=True)
        assert float(mine.abs().sum()) > 0
        assert foreign is None or not foreign.any()


@pytest.mark.parametrize("selfnorm", [False, True])
def test_mean_weights_of_pairs_are_told(selfnorm):
    rows, r, s = (
        batch(labels=torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0]).double()),
        values(12, 1),
        values(12, 2),
    )
    loss = made(tau=2.0, selfnorm=selfnorm)
    assert isinstance(loss, Summing)
    loss.both(r, s, rows, "label")
    pairs = [(i, 4 + 2 * i + k) for i in range(4) for k in range(2)]
    y = rows.label["label"].tolist()
    chosen = [j for i, j in pairs if y[i] == 1 and y[j] == 0]
    want = [sum(1 + math.exp(float(x[j]) / 2) for j in chosen) / len(chosen) for x in (s, r)]
    told = loss.facts(loss.sums() + loss.sums())
    assert told == pytest.approx({"ranker_weight": want[0], "observer_weight": want[1]})


def test_a_weight_rises_with_its_own_negative_alone():
    rows, r = batch(3, 1), torch.zeros(6).double()
    s = values(6, 5)
    base = made().both(r, s, rows, "label")[0]
    up = s.clone()
    up[3] += 1.0
    assert float(made().both(r, up, rows, "label")[0]) > float(base)
    positive = s.clone()
    positive[:3] += 5.0
    assert float(made().both(r, positive, rows, "label")[0]) == float(base)


@pytest.mark.parametrize("options", [{}, {"listwise": True}, {"selfnorm": True}])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_without_a_pair_there_is_no_loss_and_extremes_are_finite(options, label):
    """No row is a positive, or every sampled row is one too."""
    rows = batch(3, 2, labels=torch.full((9,), label).double())
    r, s = (torch.tensor([90.0, -90, 0] * 3).double().mul(sign).requires_grad_() for sign in (1, -1))
    both = torch.stack(made(**options).both(r, s, rows, "label"))
    both.sum().backward()
    assert both.tolist() == [0.0, 0.0]
    assert not r.grad.any()
    assert not s.grad.any()
    wild = torch.stack(made(**options, tau=0.5).both(r.detach(), s.detach(), batch(3, 2), "label"))
    assert bool(torch.isfinite(wild).all())


def test_the_observer_is_taught_by_the_whole_loss_and_is_another_model():
    loss, rows = made(), batch()
    x = values(12, 7).requires_grad_()
    loss({"label": x}, rows).backward()
    taught = {name for name, p in loss.observer.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("embedding") for name in taught)
    assert x.grad.any()


def test_listwise_puts_the_weights_into_the_softmax():
    rows = batch(2, 3)
    r, s = values(8, 1), values(8, 2)
    ranker, _ = made(tau=2.0, listwise=True).both(r, s, rows, "label")
    total = 0.0
    for i in range(2):
        own = [2 + 3 * i + k for k in range(3)]
        w = [1 + math.exp(float(s[j]) / 2.0) for j in own]
        mean = sum(w) / 3
        below = sum(v / mean * math.exp(float(r[j])) for v, j in zip(w, own, strict=True))
        total -= math.log(math.exp(float(r[i])) / (math.exp(float(r[i])) + below))
    assert float(ranker) == pytest.approx(total / 2, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"listwise": True}, {"selfnorm": True, "tau": 2.0}])
def test_contract(options):
    contract.without("bce_equality")("loss", CET, **options)


def test_a_temperature_must_be_positive():
    with pytest.raises(RecipeError, match="tau"):
        made(tau=0.0)
