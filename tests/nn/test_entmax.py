"""Entmax against slow bisection, against its limits, and its gradient against differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_entmax

from recsys.errors import RecipeError
from recsys.nn import entmax as module
from recsys.nn.entmax import entmax

ALPHAS = (1.0, 1.05, 1.2, 1.5, 1.7, 2.0, 2.3, 3.0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALPHAS),
    st.lists(st.floats(-40, 40), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_entmax_is_that_of_slow_bisection(alpha, scores, dtype):
    x = torch.tensor(scores, dtype=dtype)
    p = entmax(x, alpha)
    assert p.dtype == dtype
    assert (p >= 0).all()
    assert torch.isclose(p.sum(), torch.ones((), dtype=dtype))
    # For α > 2 a share rises from zero with infinite slope: the digits of τ are lost there, as α − 1 says.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    tolerance = tolerance if alpha <= 2 else tolerance ** (1 / (alpha - 1)) * 2
    assert (p.double() - slow_entmax(x.double(), alpha)).abs().max() <= tolerance


@pytest.mark.parametrize("alpha", [a for a in ALPHAS if a > 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_to_the_threshold_agree_on_awkward_scores(alpha, dtype):
    torch.manual_seed(0)
    awkward = [
        torch.zeros(200),
        1.0 - 0.5 ** torch.arange(40.0),  # each step of sparsemax drops few entries
        -torch.arange(60.0).square() / 900,
        torch.linspace(-1e4, 1e4, 30),
        torch.tensor([3.0]),
        torch.cat([torch.zeros(7), torch.full((7,), -1e30)]),
        torch.randn(300) * 1e-6,
        torch.randn(300) * 30,
        torch.tensor([2.0, 1.0, 1.0, 1.0]),  # ties where the support of sparsemax ends
    ]
    solvers = [module._bisected]
    solvers += [module._newton] if alpha <= 2 else []
    solvers += [module._sorted] if alpha in (1.5, 2.0) else []
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11}[dtype]
    tolerance = tolerance if alpha <= 2 else tolerance ** (1 / (alpha - 1)) * 2
    for scores in awkward:
        x = scores.to(dtype).view(1, -1, 1)
        shares = [module._power(x, alpha, solve) for solve in solvers]
        for p in shares:
            assert torch.isfinite(p).all()
            assert (p >= 0).all()
            assert abs(float(p.sum()) - 1) < 1e-5
            assert (p - shares[0]).abs().max() <= tolerance
            in_order = p.flatten()[x.flatten().argsort()]  # equal scores may differ in the last digit
            assert (in_order.diff() >= -1e-6).all()


@pytest.mark.parametrize("alpha", [a for a in ALPHAS if 1 < a <= 2])
def test_newton_needs_few_steps(alpha, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "NEWTON_STEPS", 12)
    x = torch.randn(50, 40, 30, dtype=torch.float64) * torch.logspace(-3, 2, 50, dtype=torch.float64).view(-1, 1, 1)
    few = module._power(x, alpha, module._newton)
    assert (few - module._power(x, alpha, module._bisected)).abs().max() < 1e-12


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    torch.manual_seed(0)
    s = 2 * torch.randn(500, 7, dtype=torch.float64)
    p = entmax(s, 2.0)
    # p is nearest if and only if no corner of the simplex lies on the side of s.
    towards = ((s - p).unsqueeze(1) * (torch.eye(7, dtype=torch.float64) - p.unsqueeze(1))).sum(2)
    assert towards.max() < 1e-12
    assert 0.1 < (p == 0).double().mean() < 0.9


def test_alpha_one_is_softmax_and_its_limit():
    torch.manual_seed(0)
    s = torch.randn(100, 6, dtype=torch.float64)
    assert torch.equal(entmax(s, 1.0), torch.softmax(s, -1))
    assert (entmax(s, 1.0001) - torch.softmax(s, -1)).abs().max() < 1e-4


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0, 2.5])
def test_shifts_change_nothing_and_peaked_scores_give_zeros(alpha):
    torch.manual_seed(0)
    s = 3 * torch.randn(100, 6, dtype=torch.float64)
    assert torch.allclose(entmax(s, alpha), entmax(s + 17.25, alpha), atol=1e-9)
    assert (entmax(s, alpha) == 0).double().mean() > 0.3


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradient_of_entmax_by_differences(alpha, dim):
    torch.manual_seed(1)
    s = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha, dim), (s,), atol=1e-6)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 2.5])
def test_the_gradient_keeps_the_result_alone(alpha):
    s = torch.randn(8, 5, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p = entmax(s, alpha, 1)
    assert [t.shape for t in kept] == [s.shape]
    assert torch.equal(kept[0], p)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.5])
def test_blocks_change_nothing(alpha, block, monkeypatch):
    torch.manual_seed(0)
    s, above = torch.randn(9, 6, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 6, 4, dtype=torch.float64)
    whole = entmax(s, alpha, 1)
    (gradient,) = torch.autograd.grad(whole, s, above)
    monkeypatch.setattr(module, "BLOCK", block)
    parts = entmax(s, alpha, 1)
    assert torch.allclose(parts, whole, atol=1e-13)
    assert torch.allclose(torch.autograd.grad(parts, s, above)[0], gradient, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0, 2.5])
def test_compiled_code_takes_another_way_to_the_same_result(alpha, monkeypatch):
    torch.manual_seed(0)
    s = torch.randn(9, 6, 4, dtype=torch.float64)
    here = entmax(s, alpha, 1)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    monkeypatch.setattr(module, "_newton", None)
    assert torch.allclose(entmax(s, alpha, 1), here, atol=1e-7 if alpha > 2 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_solved_in_float32(dtype):
    torch.manual_seed(0)
    s = (torch.randn(50, 7) * 30).to(dtype).requires_grad_()
    for alpha in ALPHAS:
        p = entmax(s, alpha)
        assert p.dtype == torch.float32
        assert torch.equal(p, entmax(s.float(), alpha))
        (gradient,) = torch.autograd.grad(p[:, 0].sum(), s)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("alpha", [0.99, 3.01, -1.0, float("nan")])
def test_alpha_out_of_range_is_one_clear_error(alpha):
    with pytest.raises(RecipeError, match=r"alpha is .*, must be from 1 \(softmax\) to 3"):
        entmax(torch.zeros(3), alpha)
