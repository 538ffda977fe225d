"""SHARK and SFS, which ask for gradients: against rows one by one, and against a mask that is really there."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankings import NAMES, PLAIN, SCHEMA, make_model, make_rows, make_run, taken

from recsys.api import Vectors
from recsys.testing import contract
from recsys_sfs import sfs
from recsys_shark import shark


def found(make, run, **options):
    return make(run.model.embedding.fields, **options).rank(run)


def loss_of(run, rows, change):
    """The recipe's loss of some rows, their vectors changed."""
    run.model.eval()
    with torch.no_grad():
        vectors = run.model.look_up(rows.ids, rows.values, rows.history)
    e = change(vectors.fields)
    x = run.model.combine(Vectors(e, vectors.histories), rows.ids)
    return run.loss(run.model.decide(x, rows.ids, rows.values), rows)


def slow_shark(run, batch):
    """Every row alone: its gradient, times how far its vectors are from their means."""
    names = run.model.embedding.fields.names
    with torch.no_grad():
        every = run.model.embedding(batch.ids, batch.values)
    mean = [sum(every[b, f] for b in range(len(batch))) / len(batch) for f in range(len(names))]
    scores = dict.fromkeys(names, 0.0)
    for b in range(len(batch)):
        leaf = every[b : b + 1].clone().requires_grad_()
        loss_of(run, taken(batch, [b]), lambda e, leaf=leaf: leaf).backward()
        for f, name in enumerate(names):
            inner = sum(float(g * (m - v)) for g, m, v in zip(leaf.grad[0, f], mean[f], every[b, f], strict=True))
            scores[name] += abs(inner) / len(batch)
    return scores


def drawn(run, total, size, count):
    """Row numbers of each batch that SFS takes."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(run.seed("sfs"))).tolist()
    size = min(size, total)
    return [order[low : low + size] for low in range(0, total - size + 1, size)][:count]


def slow_sfs(run, batch, size, count):
    """A mask of ones in front of every field's vectors, and its gradient."""
    names = run.model.embedding.fields.names
    scores, batches = dict.fromkeys(names, 0.0), drawn(run, len(batch), size, count)
    for rows in batches:
        mask = torch.ones(len(names), dtype=torch.float64, requires_grad=True)
        loss_of(run, taken(batch, rows), lambda e, mask=mask: e * mask.view(1, -1, 1)).backward()
        for name, slope in zip(names, mask.grad.tolist(), strict=True):
            scores[name] += abs(slope) / len(batches)
    total = sum(scores.values())
    return {name: score / total for name, score in scores.items()}


@pytest.mark.parametrize("make", [shark, sfs])
def test_contract(make):
    contract("selector", make)
    contract("selector", make, keep=1)


MODELS = {
    "schema": st.sampled_from([SCHEMA, PLAIN]),
    "members": st.sampled_from([1, 2]),
    "rows": st.integers(1, 25),
    "seed": st.integers(0, 99),
}


@settings(max_examples=15, deadline=None)
@given(**MODELS, size=st.sampled_from([1, 4, 100]))
def test_shark_is_what_rows_one_by_one_give(schema, members, rows, seed, size):
    batch = make_rows(rows, schema, seed)
    run = make_run(batch, schema, make_model(schema, seed, members), seed, eval_batch_size=size)
    ranking = found(shark, run)
    assert ranking.scores == {name: pytest.approx(s, rel=1e-9, abs=1e-12) for name, s in slow_shark(run, batch).items()}
    assert ranking.passes == 3 * rows


@settings(max_examples=15, deadline=None)
@given(**MODELS, size=st.sampled_from([1, 4, 100]), count=st.integers(1, 6), accumulate=st.sampled_from([1, 3]))
def test_sfs_is_the_gradient_of_a_mask(schema, members, rows, seed, size, count, accumulate):
    batch = make_rows(rows, schema, seed)
    model = make_model(schema, seed, members)
    run = make_run(batch, schema, model, seed, batch_size=size, accumulate=accumulate)
    ranking = found(sfs, run, batches=count)
    wanted = slow_sfs(run, batch, size, count)
    assert ranking.scores == {name: pytest.approx(s, rel=1e-9, abs=1e-12) for name, s in wanted.items()}
    assert sum(ranking.scores.values()) == pytest.approx(1.0)
    assert ranking.passes == 3 * sum(map(len, drawn(run, rows, size, count)))


def test_shark_does_not_mind_the_order_of_rows_nor_their_batches():
    batch = make_rows(40)
    scores = found(shark, make_run(batch)).scores
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = make_run(taken(batch, order), eval_batch_size=3, batch_size=5)
    other.model.train()
    assert found(shark, other).scores == {name: pytest.approx(s, rel=1e-9, abs=1e-12) for name, s in scores.items()}


def test_sfs_is_the_same_each_time_and_draws_other_rows_for_another_seed():
    batch = make_rows(40)
    scores = found(sfs, make_run(batch), batches=2).scores
    torch.manual_seed(99)
    assert found(sfs, make_run(batch), batches=2).scores == scores
    assert found(sfs, make_run(batch, seed=1), batches=2).scores != scores


def test_a_field_that_never_changes_has_no_first_order_loss():
    scores = found(shark, make_run(make_rows(30))).scores
    assert scores["always"] < 1e-12
    assert scores["zero"] < 1e-12
    assert min(scores[name] for name in ("user", "price", "item")) > 1e-3
    # a mask does not ask whether a field changes
    assert found(sfs, make_run(make_rows(30))).scores["always"] > 1e-3


@pytest.mark.parametrize("make", [shark, sfs])
def test_tasks_are_averaged_and_row_weights_count(make):
    """The scores of a weighted loss of two tasks are none of those of its parts."""
    batch = make_rows(30)
    each = []
    for tasks, weighted in itertools.product([("click", "buy"), ("click",), ("buy",)], [True, False]):
        schema = replace(SCHEMA, tasks=tasks)
        rows = replace(batch, label={task: batch.label[task] for task in tasks})
        rows = rows if weighted else replace(rows, context={"group": batch.context["group"]})
        model = make_model(SCHEMA)
        each.append(tuple(found(make, make_run(rows, schema, model)).scores.values()))
    assert len(set(each)) == 6


@pytest.mark.parametrize("make", [shark, sfs])
def test_a_field_that_only_a_history_compares_events_with_counts(make):
    run = make_run(make_rows(60))
    item = NAMES.index("item")
    run.model.selector.register_forward_hook(  # the interactions see no item itself
        lambda selector, inputs, output: output * (torch.arange(len(NAMES)) != item).view(1, -1, 1)
    )
    assert found(make, run).scores["item"] > 1e-3


@pytest.mark.parametrize("make", [shark, sfs])
def test_first_order_weights_do_not_count(make):
    run = make_run(make_rows(60))
    for p in (*run.model.interactions.parameters(), run.model.embedding.weight):
        p.data.zero_()
    assert set(found(make, run).scores.values()) == {0.0}
