"""Renumbered ids: the same rows for the same values, and no map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch, EncodedSchema, Field, History, Selection
from recsys.nn.head import Head
from recsys.nn.interaction import MLP
from recsys.nn.layout import Layout
from recsys.nn.model import Model
from recsys.nn.reorder import kept_first, renumbered
from recsys.nn.selection import KeepAll
from recsys.nn.sequence import MeanPool
from recsys.nn.table import Table

SCHEMA = EncodedSchema(
    (Field("user", 30), Field("price", 2, numeric=True), Field("item", 20), Field("twin", 20, shares="item")),
    (History("past", (Field("item", 20, shares="item"), Field("shop", 9)), 5, ("item", "user")),),
)
LAYOUT = Layout.of(SCHEMA)
DIM = 6


def batch(seed: int, rows: int = 40) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, f.rows, (rows,), generator=g) for f in SCHEMA.fields], 1)
    events = torch.stack([torch.randint(0, f.rows, (rows, 5), generator=g) for f in SCHEMA.histories[0].columns], -1)
    return Batch(
        ids,
        torch.randn(ids.shape, generator=g),
        {"past": (events, torch.randint(1, 6, (rows,), generator=g))},
        {"label": torch.zeros(rows)},
    )


def model(seed: int) -> Model:
    torch.manual_seed(seed)
    table = Table(SCHEMA, dim=DIM, init_std=1.0)
    mlp = MLP(Model.consumer_fields(SCHEMA, table), hidden=(8,))
    head = Head(SCHEMA, [mlp], wide=True)
    torch.nn.init.normal_(head.wide.weight)  # type: ignore[union-attr]
    return Model(SCHEMA, table, KeepAll(table.fields), {"past": MeanPool(2 * DIM)}, [mlp], head).eval()


def selection(seed: int, what: str, share: float) -> Selection:
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g) < share

    names = [c.name for c in LAYOUT.columns]
    fields = tuple(f.name for f in SCHEMA.fields if torch.rand((), generator=g) < 0.8)
    if what == "elements":
        return Selection(fields, elements={c.name: some(c.rows, DIM) for c in LAYOUT.columns})
    rows = {c.name: some(c.rows) for c in LAYOUT.columns}
    if what == "nested":  # what twin keeps, item keeps too, and the history keeps all that item does
        rows["twin"] = rows["twin"] & rows["item"]
        rows["past.item"] = rows["item"] | rows["past.item"]
        for name in ("item", "twin", "past.item"):
            rows[name][:2] = bool(seed % 2)
    dims = {name: some(DIM) for name in names} if what == "rows and dims" else {}
    return Selection(fields, rows, dims)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["rows", "rows and dims", "elements", "nested"]),
    st.sampled_from([0.1, 0.5, 0.95]),
)
def test_the_same_logits_for_the_same_values_and_a_fresh_model_becomes_it(seed, what, share):
    pruned = model(seed).prune(selection(seed, what, share)).eval()
    orders = pruned.row_order()
    if orders is None:
        return
    b = batch(seed)
    moved, chosen = pruned.reordered(orders)
    new = renumbered(b, LAYOUT, orders)
    logits = moved(new)["label"]
    assert torch.equal(logits, pruned(b)["label"])
    assert moved.bytes() <= pruned.bytes() + 4 * DIM * 2 * len(LAYOUT.rows), "two zero rows for each vocabulary at most"

    again = model(seed + 1).prune(chosen).eval()
    again.load_state_dict(moved.state_dict())
    assert torch.equal(again(new)["label"], logits)

    for v, order in enumerate(orders):
        if order is None:
            continue
        assert torch.equal(order.sort().values, torch.arange(LAYOUT.rows[v])), "every id once"
        assert order[:2].tolist() == [0, 1], "missing and unknown stay"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5]))
def test_nothing_maps_ids_where_each_column_keeps_what_the_next_one_does(seed, share):
    whole = model(seed)
    chosen = selection(seed, "nested", share)
    chosen = Selection(tuple(f.name for f in SCHEMA.fields), chosen.rows)
    pruned = whole.prune(chosen)
    orders = pruned.row_order()
    assert orders is not None
    assert len(pruned.embedding.slots) > 1
    moved, _ = pruned.reordered(orders)
    assert len(moved.embedding.slots) == 1
    assert orders[LAYOUT.owners.index("price")] is None or orders[LAYOUT.owners.index("price")].tolist() == [0, 1]


def test_a_whole_table_and_vocabularies_read_to_different_lengths_stay():
    layout = Layout.of(EncodedSchema((Field("a", 6), Field("b", 4, shares="a"), Field("c", 5))))
    kept = [torch.tensor([1, 1, 0, 1, 0, 1]).bool(), torch.ones(4).bool(), torch.tensor([0, 1, 0, 1, 1]).bool()]
    first, second = kept_first(layout, kept)
    assert first is None
    assert second is not None
    assert second.tolist() == [0, 1, 3, 4, 2]
    assert (
        kept_first(layout, [torch.ones(6).bool(), torch.ones(4).bool(), torch.tensor([0, 1, 1, 1, 1]).bool()])
        == (None,) * 2
    )


@pytest.mark.parametrize("wrong", [[1, 0, 2, 3], [0, 1, 2, 2], [0, 1, 2]])
def test_a_vocabulary_refuses_what_is_no_order(wrong):
    import numpy as np
    import polars as pl

    from recsys.data.vocabulary import Vocabulary

    vocabulary = Vocabulary("text", pl.Series(["x", "y"]))
    assert vocabulary.reordered(np.array([0, 1, 3, 2])).values.to_list() == ["y", "x"]
    with pytest.raises(ValueError, match="names every id once"):
        vocabulary.reordered(np.array(wrong))
