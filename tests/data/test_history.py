"""Histories: equal to a slow reference, blind to the present and the future, whatever the blocks, files and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data import history, history_files
from recsys.data.history import EventRule, HistoryBuilder, Numbering
from recsys.data.history_files import HistorySpec, Written, write_history
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files, MissingSplit
from recsys.errors import DataError, RecipeError

Row = tuple[int | None, int, bool, int]
ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 3)),
        st.integers(0, 6),
        st.booleans(),
        st.integers(1, 99),
    ),
    max_size=40,
)


def slow(rows: Sequence[Row], max_length: int) -> list[list[int]]:
    """Return every row's history by comparing it with every other row; ties among the past stay in log order."""
    found = []
    for user, time, _, _ in rows:
        past = [(t, i, v) for i, (u, t, event, v) in enumerate(rows) if event and u is not None and u == user]
        past = sorted(entry for entry in past if entry[0] < time)
        found.append([v for _, _, v in past][-max_length:])
    return found


def built(rows: Sequence[Row], max_length: int, cuts: Sequence[int]) -> list[list[int]]:
    """Return every row's history from the builder, fed in blocks that end at `cuts`."""
    builder = HistoryBuilder(2, max_length)
    found = []
    for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        part = rows[low:high]
        windows = builder.step(
            np.array([-1 if u is None else u for u, _, _, _ in part], np.int64),
            np.array([t for _, t, _, _ in part], np.int64),
            np.array([e for _, _, e, _ in part], bool),
            np.array([[v, v + 1] for _, _, _, v in part], np.int32).reshape(-1, 2),
        )
        values = pl.Series(range(102))
        first, second = (windows.lists(column, values, max_length).to_list() for column in (0, 1))
        assert second == [[v + 1 for v in events] for events in first]
        found += first
    return found


@given(ROWS, st.integers(1, 5), st.lists(st.integers(0, 40), max_size=6))
def test_blocks_of_any_size_give_what_comparing_all_rows_gives(
    rows: list[Row], max_length: int, cuts: list[int]
) -> None:
    rows = sorted(rows, key=lambda row: row[1])
    inside = sorted(min(cut, len(rows)) for cut in cuts)
    assert built(rows, max_length, inside) == slow(rows, max_length)


@given(ROWS, st.integers(1, 5))
def test_rows_one_at_a_time(rows: list[Row], max_length: int) -> None:
    rows = sorted(rows, key=lambda row: row[1])
    assert built(rows, max_length, list(range(1, len(rows)))) == slow(rows, max_length)


@given(ROWS.filter(bool), st.integers(1, 5), st.data())
def test_an_event_is_seen_by_later_rows_of_its_user_only(rows: list[Row], max_length: int, data: st.DataObject) -> None:
    rows = sorted(rows, key=lambda row: row[1])
    at = data.draw(st.integers(0, len(rows) - 1))
    user, time, event, _ = rows[at]
    altered = [*rows[:at], (user, time, not event, 100), *rows[at + 1 :]]
    before, after = built(rows, max_length, []), built(altered, max_length, [])
    for i, (other, moment, _, _) in enumerate(rows):
        if before[i] != after[i]:
            assert moment > time
            assert other == user
    later = [i for i, (u, t, _, _) in enumerate(rows) if user is not None and u == user and t > time]
    if later and max_length == 5 and len(slow(rows, 10**6)[later[0]]) < 5:
        assert before[later[0]] != after[later[0]]


def test_many_events_at_one_time_take_no_more_than_the_newest_of_each_user() -> None:
    builder = HistoryBuilder(1, 3)
    ones = np.ones(1000, bool)
    for block in range(20):
        values = np.full((1000, 1), block, np.int32)
        builder.step(np.arange(1000) % 10, np.zeros(1000, np.int64), ones, values)
    assert builder.nbytes < 2000
    seen = builder.step(np.array([4]), np.array([1]), np.ones(1, bool), np.zeros((1, 1), np.int32))
    assert seen.lists(0, pl.Series(range(20)), 3).to_list() == [[19, 19, 19]]


def test_rows_out_of_order_are_refused() -> None:
    builder = HistoryBuilder(1, 3)
    one = (np.ones(1, bool), np.ones((1, 1), np.int32))
    builder.step(np.array([0]), np.array([5]), *one)
    with pytest.raises(ValueError, match="order of time"):
        builder.step(np.array([0]), np.array([4]), *one)


@pytest.mark.parametrize(
    "values",
    [
        pl.Series(["a", None, "b", "a", ""]),
        pl.Series([2**63, None, 1, 2**63], dtype=pl.UInt64),
        pl.Series([-1, 5, None, -1], dtype=pl.Int8),
        pl.Series([0.5, float("nan"), None, 0.5]),
        pl.Series([True, None, False, True]),
        pl.Series([datetime(2024, 1, 1, tzinfo=UTC), None, datetime(1969, 1, 1, tzinfo=UTC)]),
        pl.Series([None, None]),
    ],
    ids=str,
)
def test_numbers_stand_for_the_values_they_were_given_for(values: pl.Series) -> None:
    numbering = Numbering(values.dtype)
    first = numbering.codes(values)
    again = numbering.codes(values.reverse())[::-1]
    assert first.tolist() == again.tolist()
    assert numbering.values.gather(first).equals(values.cast(numbering.values.dtype))
    assert len(numbering.values) == values.n_unique() + (values.null_count() == 0)


def test_texts_with_equal_hashes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "hash_series", lambda values: np.full(len(values), 7, np.uint64))
    numbering = Numbering(pl.String())
    numbering.codes(pl.Series("item", ["a"]))
    with pytest.raises(DataError, match="'item': two different texts"):
        numbering.codes(pl.Series("item", ["b"]))


def nowhere(wrong: pl.Expr) -> str:
    return "row 1"


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("x", [1, 0, None, 2], [True, False, False, True]),
        ("x", [True, False, None], [True, False, False]),
        ("x", ["1", " 0", None], [True, False, False]),
        ("x", [float("nan"), 0.5], [False, True]),
        ("x=4", [4, 4.5, None], [True, False, False]),
        ("x = 4", [4.0, 5.0], [True, False]),
        ("x=buy", ["buy", "view", None], [True, False, False]),
        ("x=true", [True, False, None], [True, False, False]),
        ("x>=4", [3, 4, 5, None], [False, True, True, False]),
        ("x>=0.5", ["0.5", "0.25"], [True, False]),
    ],
)
def test_event_rules(rule: str, values: list[Any], expected: list[bool]) -> None:
    series = pl.Series("x", values, strict=False)
    assert EventRule.parse(rule, ["x", "y"]).mask(series, nowhere).tolist() == expected


def test_a_column_may_be_named_like_a_rule() -> None:
    assert EventRule.parse("a=b", ["a", "a=b"]) == EventRule("a=b")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("clicks", "Did you mean 'click'"),
        ("click>1", "no column 'click>1'"),
        ("click>=one", "'one' is no number"),
        ("click>=nan", "NaN"),
        ("__import__('os')=1", "no column"),
    ],
)
def test_rules_that_are_none_are_refused(rule: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        EventRule.parse(rule, ["click", "user"])


def test_text_that_is_no_number_names_its_row() -> None:
    with pytest.raises(DataError, match=r"row 1, column 'x' .*'yes' is no number"):
        EventRule.parse("x", ["x"]).mask(pl.Series("x", ["1", "yes"]), nowhere)


@dataclass
class Frames:
    """A source of frames."""

    frames: dict[str, pl.DataFrame] = field(default_factory=dict)

    def scan(self, split: str) -> pl.LazyFrame:
        if split not in self.frames:
            raise MissingSplit(split)
        return self.frames[split].lazy()


def config(**sequences: dict[str, Any]) -> DataConfig:
    groups = sequences or {"past": {"columns": {"item": "item_history", "shop": "shop_history"}, "max_length": 3}}
    return DataConfig.model_validate(
        {"source": {"use": "x"}, "label": "click", "categorical": ["user", "item", "shop"], "sequences": groups}
    )


def log(rows: int = 300, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    user = [None if u == 0 else f"u{u}" for u in rng.integers(0, 9, rows)]
    item = [None if i == 0 else int(i) for i in rng.integers(0, 50, rows)]
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user": user,
            "ts": np.sort(rng.integers(0, rows // 3, rows)),
            "item": pl.Series(item, dtype=pl.UInt16),
            "shop": [f"s{i % 7}" if i else None for i in range(rows)],
            "extra": rng.random(rows),
        }
    )


def expected(frame: pl.DataFrame, value: str, max_length: int, event: Callable[[dict[str, Any]], bool]) -> list[Any]:
    rows = list(frame.iter_rows(named=True))
    found = []
    for row in rows:
        past = [
            (r["ts"], i, r[value])
            for i, r in enumerate(rows)
            if event(r) and r["user"] is not None and r["user"] == row["user"] and r["ts"] < row["ts"]
        ]
        found.append([v for _, _, v in sorted(past, key=lambda entry: entry[:2])][-max_length:])
    return found


def read(written: Written) -> pl.DataFrame:
    return pl.concat(pl.read_parquet(path) for path in written.paths.values())


def test_a_log_keeps_its_rows_and_columns_and_gains_the_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_files, "_BLOCK", 64)
    monkeypatch.setattr(history_files, "_FILE_ROWS", 100)
    frame = log()
    groups = {
        "long": {"columns": {"item": "item_history", "shop": "shop_history"}, "max_length": 5},
        "short": {"columns": {"item": "last_items"}, "max_length": 2},
    }
    told: list[int] = []
    spec = HistorySpec("user", "ts", "click")
    written = write_history(
        Frames({"all": frame}), config(**groups), spec, tmp_path / "out", progress=lambda _, n: told.append(n)
    )
    result = read(written)
    assert result.drop("item_history", "shop_history", "last_items").equals(frame)
    assert result["item_history"].to_list() == expected(frame, "item", 5, lambda r: r["click"] == 1)
    assert result["shop_history"].to_list() == expected(frame, "shop", 5, lambda r: r["click"] == 1)
    assert result["last_items"].to_list() == expected(frame, "item", 2, lambda r: r["click"] == 1)
    assert result.schema["item_history"] == pl.List(pl.UInt16)
    assert written.rows == {"all": 300}
    assert written.events == frame.filter(pl.col("user").is_not_null())["click"].sum()
    assert written.users == 8
    assert written.lengths == {c: result[c].list.len().sum() for c in ("item_history", "shop_history", "last_items")}
    assert told == [64, 128, 192, 256, 300]
    assert [f.name for f in sorted((tmp_path / "out").iterdir())] == [f"part-0000{i}.parquet" for i in range(3)]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sort", [False, True])
def test_splits_are_one_log(tmp_path: Path, sort: bool) -> None:
    frame = log()
    parts = {"train": frame[:200], "valid": frame[200:230], "test": frame[230:]}
    written = write_history(Frames(parts), config(), HistorySpec("user", "ts", sort=sort), tmp_path / "out")
    assert read(written)["item_history"].to_list() == expected(frame, "item", 3, lambda r: True)
    assert written.rows == {"train": 200, "valid": 30, "test": 70}
    assert written.paths["test"] == tmp_path / "out" / "test"
    assert pl.read_parquet(written.paths["valid"]).drop("item_history", "shop_history").equals(parts["valid"])


def test_sorting_keeps_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_files, "_BLOCK", 70)
    frame = log().sample(fraction=1, shuffle=True, seed=1)
    parts = {"train": frame[:200], "test": frame[200:]}
    spec = HistorySpec("user", "ts", "click>=1", sort=True)
    written = write_history(Frames(parts), config(), spec, tmp_path / "out")
    result = read(written)
    assert result.drop("item_history", "shop_history").equals(frame)
    assert result["item_history"].to_list() == expected(frame, "item", 3, lambda r: r["click"] == 1)
    assert result["shop_history"].to_list() == expected(frame, "shop", 3, lambda r: r["click"] == 1)


@pytest.mark.parametrize(
    "time",
    [
        pl.col("ts").cast(pl.String),
        pl.col("ts").cast(pl.Float32),
        pl.col("ts").cast(pl.UInt64) + 2**63,
        pl.from_epoch("ts").dt.strftime("%Y-%m-%d %H:%M:%S"),
        pl.from_epoch("ts"),
        pl.from_epoch("ts", time_unit="d"),
    ],
    ids=["text", "float", "uint64", "iso text", "datetime", "date"],
)
def test_every_kind_of_time(tmp_path: Path, time: pl.Expr) -> None:
    frame = log(100)
    timed = frame.with_columns(time.alias("ts"))
    written = write_history(Frames({"all": timed}), config(), HistorySpec("user", "ts"), tmp_path / "out")
    assert read(written)["item_history"].to_list() == expected(frame, "item", 3, lambda r: True)
    assert read(written)["ts"].equals(timed["ts"])


def test_a_user_is_the_same_in_files_that_type_it_differently(tmp_path: Path) -> None:
    frame = log(100).with_columns(user=pl.col("user").str.slice(1).cast(pl.Int64))
    parts = {"train": frame[:50], "test": frame[50:].with_columns(pl.col("user").cast(pl.Float64))}
    written = write_history(Frames(parts), config(), HistorySpec("user", "ts"), tmp_path / "out")
    lists = [row for path in written.paths.values() for row in pl.read_parquet(path)["item_history"].to_list()]
    assert lists == expected(frame, "item", 3, lambda r: True)


def test_declared_nulls_of_the_user_have_no_history(tmp_path: Path) -> None:
    frame = log(100)
    body = config().model_dump(exclude_none=True)
    body["categorical"]["user"]["null_values"] = ["u1"]
    marked = DataConfig.model_validate(body)
    written = write_history(Frames({"all": frame}), marked, HistorySpec("user", "ts"), tmp_path / "out")
    without = frame.with_columns(user=pl.when(pl.col("user") != "u1").then("user"))
    assert read(written)["item_history"].to_list() == expected(without, "item", 3, lambda r: True)
    assert read(written)["user"].equals(frame["user"])


def test_one_file_holds_what_a_folder_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_files, "_BLOCK", 50)
    monkeypatch.setattr(history_files, "_FILE_ROWS", 100)
    source, spec = Frames({"all": log()}), HistorySpec("user", "ts")
    folder = write_history(source, config(), spec, tmp_path / "out")
    file = write_history(source, config(), spec, tmp_path / "deep" / "out.parquet")
    assert pl.read_parquet(file.paths["all"]).equals(read(folder))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.parquet"]


def test_joined_columns_become_histories_and_are_left_out_of_the_log(tmp_path: Path) -> None:
    frame = log()
    frame.drop("shop").write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item": range(50), "shop": [f"s{i % 4}" for i in range(50)]}).write_parquet(
        tmp_path / "items.parquet"
    )
    source = Files(DataRoot((tmp_path,)), path="log.parquet", join=({"path": "items.parquet", "on": "item"},))
    keep = frame.drop("shop").columns
    written = write_history(source, config(), HistorySpec("user", "ts"), tmp_path / "out", keep=keep)
    result = read(written)
    assert result.columns == [*keep, "item_history", "shop_history"]
    joined = frame.with_columns(shop=pl.format("s{}", pl.col("item") % 4))
    assert result["shop_history"].to_list() == expected(joined, "shop", 3, lambda r: True)


def files(tmp_path: Path, *frames: pl.DataFrame) -> Files:
    for i, frame in enumerate(frames):
        frame.write_parquet(tmp_path / f"log-{i}.parquet")
    return Files(DataRoot((tmp_path,)), path="log-*.parquet")


def test_disorder_names_file_and_row(tmp_path: Path) -> None:
    frame = log(100)
    late = frame.with_columns(ts=pl.when(pl.int_range(pl.len()) == 20).then(-5).otherwise("ts"))
    source = files(tmp_path, frame.with_columns(pl.col("ts") - 1000), late)
    with pytest.raises(DataError, match=r"log-1\.parquet, row 21, column 'ts': the time is earlier.*--sort"):
        write_history(source, config(), HistorySpec("user", "ts"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_disorder_between_files_and_between_splits(tmp_path: Path) -> None:
    frame = log(100)
    with pytest.raises(DataError, match=r"log-1\.parquet, row 1, column 'ts': the time is earlier"):
        write_history(files(tmp_path, frame, frame), config(), HistorySpec("user", "ts"), tmp_path / "out")
    source = Frames({"train": frame, "test": frame})
    with pytest.raises(DataError, match="the test rows begin before the train rows end"):
        write_history(source, config(), HistorySpec("user", "ts"), tmp_path / "out")


@pytest.mark.parametrize("gap", [None, float("nan")])
@pytest.mark.parametrize("sort", [False, True])
def test_a_row_without_time_is_named(tmp_path: Path, gap: float | None, sort: bool) -> None:
    row = pl.int_range(pl.len()) == 7
    frame = log(20).with_columns(ts=pl.when(row).then(pl.lit(gap, pl.Float64)).otherwise(pl.col("ts").cast(pl.Float64)))
    with pytest.raises(DataError, match=r"log-0\.parquet, row 8, column 'ts': no time"):
        write_history(files(tmp_path, frame), config(), HistorySpec("user", "ts", sort=sort), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (pl.lit([1]).alias("item_history"), "the all rows have the column 'item_history' already"),
        (pl.lit("soon").alias("ts"), "--time: column 'ts' is text that is neither numbers nor ISO dates"),
        (pl.lit([1]).alias("user"), "'user' is List"),
        (pl.lit(True).alias("ts"), "--time: column 'ts' is Boolean"),
        (pl.lit(0.5).alias("user"), "row 1 of the all rows, column 'user': 0.5 is no whole number"),
    ],
)
def test_unusable_columns(tmp_path: Path, change: pl.Expr, told: str) -> None:
    frame = log(20).with_columns(change)
    with pytest.raises(DataError, match=told):
        write_history(Frames({"all": frame}), config(), HistorySpec("user", "ts"), tmp_path / "out")


def test_names_and_places(tmp_path: Path) -> None:
    source, spec = Frames({"train": log(20), "test": log(20)}), HistorySpec("user", "ts")
    with pytest.raises(DataError, match=r"no column 'usr'\. Did you mean 'user'"):
        write_history(source, config(), HistorySpec("usr", "ts"), tmp_path / "out")
    with pytest.raises(RecipeError, match="splits train, test; name a folder"):
        write_history(source, config(), spec, tmp_path / "out.parquet")
    with pytest.raises(DataError, match="exists already"):
        write_history(source, config(), spec, tmp_path)
    twice = {"a": {"columns": {"item": "h"}}, "b": {"columns": {"shop": "h"}}}
    with pytest.raises((RecipeError, ValueError), match="h"):
        write_history(source, config(**twice), spec, tmp_path / "out")
    empty = config().model_copy(update={"sequences": {}})
    with pytest.raises(RecipeError, match="names no history"):
        write_history(source, empty, spec, tmp_path / "out")
