"""Gradients of every row's own loss, against one backward pass for each row alone."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from recsys.api import EncodedSchema, Model, Table, field_gradients
from recsys.contracts import Batch
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.selection import KeepAll
from recsys.testing import samples
from recsys.train.losses import BCE
from recsys.train.options import TrainOptions

SCHEMA = replace(samples.schema(3, 1), tasks=("click", "buy"))


class Dot(nn.Module):
    """Weights events by their product with the target, so that the target has a gradient."""

    def forward(self, target, history, length):
        valid = torch.arange(history.shape[1]) < length.unsqueeze(1)
        return (valid.unsqueeze(-1) * history * (history @ target.unsqueeze(-1))).sum(1)


def make(schema: EncodedSchema, members: int = 1):
    torch.manual_seed(0)
    table = Table(schema, dim=4, init_std=0.5)
    fields = Model.consumer_fields(schema, table, members)
    parts = [part for _ in range(members) for part in (FM(fields), MLP(fields, hidden=(5,), batch_norm=True))]
    head = Head(schema, parts, wide=True, members=members)
    model = Model(schema, table, KeepAll(table.fields), {"clicks": Dot()}, parts, head).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # as after some training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    train = TrainOptions(batch_size=12, accumulate=2, devices=2)  # three rows in a pass
    return types.SimpleNamespace(model=model, loss=BCE(schema.tasks), device=torch.device("cpu"), train=train)


def doubled(batch: Batch, low: int, high: int) -> Batch:
    own = slice(low, high)
    return Batch(
        batch.ids[own],
        batch.values[own].double(),
        {name: (i[own], n[own]) for name, (i, n) in batch.history.items()},
        {task: y[own].double() for task, y in batch.label.items()},
        {"weight": torch.linspace(0.5, 2.0, len(batch.ids)).double()[own]},
    )


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_one_backward_pass_gives_every_row_the_gradient_it_has_alone(members, size):
    run, batch = make(SCHEMA, members), samples.batch(9, SCHEMA)
    run.model.train()
    together = []
    run.model.head.register_forward_pre_hook(lambda head, inputs: together.append(len(inputs[1])))
    state = {name: t.clone() for name, t in run.model.state_dict().items()}
    parts = [(low, doubled(batch, low, min(low + size, 9))) for low in range(0, 9, size)]
    found = list(field_gradients(run, parts))
    assert run.model.training
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(p.grad is None for p in run.model.parameters())
    assert all(torch.equal(t, state[name]) for name, t in run.model.state_dict().items())
    assert max(together) == min(size, 3)
    assert [low for low, _, _ in found] == [low for low, _ in parts]
    e, gradient = torch.cat([e for _, e, _ in found]), torch.cat([g for _, _, g in found])
    run.model.eval()
    weight = torch.linspace(0.5, 2.0, 9).double()
    for b in range(9):
        row = doubled(batch, b, b + 1)
        vectors = run.model.embedding(row.ids, row.values).detach().requires_grad_()
        seen = [vectors, run.model.sequences[0](vectors[:, 0], *events(run.model, row)).unsqueeze(1)]
        logits = run.model.decide(torch.cat(seen, 1), row.ids, row.values)
        loss = 0.0
        for task, logit in logits.items():  # the mean over the tasks of a weighted cross-entropy
            p = torch.sigmoid(logit[0])
            loss = loss - weight[b] * torch.log(p if batch.label[task][b] else 1 - p) / 2
        loss.backward()
        torch.testing.assert_close(e[b], vectors[0].detach(), rtol=0, atol=0)
        torch.testing.assert_close(gradient[b], vectors.grad[0], rtol=1e-4, atol=1e-7)  # losses are float32


def events(model, row):
    ids, length = row.history["clicks"]
    return model.embedding.history("clicks", ids).flatten(2).detach(), length


def test_vectors_that_no_part_reads_have_no_gradient():
    class Deaf(nn.Module):
        width, is_logit = 1, True

        def forward(self, e):
            return e.new_zeros(len(e), 1)

        def explain(self, e):
            return {}

    run = make(SCHEMA)
    run.model = Model(
        SCHEMA,
        run.model.embedding,
        KeepAll(run.model.embedding.fields),
        {"clicks": Dot()},
        [Deaf()],
        Head(SCHEMA, [Deaf()], wide=True),
    ).double()
    ((_, e, gradient),) = field_gradients(run, [(0, doubled(samples.batch(4, SCHEMA), 0, 4))])
    assert e.shape == gradient.shape
    assert not gradient.any()
