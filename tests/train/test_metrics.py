"""Metrics against scikit-learn and plain loops, and the inputs on which others silently go wrong."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from recsys.errors import DataError
from recsys.train.metrics import AUC, ECE, GAUC, PRAUC, LogLoss, NormalizedEntropy

ALL = [AUC, LogLoss, NormalizedEntropy, PRAUC, ECE, GAUC]

# Few distinct logits, so that most draws have ties; few groups, so that some have one class.
ROWS = st.lists(
    st.tuples(st.integers(-6, 6).map(lambda i: i / 2), st.integers(0, 1), st.integers(-2, 3)), min_size=1, max_size=40
)


def value(metric, z, y, g=None):
    z, y = torch.as_tensor(z, dtype=torch.float64), torch.as_tensor(y)
    g = torch.zeros(len(z), dtype=torch.int64) if g is None else torch.as_tensor(g)
    metric.update(z, y, group=g)
    return metric.compute().item()


def columns(rows):
    z, y, g = (np.array(c) for c in zip(*rows, strict=True))
    return z.astype(np.float64), y, g


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_auc_and_average_precision_are_sklearns(rows):
    z, y, _ = columns(rows)
    if len(set(y)) < 2:
        assert math.isnan(value(AUC(), z, y))
        assert math.isnan(value(PRAUC(), z, y))
    else:
        assert value(AUC(), z, y) == pytest.approx(roc_auc_score(y, z), abs=1e-12)
        assert value(PRAUC(), z, y) == pytest.approx(average_precision_score(y, z), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_log_loss_and_normalised_entropy_are_the_formula(rows):
    z, y, _ = columns(rows)
    want = log_loss(y, 1 / (1 + np.exp(-z)), labels=[0, 1])
    assert value(LogLoss(), z, y) == pytest.approx(want, rel=1e-12)
    base = y.mean()
    if base in (0, 1):
        assert math.isnan(value(NormalizedEntropy(), z, y))
    else:
        entropy = -(base * math.log(base) + (1 - base) * math.log(1 - base))
        assert value(NormalizedEntropy(), z, y) == pytest.approx(want / entropy, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_gauc_is_the_loop_over_groups(rows):
    z, y, g = columns(rows)
    total = weight = 0.0
    for group in set(g):
        mine = g == group
        if len(set(y[mine])) == 2:
            total += mine.sum() * roc_auc_score(y[mine], z[mine])
            weight += mine.sum()
    got = value(GAUC(), z, y, g)
    assert got == pytest.approx(total / weight, abs=1e-12) if weight else math.isnan(got)


def slow_ece(z, y, bins, binning):
    order = sorted(range(len(z)), key=lambda i: z[i])
    p = [1 / (1 + math.exp(-v)) for v in z]
    cells = [[] for _ in range(bins)]
    for i in order:
        if binning == "width":
            b = min(int(p[i] * bins), bins - 1)
        else:
            below, same = sum(v < z[i] for v in z), sum(v == z[i] for v in z)
            b = min((2 * below + same) * bins // (2 * len(z)), bins - 1)
        cells[b].append(i)
    gaps = [abs(np.mean([p[i] for i in c]) - np.mean([y[i] for i in c])) * len(c) for c in cells if c]
    return sum(gaps) / len(z)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 12), st.sampled_from(["mass", "width"]))
def test_ece_is_the_loop_over_bins(rows, bins, binning):
    z, y, _ = columns(rows)
    got = value(ECE(bins=bins, binning=binning), z, y)
    assert got == pytest.approx(slow_ece(z.tolist(), y.tolist(), bins, binning), abs=1e-12)


def test_ece_of_a_constant_is_its_distance_to_the_base_rate_whatever_the_bins():
    y = np.array([1] * 30 + [0] * 70)
    for binning in ("mass", "width"):
        assert value(ECE(bins=10, binning=binning), np.zeros(100), y) == pytest.approx(0.2)


def test_equal_mass_bins_are_equal():
    generator = np.random.default_rng(0)
    z = generator.normal(size=1000)
    p = 1 / (1 + np.exp(-z))
    y = (generator.random(1000) < p).astype(int)
    parts = np.array_split(np.argsort(z), 10)
    want = sum(abs(p[c].mean() - y[c].mean()) * len(c) for c in parts) / 1000
    assert value(ECE(bins=10), z, y) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 100), cut=st.integers(0, 40))
def test_neither_order_nor_batches_change_a_bit(make, rows, seed, cut):
    z, y, g = (torch.from_numpy(c) for c in columns(rows))
    z = z + z.sin() / 3
    whole = make()
    whole.update(z, y, group=g)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    parts = make()
    for part in (order[:cut], order[cut:]):
        parts.update(z[part], y[part], group=g[part])
    a, b = whole.compute(), parts.compute()
    assert torch.equal(a, b) or (a.isnan() and b.isnan())


def test_saturated_logits_in_perfect_order_have_auc_one():
    z, y = torch.tensor([20.0, 21.0, 30.0, 31.0]), torch.tensor([0, 0, 1, 1])
    assert len(torch.sigmoid(z).unique()) < 4  # what float32 probabilities would make of them
    assert value(AUC(), z, y) == 1.0
    assert value(GAUC(), z, y) == 1.0
    assert value(PRAUC(), z, y) == 1.0
    assert value(AUC(), -z, y) == 0.0


def test_differences_below_float32_still_rank():
    z = 20 + torch.tensor([0.0, 1e-9, 2e-9, 3e-9], dtype=torch.float64)
    assert value(AUC(), z, torch.tensor([0, 0, 1, 1])) == 1.0


def test_confident_and_wrong_costs_its_logit():
    assert value(LogLoss(), [800.0, -800.0], [0, 1]) == pytest.approx(800.0)
    assert value(LogLoss(), [50.0], [1]) == pytest.approx(math.exp(-50.0), rel=1e-12)


@pytest.mark.parametrize("make", [AUC, PRAUC, NormalizedEntropy, GAUC])
@pytest.mark.parametrize("y", [0, 1])
def test_one_class_is_undefined_not_zero(make, y):
    assert math.isnan(value(make(), [0.1, 0.2, -0.3], [y] * 3))


@pytest.mark.parametrize("make", ALL)
def test_no_rows_are_undefined(make):
    assert math.isnan(value(make(), [], torch.zeros(0)))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_is_an_error_with_its_row(make, bad):
    with pytest.raises(DataError, match="prediction of evaluated row 3 is"):
        value(make(), [0.1, 0.2, bad, 0.4], [0, 1, 1, 0])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", [2.0, -1.0, 0.5, math.nan])
def test_a_label_that_is_neither_0_nor_1_is_an_error_with_its_row(make, bad):
    with pytest.raises(DataError, match="label of evaluated row 2 is"):
        value(make(), [0.1, 0.2, 0.3], [0.0, bad, 1.0])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="expected logit and label"):
        AUC().update(torch.zeros(3, 1), torch.zeros(3))


def test_large_counts_stay_exact():
    n = 200_000
    z = torch.arange(n) % 1000
    y = (torch.arange(n) // 1000) % 2
    assert value(AUC(), z, y) == 0.5  # every score has as many clicks as non-clicks
    y = (z >= 500).long()
    assert value(AUC(), z, y) == 1.0


def test_gauc_ignores_differences_between_groups():
    z = torch.tensor([100.0, 101.0, -100.0, -99.0])
    y = torch.tensor([0, 1, 0, 1])
    assert value(GAUC(), z, y, [7, 7, -3, -3]) == 1.0
    assert value(AUC(), z, y) == 0.75


def test_reset_forgets():
    metric = AUC()
    value(metric, [0.0, 1.0], [1, 0])
    metric.reset()
    assert value(metric, [0.0, 1.0], [0, 1]) == 1.0


def test_directions_and_needs():
    assert {m.__name__ for m in ALL if m.higher_is_better} == {"AUC", "PRAUC", "GAUC"}
    assert {m.__name__: m.needs for m in ALL if m.needs} == {"GAUC": ("group",)}


@pytest.mark.parametrize("metric", [*ALL, lambda: ECE(binning="width"), lambda: ECE(bins=3)])
def test_the_bits_do_not_depend_on_the_deterministic_mode(metric):
    generator = torch.Generator().manual_seed(5)
    for rows in (1, 7, 1000, 40_000):
        z = torch.randn(rows, generator=generator, dtype=torch.float64)
        y = torch.rand(rows, generator=generator) < torch.sigmoid(z)
        g = torch.randint(-5, 50, (rows,), generator=generator)
        before = torch.are_deterministic_algorithms_enabled()
        got = []
        try:
            for mode in (False, True):
                torch.use_deterministic_algorithms(mode)
                got.append(value(metric(), z, y, g))
        finally:
            torch.use_deterministic_algorithms(before)
        assert got[0].hex() == got[1].hex()


@pytest.mark.parametrize("metric", ALL)
def test_labels_may_be_bool_or_integers_and_logits_of_any_float_type(metric):
    z, y, g = torch.linspace(-2, 2, 16), torch.arange(16) % 3 == 0, torch.arange(16) % 2 - 1
    wanted = value(metric(), z, y.double(), g)
    assert not math.isnan(wanted)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        assert value(metric(), z, y.to(dtype), g) == wanted
    half = metric()
    half.update(z.half(), y, group=g)
    whole = metric()
    whole.update(z.half().double(), y, group=g)
    assert half.compute().item() == whole.compute().item()
