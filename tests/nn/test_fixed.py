"""The choice of another run: read, shown, applied, and refused where it does not fit."""

import pytest
import torch

from recsys.api import Fields, Selection
from recsys.errors import RecipeError, RunError
from recsys.nn.fixed import Fixed
from recsys.nn.selection import save_selection
from recsys.plugin.options import describe
from recsys.testing import contract

FIELDS = Fields(("user", "item", "hour"), (30, 20, 5), 4)
SELECTION = Selection(
    ("user", "hour"),
    {"user": torch.arange(30) % 3 > 0},
    {"hour": torch.tensor([True, False, True, True])},
    {"user": (torch.arange(120) % 7 > 0).view(30, 4)},
    vocabulary="abc",
)


@pytest.fixture
def file(tmp_path):
    save_selection(SELECTION, tmp_path / "selection.safetensors")
    return str(tmp_path / "selection.safetensors")


def test_it_gives_what_a_loop_gives_and_says_what_it_keeps(file):
    selector = Fixed(FIELDS, from_=file)
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(0, r, (50,), generator=g) for r in FIELDS.rows], 1)
    e = torch.randn(50, 3, 4, generator=g)
    out = selector(e, ids)
    for b in range(50):
        for k in range(4):
            user = int(ids[b, 0])
            kept = user % 3 > 0 and (4 * user + k) % 7 > 0
            assert out[b, 0, k] == (e[b, 0, k] if kept else 0)
            assert out[b, 1, k] == 0
            assert out[b, 2, k] == (0 if k == 1 else e[b, 2, k])
    assert selector.kept().vocabulary == "abc"
    scores = selector.scores()
    count = sum(1 for user in range(30) for k in range(4) if user % 3 > 0 and (4 * user + k) % 7 > 0)
    assert float(scores["user"]) == pytest.approx(count / 120)
    assert float(scores["item"]) == 0
    assert float(scores["hour"]) == 0.75


def test_a_wrong_id_is_an_unknown_one_and_no_value_of_another_field(file):
    selector = Fixed(FIELDS, from_=file)
    e = torch.ones(4, 3, 4)
    ids = torch.tensor([[-1, 0, 0], [30, 0, 5], [31, 0, -2], [1, 0, 1]])
    out = selector(e, ids)
    assert all(torch.equal(row, out[3]) for row in out[:3])


def test_contract(tmp_path):
    """The kit's own fields, of which one is dropped, one keeps some rows and one some dimensions."""
    from recsys.testing import samples

    fields = samples.fields(3)
    rows = {fields.names[0]: torch.arange(fields.rows[0]) % 2 == 0}
    save_selection(Selection(fields.names[:2], rows), tmp_path / "s")

    def build(fields, *, from_: str = str(tmp_path / "s")):
        return Fixed(fields, from_=from_)

    contract("selector", build)


def test_named_fields_are_kept_whole_in_the_order_of_the_model():
    selector = Fixed(FIELDS, fields=("hour", "user"))
    e = torch.randn(20, 3, 4)
    ids = torch.stack([torch.randint(0, r, (20,)) for r in FIELDS.rows], 1)
    out = selector(e, ids)
    assert torch.equal(out[:, [0, 2]], e[:, [0, 2]])
    assert not out[:, 1].any()
    assert selector.kept() == Selection(("user", "hour"))
    assert {name: float(s) for name, s in selector.scores().items()} == {"user": 1.0, "item": 0.0, "hour": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either `from`"),
        ({"from_": "runs/x", "fields": ("user",)}, "give either `from`"),
        ({"fields": ("user", "itm")}, r"has no field 'itm'. Did you mean 'item'\? Fields: user, item, hour"),
        ({"fields": ()}, "name at least one field"),
    ],
)
def test_what_it_cannot_be_told(options, message):
    with pytest.raises(RecipeError, match=message):
        Fixed(FIELDS, **options)


def test_contract_of_named_fields():
    def build(fields, *, named: int = 2):
        return Fixed(fields, fields=fields.names[:named])

    contract("selector", build)


def test_the_option_has_the_name_that_python_keeps_for_itself(file):
    assert [option.name for option in describe(Fixed)] == ["from", "fields"]
    assert "folder of a run" in describe(Fixed)[0].description


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            Fields(("usr", "hour"), (30, 5), 4),
            r"keeps the field 'user', which .* Did you mean 'usr'",
        ),
        (Fields(FIELDS.names, (31, 20, 5), 4), "chose among 30 rows or dimensions of 'user', here it has 31"),
        (Fields(FIELDS.names, FIELDS.rows, 8), "chose among 4 rows or dimensions of 'hour', here it has 8"),
    ],
)
def test_another_model_is_refused(file, fields, message):
    with pytest.raises(RecipeError, match=message):
        Fixed(fields, from_=file)


def test_a_run_that_pruned_nothing_and_no_run_are_told_apart(tmp_path):
    with pytest.raises(RunError, match="no stage of this run has pruned anything"):
        Fixed(FIELDS, from_=str(tmp_path))
    with pytest.raises(RunError, match="no such folder or file"):
        Fixed(FIELDS, from_=str(tmp_path / "nowhere"))
