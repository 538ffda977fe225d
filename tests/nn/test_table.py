"""The fused table against a loop over fields, one small table each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import EncodedSchema, Field, History
from recsys.errors import DataError
from recsys.nn.table import Table

SCHEMA = EncodedSchema(
    fields=(
        Field("user", 7),
        Field("price", 2, numeric=True),
        Field("item", 11),
        Field("seen", 11, shares="item"),
    ),
    histories=(
        History("past", (Field("item", 11, shares="item"), Field("shop", 5)), 6, ("item", "user")),
        History("tags", (Field("tag", 4),), 3),
    ),
)


def make(dim=3, seed=0):
    torch.manual_seed(seed)
    return Table(SCHEMA, dim=dim, init_std=1.0)


def blocks(table):
    """The rows of each vocabulary, cut by hand."""
    user, price, item, shop, tag = table.weight.detach().split([7, 2, 11, 5, 4])
    return {"user": user, "price": price, "item": item, "seen": item, "past.item": item, "shop": shop, "tag": tag}


def slow(table, ids, values):
    own = blocks(table)
    out = []
    for row, x in zip(ids.tolist(), values.tolist(), strict=True):
        vectors = []
        for f, i, v in zip(SCHEMA.fields, row, x, strict=True):
            inside = 0 <= i < f.rows
            i = i if inside else (0 if f.numeric else 1)
            vectors.append(own[f.name][i] * (v if f.numeric and i == 1 else 1.0))
        out.append(torch.stack(vectors))
    return torch.stack(out)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 14)] * 4), min_size=1, max_size=5), st.floats(-4, 4))
def test_lookup_is_the_loop_over_fields_and_wrong_ids_stay_in_their_field(rows, value):
    table = make()
    ids = torch.tensor(rows)
    values = torch.ones(len(rows), 4)
    values[:, 1] = value
    assert torch.equal(table(ids, values), slow(table, ids, values))


def test_shared_vocabulary_is_stored_once():
    table = make()
    assert table.weight.shape == (7 + 2 + 11 + 5 + 4, 3)
    same = table(torch.tensor([[2, 1, 5, 5]]), torch.ones(1, 4))
    assert torch.equal(same[0, 2], same[0, 3])
    assert torch.equal(table.history("past", torch.tensor([[[5, 2]]]))[0, 0, 0], same[0, 2])


def test_history_reads_its_own_columns_and_stays_in_range():
    table = make()
    own = blocks(table)
    events = torch.tensor([[[4, 3], [10, 4], [11, 5], [-1, 99]]])
    want = torch.stack([torch.stack([own["item"][i], own["shop"][j]]) for i, j in [(4, 3), (10, 4), (1, 1), (1, 1)]])
    assert torch.equal(table.history("past", events)[0], want)
    assert torch.equal(table.history("tags", torch.tensor([[[3], [4]]]))[0, :, 0], own["tag"][[3, 1]])


def test_a_missing_number_is_its_row_unscaled_whatever_the_value_says():
    table = make()
    ids = torch.tensor([[2, 0, 2, 2]])
    assert torch.equal(table(ids, torch.full((1, 4), 9.0))[0, 1], table.weight[7])


def test_values_are_required_when_there_are_numeric_fields():
    with pytest.raises(ValueError, match="needs their values"):
        make()(torch.tensor([[2, 1, 2, 2]]))


def test_gradient_reaches_exactly_the_rows_that_were_read():
    table = make()
    table(torch.tensor([[3, 1, 5, 6], [3, 0, 99, 6]]), torch.tensor([[1.0, 2.0, 1.0, 1.0]] * 2)).sum().backward()
    want = torch.zeros(29, 3)
    for row, weight in [(3, 2.0), (7 + 1, 2.0), (7, 1.0), (9 + 5, 1.0), (9 + 1, 1.0), (9 + 6, 2.0)]:
        want[row] += weight
    assert torch.equal(table.weight.grad, want)


def test_out_of_range_ids_can_be_counted():
    outside = make().reader.guard.outside(torch.tensor([[7, 1, 2, 2], [3, 2, -1, 2], [9, 0, 0, 0]]))
    assert outside.sum(0).tolist() == [2, 1, 1, 0]


def test_initial_spread_is_the_option():
    torch.manual_seed(0)
    table = Table(EncodedSchema((Field("a", 20_000),)), dim=4, init_std=0.02)
    assert table.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_sharing_with_nobody_names_the_nearest_column():
    with pytest.raises(DataError, match="Did you mean 'item'"):
        Table(EncodedSchema((Field("item", 4), Field("x", 4, shares="itme"))))


def test_sharing_in_a_circle_is_refused():
    with pytest.raises(DataError, match="circle"):
        Table(EncodedSchema((Field("a", 4, shares="b"), Field("b", 4, shares="a"))))


def test_a_history_column_of_a_fields_name_has_its_own_rows_unless_it_shares():
    own = Table(EncodedSchema((Field("a", 5),), (History("h", (Field("a", 4),), 2), History("g", (Field("a", 3),), 2))))
    shared = Table(EncodedSchema((Field("a", 5),), (History("h", (Field("a", 5, shares="a"),), 2),)))
    assert (len(own.weight), len(shared.weight)) == (5 + 4 + 3, 5)


@pytest.mark.parametrize("reads", ["fields", "history"])
def test_the_gradient_is_the_same_in_training_and_evaluation_to_the_bit(reads):
    table = make()
    gen = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 12, (500, 4), generator=gen)
    events = torch.randint(-1, 12, (200, 6, 2), generator=gen)

    def gradient(train):
        table.train(train).zero_grad()
        e = table(ids, torch.ones(500, 4)) if reads == "fields" else table.history("past", events)
        (e * torch.linspace(-1, 1, e.numel()).view(e.shape)).sum().backward()
        return e.detach(), table.weight.grad.clone()

    (trained, ours), (evaluated, standard) = gradient(True), gradient(False)
    assert torch.equal(trained, evaluated)
    assert torch.equal(ours, standard)
    assert ours.abs().sum() > 0
