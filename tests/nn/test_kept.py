"""What is kept, bit by bit; and the rows that are left, against a count in a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.contracts import EncodedSchema, Field, Selection
from recsys.errors import DataError
from recsys.nn.kept import Kept, Rank, kept_columns, places, widen
from recsys.nn.layout import Layout

HUGE = 2 + (1 << 62)
LAYOUT = Layout.of(EncodedSchema((Field("a", 5), Field("b", HUGE), Field("c", 3))))


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.sampled_from([0, 1, 4, 1000]))
def test_a_row_moves_up_by_the_rows_that_went_before_it(used, row_bytes):
    rank = Rank(torch.tensor(used), row_bytes)
    kept = rank.kept.tolist()
    assert kept == sorted(set(kept))
    rows = [r for r, u in enumerate(used) if u]
    assert set(rows) <= set(kept)
    for r in rows:
        assert kept[int(rank(torch.tensor([[r]])))] == r
    everywhere = rank(torch.arange(len(used)))
    assert int(everywhere.min()) >= 0
    assert int(everywhere.max()) < len(kept)
    words = -(-(rows[-1] + 1) // 64) if rows else 1
    cost = sum(t.nbytes for t in rank.buffers())
    assert cost == (0 if rank.direct else 12 * words)
    dead = (rows[-1] + 1 if rows else 1) - max(len(rows), 1)
    assert rank.direct == (dead * row_bytes <= 12 * words)
    assert len(kept) == (dead if rank.direct else 0) + max(len(rows), 1)


def test_the_sixty_fourth_bit_counts_like_the_others():
    used = torch.zeros(640, dtype=torch.bool)
    used[torch.tensor([63, 64, 127, 200, 575])] = True
    assert Rank(used, 1000)(used.nonzero().squeeze(1)).tolist() == [0, 1, 2, 3, 4]


def test_nothing_of_the_size_of_an_untouched_vocabulary_is_made():
    dims = torch.tensor([True, False, True])
    rows = torch.tensor([True, False, True, True, True])
    a, b, c = kept_columns(LAYOUT, 3, Selection(("a", "b"), {"a": rows}, {"b": dims}))
    assert (a.dims.all(), a.ids.tolist()) == (True, rows.tolist())
    assert (b.dims.tolist(), b.ids) == (dims.tolist(), None)
    assert (c.dims.any(), c.ids) == (False, None)


def test_numbers_that_rows_and_dimensions_say_need_no_bits_of_their_own():
    rows, dims = torch.tensor([True, False, True, True, True]), torch.tensor([True, False, True])
    a, _, _ = kept_columns(LAYOUT, 3, Selection(("a", "b", "c"), elements={"a": rows.unsqueeze(1) & dims}))
    assert (a.dims.tolist(), a.ids.tolist()) == (dims.tolist(), rows.tolist())


def masks(*shape):
    count = torch.Size(shape).numel()
    return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda bits: torch.tensor(bits).view(shape))


KEPT = st.builds(Kept, masks(3), st.none() | masks(4) | masks(4, 3))


@given(KEPT, KEPT)
def test_what_both_keep_is_what_each_keeps(one, other):
    assert torch.equal(one.meet(other).numbers(0, 4), one.numbers(0, 4) & other.numbers(0, 4))
    assert torch.equal(one.meet(other).numbers(1, 3), (one.numbers(0, 4) & other.numbers(0, 4))[1:3])


def test_a_mask_of_the_wrong_length_and_an_unknown_name_are_refused():
    with pytest.raises(DataError, match="rows of 'a'"):
        kept_columns(LAYOUT, 3, Selection(("a",), {"a": torch.ones(4, dtype=torch.bool)}))
    with pytest.raises(DataError, match=r"elements of 'c' have shape \(3, 2\)"):
        kept_columns(LAYOUT, 3, Selection(("a",), elements={"c": torch.ones(3, 2, dtype=torch.bool)}))
    with pytest.raises(DataError, match="does not have"):
        kept_columns(LAYOUT, 3, Selection(("z",)))


@given(masks(6), st.integers(1, 3))
def test_numbers_go_where_they_belong(kept, rows):
    whole = torch.randn(rows, 6)
    assert torch.equal(widen(whole[:, kept], places(kept)), torch.where(kept, whole, 0.0))


def test_owners_are_named_whatever_reads_first():
    shared = (Field("seen", 4, shares="item"), Field("item", 4))
    assert Layout.of(EncodedSchema(shared)).owners == ("item",)
