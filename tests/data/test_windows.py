"""Rows shuffled window by window from disk: a bijection, the same for any ranks, well mixed, in bounded memory."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch, EncodedSchema, Field
from recsys.data.batches import EvalBatches, TrainBatches
from recsys.data.blocks import EncodedColumns
from recsys.data.order import Order, WindowOrder, divide
from recsys.data.shards import Shards, write_blocks
from recsys.errors import DataError

Numbered = Callable[[int], Shards]
MIB = 2**20


def write_numbered(folder: Path, rows: int, shard_rows: int = 37) -> Shards:
    """Row i has id i."""
    block = EncodedColumns(rows, {"row": np.arange(rows)}, {}, {}, {"label": np.zeros(rows, np.uint8)}, {})
    return write_blocks(EncodedSchema((Field("row", max(rows, 300)),)), [block], folder, shard_rows=shard_rows)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Numbered:
    folder = tmp_path_factory.mktemp("numbered")
    written: dict[int, Shards] = {}

    def of(rows: int) -> Shards:
        if rows not in written:
            written[rows] = write_numbered(folder / str(rows), rows)
        return written[rows]

    return of


def rows_of(batch: Batch) -> list[int]:
    return list(map(int, batch.ids[:, 0]))


orders = st.builds(
    WindowOrder, st.integers(1, 600), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**63), st.integers(0, 50)
)


@given(orders, st.data())
def test_a_window_order_is_a_bijection_of_positions(order: WindowOrder, data: Any) -> None:
    whole = order.rows(np.arange(order.size))
    assert sorted(whole.tolist()) == list(range(order.size))
    positions = np.array(data.draw(st.lists(st.integers(0, order.size - 1), max_size=20)), np.int64)
    assert order.rows(positions).tolist() == whole[positions].tolist()


@given(orders)
def test_windows_divide_positions_and_rows(order: WindowOrder) -> None:
    starts = [order.start(w) for w in range(order.windows + 1)]
    assert starts[0] == 0
    assert starts[-1] == order.size
    assert sorted(set(starts)) == starts
    found = [order.window_of(p) for p in range(order.size)]
    assert found == [w for w in range(order.windows) for _ in range(starts[w], starts[w + 1])]
    for window in range(order.windows):
        low, high = order.ranges(window)
        rows = [row for a, b in zip(low.tolist(), high.tolist(), strict=True) for row in range(a, b)]
        assert sorted(order.rows(np.arange(starts[window], starts[window + 1])).tolist()) == rows


def test_epochs_and_seeds_give_different_windows() -> None:
    found = {tuple(WindowOrder(5000, 10, 5, s, e).ranges(0)[0].tolist()) for s in range(5) for e in range(5)}
    assert len(found) == 25


def test_the_short_block_may_stand_anywhere() -> None:
    # 10 blocks of 10 rows, the last of 3 rows; in 5 windows of 2 blocks.
    short = [WindowOrder(93, 10, 5, seed, 0) for seed in range(1000)]
    holds = np.bincount([next(w for w in range(5) if o.start(w + 1) - o.start(w) < 20) for o in short])
    assert ((holds - 200) ** 2 / 200).sum() < 24  # chi-square, 4 degrees of freedom: p < 1e-4


@given(st.integers(1, 10**9), st.floats(1, 2000), st.integers(2**14, 2**31))
def test_two_windows_fit_into_the_memory(rows: int, row: float, memory: int) -> None:
    size = int(rows * row)
    block_rows, windows = divide(rows, size, memory)
    blocks = -(-rows // block_rows)
    largest = -(-blocks // min(windows, blocks)) * block_rows
    assert 2 * largest * size / rows <= memory * 1.001 or block_rows == largest == 1
    assert block_rows * size / rows <= 2**15 or block_rows == 1
    assert windows == 1 or blocks // windows >= 500 or block_rows == 1  # never a window of few blocks


@pytest.mark.parametrize("batch", [256, 2048])
def test_batches_are_nearly_random_samples_of_sorted_rows(batch: int) -> None:
    rows, blocks, windows = 2**18, 4096, 4
    ratio, correlation, first_half = [], [], []
    for seed in range(6):
        order = WindowOrder(rows, rows // blocks, windows, seed, 0).rows(np.arange(rows))
        means = order.reshape(-1, batch).mean(axis=1)
        ratio.append(((means - (rows - 1) / 2) ** 2).mean() / (rows**2 / 12 / batch))
        correlation.append(np.corrcoef(np.arange(rows), order)[0, 1])
        first_half.append((order[: rows // 2] < rows // 2).mean())
    # The variance that random samples have, and what the window's own mean adds to it: 1 + b / m (1 - 1 / windows).
    expected = 1 + batch / (blocks / windows) * (1 - 1 / windows)
    assert 0.6 * expected < np.mean(ratio) < 1.5 * expected
    assert np.abs(correlation).max() < 4 / np.sqrt(blocks)
    assert np.abs(np.array(first_half) - 0.5).max() < 4 * 0.5 / np.sqrt(blocks)


def test_neighbouring_rows_do_not_stay_together() -> None:
    order = WindowOrder(2**16, 64, 4, 1, 0).rows(np.arange(2**16))
    near = np.abs(np.diff(order)) < 64
    assert near.mean() < 3 * 2 * 64 / 2**14  # as rare as in a random order of the window


shapes = st.tuples(st.integers(1, 200), st.integers(1, 8), st.integers(1, 4), st.integers(1, 70)).filter(
    lambda s: min(s[0], s[3]) >= s[1] * s[2]
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(2, 500), st.integers(0, 9), st.lists(st.integers(0, 200), max_size=4))
def test_streaming_covers_every_row_once_and_resumes_anywhere(
    numbered: Numbered, shape: tuple[int, int, int, int], memory: int, epoch: int, stops: list[int]
) -> None:
    rows, ranks, accumulate, batch_size = shape
    shards = numbered(rows)

    def batches(rank: int, ranks: int, accumulate: int) -> TrainBatches:
        return TrainBatches(shards, batch_size, 5, rank, ranks, accumulate, shuffle_memory=memory / MIB)

    steps: list[list[int]] = []
    for rank in range(ranks):
        own = batches(rank, ranks, accumulate)
        steps = steps or [[] for _ in range(own.steps)]
        parts = [(rows_of(b), b.share) for b in own.epoch(epoch)]
        assert len(parts) == len(own)
        for i, (part, share) in enumerate(parts):
            steps[i // accumulate] += part
            assert share == len(part) * ranks * accumulate / own.bounds(i // accumulate, 0)[2]
        cuts = sorted({0, *(stop % own.steps for stop in stops)})
        resumed = []
        for first, end in zip(cuts, [*cuts[1:], own.steps], strict=True):
            again = own.epoch(epoch, first)
            resumed += [(rows_of(b), b.share) for b, _ in zip(again, range((end - first) * accumulate), strict=False)]
            again.close()  # type: ignore[attr-defined]
        assert resumed == parts
    assert sorted(row for step in steps for row in step) == list(range(rows))
    # The rows of a step are those of one process without micro-batches, when the steps are cut alike.
    single = batches(0, 1, 1)
    if single.steps == len(steps):
        assert [sorted(s) for s in steps] == [sorted(rows_of(b)) for b in single.epoch(epoch)]


def test_streaming_gives_the_rows_of_the_window_order(numbered: Numbered) -> None:
    shards = numbered(193)
    memory = shards.size // 2
    found = [row for b in TrainBatches(shards, 20, 7, shuffle_memory=memory / MIB).epoch(2) for row in rows_of(b)]
    order = WindowOrder(193, *divide(193, shards.size, memory), 7, 2)
    assert order.windows > 2
    assert found == order.rows(np.arange(193)).tolist()


@pytest.mark.parametrize("spare", [None, 0, 1])
def test_rows_that_fit_are_in_one_order_over_all(numbered: Numbered, spare: int | None) -> None:
    shards = numbered(193)
    memory = 0 if spare is None else (shards.size + spare) / MIB
    found = [row for b in TrainBatches(shards, 20, 7, shuffle_memory=memory).epoch(2) for row in rows_of(b)]
    assert found == Order(193, 7, 2).rows(np.arange(193)).tolist()


def test_the_order_over_all_rows_stays_what_it_was() -> None:
    assert Order(1000, 2024, 3).rows(np.arange(8)).tolist() == [781, 938, 278, 815, 14, 682, 909, 570]
    assert Order(2**40, 7, 0).rows(np.arange(3)).tolist() == [1090588095166, 22187602020, 969541025602]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 8))
def test_evaluation_from_disk_is_the_order_of_the_logs(
    numbered: Numbered, rows: int, batch_size: int, ranks: int
) -> None:
    parts = [EvalBatches(numbered(rows), batch_size, rank, ranks) for rank in range(ranks)]
    assert [row for part in parts for _, batch in part for row in rows_of(batch)] == list(range(rows))


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "s", 200)
    file = tmp_path / "s" / "records-00002.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"records-00002\.bin: shorter than when it was opened"):
        list(TrainBatches(shards, 20, 0, shuffle_memory=100 / MIB).epoch(0))
    with pytest.raises(DataError, match=r"records-00002\.bin: shorter than when it was opened"):
        list(EvalBatches(shards, 20))


def test_the_reading_thread_ends_with_the_epoch(numbered: Numbered) -> None:
    batches = TrainBatches(numbered(200), 20, 0, shuffle_memory=100 / MIB).epoch(0)
    next(batches)
    assert [t for t in threading.enumerate() if t.name.startswith("recsys-windows")]
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("recsys-windows")]


MEASURE = """
import json, sys
from pathlib import Path
from recsys.data.batches import EvalBatches, TrainBatches
from recsys.data.shards import Shards

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

shards = Shards.open(Path(sys.argv[1]))
sum(len(shards.read(low, low + 4096)) for low in (0, 4096))  # whatever is loaded at first use
found, before = {"size": shards.size / 2**20}, peak()
for name, batches in (
    ("evaluation", (batch for _, batch in EvalBatches(shards, 4096))),
    ("windows", TrainBatches(shards, 4096, 0, shuffle_memory=16).epoch(0)),
    ("maps", TrainBatches(shards, 4096, 0, shuffle_memory=0).epoch(0)),
):
    assert sum(len(batch) for batch in batches) == len(shards)
    found[name] = peak() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_option_whatever_the_data(tmp_path: Path) -> None:
    rows = 1 << 20
    rng = np.random.default_rng(0)
    fields = tuple(Field(f"c{i}", 2**33) for i in range(14))
    ids = {f.name: rng.integers(0, 2**33, rows) for f in fields}
    block = EncodedColumns(rows, ids, {}, {}, {"label": np.zeros(rows, np.uint8)}, {})
    write_blocks(EncodedSchema(fields), [block], tmp_path / "s", shard_rows=300_000)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "s")], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(child.stdout)
    assert found["size"] > 100
    assert found["evaluation"] < 8
    assert found["windows"] < 16 + 8
    assert found["maps"] > 90  # what the others are spared
