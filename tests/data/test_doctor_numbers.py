"""The numbers behind the examination of logs: AUC, hashes, counts and times, against slow references."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.doctor_rows import Distinct, RowHashes, hash_cells
from recsys.data.doctor_scores import Sample, grouped_auc, held_out_auc, ranked_auc
from recsys.data.doctor_time import Times, as_numbers
from recsys.data.hashing import mix_array

SECOND = 1_700_000_000


def slow_auc(score: list[float], label: list[int]) -> float:
    """AUC by comparing every positive with every negative row."""
    pairs = [(s > t) + (s == t) / 2 for s, y in zip(score, label, strict=True) if y for t in negatives(score, label)]
    return sum(pairs) / len(pairs)


def negatives(score: list[float], label: list[int]) -> list[float]:
    return [s for s, y in zip(score, label, strict=True) if not y]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=40))
def test_auc_is_that_of_all_pairs(rows: list[tuple[int, int]]) -> None:
    score, label = [float(s) for s, _ in rows], [y for _, y in rows]
    got = grouped_auc(np.array(score), 1 - np.array(label), np.array(label))
    if len(set(label)) == 1:
        assert np.isnan(got)
        return
    expected = slow_auc(score, label)
    assert got == pytest.approx(expected)
    both = ranked_auc(np.array(score, np.float32), np.array(label, np.uint8))
    assert both == pytest.approx(max(expected, 1 - expected))


def test_missing_numbers_rank_below_or_above_all_others() -> None:
    x = np.array([np.nan, np.nan, 1, 2, 3], np.float32)
    assert ranked_auc(x, np.array([1, 1, 0, 0, 0], np.uint8)) == 1.0
    assert ranked_auc(x, np.array([0, 0, 1, 1, 1], np.uint8)) == 1.0


def test_held_out_auc_equals_a_slow_one() -> None:
    rng = np.random.default_rng(3)
    value, half, label = rng.integers(0, 9, 300), rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    counts = np.zeros((9, 2, 2), np.int64)
    np.add.at(counts, (value, half, label), 1)
    aucs = []
    for h in (0, 1):
        other = [(v, y) for v, g, y in zip(value, half, label, strict=True) if g != h]
        prior = sum(y for _, y in other) / len(other)
        rows: Counter[int] = Counter(v for v, _ in other)
        ones: Counter[int] = Counter(v for v, y in other if y)
        mine = [(v, y) for v, g, y in zip(value, half, label, strict=True) if g == h]
        aucs.append(slow_auc([(ones[v] + prior) / (rows[v] + 1) for v, _ in mine], [int(y) for _, y in mine]))
    assert held_out_auc(counts) == pytest.approx(sum(aucs) / 2)


def test_equal_values_hash_alike_whatever_holds_them() -> None:
    whole = hash_cells(pl.Series([1, -2, None, 12], dtype=pl.Int64)).tolist()
    for dtype in (pl.Int8, pl.Float32, pl.Float64):
        assert hash_cells(pl.Series([1, -2, None, 12], dtype=dtype)).tolist() == whole
    assert hash_cells(pl.Series([0.0, float("nan")])).tolist() == hash_cells(pl.Series([-0.0, None])).tolist()
    lists = hash_cells(pl.Series([[1, 2], [2, 1], [1, 2], [], None, [1], [1, 1]]))
    assert lists[0] == lists[2]
    assert lists[3] == lists[4]
    assert len(set(lists.tolist())) == 5
    days = pl.Series(["2024-01-01", "2024-01-02"]).str.to_date()
    assert hash_cells(days).tolist() == hash_cells(days.cast(pl.Datetime("ms"))).tolist()


def test_counts_stay_close_when_only_a_share_of_hashes_is_kept() -> None:
    hashed = mix_array(np.arange(50_000))
    counter, hashes = Distinct(most=2000), RowHashes(most=4000)
    for at in range(0, 50_000, 7000):
        counter.add(np.repeat(hashed[at : at + 7000], 2))
        hashes.add("train", hashed[at : at + 7000], hashed[at : at + 7000])
    distinct, exact, once = counter.result()
    assert not exact
    assert not once
    assert distinct == pytest.approx(50_000, rel=0.1)
    hashes.add("test", hashed[::10], mix_array(hashed[::10]))
    hashes.add("test", mix_array(hashed[:5000]), hashed[:5000])
    found = hashes.result()
    assert not found.exact
    copied = found.across["test", "train"]
    assert copied.rows == pytest.approx(10_000, rel=0.2)
    assert copied.inputs / copied.rows == pytest.approx(0.5, abs=0.1)
    assert found.within["train"].whole == 0


def test_sampled_rows_keep_values_and_labels_together() -> None:
    sample = Sample(most=100)
    for at in range(0, 1000, 90):
        number = np.arange(at, min(at + 90, 1000))
        sample.add(mix_array(number), number[:, None].astype(np.float32), (number % 2)[:, None].astype(np.uint8))
    values, labels = sample.result()
    assert len(values) == 100
    assert (values[:, 0].astype(int) % 2 == labels[:, 0]).all()
    assert set(values[:, 0].astype(int)) == set(np.argsort(mix_array(np.arange(1000)))[:100])


def test_times_are_read_from_text_and_dates() -> None:
    stamp = "2023-11-14T22:13:20"
    for text in (stamp, stamp.replace("T", " "), f"{stamp}.000", f"{stamp}Z", str(SECOND)):
        assert as_numbers(pl.Series([text, None])).tolist() == [SECOND], text
    assert as_numbers(pl.Series(["2023-11-14"])).tolist() == [SECOND - 22 * 3600 - 13 * 60 - 20]
    assert as_numbers(pl.Series([stamp]).str.to_datetime(time_unit="ns")).tolist() == [SECOND]
    times = Times()
    times.add(pl.Series([stamp, "soon", None, "later"]))
    assert (times.rows, times.unreadable) == (1, 2)
