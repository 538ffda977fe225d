"""LPFS: gates and slopes in closed form, ε, the proximal step and its zeros, planted noise."""

import math

import pytest
import torch
from gates import SHORT, data_of, found, mean_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import EncodedSchema, Field, Fields, RecipeError, Table
from recsys.nn.head import Head
from recsys.nn.interaction import MLP
from recsys.nn.model import Model
from recsys.testing import contract, samples
from recsys_lpfs import LPFS, shrunk

F, D = 5, 3
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)
IDS = torch.zeros(6, F, dtype=torch.int64)
FORMS = ("lpfs", "lpfs++")


def selector(x=None, steps=0, **options):
    made = LPFS(FIELDS, **options).double()
    with torch.no_grad():
        made.x.copy_(torch.tensor(x or [1.0, -0.7, 0.2, 0.0, -0.01]))
    made.steps.fill_(steps)
    return made


def vectors(seed=0):
    return torch.randn(6, F, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"form": "lpfs"}, {"keep": 2}, {"strength": 0.0, "epsilon": 1e-3}])
def test_contract(options):
    contract("selector", LPFS, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x", [[0.4, 0.0, -0.2], [0.0, 0.0, 1e-9], [0.0, 0.0, 0.0]])
def test_pruned_is_masked_where_x_is_zero(form, x):
    torch.manual_seed(0)
    schema = EncodedSchema((Field("a", 9), Field("b", 5), Field("c", 7)))
    table = Table(schema, dim=D, init_std=1.0)
    made, parts = LPFS(table.fields, form=form), [MLP(table.fields, hidden=(8,))]
    model = Model(schema, table, made, {}, parts, Head(schema, parts)).eval()
    with torch.no_grad():
        made.x.copy_(torch.tensor(x))
        made.anneal(1.0)
        batch = samples.batch(30, schema)
        kept = made.kept()
        assert kept.fields == tuple(name for name, value in zip("abc", x, strict=True) if value)
        small = model.prune(kept)
        assert torch.equal(small(batch)["label"], model(batch)["label"])
        gone = [f for f, value in enumerate(x) if not value]
        assert not small.represent(batch.ids)[:, gone].any()


@settings(max_examples=30)
@given(
    st.sampled_from(FORMS),
    st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=F, max_size=F),
    st.sampled_from([0, 99, 100, 30_000]),
)
def test_gates_and_slopes_are_the_closed_forms(form, x, steps):
    made, e, above = selector(x, steps, form=form), vectors().requires_grad_(), vectors(1)
    eps = 0.1 * 0.9978 ** (steps // 100)
    assert float(made.eps()) == pytest.approx(eps, rel=1e-5)
    out = made(e, IDS)
    slopes = torch.autograd.grad((out * above).sum(), [e, made.x])
    for f, v in enumerate(x):
        g, slope = v * v / (v * v + eps), 2 * v * eps / (v * v + eps) ** 2
        if form == "lpfs++":
            sign = (v > 0) - (v < 0)
            g = sign * g + 10 * math.sqrt(eps) * math.atan(v)
            slope = sign * slope + 10 * math.sqrt(eps) / (1 + v * v)
        assert (out[:, f] - g * e[:, f]).abs().max() <= 1e-5 * (1 + abs(g))
        assert (slopes[0][:, f] - g * above[:, f]).abs().max() <= 1e-5 * (1 + abs(g))
        total = slope * float((e[:, f] * above[:, f]).sum().detach())
        assert float(slopes[1][f]) == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_eps_falls_with_the_steps_taken_and_with_nothing_else():
    made, e = selector(epsilon=0.4, decay=0.5, every=2), vectors()
    seen = []
    for step in range(6):
        made.anneal(step / 6)
        made(e, IDS)
        made.eval()(e, IDS)
        made.train()
        made.x.grad = None
        made.after_step()  # no step
        seen.append(float(made.eps()))
        made.x.grad = torch.ones_like(made.x)
        made.after_step()
    assert seen == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1, 0.1])


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_x_moves_by_adam_and_then_towards_zero(seed, strength):
    torch.manual_seed(seed)
    made = selector(rate=0.05, strength=strength)
    slow = made.x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([slow], lr=0.05)
    for _ in range(12):
        made.x.grad = torch.randn(F, dtype=torch.float64)
        slow.grad = made.x.grad.clone()
        made.after_step()
        adam.step()
        with torch.no_grad():
            for f, v in enumerate(slow.tolist()):
                left = max(abs(v) - 0.05 * strength, 0.0)
                slow[f] = math.copysign(left, v) if left else 0.0
        assert (made.x - slow).abs().max() <= 1e-9
    assert int(made.steps) == 12


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_exact_zeros_come_from_the_proximal_step_alone(seed):
    counts = {}
    for strength in (0.0, 0.3):
        torch.manual_seed(seed)
        made = selector([0.5] * F, rate=0.02, strength=strength)
        zeros = 0
        for _ in range(200):
            made.x.grad = torch.randn(F, dtype=torch.float64) + 0.5 * made.x.detach()  # it crosses zero
            made.after_step()
            zeros += int((made.x == 0).sum())
        counts[strength] = zeros
    assert counts[0.0] == 0
    assert counts[0.3] > 0


def test_the_soft_threshold():
    x = torch.tensor([0.3, -0.3, 0.1, -0.1, 0.0, 0.100001])
    assert shrunk(x, 0.1).tolist() == pytest.approx([0.2, -0.2, 0.0, 0.0, 0.0, 1e-6], abs=1e-7)
    assert (shrunk(x, 0.1)[2:5] == 0).all()


def test_a_field_at_zero_can_come_back_in_one_form_only():
    for form, comes in zip(FORMS, (False, True), strict=True):
        made = selector([0.0] * F, form=form)
        out = made(vectors(), IDS)
        assert not out.any()
        (out * vectors(1)).sum().backward()
        assert bool(made.x.grad.any()) is comes


def test_without_any_gradient_of_the_loss_x_gets_to_zero_in_the_steps_that_are_told():
    made = selector([1.0] * F, rate=0.01, strength=0.5)
    steps = 0
    while made.x.any():
        made.x.grad = torch.zeros_like(made.x)
        made.after_step()
        steps += 1
    assert steps in (200, 201)


def test_kept_is_what_is_not_zero_or_the_best_by_size():
    made, e = selector().eval(), vectors()
    assert made.kept().fields == ("f0", "f1", "f2", "f4")
    torch.testing.assert_close(made(e, IDS), e * made.gates().view(-1, 1))
    made.anneal(1.0)
    assert torch.equal(made(e, IDS)[:, [0, 1, 2, 4]], e[:, [0, 1, 2, 4]])
    assert not made(e, IDS)[:, 3].any()
    assert [float(s) for s in made.scores().values()] == pytest.approx([1.0, 0.7, 0.2, 0.0, 0.01])
    two = selector(keep=2).eval()
    assert two.kept().fields == ("f0", "f1")
    assert selector([0.0] * F).kept().fields == ()
    assert LPFS(FIELDS, keep=2).kept().fields == FIELDS.names, "all are equal at first"
    with pytest.raises(RecipeError, match="keep: 6 fields are asked for"):
        LPFS(FIELDS, keep=6)


def test_a_stage_that_moves_x_keeps_its_last_epoch():
    made = selector()
    assert made.reached() is None
    made.x.grad = torch.ones_like(made.x)
    made.after_step()
    assert made.reached() is False


def test_planted_noise_comes_nearer_to_zero():
    assert mean_of("lpfs") >= 0.85


def test_planted_noise_comes_to_zero_and_no_signal_does():
    data = data_of(0)
    score, made = found("lpfs", data, 0, form="lpfs")
    x = made.x.detach()
    assert score >= 0.9
    assert x[data.where(informative=True)].all()
    noise = x[data.where(informative=False)]
    assert int((noise == 0).sum()) >= 4
    assert SHORT["lpfs"][0]["rate"] * 600 * made.strength > 1
