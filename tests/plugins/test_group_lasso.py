"""Group lasso: the price and its gradient in closed form, what it is on a table, what is kept, planted noise."""

import copy
import math

import pytest
import torch
from gates import mean_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import EncodedSchema, Field, Fields, RecipeError, Table
from recsys.nn.head import Head
from recsys.nn.interaction import FM
from recsys.nn.model import Model
from recsys.testing import contract, samples
from recsys.train.losses import BCE
from recsys_group_lasso import GroupLasso

F, D = 4, 3
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)


def vectors(rows, seed=0):
    return torch.randn(rows, F, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(e):
    return torch.zeros(e.shape[:2], dtype=torch.int64)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"strength": 0.0, "keep": 1}])
def test_contract(options):
    contract("selector", GroupLasso, **options)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_contract_after_a_search(threshold):
    def build(fields: Fields) -> GroupLasso:
        """With norms that differ."""
        made = GroupLasso(fields, threshold=threshold)
        made.square.copy_(torch.arange(len(fields)) / 10)
        return made

    contract("selector", build)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 7), st.sampled_from([0.0, 0.2]))
def test_price_and_gradient_are_the_closed_forms(seed, rows, strength):
    made, e = GroupLasso(FIELDS, strength=strength).double(), vectors(rows, seed)
    e[:, 1] *= 1e-4
    e.requires_grad_()
    assert torch.equal(made(e, ids(e)), e)
    price = made.penalty()
    norms, total = [], 0.0
    for f in range(F):
        norms.append(math.sqrt(sum(float(v) ** 2 for v in e[:, f].flatten().tolist()) / rows))
        total += strength * math.sqrt(D) * norms[-1]
    assert float(price.detach()) == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert [float(s) for s in made.scores().values()] == pytest.approx(norms)
    (slope,) = torch.autograd.grad(price, e)
    for f in range(F):
        wanted = strength * math.sqrt(D) * e[:, f].detach() / (rows * norms[f])
        torch.testing.assert_close(slope[:, f], wanted, rtol=1e-9, atol=1e-12)


def test_it_is_the_group_lasso_of_a_table_whose_rows_count_as_often_as_they_are_used():
    schema = EncodedSchema((Field("a", 9), Field("b", 5)))
    table = Table(schema, dim=D, init_std=1.0)
    made, parts = GroupLasso(table.fields, strength=0.3), [FM(table.fields)]
    model = Model(schema, table, made, {}, parts, Head(schema, parts)).train()
    batch, loss = samples.batch(40, schema), BCE(schema.tasks)
    price = model.objective(loss, batch) - loss(model(batch), batch)
    wanted = 0.0
    for f, rows in enumerate((9, 5)):
        share = torch.bincount(batch.ids[:, f], minlength=rows) / 40
        part = table.weight[f * 9 :][:rows]
        wanted += 0.3 * D**0.5 * float((share.sqrt().unsqueeze(1) * part).norm().detach())
    assert float(price.detach()) == pytest.approx(wanted, rel=1e-4)
    (slope,) = torch.autograd.grad(made.penalty(), table.weight)
    used = torch.zeros(len(slope), dtype=torch.bool)
    used[batch.ids[:, 0]] = True
    used[9 + batch.ids[:, 1]] = True
    assert torch.equal(slope.any(1), used), "no row that the batch does not use"


def test_vectors_of_zeros_have_a_gradient_of_zero():
    made, e = GroupLasso(FIELDS), torch.zeros(5, F, D, requires_grad=True)
    made(e, ids(e))
    made.penalty().backward()
    assert not e.grad.any()


def test_nothing_is_paid_for_evaluation_and_by_a_copy():
    made, e = GroupLasso(FIELDS), torch.randn(5, F, D, requires_grad=True)
    assert float(made.penalty()) == 0
    made(e, ids(e))
    assert float(made.penalty().detach()) > 0
    assert float(copy.deepcopy(made).penalty()) == 0
    before = made.square.clone()
    made.eval()(e, ids(e))
    assert float(made.penalty()) == 0
    assert torch.equal(made.square, before)


def test_the_price_of_half_precision_is_summed_in_float32():
    made, e = GroupLasso(FIELDS, strength=1.0), torch.full((4096, F, D), 1.0, dtype=torch.bfloat16)
    assert made(e, ids(e)).dtype == torch.bfloat16
    assert made.penalty().dtype == torch.float32
    assert float(made.penalty()) == pytest.approx(F * D)


def test_the_average_begins_with_the_first_batch_and_forgets_slowly():
    made, wanted = GroupLasso(FIELDS).double(), None
    for step in range(4):
        e = vectors(7, step)
        now = e.square().sum(2).mean(0)
        made(e, ids(e))
        wanted = now if wanted is None else 0.98 * wanted + 0.02 * now
    torch.testing.assert_close(made.square, wanted, rtol=1e-9, atol=0)


def test_kept_are_the_longest_or_those_above_the_threshold():
    e = torch.randn(6, F, D)
    for options, kept in (({"keep": 2}, [1, 3]), ({"threshold": 0.24}, [1, 2, 3]), ({"threshold": 0.9}, [1])):
        made = GroupLasso(FIELDS, **options).eval()
        assert made.kept().fields == FIELDS.names, "nothing is known yet"
        made.square.copy_(torch.tensor([0.2, 2.0, 0.5, 1.5]) ** 2)
        assert made.kept().fields == tuple(FIELDS.names[f] for f in kept)
        assert torch.equal(made(e, ids(e)), e)
        made.anneal(1.0)
        out = made(e, ids(e))
        assert torch.equal(out[:, kept], e[:, kept])
        assert not out[:, [f for f in range(F) if f not in kept]].any()
    with pytest.raises(RecipeError, match="keep: 5 fields are asked for"):
        GroupLasso(FIELDS, keep=5)


def test_a_stage_that_pays_keeps_its_last_epoch():
    for strength, wanted in ((0.0, None), (0.1, False)):
        made = GroupLasso(FIELDS, strength=strength)
        assert made.reached() is None
        made(torch.randn(5, F, D), torch.zeros(5, F).long())
        assert made.reached() is wanted


def test_planted_noise_gets_shorter_by_the_price_and_not_without_it():
    assert mean_of("group_lasso") >= 0.85
    assert mean_of("group_lasso", seeds=(0,), strength=0.0) < 0.75
