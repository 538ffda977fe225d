"""BST against a loop over rows, heads and events; what padding, order and the target change."""

import math

import pytest
import torch

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_bst import BST


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
    size = len(x) // block.heads
    heads = []
    for h in range(block.heads):
        part = slice(h * size, (h + 1) * size)
        q = (block.query.weight @ x)[part]
        scores = [q @ (block.key.weight @ s)[part] / math.sqrt(size) for s in states]
        total = sum(torch.exp(a) for a in scores)
        heads.append(
            sum(torch.exp(a) / total * (block.value.weight @ s)[part] for a, s in zip(scores, states, strict=True))
        )
    return block.out.weight @ torch.cat(heads)


def slow(model, target, history, length):
    """The sequence of one row after the other: its events, oldest first, then the target."""
    rows = []
    for b, n in enumerate(length.tolist()):
        if not n:
            rows.append(torch.zeros_like(target[b]))
            continue
        last = len(model.position) - 1
        states = [history[b, t] + model.position[min(n - t, last)] for t in range(n)]
        states.append(target[b] + model.position[0])
        for block in model.blocks:
            new = []
            for x in states:
                a = normed(x + attended(block, x, states), block.between)
                first, second = block.network[0], block.network[3]
                inner = first.weight @ a + first.bias
                inner = torch.where(inner > 0, inner, 0.01 * inner)
                new.append(normed(a + second.weight @ inner + second.bias, block.after))
            states = new
        rows.append(states[-1] if model.pool == "target" else sum(states) / len(states))
    return torch.stack(rows)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("pool", ["target", "mean"])
@pytest.mark.parametrize("positions", [3, 10])
def test_outputs_and_gradients_are_those_of_the_loop(blocks, pool, positions):
    model = disturbed(BST(6, blocks=blocks, heads=2, hidden=2, positions=positions, pool=pool))
    target, history, length = batch([4, 1, 0, 3], 5, 6)
    target.requires_grad_()
    history.requires_grad_()
    above = torch.randn(4, 6, dtype=torch.float64)
    leaves = [target, history, *model.parameters()]
    fast, wanted = model(target, history, length), slow(model, target, history, length)
    assert (fast - wanted).abs().max() <= 1e-9
    ours = torch.autograd.grad((fast * above).sum(), leaves)
    theirs = torch.autograd.grad((wanted * above).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("options", [{}, {"blocks": 2, "heads": 1}, {"pool": "mean", "positions": 3}])
def test_contract(options):
    contract("sequence", BST, **options)


@pytest.mark.parametrize("pool", ["target", "mean"])
def test_padding_of_any_value_changes_neither_output_nor_gradient(pool):
    model = disturbed(BST(4, blocks=2, pool=pool))
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


def test_order_matters_only_through_the_positions():
    target, history, length = batch([5], 5, 4)
    shuffled = history[:, [2, 0, 1, 4, 3]]
    model = disturbed(BST(4, blocks=2))
    assert (model(target, shuffled, length) - model(target, history, length)).abs().max() > 1e-3
    with torch.no_grad():
        model.position.copy_(model.position[:1].expand_as(model.position))
    torch.testing.assert_close(model(target, shuffled, length), model(target, history, length))


def test_the_target_and_every_event_reach_the_output():
    model = disturbed(BST(4))
    target, history, length = batch([3], 5, 4)
    target.requires_grad_()
    history.requires_grad_()
    of_target, of_history = torch.autograd.grad(model(target, history, length).square().sum(), [target, history])
    assert bool(of_target.any())
    assert of_history[0].abs().amax(1).gt(0).tolist() == [True, True, True, False, False]


def test_dropout_works_in_training_only():
    model = BST(4, dropout=0.5)
    inputs = [x.float() if x.is_floating_point() else x for x in batch([5, 3], 5, 4)]
    assert not torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


def test_width_must_divide_into_heads():
    with pytest.raises(RecipeError, match="width 10 cannot be split over 3 heads"):
        BST(10, heads=3)
