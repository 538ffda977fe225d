"""DIEN against a loop over rows and events, its two limits, and its auxiliary loss against a loop over steps."""

import math

import pytest
import torch

from recsys.testing import contract
from recsys_dien import DIEN, Gates


def disturbed(module, seed=0):
    torch.manual_seed(seed)
    module = module.double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def batch(length, longest, width, seed=1):
    torch.manual_seed(seed)
    history = torch.randn(len(length), longest, width, dtype=torch.float64)
    return torch.randn(len(length), width, dtype=torch.float64), history, torch.tensor(length)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def slow_unit(gates, x, h, share=1.0):
    """One row, one step, gate by gate."""
    width = len(h)
    w, b, u = gates.input.weight, gates.input.bias, gates.state.weight
    part = [slice(i * width, (i + 1) * width) for i in range(3)]
    update = sigmoid(w[part[0]] @ x + u[part[0]] @ h + b[part[0]]) * share
    reset = sigmoid(w[part[1]] @ x + u[part[1]] @ h + b[part[1]])
    new = torch.tanh(w[part[2]] @ x + reset * (u[part[2]] @ h) + b[part[2]])
    return (1 - update) * h + update * new


def slow_interests(model, events):
    h, states = torch.zeros_like(events[0]), []
    for e in events:
        h = slow_unit(model.extractor, e, h)
        states.append(h)
    return states


def slow(model, target, history, length):
    rows = []
    for b, n in enumerate(length.tolist()):
        h = torch.zeros_like(target[b])
        if n:
            states = slow_interests(model, history[b, :n])
            scores = [s @ model.attention.weight @ target[b] for s in states]
            total = sum(torch.exp(a) for a in scores)
            for s, a in zip(states, scores, strict=True):
                h = slow_unit(model.evolution, s, h, torch.exp(a) / total)
        rows.append(h)
    return torch.stack(rows)


def slow_auxiliary(model, history, length):
    came, did_not = [], []
    rows = len(length)
    for b, n in enumerate(length.tolist()):
        states = slow_interests(model, history[b, :n]) if n else []
        other = (b + 1) % rows
        for t in range(n - 1):
            came.append(-torch.log(sigmoid(judged(model, states[t], history[b, t + 1]))))
            if rows > 1 and t + 1 < int(length[other]):
                did_not.append(-torch.log(1 - sigmoid(judged(model, states[t], history[other, t + 1]))))
    zero = history.new_zeros(())
    return model.strength * (
        (sum(came) / len(came) if came else zero) + (sum(did_not) / len(did_not) if did_not else zero)
    )


def judged(model, state, event):
    x = torch.cat([state, event])
    linears = model.judge[::2]
    for i, layer in enumerate(linears):
        x = layer.weight @ x + layer.bias
        x = sigmoid(x) if i < len(linears) - 1 else x
    return x.squeeze()


LENGTHS = [[4, 1, 0, 3], [5, 5], [2, 1, 3], [3], [0, 1], [1]]


@pytest.mark.parametrize("length", LENGTHS)
def test_output_loss_and_gradients_are_those_of_the_loops(length):
    model = disturbed(DIEN(4, auxiliary=0.7, auxiliary_hidden=(5, 3)))
    target, history, count = batch(length, 5, 4)
    target.requires_grad_()
    history.requires_grad_()
    above = torch.randn(len(length), 4, dtype=torch.float64)
    leaves = [target, history, *model.parameters()]
    fast, wanted = model(target, history, count), slow(model, target, history, count)
    assert (fast - wanted).abs().max() <= 1e-9
    penalty, wanted_penalty = model.penalty(), slow_auxiliary(model, history, count)
    assert (penalty - wanted_penalty).abs() <= 1e-9
    ours = torch.autograd.grad((fast * above).sum() + penalty, leaves, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(
        (wanted * above).sum() + wanted_penalty, leaves, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("options", [{}, {"auxiliary": 0.0}])
def test_contract(options):
    contract("sequence", DIEN, **options)


def test_a_share_of_one_is_torchs_own_unit_and_of_zero_the_initial_state():
    gates = disturbed(Gates(4))
    own = torch.nn.GRU(4, 4).double()
    with torch.no_grad():
        # There the gates stand in the order r, z, n, and z keeps the old state: z = 1 − u, σ(−x) = 1 − σ(x).
        (u, r, n), (su, sr, sn) = gates.input.weight.split(4), gates.state.weight.split(4)
        bu, br, bn = gates.input.bias.split(4)
        own.weight_ih_l0.copy_(torch.cat([r, -u, n]))
        own.weight_hh_l0.copy_(torch.cat([sr, -su, sn]))
        own.bias_ih_l0.copy_(torch.cat([br, -bu, bn]))
        own.bias_hh_l0.zero_()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    wanted = own(x)[0]
    torch.testing.assert_close(gates(x), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gates(x, torch.ones(6, 3, 1).double()), wanted, rtol=1e-10, atol=1e-12)
    assert not gates(x, torch.zeros(6, 3, 1).double()).any()


def test_padding_of_any_value_changes_neither_output_nor_loss_nor_gradient():
    model = disturbed(DIEN(4))
    results = []
    for extra in (0, 3):
        target, history, length = batch([5, 2, 0], 5, 4)
        noise = torch.full((3, extra, 4), math.nan, dtype=torch.float64)
        history = torch.cat([history, noise], 1).requires_grad_()
        out = model(target, history, length)
        loss = model.penalty()
        grads = torch.autograd.grad(out.square().sum() + loss, [history, *model.parameters()])
        results.append([out, loss, grads[0][:, :5], *grads[1:]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_order_and_target_matter():
    model = disturbed(DIEN(4))
    target, history, length = batch([5], 5, 4)
    out = model(target, history, length)
    assert (model(target, history[:, [1, 0, 2, 3, 4]], length) - out).abs().max() > 1e-3
    assert (model(target + 1, history, length) - out).abs().max() > 1e-3


def test_the_auxiliary_loss_is_of_training_alone():
    model = DIEN(4)
    inputs = [x.float() if x.is_floating_point() else x for x in batch([5, 3], 5, 4)]
    model(*inputs)
    assert float(model.penalty().detach()) > 0
    model.eval()(*inputs)
    assert float(model.penalty()) == 0
    assert DIEN(4, auxiliary=0).judge is None


def test_the_auxiliary_loss_learns_which_event_follows():
    """Events count up modulo 6 from a start of the row's: the next one is known, another row's differs."""
    torch.manual_seed(0)
    vectors = torch.randn(6, 8)
    model = DIEN(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        starts = torch.arange(64) % 6
        history = vectors[(starts.unsqueeze(1) + torch.arange(6)) % 6]
        model(torch.zeros(64, 8), history, torch.full((64,), 6))
        loss = model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[0] > 1.3  # two coins: 2 log 2
    assert losses[-1] < 0.1
