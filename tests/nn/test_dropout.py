"""Dropout: the right share, the right mean, independent elements, gradients through the kept ones only."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.4, 0.5, 0.9])
def test_share_and_mean(p: float) -> None:
    torch.manual_seed(1)
    n = 1_000_000
    y = Dropout(p).train()(torch.ones(n))
    dropped = float((y == 0).double().mean())
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n) + 2**-17
    values = y.unique()
    assert len(values) == 2, "kept elements all have the same scale"
    assert float(values[1]) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert abs(float(y.double().mean()) - 1) < 4 * math.sqrt(p / (1 - p) / n)


def test_elements_are_independent() -> None:
    torch.manual_seed(2)
    kept = (Dropout(0.5).train()(torch.ones(400_000)) > 0).double() - 0.5
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = float((kept[:-lag] * kept[lag:]).mean() / 0.25)
        assert abs(correlation) < 4 / math.sqrt(len(kept)), lag


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 100))
def test_any_shape_and_gradient_through_kept_elements(shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64) + 1
    x.requires_grad_()
    y = Dropout(0.5).train()(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y, x * x.grad)
    assert set(x.grad.unique().tolist()) <= {0.0, 2.0}


def test_same_seed_same_mask_and_eval_is_the_identity() -> None:
    layer = Dropout(0.3)
    x = torch.rand(13, 7)
    torch.manual_seed(5)
    first = layer.train()(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_impossible_shares_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout is"):
        Dropout(p)
