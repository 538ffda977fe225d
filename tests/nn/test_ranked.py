"""The selector that keeps the best of a ranking, against a sort written out here."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.api import Fields, RankedFields, Ranking, RecipeError, best, how_many, passing
from recsys.testing import contract


def four(rank=lambda run: Ranking({}), keep=2):
    return RankedFields(Fields(("a", "b", "c", "d"), (3, 4, 5, 6), 2), rank, keep)


def the_run():
    return types.SimpleNamespace(stage="2-rank_fields")


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=4),
    st.sampled_from([1, 2, 3, 4, 0.1, 0.5, 0.7, 1.0]),
)
def test_the_best_fields_pass_and_of_equals_the_first(scores, keep):
    made = four(lambda run: Ranking(dict(zip("abcd", scores, strict=True)), 7), keep)
    e = torch.randn(5, 4, 2)
    assert torch.equal(made(e, torch.zeros(5, 4).long()), e)
    assert made.kept().fields == ("a", "b", "c", "d")
    assert made.rank(the_run()).passes == 7
    order = sorted(range(4), key=lambda f: (-scores[f], f))
    wanted = order[: keep if isinstance(keep, int) else max(round(4 * keep), 1)]
    assert made.kept().fields == tuple("abcd"[f] for f in sorted(wanted))
    out = made(e, torch.zeros(5, 4).long())
    for f in range(4):
        assert torch.equal(out[:, f], e[:, f] if f in wanted else torch.zeros(5, 2))
    assert {name: float(s) for name, s in made.scores().items()} == dict(zip("abcd", scores, strict=True))
    again = four(keep=keep)
    again.load_state_dict(made.state_dict())
    assert again.kept() == made.kept()


def test_fields_are_open_while_they_are_ranked_again():
    seen = []
    made = four(lambda run: Ranking({"a": 1.0, "b": 2.0, "c": seen.append(made.kept().fields) or 0.0, "d": 0.0}), 1)
    made.rank(the_run())
    made.rank(the_run())
    assert seen == [("a", "b", "c", "d")] * 2
    assert made.kept().fields == ("b",)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_field_without_a_finite_score_is_named(bad):
    scores = {"a": 1.0, "b": 1.0, "c": bad, "d": 1.0}
    made = four(lambda run: Ranking({n: s for n, s in scores.items() if s is not None}))
    with pytest.raises(RecipeError, match="2-rank_fields: the field 'c' has no finite score"):
        made.rank(the_run())
    assert made.kept().fields == ("a", "b", "c", "d")


def test_more_fields_than_there_are():
    with pytest.raises(RecipeError, match="keep: 5 fields are asked for, and the model has 4"):
        four(keep=5)


@pytest.mark.parametrize("done", [False, True])
def test_contract(done):
    def build(fields: Fields, *, keep: float = 0.5) -> RankedFields:
        """Keep the best half."""
        made = RankedFields(fields, lambda run: Ranking(dict(zip(fields.names, range(len(fields)), strict=True))), keep)
        if done and made.importance.device.type != "meta":
            made.rank(the_run())
        return made

    contract("selector", build)


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=7),
    st.sampled_from([1, 0.1, 0.5, 0.7, 1.0]),
)
def test_what_passes_is_what_is_best_once_any_two_scores_differ(scores, keep):
    fields = Fields(tuple("abcdefg"[: len(scores)]), (3,) * len(scores), 2)
    found = passing(fields, torch.tensor(scores), keep)
    assert found.all() if len(set(scores)) == 1 else torch.equal(found, best(fields, torch.tensor(scores), keep))


def test_how_many_are_kept():
    fields = Fields(tuple("abcdefgh"), (3,) * 8, 2)
    assert [how_many(fields, keep) for keep in (3, 8, 0.5, 1.0, 0.01)] == [3, 8, 4, 8, 1]
    with pytest.raises(RecipeError, match="keep: 9 fields are asked for"):
        passing(fields, torch.arange(8.0), 9)
