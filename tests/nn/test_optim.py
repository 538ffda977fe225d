"""Weight decay on tables against Adam written by hand with the penalty in the loss."""

import pytest
import torch

from recsys.contracts import Batch, EncodedSchema, Field
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.model import Model
from recsys.nn.optim import build_optimizer
from recsys.nn.selection import KeepAll
from recsys.nn.table import Table
from recsys.train.losses import BCE

SCHEMA = EncodedSchema((Field("a", 6), Field("b", 5)))
IDS = torch.tensor([[2, 3], [4, 1], [2, 2], [0, 1]])  # rows 3, 5 of a and 0, 4 of b are never read
BATCH = Batch(IDS, label={"label": torch.tensor([1.0, 0.0, 0.0, 1.0])})


def make():
    torch.manual_seed(0)
    table = Table(SCHEMA, dim=3, init_std=0.5)
    parts = [FM(table.fields), MLP(table.fields, hidden=(4,))]
    model = Model(SCHEMA, table, KeepAll(table.fields), {}, parts, Head(SCHEMA, parts, wide=True)).double()
    torch.nn.init.normal_(model.head.wide.weight)
    return model


class HandAdam:
    """Adam as the paper writes it."""

    def __init__(self, parameters, lr):
        self.parameters = list(parameters)
        self.lr, self.t = lr, 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, grads):
        self.t += 1
        for p, g, m, v in zip(self.parameters, grads, self.m, self.v, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


def test_embedding_l2_is_the_penalty_on_the_whole_table_in_every_step():
    model, by_hand = make(), make()
    loss = BCE(("label",))
    optimizer = build_optimizer(model.parameter_groups(), lr=0.01, embedding_l2=0.3, network_l2=0.02)
    adam = HandAdam(by_hand.parameters(), lr=0.01)
    tables = [by_hand.embedding.weight, by_hand.head.wide.weight]
    others = [p for p in by_hand.parameters() if all(p is not t for t in tables)]
    for _ in range(20):
        optimizer.zero_grad()
        loss(model(BATCH), BATCH).backward()
        optimizer.step()
        penalty = 0.3 / 2 * sum(t.square().sum() for t in tables) + 0.02 / 2 * sum(p.square().sum() for p in others)
        adam.step(torch.autograd.grad(loss(by_hand(BATCH), BATCH).double() + penalty, adam.parameters))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()
    start = make()
    for row in (3, 5, 6 + 0, 6 + 4):  # rows that no batch touches shrink too
        assert (model.embedding.weight[row].abs() < start.embedding.weight[row].abs()).all()
        assert model.head.wide.weight[row].abs() < start.head.wide.weight[row].abs()


def test_groups_divide_all_parameters():
    model = make()
    tables, others = model.parameter_groups()
    assert {id(p) for p in tables} == {id(model.embedding.weight), id(model.head.wide.weight)}
    assert {id(p) for p in tables} | {id(p) for p in others} == {id(p) for p in model.parameters()}
    assert len(tables) + len(others) == len(list(model.parameters()))


def test_adamw_decays_apart_from_the_gradient():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(([p], []), name="adamw", lr=0.1, embedding_l2=0.5)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_every_optimizer_takes_the_one_kernel_step_and_descends(name):
    model = make()
    loss = BCE(("label",))
    optimizer = build_optimizer(model.parameter_groups(), name=name, lr=0.05)
    assert optimizer.defaults["fused"]
    before = loss(model(BATCH), BATCH).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss(model(BATCH), BATCH).backward()
        optimizer.step()
    assert loss(model(BATCH), BATCH).item() < before
