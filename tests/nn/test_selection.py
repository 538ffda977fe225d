"""Selections as values and as files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from recsys.contracts import Fields, Selection
from recsys.errors import RunError
from recsys.nn.selection import KeepAll, both, everything, is_everything, is_nothing, load_selection, save_selection

FIELDS = Fields(("user", "größe/é", "rows/x"), (4, 5, 6), 3)
bits = st.lists(st.booleans(), min_size=1, max_size=9).map(lambda b: torch.tensor(b))
names = st.sampled_from(FIELDS.names)


@settings(max_examples=30, deadline=None)
@given(st.lists(names, unique=True), st.dictionaries(names, bits), st.dictionaries(names, bits))
def test_a_file_gives_back_the_same_selection(tmp_path_factory, fields, rows, dims):
    path = tmp_path_factory.mktemp("s") / "selection.safetensors"
    save_selection(Selection(tuple(fields), rows, dims), path)
    loaded = load_selection(path)
    assert loaded.fields == tuple(fields)
    for got, want in ((loaded.rows, rows), (loaded.dims, dims)):
        assert set(got) == set(want)
        assert all(torch.equal(got[k], want[k]) and got[k].dtype == torch.bool for k in want)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_masks_of_elements_come_back_from_an_eighth_of_their_bytes(tmp_path_factory, rows, dim, seed):
    path = tmp_path_factory.mktemp("s") / "selection.safetensors"
    mask = torch.rand(rows, dim, generator=torch.Generator().manual_seed(seed)) < 0.5
    save_selection(Selection(("a",), elements={"a": mask, "h.b": mask[:, :1]}), path)
    loaded = load_selection(path).elements
    assert torch.equal(loaded["a"], mask)
    assert torch.equal(loaded["h.b"], mask[:, :1])
    big = torch.ones(10_000, 16, dtype=torch.bool)
    save_selection(Selection(("a",), elements={"a": big}), path)
    assert path.stat().st_size < 10_000 * 2 + 1000


@settings(max_examples=30, deadline=None)
@given(st.lists(names, unique=True), st.lists(names, unique=True), st.data())
def test_both_keeps_what_each_of_two_keeps(one, two, data):
    def draw():
        return data.draw(st.dictionaries(names, st.just(torch.rand(4) < 0.5)))

    a = Selection(tuple(one), draw(), draw(), {"user": torch.rand(4, 3) < 0.5})
    b = Selection(tuple(two), draw(), draw(), {"user": torch.rand(4, 3) < 0.5})
    found = both(a, b)
    assert set(found.fields) == set(one) & set(two)
    for part in ("rows", "dims", "elements"):
        x, y = getattr(a, part), getattr(b, part)
        for name in set(x) | set(y):
            want = torch.ones_like(x.get(name, y.get(name)))
            for masks in (x, y):
                want = want & masks.get(name, torch.ones_like(want))
            assert torch.equal(getattr(found, part)[name], want)


def test_views_are_saved_without_what_they_are_a_view_of(tmp_path):
    mask = torch.zeros(100_000, dtype=torch.bool)[:10]
    save_selection(Selection(("a",), {"a": mask}), tmp_path / "s")
    assert (tmp_path / "s").stat().st_size < 1000


def test_other_files_are_refused_by_name(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "torn").write_bytes(b"\x99" * 20)
    for name in ("weights", "torn", "absent"):
        with pytest.raises(RunError, match=name):
            load_selection(tmp_path / name)


def test_everything_and_what_is_less():
    assert is_everything(everything(FIELDS), FIELDS)
    assert is_everything(Selection(FIELDS.names, {"user": torch.ones(4)}), FIELDS)
    assert not is_everything(Selection(FIELDS.names[1:]), FIELDS)
    assert not is_everything(Selection(FIELDS.names, {"user": torch.tensor([1, 0, 1, 1])}), FIELDS)
    assert not is_everything(Selection(FIELDS.names, dims={"user": torch.tensor([1, 0, 1])}), FIELDS)
    assert not is_everything(Selection(FIELDS.names, elements={"user": torch.tensor([[1, 0, 1]])}), FIELDS)


def test_keep_all_is_the_identity():
    selector = KeepAll(FIELDS)
    e = torch.randn(2, 3, 3)
    assert selector(e, torch.zeros(2, 3, dtype=torch.int64)) is e
    assert selector.penalty().item() == 0.0
    assert is_everything(selector.kept(), FIELDS)
    assert {k: v.item() for k, v in selector.scores().items()} == dict.fromkeys(FIELDS.names, 1.0)
    assert not selector.state_dict()


def test_a_scale_multiplies_and_changes_no_decision():
    e = torch.randn(4, 3, 3)
    assert torch.equal(KeepAll(FIELDS)(e, e), e)
    assert torch.equal(KeepAll(FIELDS, scale=1.5)(e, e), e * 1.5)
    assert KeepAll(FIELDS, scale=1.5).factor() == 1.5
    assert is_everything(KeepAll(FIELDS, scale=1.5).kept(), FIELDS)


def test_nothing_is_kept_when_every_field_lost_all_of_something():
    none, some = torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, False, False])
    names = FIELDS.names
    assert is_nothing(Selection(()), FIELDS)
    assert is_nothing(Selection(("elsewhere",)), FIELDS)
    assert is_nothing(Selection(names[:2], {names[0]: none}, {names[1]: none}), FIELDS)
    assert not is_nothing(Selection(names[:2], {names[0]: none, names[1]: some}), FIELDS)
    assert not is_nothing(everything(FIELDS), FIELDS)
