"""Shards on disk: whole-batch gathers against plain Python lists, and damage that must be noticed."""

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch, EncodedSchema, Field, History
from recsys.data.batches import TrainBatches
from recsys.data.blocks import EncodedColumns, Ragged
from recsys.data.layout import Layout
from recsys.data.order import WindowOrder, divide
from recsys.data.pieces import gather
from recsys.data.shards import Shards, write_blocks
from recsys.data.windows import Space
from recsys.errors import DataError

SCHEMA = EncodedSchema(
    fields=(
        Field("small", 200),
        Field("price", 2, numeric=True),
        Field("wide", 70_000),
        Field("huge", 2**33),
        Field("age", 2, numeric=True),
        Field("size", 2, numeric=True),
        Field("last", 256),
    ),
    histories=(
        History("past", (Field("past_wide", 70_000), Field("past_small", 200)), 5, ("wide", "small")),
        History("tags", (Field("tags", 90),), 3),
    ),
    tasks=("click", "buy"),
    context=("weight", "group", "position"),
)


def make_block(rows: int, seed: int) -> EncodedColumns:
    rng = np.random.default_rng(seed)
    values = {f.name: rng.normal(size=rows).astype(np.float32) for f in SCHEMA.fields if f.numeric}
    for column in values.values():
        column[rng.random(rows) < 0.3] = np.nan
    history = {}
    for h in SCHEMA.histories:
        length = rng.integers(0, h.max_length + 1, rows)
        events = [rng.integers(0, c.rows, int(length.sum())) for c in h.columns]
        history[h.name] = Ragged(np.stack(events, axis=1), length)
    return EncodedColumns(
        rows,
        {f.name: rng.integers(0, f.rows, rows) for f in SCHEMA.fields if not f.numeric},
        values,
        history,
        {t: rng.integers(0, 2, rows).astype(np.uint8) for t in SCHEMA.tasks},
        {
            "weight": rng.random(rows).astype(np.float32),
            "group": rng.integers(-(2**63), 2**63 - 1, rows),
            "position": rng.integers(0, 9, rows),
        },
    )


def as_python(blocks: list[EncodedColumns]) -> list[dict[str, Any]]:
    """One dictionary per row: slow, and nothing to get wrong."""
    rows = []
    for block in blocks:
        starts = {g: np.concatenate([[0], np.cumsum(r.length)]) for g, r in block.history.items()}
        for i in range(block.rows):
            row: dict[str, Any] = {n: int(v[i]) for n, v in block.ids.items()}
            row |= {n: float(v[i]) for n, v in block.values.items()}
            row |= {n: float(v[i]) for n, v in block.label.items()}
            row |= {n: v[i].item() for n, v in block.context.items()}
            for g, r in block.history.items():
                row[g] = r.values[starts[g][i] : starts[g][i + 1]].tolist()
            rows.append(row)
    return rows


def assert_equals(batch: Batch, rows: list[dict[str, Any]]) -> None:
    assert batch.ids.dtype == torch.int64
    assert batch.values is not None
    assert batch.values.dtype == torch.float32
    for i, field in enumerate(SCHEMA.fields):
        if field.numeric:
            missing = [r[field.name] != r[field.name] for r in rows]
            assert batch.ids[:, i].tolist() == [0 if m else 1 for m in missing]
            expected = [1.0 if m else r[field.name] for m, r in zip(missing, rows, strict=True)]
        else:
            assert batch.ids[:, i].tolist() == [r[field.name] for r in rows]
            expected = [1.0] * len(rows)
        assert batch.values[:, i].tolist() == expected
    for task in SCHEMA.tasks:
        assert batch.label[task].dtype == torch.float32
        assert batch.label[task].tolist() == [r[task] for r in rows]
    for name, dtype in (("weight", torch.float32), ("group", torch.int64), ("position", torch.int64)):
        assert batch.context[name].dtype == dtype
        assert batch.context[name].tolist() == [r[name] for r in rows]
    for history in SCHEMA.histories:
        ids, length = batch.history[history.name]
        lists = [r[history.name] for r in rows]
        longest = max([1, *map(len, lists)])
        zero = [0] * len(history.columns)
        assert ids.tolist() == [events + [zero] * (longest - len(events)) for events in lists]
        assert length.tolist() == [len(events) for events in lists]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Shards, list[dict[str, Any]]]]:
    """The same 300 rows in one file, and in files of 64 and of 7 rows."""
    blocks = [make_block(rows, seed) for seed, rows in enumerate((100, 1, 150, 49))]
    expected = as_python(blocks)
    folder = tmp_path_factory.mktemp("shards")
    return {n: (write_blocks(SCHEMA, blocks, folder / str(n), shard_rows=n), expected) for n in (1000, 64, 7)}


@pytest.mark.parametrize("shard_rows", [1000, 64, 7])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picked=st.lists(st.integers(0, 299), max_size=40))
def test_gathers_equal_python_lists(written: Any, shard_rows: int, picked: list[int]) -> None:
    shards, expected = written[shard_rows]
    assert len(shards) == 300
    assert_equals(shards.gather(np.array(picked, np.int64)), [expected[i] for i in picked])


@pytest.mark.parametrize("shard_rows", [1000, 64, 7])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 300), min_size=2, max_size=40, unique=True), at_once=st.sampled_from([1, 20, 1000]))
def test_ranges_read_from_disk_equal_python_lists(written: Any, shard_rows: int, cuts: list[int], at_once: int) -> None:
    shards, expected = written[shard_rows]
    low, high = np.array(sorted(cuts)[: len(cuts) // 2 * 2]).reshape(-1, 2).T
    rows = [i for a, b in zip(low.tolist(), high.tolist(), strict=True) for i in range(a, b)]
    space = Space()
    shards.files.read(np.array([0]), np.array([290]), space)  # what lay in the space before is overwritten
    with mock.patch("recsys.data.windows._AT_ONCE", at_once):
        piece = shards.files.read(low, high, space)
    picked = np.random.default_rng(0).permutation(len(rows))
    batch = gather(shards.files.layout, [(piece, slice(None), picked)], len(rows))
    assert_equals(batch, [expected[rows[i]] for i in picked])
    assert_equals(shards.read(rows[0], rows[0] + 1), [expected[rows[0]]])


@pytest.mark.parametrize("shard_rows", [1000, 64, 7])
@pytest.mark.parametrize("batch_size", [7, 300])
def test_streamed_batches_equal_python_lists(written: Any, shard_rows: int, batch_size: int) -> None:
    shards, expected = written[shard_rows]
    memory = shards.size // 3
    order = WindowOrder(300, *divide(300, shards.size, memory), 9, 1)
    assert order.windows > 5
    low = 0
    for batch in TrainBatches(shards, batch_size, 9, shuffle_memory=memory / 2**20).epoch(1):
        assert_equals(batch, [expected[i] for i in order.rows(np.arange(low, low + len(batch)))])
        low += len(batch)
    assert low == 300


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (5, 5), (299, 301)])
def test_reads_outside_are_refused(written: Any, low: int, high: int) -> None:
    with pytest.raises(IndexError, match=r"rows must lie in \[0, 300\)"):
        written[64][0].read(low, high)


def test_in_memory_equals_mapped(written: Any) -> None:
    shards, expected = written[64]
    copy = Shards.open(shards.folder, in_memory=True)
    assert_equals(copy.gather(np.arange(300)), expected)
    assert copy.labels("buy").tolist() == [r["buy"] for r in expected]


@pytest.mark.parametrize("row", [-1, 300])
def test_rows_outside_are_refused(written: Any, row: int) -> None:
    with pytest.raises(IndexError, match=r"rows must lie in \[0, 300\)"):
        written[64][0].gather(np.array([0, row]))


def test_only_empty_histories(tmp_path: Path) -> None:
    block = make_block(4, 0)
    empty = {g: Ragged(r.values[:0], np.zeros(4, np.int64)) for g, r in block.history.items()}
    shards = write_blocks(
        SCHEMA, [EncodedColumns(4, block.ids, block.values, empty, block.label, block.context)], tmp_path / "s"
    )
    ids, length = shards.gather(np.arange(3)).history["past"]
    assert ids.tolist() == [[[0, 0]]] * 3
    assert length.tolist() == [0, 0, 0]


@given(st.lists(st.one_of(st.just(None), st.sampled_from([3, 300, 70_000])), min_size=1, max_size=60))
def test_a_layout_takes_the_bytes_it_needs_and_no_two_overlap(rows: list[int | None]) -> None:
    fields = tuple(Field(f"f{i}", r or 2, numeric=r is None) for i, r in enumerate(rows))
    layout = Layout.of(EncodedSchema(fields, context=("weight", "time")))
    taken = sorted(
        (run.offset, run.offset + run.size) for run in (*layout.ids, *layout.numbers, *layout.labels, *layout.context)
    )
    assert all(a[1] <= b[0] for a, b in pairwise(taken))
    assert taken[-1][1] <= layout.size
    assert all(run.offset % run.dtype.itemsize == 0 for run in layout.ids)
    assert sorted(i for run in (*layout.ids, *layout.numbers) for i in run.columns) == list(range(len(fields)))
    for run in layout.ids:
        assert all(fields[i].rows - 1 <= np.iinfo(run.dtype).max for i in run.columns)
    needed = sum(4 if r is None else 1 if r <= 256 else 2 if r <= 65_536 else 4 for r in rows) + 1 + 4 + 8
    assert needed <= layout.size <= 1.05 * needed
    assert len(layout.ids) <= 3


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    shards = write_blocks(SCHEMA, [make_block(50, 1)], tmp_path / "s")
    shards.verify()
    file = tmp_path / "s" / "records-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[123] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"records-00000\.bin: altered after it was written"):
        Shards.open(tmp_path / "s").verify()


def test_a_shortened_file_is_found_when_opening(tmp_path: Path) -> None:
    write_blocks(SCHEMA, [make_block(50, 1)], tmp_path / "s")
    file = tmp_path / "s" / "history0-values-00000.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"history0-values-00000\.bin: has {size - 3} bytes, expected {size} bytes"):
        Shards.open(tmp_path / "s")
    file.unlink()
    with pytest.raises(DataError, match=r"history0-values-00000\.bin: is missing"):
        Shards.open(tmp_path / "s")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield make_block(5, 0)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_blocks(SCHEMA, broken(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    with pytest.raises(DataError, match="no complete encoded data"):
        Shards.open(tmp_path / "s")
