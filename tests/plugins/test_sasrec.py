"""SASRec against a loop over rows, heads and events, and the order in which information may flow."""

import math

import pytest
import torch

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_sasrec import SASRec


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


def normed(x, norm):
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + norm.eps) * norm.weight + norm.bias


def attended(block, x, states):
    """One query over all states, head by head."""
    size = len(x) // block.heads
    q = block.query.weight @ x + block.query.bias
    heads = []
    for h in range(block.heads):
        part = slice(h * size, (h + 1) * size)
        scores = [q[part] @ (block.key.weight @ s)[part] / math.sqrt(size) for s in states]
        total = sum(torch.exp(a) for a in scores)
        values = [(block.value.weight @ s + block.value.bias)[part] for s in states]
        heads.append(sum(torch.exp(a) / total * v for a, v in zip(scores, values, strict=True)))
    return torch.cat(heads)


def slow_states(model, history, length):
    """The states after all blocks, of one row."""
    states = [
        history[t] * math.sqrt(model.width) + model.position[min(length - 1 - t, len(model.position) - 1)]
        for t in range(length)
    ]
    for block in model.blocks:
        new = []
        for t in range(length):
            x = normed(states[t], block.before)
            y = normed(x + attended(block, x, states[: t + 1]), block.between)
            first, last = block.network[0], block.network[3]
            new.append(y + last.weight @ (first.weight @ y + first.bias).clamp(min=0) + last.bias)
        states = new
    return [normed(s, model.norm) for s in states]


def slow(model, history, length):
    rows = [
        slow_states(model, history[b], int(n))[-1] if n else torch.zeros_like(history[b, 0])
        for b, n in enumerate(length)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("positions", [2, 10])
def test_outputs_and_gradients_are_those_of_the_loop(blocks, heads, positions):
    model = disturbed(SASRec(6, blocks=blocks, heads=heads, positions=positions))
    target, history, length = batch([4, 1, 0, 3], 5, 6)
    history.requires_grad_()
    above = torch.randn(4, 6, dtype=torch.float64)
    leaves = [history, *model.parameters()]
    fast, wanted = model(target, history, length), slow(model, history, length)
    assert (fast - wanted).abs().max() <= 1e-9
    ours = torch.autograd.grad((fast * above).sum(), leaves)
    theirs = torch.autograd.grad((wanted * above).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("options", [{}, {"blocks": 1, "heads": 2}, {"blocks": 3, "positions": 2}])
def test_contract(options):
    contract("sequence", SASRec, **options)


def test_a_state_does_not_know_what_comes_after_it():
    """The output is the newest state, so histories cut short tell all states; inner blocks must not look ahead."""
    model = disturbed(SASRec(4, blocks=3, positions=1))  # one position vector: states do not depend on what follows
    target, history, _ = batch([6], 6, 4)
    whole = slow_states(model, history[0], 6)
    for n in range(1, 7):
        changed = history.clone()
        changed[0, n:] = 9.0
        torch.testing.assert_close(model(target, changed, torch.tensor([n]))[0], whole[n - 1], rtol=1e-9, atol=1e-9)


def test_order_matters_and_the_target_does_not():
    model = disturbed(SASRec(4))
    target, history, length = batch([5], 5, 4)
    out = model(target, history, length)
    assert (model(target, history[:, [1, 0, 2, 3, 4]], length) - out).abs().max() > 1e-3
    assert torch.equal(model(target + 1, history, length), out)


def test_padding_of_any_value_changes_neither_output_nor_gradient():
    model = disturbed(SASRec(4))
    results = []
    for extra in (0, 3):
        target, history, length = batch([5, 2, 0], 5, 4)
        noise = torch.full((3, extra, 4), math.nan, dtype=torch.float64)
        history = torch.cat([history, noise], 1).requires_grad_()
        out = model(target, history, length)
        results.append([out, *torch.autograd.grad(out.square().sum(), [history, *model.parameters()])])
        results[-1][1] = results[-1][1][:, :5]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_works_in_training_only():
    model = SASRec(4, dropout=0.5)
    inputs = [x.float() if x.is_floating_point() else x for x in batch([5, 3], 5, 4)]
    assert not torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


def test_width_must_divide_into_heads():
    with pytest.raises(RecipeError, match="width 10 cannot be split over 3 heads"):
        SASRec(10, heads=3)
