"""MvFS: views, their mixture and the gates against loops; how sharp they are; planted noise."""

import math

import pytest
import torch
from gates import mean_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import Fields, RecipeError
from recsys.testing import contract
from recsys_mvfs import MvFS

F, D, K = 4, 2, 3
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)


def selector(seed=0, progress=0.5, **options):
    torch.manual_seed(seed)
    made = MvFS(FIELDS, **{"views": K} | options).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    made.anneal(progress)
    return made


def vectors(rows, seed=0):
    return torch.randn(rows, F, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(e):
    return torch.zeros(e.shape[:2], dtype=torch.int64)


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def affine(weight, bias, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def slow_shares(made, e):
    """I of every row, view by view."""
    weight, bias = made.views.weight.tolist(), made.views.bias.tolist()
    found = []
    for x in e.flatten(1).tolist():
        each = [softmax(affine(weight[k * F : k * F + F], bias[k * F : k * F + F], x)) for k in range(K)]
        trust = softmax(
            affine(made.trust.weight.tolist(), made.trust.bias.tolist(), [v for view in each for v in view])
        )
        found.append([sum(t * view[f] for t, view in zip(trust, each, strict=True)) for f in range(F)])
    return found


@pytest.mark.parametrize("options", [{}, {"views": 2, "level": 0.5, "warmup": 0.0}, {"sharpness": 50.0, "keep": 1}])
def test_contract(options):
    contract("selector", MvFS, **options)


def test_contract_after_a_search():
    def build(fields: Fields, *, keep: float = 0.5) -> MvFS:
        """With gates that differ."""
        made = MvFS(fields, keep=keep)
        made.importance.copy_(torch.arange(len(fields)) / 10)
        return made

    contract("selector", build)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([0, 3000, 9000]))
def test_gates_are_those_of_the_loop(seed, rows, batches):
    made, e = selector(seed, level=0.3), vectors(rows, seed)
    made.batches.fill_(batches)
    kappa = max(5.0, 1 + 1e-3 * batches)
    shares = slow_shares(made, e)
    assert all(sum(row) == pytest.approx(1) for row in shares)
    wanted = [[0.5 * (1 + math.tanh(kappa * (share - 0.3))) for share in row] for row in shares]
    out = made(e, ids(e))
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert (out - e * wanted.unsqueeze(2)).abs().max() <= 1e-6
    fresh = wanted.mean(0) if batches == 0 else 0.98 / F + 0.02 * wanted.mean(0)
    torch.testing.assert_close(made.importance, fresh, rtol=1e-6, atol=1e-7)
    assert int(made.batches) == batches + 1


def test_gates_get_sharper_from_five_on_and_not_in_evaluation_or_warm_up():
    made, e = selector(pace=1.5, warmup=0.5, progress=0.4), vectors(5)
    found = []
    for step in range(6):
        made.anneal(0.4 if step < 2 else 0.6)
        made.eval()(e, ids(e))
        made.train()(e, ids(e))
        found.append(float((1 + made.pace * made.batches).clamp(min=made.sharpness)))
    assert found == [5.0, 5.0, 5.0, 5.0, 5.5, 7.0]


def test_equal_views_are_trusted_whatever_the_gate_on_them_says():
    made, e = selector(), vectors(5)
    with torch.no_grad():
        made.views.weight.copy_(made.views.weight[:F].repeat(K, 1))
        made.views.bias.copy_(made.views.bias[:F].repeat(K))
    view = made.views(e.flatten(1))[:, :F].softmax(1)
    torch.testing.assert_close(made.gates(e), (1 + (5 * (view - 0.2)).tanh()) / 2)


def test_in_the_warm_up_all_fields_weigh_alike_and_no_view_learns():
    made, e = selector(warmup=0.3, progress=0.2), vectors(5)
    out = made(e, ids(e))
    torch.testing.assert_close(out, e * 0.5 * (1 + math.tanh(5 * (1 / F - 0.2))))
    (out * vectors(5, 1)).sum().backward()
    assert all(not p.grad.any() for p in made.parameters())
    assert made.kept().fields == FIELDS.names
    assert int(made.batches) == 0


def test_views_begin_apart_and_the_gate_on_them_is_initialised():
    torch.manual_seed(0)
    many = Fields(tuple(f"f{i}" for i in range(30)), (9,) * 30, 16)
    made = MvFS(many)
    assert float(made.views.weight.detach().std()) == pytest.approx((2 / (30 * 16 + 30)) ** 0.5, rel=0.02)
    assert float(made.trust.weight.detach().std()) == pytest.approx((2 / (6 * 30 + 6)) ** 0.5, rel=0.1)
    assert not made.views.bias.any()
    assert not made.trust.bias.any()
    blocks = made.views.weight.view(6, 30, -1)
    assert all(not torch.equal(blocks[0], block) for block in blocks[1:])


def test_evaluation_sees_gates_of_rows_in_the_search_and_the_best_fields_after_it():
    made, e = selector(keep=2), vectors(6)
    made.importance.copy_(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    made.eval()
    torch.testing.assert_close(made(e, ids(e)), e * made.gates(e).unsqueeze(2))
    assert made.kept().fields == ("f1", "f3")
    made.anneal(1.0)
    assert torch.equal(made(e, ids(e))[:, [1, 3]], e[:, [1, 3]])
    assert not made(e, ids(e))[:, [0, 2]].any()


def test_more_fields_than_there_are():
    with pytest.raises(RecipeError, match="keep: 5 fields are asked for"):
        MvFS(FIELDS, keep=5)


def test_planted_noise_has_smaller_gates_when_they_are_sharp_about_the_mean_share():
    assert mean_of("mvfs") >= 0.9
