"""Binary cross-entropy against the formula, row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.train.losses import BCE, label_bce

rows = st.lists(
    st.tuples(st.floats(-30, 30, width=32), st.integers(0, 1), st.floats(0, 5, width=32)), min_size=1, max_size=8
)


def batch(labels, weights=None):
    context = {} if weights is None else {"weight": torch.tensor(weights)}
    return Batch(torch.zeros(len(labels), 1, dtype=torch.int64), label={"y": torch.tensor(labels)}, context=context)


def one(z, y):
    return max(z, 0) - z * y + math.log1p(math.exp(-abs(z)))


@settings(max_examples=50, deadline=None)
@given(rows, st.booleans())
def test_it_is_the_mean_over_rows_of_weight_times_loss(rows, weighted):
    z, y, w = zip(*rows, strict=True)
    got = BCE(("y",))({"y": torch.tensor(z)}, batch([float(v) for v in y], list(w) if weighted else None))
    want = sum((b if weighted else 1.0) * one(a, v) for a, v, b in rows) / len(rows)
    # In float32, the loss of a row is exact to a few units of 1e-7 only, however small it is; a weight scales that too.
    assert got.item() == pytest.approx(want, rel=1e-5, abs=1e-6 * (max(1.0, *w) if weighted else 1.0))


def test_unit_weights_change_nothing_and_the_divisor_is_not_their_sum():
    logits = {"y": torch.tensor([0.3, -1.0, 2.0])}
    labels = [1.0, 0.0, 0.0]
    plain = BCE(("y",))(logits, batch(labels))
    assert torch.equal(BCE(("y",))(logits, batch(labels, [1.0] * 3)), plain)
    assert BCE(("y",))(logits, batch(labels, [2.0] * 3)).item() == pytest.approx(2 * plain.item())
    assert BCE(("y",))(logits, batch(labels, [0.0] * 3)).item() == 0.0


def test_several_tasks_are_averaged():
    logits = {"a": torch.tensor([0.5, -0.5]), "b": torch.tensor([1.5, 2.0])}
    label = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    data = Batch(torch.zeros(2, 1, dtype=torch.int64), label=label)
    both = BCE(("a", "b"))(logits, data)
    assert both.item() == pytest.approx((BCE(("a",))(logits, data) + BCE(("b",))(logits, data)).item() / 2)


def test_float32_under_autocast_and_from_half_precision():
    labels = batch([1.0, 0.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = BCE(("y",))({"y": torch.tensor([1e-3, -1e-3], dtype=torch.bfloat16)}, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(one(1e-3, 1), abs=1e-5)


def test_confident_rows_keep_their_gradient():
    z = torch.tensor([60.0, -60.0], requires_grad=True)
    loss = BCE(("y",))({"y": z}, batch([0.0, 1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(60.0)
    assert z.grad.tolist() == pytest.approx([0.5, -0.5])


@settings(max_examples=50, deadline=None)
@given(rows, st.booleans())
def test_one_logit_for_all_tasks_is_compared_with_the_labels_of_each(rows, weighted):
    z, y, w = zip(*rows, strict=True)
    label = {"a": torch.tensor(y).float(), "b": 1 - torch.tensor(y).float()}
    context = {"weight": torch.tensor(w)} if weighted else {}
    data = Batch(torch.zeros(len(z), 1, dtype=torch.int64), label=label, context=context)
    got = label_bce(torch.tensor(z).double(), data)
    of_a = sum((b if weighted else 1.0) * one(a, v) for a, v, b in rows) / len(rows)
    of_b = sum((b if weighted else 1.0) * one(a, 1 - v) for a, v, b in rows) / len(rows)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx((of_a + of_b) / 2, rel=1e-12, abs=1e-12)


def test_one_logit_has_the_loss_of_a_model_with_that_logit():
    data = batch([1.0, 0.0, 1.0], [0.5, 2.0, 1.0])
    z = torch.tensor([0.3, -1.0, 2.0], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = label_bce(z, data)
    assert got.dtype == torch.float32
    assert torch.equal(got, BCE(("y",))({"y": z}, data))
