"""AutoField: draws against loops and against the chances that they stand for, the temperature, planted noise."""

import math

import pytest
import torch
from gates import mean_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import Fields, RecipeError
from recsys.testing import contract
from recsys_autofield import AutoField

F, D = 5, 3
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)
IDS = torch.zeros(7, F, dtype=torch.int64)


def selector(seed=0, batches=0, **options):
    torch.manual_seed(seed)
    made = AutoField(FIELDS, **options).double()
    with torch.no_grad():
        made.logits.add_(torch.randn(F, 2))
    made.batches.fill_(batches)
    return made


def vectors(seed=0):
    return torch.randn(7, F, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(pair):
    top = max(pair)
    powers = [math.exp(x - top) for x in pair]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("options", [{}, {"gumbel": False}, {"keep": 1}, {"keep": 1.0, "cooling": 0.0}])
def test_contract(options):
    contract("selector", AutoField, **options)


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from([0, 5000, 50_000]), st.booleans())
def test_gates_and_gradients_are_those_of_the_loop(seed, batches, gumbel):
    made = selector(seed, batches, gumbel=gumbel)
    e, above = vectors(seed).requires_grad_(), vectors(seed + 1)
    torch.manual_seed(seed)
    noise = (-torch.empty(F, 2, dtype=torch.float64).exponential_().log()).tolist() if gumbel else [[0.0, 0.0]] * F
    torch.manual_seed(seed)
    out = made(e, IDS)
    found = torch.autograd.grad((out * above).sum(), [e, made.logits])
    tau = max(0.01, 1 - 5e-5 * batches)
    for f in range(F):
        a = made.logits[f].tolist()
        logs = [math.log(p) for p in softmax(a)] if gumbel else a
        keep, drop = softmax([(x + g) / tau for x, g in zip(logs, noise[f], strict=True)])
        assert keep + drop == pytest.approx(1)
        assert (out[:, f] - keep * e[:, f]).abs().max() <= 1e-7  # the temperature is a float32
        assert (found[0][:, f] - keep * above[:, f]).abs().max() <= 1e-7
        slope = float((above[:, f] * e[:, f]).sum().detach()) * keep * drop / tau
        assert found[1][f].tolist() == pytest.approx([slope, -slope], rel=1e-5, abs=1e-7)


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from([0, 7000, 10**6]), st.booleans())
def test_the_two_gates_of_a_field_have_sum_one(seed, batches, gumbel):
    made = selector(seed, batches, gumbel=gumbel)
    assert (made.drawn().sum(1) - 1).abs().max() <= 1e-12


def test_when_it_is_cold_draws_are_all_or_nothing_with_the_chances_of_the_softmax():
    made = selector(3, temperature=1e-6, coldest=1e-6, cooling=0.0)
    torch.manual_seed(0)
    draws = torch.stack([made.drawn().detach() for _ in range(4000)])
    # Two logits within τ of each other are the one draw in between.
    assert ((draws == 0) | (draws == 1)).double().mean() > 0.999
    chance = made.logits.detach().softmax(1)
    spread = (chance * (1 - chance) / 4000).sqrt()
    assert ((draws.mean(0) - chance).abs() < 4 * spread).all()


def test_when_it_is_cold_the_deterministic_gate_is_that_of_the_larger_logit():
    made = selector(3, gumbel=False, temperature=1e-4, coldest=1e-4)
    larger = made.logits.argmax(1)
    assert torch.equal(made.drawn(), torch.nn.functional.one_hot(larger, 2).double())
    state = torch.get_rng_state()
    made(vectors(), IDS)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


def test_it_cools_with_every_training_batch_and_no_other():
    made = AutoField(FIELDS, temperature=0.5, cooling=0.1, coldest=0.15)
    e = torch.randn(7, F, D)
    seen = []
    for _ in range(6):
        seen.append(float(made.heat()))
        made.eval()(e, IDS)
        made.train()(e, IDS)
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.15, 0.15])


def test_half_a_chance_at_first_and_all_fields_kept_until_some_are_better():
    made = AutoField(FIELDS, keep=2).eval()
    assert all(float(s) == 0.5 for s in made.scores().values())
    assert made.kept().fields == FIELDS.names
    e = torch.randn(7, F, D)
    assert torch.equal(made(e, IDS), e * 0.5)
    with torch.no_grad():
        made.logits[:, 0] = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2])
    chance = made.logits.detach().softmax(1)[:, 0]
    torch.testing.assert_close(made(e, IDS), e * chance.view(-1, 1))
    assert made.kept().fields == ("f1", "f3")
    assert made.scores()["f3"] == chance[3]
    made.anneal(1.0)
    assert torch.equal(made(e, IDS)[:, [1, 3]], e[:, [1, 3]])
    assert not made(e, IDS)[:, [0, 2, 4]].any()


def test_without_draws_evaluation_sees_the_very_gates_of_training():
    made = selector(1, 10_000, gumbel=False)
    x = vectors()
    assert torch.equal(made.eval()(x, IDS), made.train()(x, IDS))


def test_a_stage_that_moves_the_logits_keeps_its_last_epoch():
    made = AutoField(FIELDS)
    made.search_step(0.1)
    assert made.reached() is None
    made.logits.grad = torch.ones_like(made.logits)
    made.search_step(0.1)
    assert made.reached() is False
    assert made.logits.tolist()[0] == pytest.approx([0.4, 0.4])


def test_more_fields_than_there_are():
    with pytest.raises(RecipeError, match="keep: 6 fields are asked for"):
        AutoField(FIELDS, keep=6)


def test_planted_noise_has_smaller_chances():
    assert mean_of("autofield") >= 0.95
