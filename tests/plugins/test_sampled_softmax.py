"""Sampled softmax: the correction against planted probabilities, masks, and frequencies estimated on the way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.contracts import Batch, EncodedSchema, Field
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_sampled_softmax import Frequencies, SampledSoftmax

SCHEMA = EncodedSchema((Field("user", 9), Field("item", 30)), (), ("label",))
ITEMS = 20


def made(**options):
    return SampledSoftmax(("label",), SCHEMA, **options)


def batch(item, log_q, logged, label=None):
    negatives = len(item) // logged - 1
    label = torch.cat([torch.ones(logged), torch.zeros(logged * negatives)]) if label is None else label
    context = {"item": item, "log_q": log_q}
    return Batch(
        torch.zeros(len(item), 2).long(), label={"label": label.double()}, context=context, negatives=negatives
    )


def random_batch(logged, negatives, seed):
    random = torch.Generator().manual_seed(seed)
    rows = logged * (1 + negatives)
    item = torch.randint(2, 6, (rows,), generator=random)
    label = torch.randint(0, 4, (rows,), generator=random) == 0
    label[:logged] = torch.rand(logged, generator=random) < 0.8
    q = -6 * torch.rand(30, generator=random).double()
    x = torch.randn(rows, generator=random).double().mul(2).requires_grad_()
    return x, batch(item, q[item], logged, label)


@pytest.mark.parametrize(
    ("temperature", "correct", "correct_positive"), [(1.0, True, True), (0.3, True, False), (2.0, False, True)]
)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_loss_and_gradient_are_those_of_the_loops(temperature, correct, correct_positive, logged, negatives, seed):
    x, rows = random_batch(logged, negatives, seed)
    loss = made(temperature=temperature, correct=correct, correct_positive=correct_positive)({"label": x}, rows)
    loss.backward()
    z, y = x.tolist(), rows.label["label"].tolist()
    item, q = rows.context["item"].tolist(), rows.context["log_q"].tolist()
    total, gradient = 0.0, [0.0] * len(z)
    for i in range(logged):
        if not y[i]:
            continue
        own = [logged + i * negatives + k for k in range(negatives)]
        own = [j for j in own if item[j] != item[i] and not y[j]]
        score = {i: z[i] / temperature - (q[i] if correct and correct_positive else 0.0)}
        score |= {j: z[j] / temperature - (q[j] if correct else 0.0) for j in own}
        below = sum(math.exp(v) for v in score.values())
        total += math.log(below) - score[i]
        for j, v in score.items():
            gradient[j] += (math.exp(v) / below - (j == i)) / temperature
    assert float(loss.detach()) == pytest.approx(total / logged, rel=1e-9, abs=1e-12)
    assert x.grad.tolist() == pytest.approx([g / logged for g in gradient], rel=1e-8, abs=1e-12)


def test_equal_probabilities_and_a_common_factor_change_nothing():
    x, rows = random_batch(4, 3, 1)
    flat = batch(rows.context["item"], torch.full((16,), -2.0).double(), 4, rows.label["label"])
    plain = made(correct=False)({"label": x}, flat)
    assert float(made()({"label": x}, flat).detach()) == pytest.approx(float(plain.detach()), rel=1e-9)
    scaled = batch(rows.context["item"], rows.context["log_q"] - 1.5, 4, rows.label["label"])
    wanted = made()({"label": x}, rows)
    assert float(made()({"label": x}, scaled).detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)


def learned(correct):
    """Scores of twenty items after a thousand steps on positives ~ p and negatives ~ q, and ln p and ln q."""
    random = torch.Generator().manual_seed(4)
    p = (0.5 * torch.randn(ITEMS, generator=random).double()).softmax(0)
    q = (1.0 * torch.randn(ITEMS, generator=random).double()).softmax(0)
    score = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    log_q = torch.cat([torch.zeros(2).double(), q.log(), torch.zeros(8).double()])
    loss = made(correct=correct)
    optimizer = torch.optim.Adam([score], lr=0.05)
    n, m = 512, 8
    for step in range(700):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 700)
        item = torch.cat(
            [torch.multinomial(p, n, True, generator=random), torch.multinomial(q, n * m, True, generator=random)]
        )
        rows = batch(item + 2, log_q[item + 2], n)
        optimizer.zero_grad()
        loss({"label": score[item + 2]}, rows).backward()
        optimizer.step()
    return score.detach()[2 : 2 + ITEMS], p.log(), q.log()


def rmse(a, b):
    gap = a - b
    return float((gap - gap.mean()).square().mean().sqrt())


def test_scores_are_those_of_the_data_with_the_correction_and_of_the_sampler_without():
    with_it, log_p, log_q = learned(True)
    without, _, _ = learned(False)
    assert rmse(with_it, log_p) < 0.12
    assert rmse(without, log_p - log_q) < 0.15
    assert rmse(without, log_p) > 0.5


def test_a_list_without_alternatives_adds_nothing():
    x = torch.tensor([0.3, -1.0, 2.0, 0.5]).double().requires_grad_()
    rows = batch(torch.tensor([4, 5, 4, 6]), torch.full((4,), -1.0).double(), 2)
    loss = made()({"label": x}, rows)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(0.5 + 1.0)) / 2)
    assert x.grad[0] == 0
    assert x.grad[2] == 0


def test_frequencies_are_those_of_the_batches():
    random = torch.Generator().manual_seed(0)
    often = torch.tensor([0.5, 0.2, 0.05, 0.9]).double()
    counts = Frequencies(6, 0.03)
    for _ in range(3000):
        counts.see(2 + (torch.rand(4, generator=random) < often).nonzero().flatten())
    found = counts.log_q(torch.arange(2, 6)).exp()
    assert found.tolist() == pytest.approx(often.tolist(), rel=0.35)


def test_the_streaming_estimate_learns_in_training_alone_and_is_saved():
    x, rows = random_batch(4, 2, 3)
    loss = made(frequency="streaming")
    loss({"label": x}, rows)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    assert float(state["stream.step"]) == 1.0
    loss.eval()({"label": x}, rows)
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())
    for _ in range(200):
        loss.train()({"label": x}, rows)
    again = made(frequency="streaming")
    again.load_state_dict(loss.state_dict())
    assert float(again.eval()({"label": x}, rows).detach()) == float(loss.eval()({"label": x}, rows).detach())


@pytest.mark.parametrize("options", [{}, {"frequency": "streaming", "item": "f1"}, {"correct_positive": False}])
def test_contract(options):
    contract.without("bce_equality")("loss", SampledSoftmax, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature"), ({"frequency": "streaming", "item": "film"}, "no field 'film'")],
)
def test_options_are_checked(options, message):
    with pytest.raises(RecipeError, match=message):
        made(**options)
