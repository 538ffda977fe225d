"""SIM against a loop over rows, heads and events; what the search takes, and that the labels teach it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from recsys.api import Batch
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_sim import SIM


def disturbed(module, seed=0):
    torch.manual_seed(seed)
    module = module.double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def inputs(length, longest, width, seed=1):
    torch.manual_seed(seed)
    history = torch.randn(len(length), longest, width, dtype=torch.float64)
    return torch.randn(len(length), width, dtype=torch.float64), history, torch.tensor(length)


def labelled(*tasks, weight=None):
    """A batch of which only labels and weights are read."""
    label = {f"task{i}": torch.tensor(y, dtype=torch.float32) for i, y in enumerate(tasks)}
    context = {} if weight is None else {"weight": torch.tensor(weight)}
    return Batch(torch.zeros(len(tasks[0]), 1, dtype=torch.int64), label=label, context=context)


def slow_scores(model, q, events):
    """r_t of one row, both projections written out."""
    return [(model.search.of_event.weight @ k) @ (model.search.of_target.weight @ q) for k in events]


def slow_taken(model, q, events):
    """The positions of the highest scores, best first."""
    scores = [r.item() for r in slow_scores(model, q, events)]
    return sorted(range(len(events)), key=lambda t: -scores[t])[: model.top]


def slow(model, target, history, length):
    size = model.width // model.heads
    rows = []
    for b, n in enumerate(length.tolist()):
        q, heads = target[b], []
        taken = [history[b, t] for t in slow_taken(model, q, history[b, :n])]
        for h in range(model.heads):
            part = slice(h * size, (h + 1) * size)
            ours = (model.query.weight @ q)[part]
            scores = [ours @ (model.key.weight @ k)[part] / math.sqrt(size) for k in taken]
            total = sum(torch.exp(a) for a in scores)
            seen = (torch.exp(a) / total * k for a, k in zip(scores, taken, strict=True))
            heads.append(sum(seen, torch.zeros_like(q)))
        rows.append(model.out.weight @ torch.cat(heads))
    return torch.stack(rows)


def slow_auxiliary(model, target, history, length, batch):
    total = target.new_zeros(())
    for b, n in enumerate(length.tolist()):
        q, events = target[b], history[b, :n]
        found = sum((r * k for r, k in zip(slow_scores(model, q, events), events, strict=True)), torch.zeros_like(q))
        x = torch.cat([found, q])
        for layer in [m for m in model.search.judge.modules() if isinstance(m, torch.nn.Linear)]:
            x = (layer.weight @ x + layer.bias).clamp(min=0)
        p = 1 / (1 + torch.exp(-(model.search.last.weight @ x + model.search.last.bias)))[0]
        weight = float(batch.context["weight"][b]) if "weight" in batch.context else 1.0
        for label in batch.label.values():
            row = -torch.log(p) if label[b] else -torch.log(1 - p)
            total = total + weight * row / len(batch.label)
    return model.strength * total / len(length)


BATCHES = {
    "one task": labelled([1, 0, 1, 1, 0]),
    "weights": labelled([1, 0, 0, 1, 0], weight=[0.5, 2.0, 0.0, 1.0, 3.0]),
    "two tasks": labelled([1, 0, 1, 1, 0], [0, 0, 1, 0, 1], weight=[0.5, 2.0, 0.0, 1.0, 3.0]),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("top", [1, 3, 6, 50])
@pytest.mark.parametrize("heads", [1, 2])
def test_output_loss_and_gradients_are_those_of_the_loops(top, heads, batch):
    model = disturbed(SIM(4, top=top, heads=heads, auxiliary=0.7, auxiliary_hidden=(5, 3)))
    target, history, length = inputs([6, 1, 0, 4, 5], 7, 4)
    target.requires_grad_()
    history.requires_grad_()
    above = torch.randn(5, 4, dtype=torch.float64)
    leaves = [target, history, *model.parameters()]
    fast, wanted = model(target, history, length), slow(model, target, history, length)
    assert (fast - wanted).abs().max() <= 1e-9
    loss, wanted_loss = model.auxiliary(batch), slow_auxiliary(model, target, history, length, batch)
    assert (loss - wanted_loss).abs() <= 1e-9
    ours = torch.autograd.grad((fast * above).sum() + loss, leaves)
    theirs = torch.autograd.grad((wanted * above).sum() + wanted_loss, leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9
    with torch.no_grad():
        assert (model.eval()(target, history, length) - wanted).abs().max() <= 1e-9


def test_the_search_learns_from_its_own_loss_alone():
    model = disturbed(SIM(4, top=2))
    out = model(*inputs([6, 4], 6, 4)).sum()
    of_search = list(model.search.parameters())
    assert torch.autograd.grad(out, of_search, allow_unused=True) == (None,) * len(of_search)
    attention = [model.query.weight, model.key.weight, model.out.weight]
    assert torch.autograd.grad(model.auxiliary(labelled([1, 0])), attention, allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("options", [{}, {"top": 5, "heads": 1, "auxiliary_hidden": ()}])
def test_contract(options):
    contract("sequence", SIM, **options)


@pytest.mark.parametrize("top", [2, 3])
def test_contract_of_a_search_that_leaves_events_out(top):
    # What the newest event must change is not what a search need take.
    contract.without("padding_invariance")("sequence", SIM, top=top)


@pytest.mark.parametrize("training", [True, False])
def test_no_more_events_than_are_taken_is_attention_over_all(training):
    wide, narrow = (disturbed(SIM(4, top=top)).train(training) for top in (50, 5))
    target, history, length = inputs([5, 3, 0, 5], 9, 4)  # longer than `narrow` takes: it has to search
    torch.testing.assert_close(narrow(target, history, length), wide(target, history, length), rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_the_highest_scores_are_taken_and_padding_only_where_events_are_too_few(length, top, seed):
    model = disturbed(SIM(4, top=top), seed)
    _, history, count = inputs(length, 8, 4, seed)
    valid = torch.arange(8) < count.unsqueeze(1)
    scores = torch.where(valid, -1 - torch.rand(len(length), 8).double(), 0.0)  # of padding it seems higher
    events, taken = model.found(scores, history, valid)
    for b, n in enumerate(length):
        best = sorted(range(n), key=lambda t: -float(scores[b, t]))[:top]
        assert taken[b].tolist() == [True] * len(best) + [False] * (top - len(best))
        assert torch.equal(events[b, : len(best)], history[b, best])


@pytest.mark.parametrize("top", [2, 4, 50])
def test_padding_of_any_value_changes_neither_output_nor_loss_nor_gradient(top):
    model = disturbed(SIM(4, top=top))
    results = []
    for extra in (0, 3):
        target, history, length = inputs([5, 2, 0], 5, 4)
        target = -target  # a sign for which scores of events are negative too
        history = torch.cat([history, torch.full((3, extra, 4), math.nan, dtype=torch.float64)], 1)
        history[1, 2:] = math.nan
        history.requires_grad_()
        out = model(target, history, length)
        loss = model.auxiliary(labelled([1, 0, 1]))
        grads = torch.autograd.grad(out.square().sum() + loss, [history, *model.parameters()])
        assert not grads[0][1, 2:].any()
        assert not grads[0][2].any()
        results.append([out, loss, grads[0][:, :5], *grads[1:]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert bool(results[0][1].isfinite())


def test_the_graph_takes_histories_shorter_and_longer_than_the_search_finds():
    model = disturbed(SIM(4, top=3)).eval()
    rows, longest = Dim("rows", min=1), Dim("longest", min=1)
    shapes = ({0: rows}, {0: rows, 1: longest}, {0: rows})
    for traced in (2, 6):
        program = export(model, inputs([1, 2, traced], traced, 4), dynamic_shapes=shapes).module()
        for length in ([1], [2, 0], [3, 1, 2], [4, 0, 2, 3], [11, 1, 10, 4, 0]):
            given = inputs(length, max(length), 4)
            torch.testing.assert_close(program(*given), model(*given), rtol=1e-10, atol=1e-12)


def test_half_precision_takes_the_same_events():
    model = SIM(16, top=5).eval()
    target, history, length = (x.float() if x.is_floating_point() else x for x in inputs([60] * 40, 60, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.search(target, history)
        close = model(target, history, length)
    assert torch.equal(scores, model.search(target, history))
    assert (close - model(target, history, length)).norm() / close.norm() < 2e-2


def test_the_loss_is_of_training_alone_and_a_copy_has_none():
    model = SIM(4, top=2)
    given = [x.float() if x.is_floating_point() else x for x in inputs([5, 3], 5, 4)]
    model(*given)
    loss = model.auxiliary(labelled([1, 0]))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) > 0
    assert float(copy.deepcopy(model).auxiliary(labelled([1, 0]))) == 0
    model.eval()(*given)
    assert float(model.auxiliary(labelled([1, 0]))) == 0


def test_width_must_divide_into_heads():
    with pytest.raises(RecipeError, match="width 10 cannot be split over 3 heads"):
        SIM(10, heads=3)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("top", [10, 50])
def test_nothing_is_larger_than_the_history(top):
    rows, longest, width = 16, 50, 32
    model = SIM(width, top=top)
    target, history = (
        torch.randn(rows, width, requires_grad=True),
        torch.randn(rows, longest, width, requires_grad=True),
    )
    with Largest() as seen:
        out = model(target, history, torch.full((rows,), longest))
        (out.sum() + model.auxiliary(labelled([1.0] * rows))).backward()
    assert seen.size <= rows * longest * width


# What the search is for


CATEGORIES, ITEMS, EVENTS, TOP = 10, 60, 40, 8


def draw(rows, generator):
    """Items of ten categories: of positive rows a tenth of the events are of the target's, of negative ones none is."""
    target = torch.randint(0, ITEMS, (rows,), generator=generator)
    own = target.unsqueeze(1) % CATEGORIES
    other = (own + torch.randint(1, CATEGORIES, (rows, EVENTS), generator=generator)) % CATEGORIES
    y = torch.rand(rows, generator=generator) < 0.5
    near = (torch.rand(rows, EVENTS, generator=generator) < 0.1) & y.unsqueeze(1)
    item = torch.randint(0, ITEMS // CATEGORIES, (rows, EVENTS), generator=generator)
    return target, torch.where(near, own, other) + CATEGORIES * item, y.float()


def recall(model, table, generator):
    """Of the events of the target's category, the share that the search finds."""
    target, history, _ = draw(1000, generator)
    events = table(history)
    category = (history % CATEGORIES).unsqueeze(2).expand_as(events)  # goes along with the events
    scores = model.search(table(target), events)
    found, _ = model.found(scores, category, torch.ones_like(history, dtype=torch.bool))
    own = (target % CATEGORIES).unsqueeze(1)
    return float((found[:, :, 0] == own).sum() / (category[:, :, 0] == own).sum())


def test_the_search_learns_to_find_the_few_events_of_the_targets_category():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    table = torch.nn.Embedding(ITEMS, 16)
    torch.nn.init.normal_(table.weight, std=0.1)
    model = SIM(16, top=TOP)
    before = recall(model, table, generator)
    optimizer = torch.optim.Adam([*model.search.parameters(), *table.parameters()], lr=0.01)
    for _ in range(700):
        target, history, y = draw(256, generator)
        model(table(target), table(history), torch.full((256,), EVENTS))
        optimizer.zero_grad()
        model.auxiliary(labelled(y.tolist())).backward()
        optimizer.step()
    # Chance is TOP / EVENTS = .2; the target itself is among the events of its category, so it starts above that.
    assert before < 0.4
    assert recall(model, table, generator) > 0.6
