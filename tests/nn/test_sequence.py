"""The masked mean against a loop, and what padding must never do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.nn.sequence import MeanPool


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 4))
def test_it_is_the_mean_of_the_first_events(lengths, longest, width):
    history = torch.randn(len(lengths), longest, width, dtype=torch.float64)
    out = MeanPool(width)(torch.zeros(len(lengths), width), history, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        n = min(n, longest)
        want = sum(history[b, t] for t in range(n)) / n if n else torch.zeros(width, dtype=torch.float64)
        assert torch.allclose(out[b], want, atol=1e-12)


def test_padding_of_any_kind_and_length_changes_nothing():
    history = torch.randn(3, 4, 2)
    length = torch.tensor([4, 2, 0])
    pool = MeanPool(2)
    want = pool(torch.zeros(3, 2), history, length)
    for padding in (1e30, float("nan"), float("inf")):
        padded = torch.cat([history, torch.zeros(3, 5, 2)], 1)
        for b, n in enumerate(length):
            padded[b, n:] = padding
        assert torch.equal(pool(torch.full((3, 2), padding), padded, length), want)


def test_an_empty_history_has_zero_output_and_zero_finite_gradient():
    history = torch.randn(2, 3, 2, requires_grad=True)
    out = MeanPool(2)(torch.zeros(2, 2), history, torch.tensor([0, 2]))
    out.square().sum().backward()
    assert torch.equal(out[0], torch.zeros(2))
    assert torch.equal(history.grad[0], torch.zeros(3, 2))
    assert torch.isfinite(history.grad).all()
    assert history.grad[1, :2].abs().min() > 0
    assert torch.equal(history.grad[1, 2], torch.zeros(2))
