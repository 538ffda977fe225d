"""Logistic regression as an interaction: one weight per value, and nothing that crosses fields."""

import torch
from interactions import DOUBLE, assert_equal_to_loop, assert_small_graph, fields, vectors, xor_auc

from recsys.contracts import EncodedSchema, Field
from recsys.nn.head import Head
from recsys.nn.table import Table
from recsys.testing import contract
from recsys_lr import LR


def test_contract():
    contract("interaction", LR)
    assert_small_graph(LR)


def test_it_is_the_sum_over_the_fields():
    def loop(row):
        return sum(row[f, d] for f in range(4) for d in range(2)).reshape(1)

    assert_equal_to_loop(LR(fields(4, 2)), loop, vectors(3, 4, 2))


def test_with_dimension_one_it_is_the_first_order_term_of_the_head():
    schema = EncodedSchema((Field("x", 2, numeric=True), Field("c", 5)))
    table = Table(schema, dim=1, init_std=1.0).double()
    plain, wide = Head(schema, [LR(table.fields)]).double(), Head(schema, [], wide=True).double()
    with torch.no_grad():
        wide.wide.weight.copy_(table.weight)
    ids, values = torch.tensor([[1, 3], [0, 4]]), torch.tensor([[1.5, 1.0], [1.0, 1.0]], dtype=DOUBLE)
    ours = plain([LR(table.fields)(table(ids, values))], ids, values)["label"]
    assert torch.allclose(ours, wide([], ids, values)["label"], atol=1e-12)
    assert ours.abs().min() > 1e-3


def test_it_explains_what_each_field_adds_and_cannot_learn_xor():
    e = vectors(3, 4, 2)
    model = LR(fields(4, 2))
    assert torch.allclose(model.explain(e)["fields"].sum(1, keepdim=True), model(e))
    assert xor_auc(LR) < 0.6
