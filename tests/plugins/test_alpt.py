"""ALPT: the gradient of the steps against LSQ's, in loops and by a second pass; their Adam; what stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import EncodedSchema, Field
from recsys.testing import samples
from recsys_lpt import ALPT, HIGHEST, LEAST, LOWEST, on_grid, step_gradient

SCHEMA = EncodedSchema((Field("a", 30), Field("b", 20), Field("x", 2, numeric=True)))
N, DIM = 52, 4


def make(seed=0, **options):
    torch.manual_seed(seed)
    made = ALPT(SCHEMA, **{"dim": DIM, "init_std": 0.5, "step": 0.02, "rate": 1e-3, **options}).double()
    with torch.no_grad():
        made.weight.copy_(on_grid(made.weight, made.step))  # the grid of float64
    return made


def quantised(w, step):
    """Δ · clip(round(w/Δ), −128, 127), whose rounding passes gradients on as they are: autograd then gives LSQ's."""
    y = (w / step).clamp(LOWEST, HIGHEST)
    return step * (y + (y.round() - y).detach())


def nearest_even(y):
    low = y // 1
    gap = y - low
    return low + (gap > 0.5 or (gap == 0.5 and low % 2 == 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.01, 0.2]))
def test_the_gradient_of_the_steps_is_lsqs(seed, size):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(8, DIM, generator=g, dtype=torch.float64)
    step = size * (0.5 + torch.rand(8, 1, generator=g, dtype=torch.float64))
    slope = torch.randn(8, DIM, generator=g, dtype=torch.float64)
    w[0, 0], w[0, 1] = 200 * step[0, 0], -200 * step[0, 0]
    got = step_gradient(w, step, slope)
    clipped = 0
    for i in range(8):
        want = 0.0
        for k in range(DIM):
            y = float(w[i, k] / step[i, 0])
            if y <= LOWEST or y >= HIGHEST:
                want += float(slope[i, k]) * (LOWEST if y <= LOWEST else HIGHEST)
                clipped += 1
            else:
                want += float(slope[i, k]) * (nearest_even(y) - y)
        assert abs(float(got[i]) - want) <= 1e-9
    assert clipped >= 2
    step.requires_grad_()
    (by_autograd,) = torch.autograd.grad((quantised(w, step) * slope).sum(), step)
    assert (got - by_autograd).abs().max() <= 1e-9


@pytest.mark.parametrize("lr", [0.004, 0.0099])
def test_one_pass_gives_the_gradient_of_the_papers_second_pass(lr, monkeypatch):
    """Where no number moves by half a step or more, the nearest point of the grid is where the first pass was."""
    seen = {}

    def note(w, step, slope):
        seen["gradient"] = step_gradient(w, step, slope)
        seen["rows"] = w.clone()
        return seen["gradient"]

    monkeypatch.setattr("recsys_lpt.step_gradient", note)
    table = make().train()
    batch = samples.batch(32, SCHEMA, seed=1)

    def loss(e):  # products of fields, so that the gradient depends on the numbers
        return ((e[:, 0] * e[:, 1] * e[:, 2]).sum(1) - 0.7).square().mean() + e.sin().mean()

    step = table.step.clone().requires_grad_()
    optimizer = torch.optim.Adam([table.weight], lr)
    loss(table(batch.ids, batch.values.double())).backward()
    optimizer.step()
    after = table.weight.detach().clone()
    table.after_step()

    ids = batch.ids + torch.tensor([0, 30, 50])
    e = quantised(after, step)[ids]
    e = torch.cat(
        [e[:, :2], e[:, 2:] * torch.where(batch.ids[:, 2:] == 1, batch.values[:, 2:].double(), 1)[..., None]], 1
    )
    (second,) = torch.autograd.grad(loss(e), step)
    rows = [int((after == row).all(1).nonzero()[0]) for row in seen["rows"]]
    assert set(ids.flatten().tolist()) <= set(rows)
    assert (seen["gradient"] - second[rows]).abs().max() <= 1e-9
    assert seen["gradient"].abs().max() > 1e-4


def test_steps_move_as_adam_moves_them_and_only_those_of_rows_that_moved():
    table = make().train()
    optimizer = torch.optim.SGD([table.weight], 0.5)
    step, mean, square = table.step.detach().clone(), torch.zeros(N, 1).double(), torch.zeros(N, 1).double()
    start = step.clone()
    seen = torch.zeros(N, dtype=torch.bool)
    for t in range(1, 9):
        optimizer.zero_grad()
        batch = samples.batch(6, SCHEMA, seed=t)
        (table(batch.ids, batch.values.double()).sin().sum()).backward()
        before = table.weight.detach().clone()
        optimizer.step()
        away = (table.weight != before).any(1)
        slope = step_gradient(table.weight.detach(), step, table.weight.grad)
        table.after_step()
        mean[away] = 0.9 * mean[away] + 0.1 * slope[away]
        square[away] = 0.999 * square[away] + 0.001 * slope[away] ** 2
        change = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-12)
        step[away] = (step[away] - 1e-3 * change[away]).clamp(min=LEAST)
        assert (table.step - step).abs().max() <= 1e-12
        seen |= away
    assert torch.equal((table.step != start).squeeze(1), seen)
    assert 0 < int(seen.sum()) < N
    assert float(table.step.min()) > 0


def test_saturated_rows_get_larger_steps():
    table = make(init_std=0.0, step=0.01, rate=1e-3).train()
    optimizer = torch.optim.Adam([table.weight], 0.05)
    ids = torch.tensor([[5, 3, 1]])
    for _ in range(400):
        optimizer.zero_grad()
        (table(ids, torch.ones(1, 3).double()) - 4.0).square().sum().backward()
        optimizer.step()
        table.after_step()
    assert (table.step[[5, 33, 51]] * HIGHEST > 3.9).all(), "128 steps of .01 reach 1.28"
    assert ((table(ids, torch.ones(1, 3).double()) - 4.0).abs() < 0.2).all()
    assert torch.equal(table.step[:5], torch.full((5, 1), 0.01).double())


def test_a_step_that_moves_nothing_changes_nothing():
    """As one that training skips: gradients that are not finite stay behind."""
    table = make().train()
    before = {name: t.clone() for name, t in table.state_dict().items() if name != "_extra_state"}
    table.weight.grad = torch.full_like(table.weight, torch.nan)
    table.after_step()
    assert all(torch.equal(t, table.state_dict()[name]) for name, t in before.items())


def test_gradients_reach_the_numbers_and_no_optimizer_the_steps():
    table = make()
    assert [name for name, p in table.named_parameters() if p.requires_grad] == ["weight"]
    assert set(table.export_tables()) == {"weight", "step"}
