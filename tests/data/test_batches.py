"""Order, training batches and evaluation batches: every row once, in an order that is a pure function."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch
from recsys.data.batches import EvalBatches, TrainBatches
from recsys.data.order import Order
from recsys.data.shards import Shards
from recsys.errors import DataError


@dataclass
class Numbered:
    """Stands in for shards: row i has id i."""

    rows: int
    in_memory = True

    def __len__(self) -> int:
        return self.rows

    def read(self, low: int, high: int) -> Batch:
        return self.gather(np.arange(low, high))

    def gather(self, rows: np.ndarray) -> Batch:
        return Batch(ids=torch.from_numpy(rows.copy())[:, None])


def numbered(rows: int) -> Shards:
    return cast(Shards, Numbered(rows))


def rows_of(batch: Batch) -> list[int]:
    return cast(list[int], batch.ids[:, 0].tolist())


@given(st.integers(1, 2000), st.integers(0, 2**63), st.integers(0, 50))
def test_an_order_is_a_bijection(rows: int, seed: int, epoch: int) -> None:
    order = Order(rows, seed, epoch)
    assert sorted(order.rows(np.arange(rows)).tolist()) == list(range(rows))


@given(st.integers(1, 2000), st.integers(0, 1000), st.data())
def test_an_order_depends_on_nothing_but_its_arguments(rows: int, seed: int, data: Any) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=20)), np.int64)
    whole = Order(rows, seed, 3).rows(np.arange(rows))
    assert Order(rows, seed, 3).rows(positions).tolist() == whole[positions].tolist()


def test_epochs_and_seeds_give_different_orders() -> None:
    positions = np.arange(1000)
    orders = {tuple(Order(1000, seed, epoch).rows(positions)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_an_order_looks_random() -> None:
    rows, seeds = 97, 2000
    found = np.stack([Order(rows, seed, 0).rows(np.arange(rows)) for seed in range(seeds)])
    at_zero = np.bincount(found[:, 0], minlength=rows)
    expected = seeds / rows
    assert ((at_zero - expected) ** 2 / expected).sum() < 160  # chi-square, 96 degrees of freedom: p < 1e-4
    followers = np.bincount((found[:, 1:] - found[:, :-1]).ravel() % rows, minlength=rows)[1:]
    assert followers.max() < 1.15 * followers.mean()  # no distance between neighbours is preferred


def test_orders_of_more_than_2_to_the_32_rows() -> None:
    rows = 2**33 + 7
    order = Order(rows, 0, 0)
    found = order.rows(np.arange(rows - 10_000, rows))
    assert len(np.unique(found)) == 10_000
    assert found.min() >= 0
    assert 2**32 < found.max() < rows


shapes = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 120), st.integers(1, 600)).filter(
    lambda s: min(s[2], s[3]) >= s[0] * s[1]
)


@settings(deadline=None)
@given(shapes, st.integers(0, 9))
def test_training_covers_every_row_once_whatever_the_ranks(shape: tuple[int, int, int, int], epoch: int) -> None:
    ranks, accumulate, batch_size, rows = shape
    steps: list[list[int]] | None = None
    everything: list[int] = []
    for rank in range(ranks):
        batches = TrainBatches(numbered(rows), batch_size, seed=5, rank=rank, ranks=ranks, accumulate=accumulate)
        parts = [rows_of(b) for b in batches.epoch(epoch)]
        assert len(parts) == len(batches) == batches.steps * accumulate
        steps = steps or [[] for _ in range(batches.steps)]
        for i, part in enumerate(parts):
            steps[i // accumulate] += part
            everything += part
    assert sorted(everything) == list(range(rows))
    # The rows of a step are those of one process without micro-batches, when the steps are cut alike.
    single = TrainBatches(numbered(rows), batch_size, seed=5)
    if steps is not None and single.steps == len(steps):
        assert [sorted(s) for s in steps] == [sorted(rows_of(b)) for b in single.epoch(epoch)]


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_shares_weigh_every_row_of_a_step_equally(shape: tuple[int, int, int, int], seed: int) -> None:
    ranks, accumulate, batch_size, rows = shape
    loss = np.random.default_rng(seed).normal(size=rows)
    first = TrainBatches(numbered(rows), batch_size, 1, 0, ranks, accumulate)
    together = np.zeros(first.steps)
    members: list[list[int]] = [[] for _ in range(first.steps)]
    for rank in range(ranks):
        for i, batch in enumerate(TrainBatches(numbered(rows), batch_size, 1, rank, ranks, accumulate).epoch(0)):
            mean = loss[rows_of(batch)].mean()
            together[i // accumulate] += batch.share * mean / (ranks * accumulate)
            members[i // accumulate] += rows_of(batch)
    np.testing.assert_allclose(together, [loss[m].mean() for m in members], rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(shapes)
def test_steps_are_full_and_the_last_is_never_tiny(shape: tuple[int, int, int, int]) -> None:
    ranks, accumulate, batch_size, rows = shape
    batches = TrainBatches(numbered(rows), batch_size, 0, 0, ranks, accumulate)
    sizes = [batches.bounds(step, 0)[2] for step in range(batches.steps)]
    assert sum(sizes) == rows
    assert all(size == batch_size for size in sizes[:-1])
    least = max(min(64, batch_size), 2 * ranks * accumulate)
    assert len(sizes) == 1 or sizes[-1] >= min(least, batch_size)
    assert sizes[-1] < batch_size + least


def test_resuming_in_an_epoch_gives_its_remaining_batches() -> None:
    batches = TrainBatches(numbered(1000), 64, 7, rank=1, ranks=2, accumulate=2)
    whole = [rows_of(b) for b in batches.epoch(4)]
    assert [rows_of(b) for b in batches.epoch(4, start_step=5)] == whole[10:]


@pytest.mark.parametrize(("rows", "batch_size"), [(7, 100), (1000, 7)])
def test_too_few_rows_for_every_process_is_an_error(rows: int, batch_size: int) -> None:
    with pytest.raises(DataError, match=r"7 rows per step cannot be divided over 4 processes x 2 micro-batches"):
        TrainBatches(numbered(rows), batch_size, 0, ranks=4, accumulate=2)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 8))
def test_evaluation_in_rank_order_is_the_order_of_the_logs(rows: int, batch_size: int, ranks: int) -> None:
    found: list[int] = []
    batches: list[tuple[int, int]] = []
    for rank in range(ranks):
        part = EvalBatches(numbered(rows), batch_size, rank, ranks)
        taken = list(part)
        assert len(taken) == len(part)
        for first, batch in taken:
            assert rows_of(batch)[0] == first
            found += rows_of(batch)
            batches.append((first, len(batch)))
    assert found == list(range(rows))
    assert batches == [(first, len(batch)) for first, batch in EvalBatches(numbered(rows), batch_size)]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 4))
def test_evaluation_of_some_rows_gives_these_in_their_order(rows: list[int], batch_size: int, ranks: int) -> None:
    found: list[int] = []
    for rank in range(ranks):
        part = EvalBatches(numbered(100), batch_size, rank, ranks, np.array(rows))
        assert part.count == len(rows)
        for first, batch in part:
            assert (first, rows_of(batch)) == (len(found), rows[first : first + batch_size])
            found += rows_of(batch)
    assert found == rows
