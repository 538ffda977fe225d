"""AdaFS: weights of every row against loops, hard and soft, the warm-up, what is kept, planted noise."""

import math

import pytest
import torch
from gates import mean_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import DataError, EncodedSchema, Field, Fields, RecipeError, Table
from recsys.nn.head import Head
from recsys.nn.interaction import FM
from recsys.nn.model import Model
from recsys.testing import contract
from recsys_adafs import AdaFS

F, D = 4, 2
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)


def selector(seed=0, progress=0.5, **options):
    torch.manual_seed(seed)
    made = AdaFS(FIELDS, **{"dropout": 0.0, "hidden": (3,)} | options).double()
    torch.nn.init.normal_(made.last.weight)
    torch.nn.init.normal_(made.last.bias)
    made.anneal(progress)
    return made


def vectors(rows, seed=0):
    return torch.randn(rows, F, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(e):
    return torch.zeros(e.shape[:2], dtype=torch.int64)


def slow_weights(made, e, mean, var):
    """Loops over rows, hidden units and fields."""
    hidden, last = made.layers.layers[0], made.last
    found = []
    for row in e.flatten(1).tolist():
        x = [(v - m) / math.sqrt(s + made.norm.eps) for v, m, s in zip(row, mean, var, strict=True)]
        h = [
            max(0.0, sum(w * v for w, v in zip(ws, x, strict=True)) + b)
            for ws, b in zip(hidden.weight.tolist(), hidden.bias.tolist(), strict=True)
        ]
        z = [
            sum(w * v for w, v in zip(ws, h, strict=True)) + b
            for ws, b in zip(last.weight.tolist(), last.bias.tolist(), strict=True)
        ]
        powers = [math.exp(v - max(z)) for v in z]
        found.append([p / sum(powers) for p in powers])
    return found


def hard(row, most):
    best = sorted(row, reverse=True)[:most]
    return [w / sum(best) if w in best else 0.0 for w in row]


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"learn": "joint", "hidden": ()}, {"keep": 2, "warmup": 0.0}])
def test_contract(options):
    contract("selector", AdaFS, **options)


def test_contract_after_a_search():
    def build(fields: Fields, *, keep: float = 0.5) -> AdaFS:
        """With weights that differ."""
        made = AdaFS(fields, keep=keep)
        made.importance.copy_(torch.arange(len(fields)) / 10)
        return made

    contract("selector", build)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(2, 7), st.sampled_from([None, 1, 3]), st.booleans())
def test_weights_are_those_of_the_loop(seed, rows, most, training):
    made = selector(seed, keep=most or 0.5, hard=most is not None).train(training)
    earlier, e = vectors(9, seed + 1), vectors(rows, seed)
    made.norm(earlier.flatten(1))
    flat = e.flatten(1)
    mean, var = flat.mean(0), flat.var(0, correction=0)
    if not training:
        mean, var = made.norm.running_mean, made.norm.running_var
    found = slow_weights(made, e, mean.tolist(), var.tolist())
    wanted = [hard(row, most) for row in found] if most else found
    wanted = torch.tensor(wanted, dtype=torch.float64)
    out = made(e, ids(e))
    assert (out - e * wanted.unsqueeze(2)).abs().max() <= 1e-9
    assert (wanted.sum(1) - 1).abs().max() <= 1e-9
    if training:
        torch.testing.assert_close(made.importance, torch.tensor(found).double().mean(0), rtol=1e-6, atol=1e-9)


def test_the_score_is_a_moving_average_over_batches():
    made, wanted = selector(), None
    for step in range(4):
        e = vectors(6, step)
        made.eval().train()
        now = made.weights(e).mean(0).detach()
        made(e, ids(e))
        wanted = now if wanted is None else 0.98 * wanted + 0.02 * now
    torch.testing.assert_close(made.importance, wanted, rtol=1e-6, atol=0)
    before = made.importance.clone()
    made.eval()(vectors(6, 9), ids(e))
    assert torch.equal(made.importance, before)
    assert float(made.scores()["f2"]) == float(made.importance[2])


@pytest.mark.parametrize("hard", [False, True])
def test_in_the_warm_up_all_fields_weigh_alike_and_the_controller_learns_nothing(hard):
    made, e = selector(warmup=0.3, progress=0.29, hard=hard), vectors(6)
    out = made(e, ids(e))
    torch.testing.assert_close(out, e / F, rtol=1e-12, atol=0)
    (out * vectors(6, 1)).sum().backward()
    assert all(not p.grad.any() for p in made.architecture())
    assert made.kept().fields == FIELDS.names, "none is better than another"
    made.anneal(0.3)
    (made(e, ids(e)) * vectors(6, 1)).sum().backward()
    assert all(p.grad.any() for p in made.architecture())


def test_at_first_the_controller_says_nothing():
    made, e = AdaFS(FIELDS, warmup=0.0), torch.randn(6, F, D)
    torch.testing.assert_close(made(e, ids(e)), e / F)
    assert made.kept().fields == FIELDS.names


def test_evaluation_weighs_rows_in_the_search_and_keeps_the_best_fields_after_it():
    made, e = selector(keep=2), vectors(6)
    made(e, ids(e))
    made.importance.copy_(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    made.eval()
    torch.testing.assert_close(made(e, ids(e)), e * made.weights(e).unsqueeze(2))
    assert made.kept().fields == ("f1", "f3")
    made.anneal(1.0)
    assert torch.equal(made(e, ids(e))[:, [1, 3]], e[:, [1, 3]])
    assert not made(e, ids(e))[:, [0, 2]].any()


def test_a_single_row_cannot_be_normalised():
    made, e = selector(), vectors(1)
    with pytest.raises(DataError, match="the vectors of one row cannot be normalised"):
        made(e, ids(e))
    assert made.eval()(e, ids(e)).isfinite().all()


@pytest.mark.parametrize("learn", ["bilevel", "joint"])
def test_the_controller_waits_for_a_search_or_learns_with_the_rest(learn):
    schema = EncodedSchema((Field("a", 9), Field("b", 9)))
    table = Table(schema, dim=D)
    made, parts = AdaFS(table.fields, learn=learn), [FM(table.fields)]
    model = Model(schema, table, made, {}, parts, Head(schema, parts))
    own = {id(p) for p in (*made.layers.parameters(), *made.last.parameters())}
    assert own & {id(p) for p in model.parameter_groups()[1]} == (own if learn == "joint" else set())
    assert model.searched() == ([] if learn == "joint" else [made])
    for p in made.parameters():
        p.grad = torch.ones_like(p)
    before = made.last.bias.detach().clone()
    made.search_step(0.1)
    assert made.reached() is (None if learn == "joint" else False)
    torch.testing.assert_close(made.last.bias.detach(), before if learn == "joint" else before - 0.1)


def test_more_fields_than_there_are():
    with pytest.raises(RecipeError, match="keep: 5 fields are asked for"):
        AdaFS(FIELDS, keep=5)


def test_planted_noise_weighs_less():
    assert mean_of("adafs") >= 0.85
