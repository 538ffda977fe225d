"""Splits: which rows go where, against what a plain loop would do."""

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.hashing import hash_text, mix
from recsys.data.schema import DataConfig, HashSplit
from recsys.data.sources import MissingSplit
from recsys.data.split import split_frames, split_rows
from recsys.errors import DataError


class Memory:
    """A source of rows in memory."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame

    def scan(self, split: str) -> pl.LazyFrame:
        assert split == "all"
        return self.frame.lazy()


def split(frame: pl.DataFrame, **options: Any) -> dict[str, pl.DataFrame]:
    config = DataConfig.model_validate({"source": {}, "label": "y", "categorical": ["c"], "split": options})
    return {k: v.collect() for k, v in split_frames(Memory(frame), config.split).items()}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=80),
    st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0.0, 0.25), (0.25, 0.0)]),
)
def test_time_splits_are_strictly_ordered_and_complete(times: list[int], shares: tuple[float, float]) -> None:
    frame = pl.DataFrame({"t": times, "row": range(len(times))})
    valid, test = shares
    rows = len(times)
    ordered_times = sorted(times)
    # A split is impossible exactly when a cut falls into the first group of equal times, or both into one group.
    cuts = [ordered_times[min(round(rows * (1 - s)), rows - 1)] for s in (valid + test, test) if s]
    if ordered_times[0] in cuts or (valid and test and cuts[0] == cuts[1]):
        with pytest.raises(DataError, match="no rows are left"):
            split(frame, by="time", column="t", valid=valid, test=test)
        return
    parts = split(frame, by="time", column="t", valid=valid, test=test)
    assert set(parts) == {"train", *(["valid"] if valid else []), *(["test"] if test else [])}
    assert sorted(r for p in parts.values() for r in p["row"]) == list(range(len(times)))
    ordered = [parts[n]["t"] for n in ("train", "valid", "test") if n in parts]
    for earlier, later in pairwise(ordered):
        assert max(earlier) < min(later)
    assert len(parts["train"]) <= round(rows * (1 - (valid + test)))
    for part in parts.values():
        assert part["row"].is_sorted()


def test_distinct_times_give_the_shares_asked_for() -> None:
    parts = split(pl.DataFrame({"t": list(range(1000))[::-1]}), by="time", column="t", valid=0.1, test=0.2)
    assert {k: len(v) for k, v in parts.items()} == {"train": 700, "valid": 100, "test": 200}
    assert parts["test"]["t"].min() == 800


@pytest.mark.parametrize("kind", ["datetime", "text", "mixed text", "zoned text", "number text"])
def test_times_of_other_types(kind: str) -> None:
    moments = [datetime(2024, 1, 1) + timedelta(days=i) for i in (5, 0, 3, 9, 1, 2, 4, 6, 7, 8)]
    series = {
        "datetime": pl.Series(moments),
        "text": pl.Series([m.isoformat() for m in moments]),
        "mixed text": pl.Series([m.isoformat(" ") if m.day % 2 else f"{m.date()}" for m in moments]),
        "zoned text": pl.Series([f"{m.isoformat()}{'+00:00' if m.day % 2 else 'Z'}" for m in moments]),
        "number text": pl.Series([str(m.timestamp()) for m in moments]),
    }[kind]
    parts = split(pl.DataFrame({"t": series, "row": range(10)}), by="time", column="t", valid=0.2, test=0.1)
    assert parts["test"]["row"].to_list() == [3]
    assert parts["valid"]["row"].to_list() == [8, 9]


def test_time_splits_need_times() -> None:
    with pytest.raises(DataError, match="row 2: no value in column 't'"):
        split(pl.DataFrame({"t": [1, None, 3]}), by="time", column="t")
    with pytest.raises(DataError, match="neither numbers nor ISO dates"):
        split(pl.DataFrame({"t": ["x", "y"]}), by="time", column="t")
    with pytest.raises(DataError, match=r"no column 'tt'. Did you mean 't'"):
        split(pl.DataFrame({"t": [1, 2]}), by="time", column="tt")
    with pytest.raises(DataError, match="no rows are left for valid"):
        split(pl.DataFrame({"t": [1, 1, 1, 2, 2, 2]}), by="time", column="t", valid=0.2, test=0.2)


def reference_draw(seed: int, *hashes: int) -> int:
    state = mix(seed)
    for value in hashes:
        state = mix(state ^ value)
    return state


def place(draw: int, valid: float, test: float) -> str:
    if draw < int(test * 2**64):
        return "test"
    return "valid" if draw < int(test * 2**64) + int(valid * 2**64) else "train"


def test_hash_splits_follow_the_documented_hash() -> None:
    users = [f"u{i % 50}" for i in range(400)]
    frame = pl.DataFrame({"user": users, "day": [i % 7 for i in range(400)], "row": range(400)})
    parts = split(frame, by="hash", columns=["user", "day"], valid=0.2, test=0.3, seed=9)
    for name, part in parts.items():
        assert part.columns == frame.columns
        for user, day, _ in part.iter_rows():
            assert place(reference_draw(9, hash_text(user), mix(day)), 0.2, 0.3) == name
    assert sum(map(len, parts.values())) == 400


def test_hash_splits_by_row_number() -> None:
    frame = pl.DataFrame({"row": range(3000)})
    parts = split(frame, by="hash", valid=0.1, test=0.1)
    expected = [place(reference_draw(0, mix(i)), 0.1, 0.1) for i in range(3000)]
    for name, part in parts.items():
        assert part.columns == ["row"]
        assert part["row"].to_list() == [i for i, e in enumerate(expected) if e == name]
    assert 240 < len(parts["valid"]) < 360
    assert split(frame, by="hash", seed=1)["test"]["row"].to_list() != parts["test"]["row"].to_list()


def test_column_splits() -> None:
    frame = pl.DataFrame({"fold": [1, 2, 3, 4, 5], "late": [True, False, False, True, False]})
    parts = split(frame, by="column", column="fold", valid=4, test=[5, 1])
    assert {k: v["fold"].to_list() for k, v in parts.items()} == {"train": [2, 3], "valid": [4], "test": [1, 5]}
    assert split(frame, by="column", column="late", test=True)["test"]["fold"].to_list() == [1, 4]
    texts = frame.with_columns(pl.col("fold").cast(pl.String))
    assert split(texts, by="column", column="fold", test=[5])["test"]["fold"].to_list() == ["5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": [9]}, r"no row has 'fold' in 9 \(valid\)"),
        ({}, "give the values of `valid`, of `test`, or of both"),
        ({"valid": [1], "test": [1, 2]}, "1 is listed under valid and under test"),
        ({"valid": [1, 2], "test": [3]}, "no rows are left for train"),
    ],
)
def test_column_splits_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(pl.DataFrame({"fold": [1, 2, 3]}), by="column", column="fold", **options)


class Official(Memory):
    """A source with an official train and test part."""

    def scan(self, name: str) -> pl.LazyFrame:
        if name not in ("train", "test"):
            raise MissingSplit(f"no {name!r} split")
        return self.frame.lazy().filter(pl.col("part") == name).drop("part")


def test_a_rule_divides_the_train_part_of_a_source_with_an_official_test_part() -> None:
    frame = pl.DataFrame({"row": range(1000), "part": ["train"] * 800 + ["test"] * 200})
    rule = HashSplit(by="hash", valid=0.1, test=0)
    source = Official(frame)
    parts = {name: rows.collect()["row"].to_list() for name, rows in split_frames(source, rule).items()}
    assert parts["test"] == list(range(800, 1000))
    assert sorted(parts["train"] + parts["valid"]) == list(range(800))
    assert 40 < len(parts["valid"]) < 120
    assert {n: rows.scanned for n, rows in split_rows(source, rule).items()} == dict(
        train="train", valid="train", test="test"
    )


def test_a_split_given_twice_is_refused() -> None:
    frame = pl.DataFrame({"row": range(1000), "part": ["train"] * 800 + ["test"] * 200})
    rule = HashSplit(by="hash", valid=0.1, test=0.1)
    with pytest.raises(DataError, match="the source gives 'test' rows, and the rule takes some"):
        split_frames(Official(frame), rule)
