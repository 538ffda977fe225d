"""Adam as part of a part's state, against torch's own and across a stop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recsys.api import OwnAdam


def parameters(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 2), (4,), ())]


def test_it_moves_as_torch_does_and_rests_without_gradients():
    own, wanted = parameters(), parameters()
    adam, reference = OwnAdam(own).double(), torch.optim.Adam(wanted, lr=0.03)
    for step in range(12):
        idle = step in (4, 7)  # a step that was skipped
        for a, b in zip(own, wanted, strict=True):
            a.grad = torch.zeros_like(a) if idle else torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in own]
        adam.step(own, 0.03)
        if idle:
            assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
            continue
        reference.step()
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert adam.taken() == 10


def test_what_has_no_gradient_stays_and_counts_no_step():
    own, wanted = parameters(), parameters()
    adam, reference = OwnAdam(own).double(), torch.optim.Adam(wanted, lr=0.1)
    adam.step(own, 0.1)
    assert adam.taken() == 0
    for step in range(6):
        for i, (a, b) in enumerate(zip(own, wanted, strict=True)):
            a.grad = None if (step + i) % 3 == 0 else torch.randn_like(a)
            b.grad = None if a.grad is None else a.grad.clone()
        adam.step(own, 0.1)
        reference.step()
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_its_state_it_goes_on_to_the_same_bits(dtype):
    own = parameters(dtype=dtype)
    adam = OwnAdam(own).to(dtype)

    def run(adam, own, steps):
        for step in steps:
            for p in own:
                p.grad = torch.full_like(p, (-1.0) ** step / (step + 1))
            adam.step(own, 0.05)

    run(adam, own, range(5))
    other = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = OwnAdam(other).to(dtype)
    resumed.load_state_dict(adam.state_dict())
    run(adam, own, range(5, 9))
    run(resumed, other, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert resumed.taken() == 9
