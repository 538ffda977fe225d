"""Batches of whole groups: every row once, no group divided, the same for any number of ranks, resumable."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.data.groups import GroupBatches
from recsys.data.shards import Shards
from recsys.errors import DataError


@dataclass
class Grouped:
    """Stands in for shards: row i has id i."""

    group: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    def groups(self) -> np.ndarray:
        return self.group

    def gather(self, rows: np.ndarray) -> Batch:
        own = torch.from_numpy(self.group[rows])
        return Batch(ids=torch.from_numpy(rows.copy())[:, None], context={"group": own})


def batches(group: list[int], size: int, **options: Any) -> GroupBatches:
    return GroupBatches(cast(Shards, Grouped(np.array(group, np.int64))), size, seed=5, **options)


def rows_of(batch: Batch) -> list[int]:
    return cast(list[int], batch.ids[:, 0].tolist())


groups = st.lists(st.integers(-3, 30), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 60), st.integers(0, 4))
def test_every_row_comes_once_and_no_group_is_divided(group: list[int], size: int, epoch: int) -> None:
    made = batches(group, size)
    given = list(made.epoch(epoch))
    assert len(given) == len(made) == made.steps
    assert sorted(row for batch in given for row in rows_of(batch)) == list(range(len(group)))
    seen: set[int] = set()
    for batch in given:
        own = [group[row] for row in rows_of(batch)]
        kinds = list(dict.fromkeys(own))
        assert own == [k for k in kinds for _ in range(group.count(k))]  # whole, and side by side
        assert not seen & set(kinds)
        seen |= set(kinds)
        for kind in kinds:
            rows = [row for row in rows_of(batch) if group[row] == kind]
            assert rows == sorted(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=150), st.integers(2, 3), st.integers(1, 2))
def test_ranks_and_micro_batches_divide_a_step_and_their_shares_make_its_mean(
    group: list[int], ranks: int, accumulate: int
) -> None:
    group = [*range(60), *group]
    alone = batches(group, 60)
    parts = [batches(group, 60, rank=r, ranks=ranks, accumulate=accumulate) for r in range(ranks)]
    if any(part.steps != alone.steps for part in parts):
        return  # a last step of fewer groups than there are pieces goes with the one before it
    steps = [list(part.epoch(1)) for part in parts]
    for step, whole in enumerate(alone.epoch(1)):
        pieces = [steps[r][step * accumulate + m] for m in range(accumulate) for r in range(ranks)]
        assert [row for piece in pieces for row in rows_of(piece)] == rows_of(whole)
        means = [piece.share * piece.ids.double().mean().item() if len(piece) else 0.0 for piece in pieces]
        assert sum(means) / len(pieces) == pytest.approx(whole.ids.double().mean().item())


def test_an_epoch_goes_on_where_it_was_left_and_another_one_has_another_order() -> None:
    made = batches([i // 4 for i in range(400)], 40)
    whole = [rows_of(batch) for batch in made.epoch(2)]
    assert [rows_of(batch) for batch in made.epoch(2, start_step=3)] == whole[3:]
    assert [rows_of(batch) for batch in made.epoch(3)] != whole
    assert made.part(2, 5, 0)[0].tolist() == whole[5]
    assert made.steps == 10
    assert {len(rows) for rows in whole} == {40}


def test_steps_have_the_rows_asked_for_on_the_average() -> None:
    sizes = np.random.default_rng(0).integers(1, 20, 500)
    made = batches(np.repeat(np.arange(500), sizes).tolist(), 100)
    rows = [len(batch) for batch in made.epoch(0)]
    assert np.mean(rows[:-1]) == pytest.approx(100, rel=0.1)


def test_too_few_groups_for_the_processes_are_named() -> None:
    with pytest.raises(DataError, match="3 groups per step cannot be divided over 4 processes x 1"):
        batches([0, 0, 1, 1, 2, 2], 512, ranks=4)
