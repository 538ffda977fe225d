"""DIN against a loop over events, its padding, its statistics, its memory, and a task that mean pooling cannot do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import recsys_din
from recsys.nn.sequence import MeanPool
from recsys.testing import contract
from recsys_din import DIN, Dice, DiceMLP

ACTIVATIONS = ("dice", "official_dice", "prelu", "sigmoid", "relu")


def disturbed(module, scale=0.5, seed=0):
    """Double precision, every parameter away from its initial value, running statistics too."""
    torch.manual_seed(seed)
    module = module.double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=scale)
    for part in module.modules():
        if isinstance(part, Dice):
            part.mean.normal_()
            part.variance.uniform_(0.5, 2.0)
    return module


def batch(length, longest, width, seed=1):
    torch.manual_seed(seed)
    length = torch.tensor(length)
    history = torch.randn(len(length), longest, width, dtype=torch.float64)
    return torch.randn(len(length), width, dtype=torch.float64), history, length


def slow_dice(columns, part, training):
    """Dice of a list of vectors, by the definition."""
    eps = part.eps
    if training:
        mean = sum(columns) / len(columns)
        variance = sum((c - mean) ** 2 for c in columns) / len(columns)
    else:
        mean, variance = part.mean, part.variance
    out = []
    for s in columns:
        y = (s - mean) / torch.sqrt(variance + eps)
        p = 1 / (1 + torch.exp(-(y if part.beta is None else part.beta * y)))
        out.append(p * s + (1 - p) * part.alpha * s)
    return out


def slow_activation(columns, part, training):
    if isinstance(part, Dice):
        return slow_dice(columns, part, training)
    if isinstance(part, recsys_din.PReLU):
        return [s.clamp(min=0) + part.alpha * s.clamp(max=0) for s in columns]
    return [1 / (1 + torch.exp(-s)) if isinstance(part, torch.nn.Sigmoid) else s.clamp(min=0) for s in columns]


def slow_din(din, target, history, length):
    """The paper's equation, one event at a time, with the input of the first layer written out."""
    where = [(b, t) for b in range(len(length)) for t in range(int(length[b]))]
    inputs = []
    for b, t in where:
        q, k = target[b], history[b, t]
        inputs.append(torch.cat([q, k, q - k, q * k]))
    x = [din.first.weight @ z + din.first.bias for z in inputs]
    for i, part in enumerate(din.layers.activations):
        if i:
            linear = din.layers.linears[i - 1]
            x = [linear.weight @ z + linear.bias for z in x]
        x = slow_activation(x, part, din.training)
    score = {at: (din.last.weight @ z)[0] for at, z in zip(where, x, strict=True)}
    if din.last.bias is not None:
        score = {at: a + din.last.bias[0] for at, a in score.items()}
    out = []
    for b in range(len(length)):
        weights = [score[b, t] for t in range(int(length[b]))]
        if din.softmax and weights:
            powers = [torch.exp(a / math.sqrt(din.width)) for a in weights]
            weights = [p / sum(powers) for p in powers]
        out.append(sum((a * history[b, t] for t, a in enumerate(weights)), torch.zeros_like(target[b])))
    return torch.stack(out)


WAYS = pytest.mark.parametrize("way", ["packed", "one matrix per row", "two products"])


def take(way, monkeypatch):
    """Force one of the three ways in which the scores are computed."""
    monkeypatch.setattr(recsys_din, "_packs", lambda history: way == "packed")
    monkeypatch.setattr(recsys_din, "NARROW", 0 if way == "two products" else 64)


@WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_are_those_of_the_loop(way, training, preset, activation, monkeypatch):
    take(way, monkeypatch)
    din = disturbed(DIN(5, preset=preset, activation=activation, hidden=(7, 4))).train(training)
    target, history, length = batch([3, 0, 1, 4], 4, 5)
    target.requires_grad_()
    history.requires_grad_()
    above = torch.randn(4, 5, dtype=torch.float64)
    leaves = [target, history, *din.parameters()]
    slow = slow_din(din, target, history, length)
    fast = din(target, history, length)
    assert (fast - slow).abs().max() <= 1e-9
    wanted = torch.autograd.grad((slow * above).sum(), leaves)
    found = torch.autograd.grad((fast * above).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("block", [2**17, 30])
@pytest.mark.parametrize("width", [5, 70])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"preset": "official"}, {"activation": "official_dice"}])
def test_full_histories_are_those_of_the_loop(options, training, width, block, monkeypatch):
    monkeypatch.setattr(recsys_din, "BLOCK", block)  # some rows at a time, or all
    din = disturbed(DIN(width, hidden=(7, 4), **options), scale=0.3).train(training)
    target, history, length = batch([3, 3, 3, 3], 3, width)
    target.requires_grad_()
    history.requires_grad_()
    above = torch.randn(4, width, dtype=torch.float64)
    leaves = [target, history, *din.parameters()]
    slow, fast = slow_din(din, target, history, length), din(target, history, length)
    assert (fast - slow).abs().max() <= 1e-9
    wanted = torch.autograd.grad((slow * above).sum(), leaves, create_graph=True)
    found = torch.autograd.grad((fast * above).sum(), leaves, create_graph=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9
    # Gradients of a penalty on the gradients too.
    wanted, found = (
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
        for grads in (wanted, found)
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-7 * max(1.0, float(b.abs().max()))
    # As they are when nothing asks for more.
    plain = torch.autograd.grad((din(target, history, length) * above).sum(), leaves)
    slow = torch.autograd.grad((slow_din(din, target, history, length) * above).sum(), leaves)
    for a, b in zip(plain, slow, strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("learned_scale", [True, False])
def test_gradients_of_gradients_of_dice(learned_scale):
    dice = disturbed(Dice(3, learned_scale=learned_scale)).train()
    s = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dice, s)
    assert torch.autograd.gradgradcheck(dice, s)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_rows_and_no_events_are_no_trouble(rows):
    din = DIN(4)
    target, history = torch.randn(rows, 4), torch.randn(rows, 0, 4)
    assert not bool(din(target, history, torch.zeros(rows, dtype=torch.int64)).any())
    assert din(target, torch.randn(rows, 3, 4), torch.full((rows,), 3)).shape == (rows, 4)


def test_full_histories_under_autocast():
    torch.manual_seed(0)
    din = DIN(6, hidden=(8, 4))
    target, history, length = torch.randn(9, 6, requires_grad=True), torch.randn(9, 5, 6), torch.full((9,), 5)
    want = din(target, history, length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = din(target, history, length)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(got.float().sum(), target)[0].isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"preset": "official"}, {"activation": "official_dice"}, {"hidden": (6,), "softmax": True}]
)
def test_contract(options):
    contract("sequence", DIN, **options)


def test_contract_of_the_perceptron():
    contract("interaction", DiceMLP)


@WAYS
@pytest.mark.parametrize("preset", ["paper", "official"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 4))
def test_more_padding_changes_nothing_neither_statistics_nor_gradients(way, preset, length, more):
    with pytest.MonkeyPatch.context() as patch:
        take(way, patch)
        results = []
        for extra in (0, more):
            din = disturbed(DIN(4, preset=preset, activation="dice", hidden=(6, 3))).train()
            target, history, n = batch(length, 5, 4)
            noise = torch.full((len(length), extra, 4), math.nan, dtype=torch.float64)
            history = torch.cat([history, noise], 1).requires_grad_()
            out = din(target.requires_grad_(), history, n)
            leaves = [target, history, *din.parameters()]
            grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
            assert not bool(grads[1][:, 5:].any())
            statistics = list(din.buffers())
            seen = [out, grads[0], grads[1][:, :5], *grads[2:], *statistics, din.eval()(target, history, n)]
            results.append([torch.zeros(()) if x is None else x for x in seen])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_with_padding_in_the_statistics_padding_does_change_them():
    outs = []
    for longest in (4, 9):
        din = disturbed(DIN(4, hidden=(6,), pad_in_stats=True)).train()
        target, history, length = batch([4, 2], 9, 4)
        outs.append(din(target, history[:, :longest], length))
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@WAYS
@pytest.mark.parametrize("training", [True, False])
def test_the_order_of_the_events_does_not_matter(way, training, monkeypatch):
    take(way, monkeypatch)
    din = disturbed(DIN(4)).train(training)
    target, history, length = batch([5, 3], 5, 4)
    shuffled = history.clone()
    shuffled[0] = history[0, [3, 1, 4, 0, 2]]
    shuffled[1, :3] = history[1, [2, 0, 1]]
    torch.testing.assert_close(din(target, shuffled, length), din(target, history, length), rtol=1e-10, atol=1e-12)


def test_events_twice_double_a_plain_sum_and_leave_a_mean_alone():
    target, history, length = batch([3, 3], 3, 4)
    for preset, factor in (("paper", 2), ("official", 1)):
        din = disturbed(DIN(4, preset=preset)).eval()
        once, twice = din(target, history, length), din(target, torch.cat([history, history], 1), 2 * length)
        torch.testing.assert_close(twice, factor * once, rtol=1e-10, atol=1e-12)


def test_one_event_under_a_softmax_is_that_event():
    din = disturbed(DIN(4, preset="official"))
    target, history, length = batch([1, 1], 6, 4)
    torch.testing.assert_close(din(target, history, length), history[:, 0])


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_weights_are_those_of_the_sum(preset):
    din = disturbed(DIN(4, preset=preset)).eval()
    target, history, length = batch([3, 0, 2], 5, 4)
    weights = din.weights(target, history, length)
    assert not bool(weights[1].any())
    assert not bool(weights[2, 2:].any())
    torch.testing.assert_close((weights.unsqueeze(2) * history).sum(1), din(target, history, length))
    if preset == "official":
        torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


def test_an_untrained_unit_is_close_to_a_plain_sum():
    din = DIN(8)
    target, history, length = (x if x.dtype == torch.int64 else 1e-4 * x.float() for x in batch([3, 1], 3, 8))
    out = din.eval()(target, history, length)
    torch.testing.assert_close(out[1], history[1, 0], rtol=0.01, atol=1e-8)
    torch.testing.assert_close(out[0], history[0].sum(0), rtol=0.01, atol=1e-6)


# Dice


def test_dice_by_hand():
    dice = Dice(1).double()
    s = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # mean 0, variance (divided by n) 1
    p = torch.sigmoid(s)
    torch.testing.assert_close(dice(s), p * s, rtol=1e-7, atol=0)  # alpha starts at 0


def test_dice_with_a_slope_of_one_is_the_identity_and_passes_large_values():
    s = torch.randn(50, 3, dtype=torch.float64)
    dice = Dice(3).double()
    s[0] = 1e4
    torch.testing.assert_close(dice(s)[0], s[0], rtol=1e-2, atol=0)
    with torch.no_grad():
        dice.alpha.fill_(1)
    torch.testing.assert_close(dice(s), s)


def test_learned_scale_starts_as_half_of_its_argument():
    s = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(Dice(3, learned_scale=True).double()(s), s / 2)


def test_running_statistics_are_those_of_the_events_and_serve_in_evaluation():
    torch.manual_seed(0)
    dice = Dice(2).double()
    valid = torch.rand(64, 10) < 0.3
    seen = []
    for _ in range(40):
        s = torch.randn(64, 10, 2, dtype=torch.float64) * 3 + 1
        dice(s.masked_fill(~valid.unsqueeze(-1), 1e3), valid)
        seen.append(s[valid])
    mean = torch.stack([s.mean(0) for s in seen]).mean(0)
    variance = torch.stack([s.var(0, unbiased=False) for s in seen]).mean(0)
    torch.testing.assert_close(dice.mean, mean)  # fewer than 1 / momentum batches: their plain mean
    torch.testing.assert_close(dice.variance, variance)
    y = (s - mean) / (variance + dice.eps).sqrt()
    torch.testing.assert_close(dice.eval()(s), s * torch.sigmoid(y))
    assert (dice.train()(s) - dice.eval()(s)).abs().max() > 1e-4


def test_a_batch_without_events_leaves_the_running_statistics_alone():
    for way in ("packed", "one matrix per row"):
        with pytest.MonkeyPatch.context() as patch:
            take(way, patch)
            din = disturbed(DIN(4)).train()
            before = [b.clone() for b in din.buffers()]
            target, history, _ = batch([0, 0], 3, 4)
            history.requires_grad_()
            out = din(target, history, torch.zeros(2, dtype=torch.int64))
            assert not bool(out.any())
            out.sum().backward()
            assert history.grad is None or not bool(history.grad.any())
            assert all(torch.equal(a, b) for a, b in zip(before, din.buffers(), strict=True))


def test_the_perceptron_is_linear_layers_with_dice_between():
    from recsys.contracts import Fields

    model = disturbed(DiceMLP(Fields(("a", "b"), (3, 3), 2), hidden=(5, 3))).train()
    e = torch.randn(6, 2, 2, dtype=torch.float64)
    x = [model.first.weight @ row + model.first.bias for row in e.flatten(1)]
    x = slow_dice(x, model.layers.activations[0], True)
    linear = model.layers.linears[0]
    x = slow_dice([linear.weight @ row + linear.bias for row in x], model.layers.activations[1], True)
    torch.testing.assert_close(model(e), torch.stack(x), rtol=1e-10, atol=1e-12)


# memory


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


@WAYS
def test_the_input_of_the_first_layer_is_never_made(way, monkeypatch):
    take(way, monkeypatch)
    rows, longest, width = 16, 50, 32
    din = DIN(width, hidden=(24, 8)).train()
    target, history = torch.randn(rows, width), torch.randn(rows, longest, width)
    length = torch.full((rows,), longest)
    with Largest() as seen:
        din(target.requires_grad_(), history.requires_grad_(), length).sum().backward()
    assert seen.size <= rows * longest * width


@pytest.mark.parametrize("width", [32, 96])
def test_the_exported_graph_has_no_tensor_of_the_first_layers_input(width):
    rows, longest = 16, 50
    din = DIN(width, hidden=(24, 8)).eval()
    inputs = (torch.randn(rows, width), torch.randn(rows, longest, width), torch.full((rows,), longest))
    graph = torch.export.export(din, inputs).graph_module.graph
    sizes = [n.meta["val"].numel() for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert max(sizes) == rows * longest * width
    with pytest.MonkeyPatch.context() as patch:
        take("two products", patch)
        state = dict(din.state_dict())
        call = torch.func.functional_call
        traced = make_fx(lambda s, *x: call(din, s, x), tracing_mode="fake")(state, *inputs).graph
    sizes = [n.meta["val"].numel() for n in traced.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert max(sizes) == rows * longest * width


# relevance


def relevance_auc(pool, steps=250):
    """Label: is the target's category among those of the history? Twenty events, fifty categories, half positive."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def draw(rows):
        history = torch.randint(0, 50, (rows, 20), generator=generator)
        length = torch.randint(10, 21, (rows,), generator=generator)
        inside = history.gather(1, (torch.rand(rows, 1, generator=generator) * length.unsqueeze(1)).long()).squeeze(1)
        target = torch.where(
            torch.rand(rows, generator=generator) < 0.5, inside, torch.randint(0, 50, (rows,), generator=generator)
        )
        seen = torch.arange(20) < length.unsqueeze(1)
        return target, history, length, ((history == target.unsqueeze(1)) & seen).any(1).float()

    table = torch.nn.Embedding(50, 8)
    top = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    parts = torch.nn.ModuleList([table, pool, top])
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.01)

    def logit(target, history, length):
        q = table(target)
        return top(torch.cat([q, pool(q, table(history), length)], 1)).squeeze(1)

    for _ in range(steps):
        target, history, length, y = draw(256)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logit(target, history, length), y).backward()
        optimizer.step()
    parts.eval()
    target, history, length, y = draw(4000)
    with torch.no_grad():
        return roc_auc_score(y.numpy(), logit(target, history, length).double().numpy())


def test_din_learns_relevance_and_mean_pooling_does_not():
    assert relevance_auc(DIN(8, hidden=(32, 16))) > 0.95
    assert relevance_auc(MeanPool(8)) <= 0.8
