"""Permutation importance against the whole model on rows that are physically shuffled, field by field."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankings import NAMES, PLAIN, SCHEMA, logits_of, make_model, make_rows, make_run, taken

import recsys_permutation
from recsys.api import Batch, Fields, RecipeError
from recsys.testing import contract
from recsys_permutation import others, permutation


def auc(logit, label, tie=0.5):
    """Pairs in the right order; of equal rows, which sums in another order set apart by a rounding, so much is won."""
    won = total = 0.0
    for z, y in zip(logit, label, strict=True):
        for w, x in zip(logit, label, strict=True):
            if y == 1 and x == 0:
                won += tie if abs(z - w) < 1e-9 else float(z > w)
                total += 1
    return won / total


def logloss(logit, label, tie=0.5):
    away = [-z if y == 1 else z for z, y in zip(logit, label, strict=True)]
    return sum(max(a, 0.0) + math.log1p(math.exp(-abs(a))) for a in away) / len(away)


METRICS = {"auc": (auc, 1), "logloss": (logloss, -1)}


def by_group(logit, label, group):
    """AUC inside each group that has both labels, weighted by its rows."""
    total = rows = 0
    for g in set(group):
        own = [i for i, other in enumerate(group) if other == g]
        if len({label[i] for i in own}) == 2:
            total += len(own) * auc([logit[i] for i in own], [label[i] for i in own])
            rows += len(own)
    return total / rows


def shuffled(batch, f, source):
    """Row b with the value of field f that row source[b] has."""
    ids = batch.ids.clone()
    values = None if batch.values is None else batch.values.clone()
    for b, other in enumerate(source):
        ids[b, f] = batch.ids[other, f]
        if values is not None:
            values[b, f] = batch.values[other, f]
    return Batch(ids, values, batch.history, batch.label, batch.context)


def slow(run, batch, metric, repeats):
    """Least and largest score of each field by the whole model on whole batches; they differ where rows are tied."""
    measure, sign = METRICS[metric]

    def value(rows, tie):
        logits = logits_of(run.model, rows)
        each = [measure(logits[task].tolist(), batch.label[task].tolist(), tie) for task in batch.label]
        return sum(each) / len(each)

    names = [field.name for field in run.schema.fields]
    scores = {name: [0.0, 0.0] for name in names}
    for repeat in range(repeats):
        source = others(len(batch), run.seed("permutation", repeat)).tolist()
        for f, name in enumerate(names):
            for end in 0, 1:
                lost = value(batch, end) - value(shuffled(batch, f, source), 1 - end)
                scores[name][end] += sign * lost / repeats
    return {name: (min(ends) - 1e-9, max(ends) + 1e-9) for name, ends in scores.items()}


def found(run, **options):
    fields = run.model.embedding.fields
    return permutation(fields, **options).rank(run)


def test_contract():
    contract("selector", permutation)
    contract("selector", permutation, keep=2, metric="logloss", rows=10)


@settings(max_examples=25, deadline=None)
@given(
    schema=st.sampled_from([SCHEMA, PLAIN]),
    rows=st.integers(12, 30),
    metric=st.sampled_from(["auc", "logloss"]),
    repeats=st.integers(1, 3),
    size=st.sampled_from([1, 5, 7, 100]),
    held=st.sampled_from([1, 500, 1 << 20]),
    members=st.sampled_from([1, 2]),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_the_whole_model_on_shuffled_rows(
    schema, rows, metric, repeats, size, held, members, wide, seed
):
    model, batch = make_model(schema, seed, members, wide), make_rows(rows, schema, seed)
    for task in batch.label:
        batch.label[task][:2] = torch.tensor([0.0, 1.0])
    run = make_run(batch, schema, model, seed, eval_batch_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recsys_permutation, "HELD", held)
        ranking = found(run, metric=metric, repeats=repeats)
    wanted = slow(run, batch, metric, repeats)
    assert all(low <= ranking.scores[name] <= high for name, (low, high) in wanted.items())
    # a forward pass for every row, and one for every pair of row and field that has got another value
    changed = 0
    for repeat in range(repeats):
        source = others(rows, run.seed("permutation", repeat)).tolist()
        for f in range(len(schema.fields)):
            new = shuffled(batch, f, source)
            differs = new.ids[:, f] != batch.ids[:, f]
            if batch.values is not None:
                differs |= new.values[:, f] != batch.values[:, f]
            changed += int(differs.sum())
    assert ranking.passes == rows + changed <= rows * (1 + repeats * len(schema.fields))


@given(st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_a_field_that_never_changes_has_exactly_zero(seed):
    batch = make_rows(40, seed=seed)
    batch = replace(batch, values=batch.values.float())  # as real ones are, so that sums are rounded
    run = make_run(batch, model=make_model(seed=seed).float(), seed=seed)
    scores = found(run, metric="logloss", repeats=2).scores
    assert scores["always"] == scores["zero"] == 0.0
    assert all(scores[name] != 0.0 for name in ("user", "price", "item"))


def test_numbers_move_with_their_being_missing():
    batch = make_rows(40)
    assert 0 < int((batch.ids[:, 1] == 0).sum()) < 40
    run = make_run(batch)
    price = NAMES.index("price")
    seen = []
    run.model.embedding.register_forward_pre_hook(lambda table, inputs: seen.append(inputs))
    found(run, repeats=1)
    pairs = {(int(i), float(v)) for ids, values in seen for i, v in zip(ids[:, price], values[:, price], strict=True)}
    assert pairs == {(int(i), float(v)) for i, v in zip(batch.ids[:, price], batch.values[:, price], strict=True)}


def test_a_target_is_lost_in_the_history_too_and_only_there_is_it_read_again():
    """Without interactions that see the item itself, its score is what the history says."""
    run = make_run(make_rows(60), eval_batch_size=60)
    with torch.no_grad():
        run.model.head.wide.weight.zero_()
    read = []
    run.model.sequences[0].register_forward_hook(lambda pool, inputs, output: read.append(len(output)))
    ranking = found(run, repeats=1)
    assert ranking.scores["item"] != 0
    source = others(60, run.seed("permutation", 0))
    targets = [NAMES.index(name) for name in ("item", "user")]
    again = sum(
        int((run.split("valid").batch.ids[source, f] != run.split("valid").batch.ids[:, f]).sum()) for f in targets
    )
    assert sum(read) == 60 + 60 + again, "all rows twice, then pairs of a row and a target"


@given(st.integers(2, 200), st.integers(0, 2**40))
def test_every_row_gets_another_one_and_each_is_given_once(rows, seed):
    source = others(rows, seed)
    assert sorted(source) == list(range(rows))
    assert not (source == np.arange(rows)).any()
    at, seen = 0, []
    for _ in range(rows):
        seen.append(at)
        at = int(source[at])
    assert at == 0
    assert sorted(seen) == list(range(rows)), "one circle"


def test_any_other_row_is_as_likely():
    counts = np.zeros((4, 4))
    for seed in range(3000):
        counts[np.arange(4), others(4, seed)] += 1
    assert np.diag(counts).tolist() == [0] * 4
    off = counts[~np.eye(4, dtype=bool)]
    assert abs(off - 1000).max() < 5 * math.sqrt(1000 * 2 / 3)


def test_a_single_row_can_lose_nothing():
    assert found(make_run(make_rows(1)), metric="logloss").scores == dict.fromkeys(NAMES, 0.0)


def test_some_rows_are_drawn_once_and_the_others_are_not_looked_at():
    batch = make_rows(50)
    run = make_run(batch)
    wanted = found(run, metric="logloss", rows=20, repeats=2).scores
    generator = torch.Generator().manual_seed(run.seed("permutation", "rows"))
    drawn = torch.randperm(50, generator=generator)[:20].sort().values
    assert found(make_run(taken(batch, drawn)), metric="logloss", repeats=2).scores == wanted
    assert found(run, metric="logloss", rows=500, repeats=2).scores == found(run, metric="logloss", repeats=2).scores


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_and_modes_change_nothing(size):
    batch = make_rows(64)
    scores = []
    for eval_batch_size, training in ((16, False), (size, True)):
        run = make_run(batch, eval_batch_size=eval_batch_size)
        run.model.train(training)
        torch.manual_seed(size)
        scores.append(found(run, metric="logloss", repeats=2).scores)
        assert run.model.training == training
    assert scores[1] == {name: pytest.approx(score, abs=1e-12) for name, score in scores[0].items()}


def test_one_class_is_told_and_what_to_do():
    batch = make_rows(30)
    for label in batch.label.values():
        label.fill_(1.0)
    run = make_run(batch)
    with pytest.raises(
        RecipeError, match=r"2-rank_fields: 'auc' is undefined on the 30 validation rows .*metric: logloss"
    ):
        found(run)
    assert found(run, metric="logloss").passes > 30


def test_a_task_of_one_class_ranks_nothing_and_is_named():
    batch = make_rows(30)
    batch.label["buy"].fill_(0.0)
    run = make_run(batch)
    scores = found(run, repeats=1).scores
    assert "'auc' is undefined for buy, which ranks no fields" in run.log.getvalue()
    source = others(30, run.seed("permutation", 0)).tolist()
    before = auc(logits_of(run.model, batch)["click"].tolist(), batch.label["click"].tolist())
    for f, name in enumerate(NAMES):
        after = logits_of(run.model, shuffled(batch, f, source))["click"].tolist()
        assert scores[name] == pytest.approx(before - auc(after, batch.label["click"].tolist()), abs=1e-9)


def test_a_metric_may_need_a_column():
    batch = make_rows(60)
    run = make_run(batch)
    scores = found(run, metric="gauc", repeats=1).scores
    source, group = others(60, run.seed("permutation", 0)).tolist(), batch.context["group"].tolist()

    def value(rows):
        each = logits_of(run.model, rows).items()
        return sum(by_group(z.tolist(), batch.label[task].tolist(), group) for task, z in each) / 2

    wanted = {name: value(batch) - value(shuffled(batch, f, source)) for f, name in enumerate(NAMES)}
    assert scores == {name: pytest.approx(score, abs=1e-9) for name, score in wanted.items()}


def test_a_metric_may_have_options():
    run = make_run(make_rows(60))
    two, same = found(run, metric={"use": "ece", "bins": 2}).scores, found(run, metric={"use": "ece"}).scores
    assert same == found(run, metric="ece").scores != two


def test_more_fields_than_there_are():
    with pytest.raises(RecipeError, match="keep: 4 fields are asked for, and the model has 3"):
        permutation(Fields(("a", "b", "c"), (2, 2, 2), 4), keep=4)
