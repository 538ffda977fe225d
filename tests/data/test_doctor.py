"""The examination of logs: planted faults are found with their numbers, and sound data is left in peace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.data import doctor
from recsys.data.doctor import examine
from recsys.data.doctor_facts import Examination, Finding, Limits
from recsys.data.doctor_rules import findings
from recsys.data.doctor_scores import stability_index
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.sources import MissingSplit
from recsys.data.split import split_rows

SECOND = 1_700_000_000


class Given:
    """A source of frames in memory."""

    def __init__(self, frames: Mapping[str, pl.DataFrame]) -> None:
        self.frames = frames

    def scan(self, split: str) -> pl.LazyFrame:
        if split not in self.frames:
            raise MissingSplit(split)
        return self.frames[split].lazy()


def check(frames: pl.DataFrame | Mapping[str, pl.DataFrame], rows: int = 10**6, **data: Any) -> Examination:
    """Examine frames as a recipe with this data block would have them."""
    source = Given(frames if isinstance(frames, Mapping) else {"train": frames})
    limits = data.pop("limits", None)
    config = DataConfig.model_validate({"source": {}, "label": "y", **data})
    split = split_rows(source, config.split)
    encoder = Encoder.fit(doctor.first_rows(split["train"], rows), config)
    return examine(split, config, encoder, rows=rows, limits=limits)


def select(found: Examination, code: str, **where: str) -> list[Finding]:
    return [f for f in found.findings if f.code == code and all(getattr(f, k) == v for k, v in where.items())]


def one(found: Examination, code: str, **where: str) -> Finding:
    (finding,) = select(found, code, **where)
    return finding


def logs(rows: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Logs in which no column tells much about the label."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "y": (rng.random(rows) < 0.3).astype(int),
            "user": rng.integers(0, 40, rows),
            "city": rng.choice(["Köln", "東京", "Oslo"], rows),
            "price": rng.normal(size=rows),
            "id": rng.permutation(rows) + 10**6,
        }
    )


def test_a_copied_label_is_a_leak_and_nothing_else_is() -> None:
    frame = logs().with_columns(
        copy=pl.when(pl.col("y") == 1).then(pl.lit("bought")).otherwise(pl.lit("left")),
        backwards=-pl.col("y") * 2.5,
        shuffled=pl.col("y").shuffle(seed=1),
    )
    found = check(frame, categorical=["user", "city", "copy", "shuffled", "id"], numeric=["price", "backwards"])
    assert {f.column: f.number for f in select(found, "leak")} == {"copy": 1.0, "backwards": 1.0}
    assert all(f.severity == "warning" for f in select(found, "leak"))
    assert found.aucs["label"]["id"] == 0.5
    assert abs(found.aucs["label"]["shuffled"] - 0.5) < 0.05
    assert one(found, "unique").column == "id"


def test_the_auc_of_a_noisy_copy_is_the_one_expected_and_the_limit_decides() -> None:
    """With the label flipped in a share e of the rows, the two scores rank with AUC ((1-e) + (1-e)) / 2 = 1 - e."""
    frame = logs(20_000)
    flip = np.random.default_rng(1).random(20_000) < 0.02
    copy = np.where(flip, 1 - frame["y"].to_numpy(), frame["y"].to_numpy())
    frame = frame.with_columns(copy=pl.Series(copy))
    found = check(frame, categorical=["copy"], numeric=["price"])
    y = frame["y"].to_numpy()
    expected = (copy[y == 1].mean() + 1 - copy[y == 0].mean()) / 2
    assert found.aucs["label"]["copy"] == pytest.approx(expected, abs=1e-3)
    assert not select(found, "leak")
    loose = check(frame, categorical=["copy"], numeric=["price"], limits=Limits(leak=0.97))
    assert one(loose, "leak").column == "copy"


def test_missing_exactly_where_the_label_is_one_is_a_leak() -> None:
    frame = logs().with_columns(late=pl.when(pl.col("y") == 0).then(pl.col("price")))
    found = check(frame, categorical=["user"], numeric=["late"])
    assert one(found, "leak").column == "late"


def test_a_history_that_holds_its_own_target_is_a_leak() -> None:
    frame = logs().with_columns(
        past=pl.when(pl.col("y") == 1)
        .then(pl.concat_list("user", pl.lit(99)))
        .otherwise(pl.concat_list(pl.lit(99), pl.lit(98)))
    )
    sequences = {"seen": {"columns": {"user": "past"}}}
    found = check(frame, categorical=["user"], sequences=sequences)
    assert one(found, "leak").column == "target in seen"
    assert found.aucs["label"]["length of seen"] == 0.5
    assert found.events == {"past": 2.0}


def test_every_task_has_its_own_leaks() -> None:
    frame = logs().with_columns(buy=pl.col("y").shuffle(seed=5)).with_columns(copy=pl.col("buy"))
    found = check(frame, categorical=["user", "copy"], label={"click": "y", "buy": "buy"})
    assert [(f.column, "'buy'" in f.message) for f in select(found, "leak")] == [("copy", True)]


def test_constants_and_row_ids() -> None:
    frame = logs().with_columns(
        same=pl.lit("x"),
        gap=pl.when(pl.col("user") > 3).then(1),
        row=pl.int_range(pl.len()),
        text=pl.col("id").cast(str),
    )
    found = check(frame, categorical=["same", "gap", "city", "id", "text"], numeric=["price", "row"])
    assert one(found, "constant").column == "same", "a value beside nulls tells something"
    assert {f.column for f in select(found, "unique")} == {"id", "text", "row"}, "measurements may all differ"
    assert found.columns["city"].distinct == 3
    assert not select(found, "leak")
    with_twin = pl.concat([frame, frame.head(1)])
    assert not select(check(with_twin, categorical=["id"]), "unique")


def test_null_and_unknown_rates_equal_a_slow_count() -> None:
    rng = np.random.default_rng(2)
    frames = {}
    for split, rows, values in (("train", 700, 30), ("valid", 300, 45), ("test", 250, 60)):
        raw = [
            None if rng.random() < 0.1 else "?" if rng.random() < 0.1 else f"v{rng.integers(values)}"
            for _ in range(rows)
        ]
        number = [None if rng.random() < 0.2 else rng.random() for _ in range(rows)]
        tags = [[f"t{rng.integers(values)}" for _ in range(rng.integers(0, 4))] for _ in range(rows)]
        frames[split] = pl.DataFrame({"y": rng.integers(0, 2, rows), "c": raw, "n": number, "tags": tags}, strict=False)
    found = check(
        frames,
        categorical={"c": {"min_count": 15, "null_values": ["?"]}},
        numeric=["n"],
        multi_valued={"tags": {"min_count": 10}},
    )
    seen = Counter(v for v in frames["train"]["c"].to_list() if v not in (None, "?"))
    known = {v for v, n in seen.items() if n >= 15}
    tagged = Counter(t for tags in frames["train"]["tags"].to_list() for t in tags)
    tags_known = {t for t, n in tagged.items() if n >= 10}
    for split, frame in frames.items():
        values = frame["c"].to_list()
        missing = [v in (None, "?") for v in values]
        unknown = [v not in (None, "?") and v not in known for v in values]
        assert found.columns["c"].null[split] == pytest.approx(sum(missing) / len(values))
        assert found.columns["c"].unknown[split] == pytest.approx(sum(unknown) / len(values))
        numbers = frame["n"].to_list()
        assert found.columns["n"].null[split] == pytest.approx(sum(x is None for x in numbers) / len(numbers))
        lists = frame["tags"].to_list()
        events = [t for tags in lists for t in tags]
        assert found.columns["tags"].null[split] == pytest.approx(sum(not tags for tags in lists) / len(lists))
        assert found.columns["tags"].unknown[split] == pytest.approx(
            sum(t not in tags_known for t in events) / len(events)
        )
    assert found.columns["n"].unknown == {}
    assert found.columns["c"].ids == len(known) + 2
    assert {f.split for f in select(found, "unknown", column="c")} >= {"test"}


def test_numbers_that_are_not_finite_are_told() -> None:
    config = DataConfig.model_validate({"source": {}, "label": "y", "numeric": ["price"]})
    found = check(logs(), numeric=["price"])
    found.columns["price"].non_finite["train"] = 30
    (finding,) = [f for f in findings(found, config, Limits()) if f.column == "price"]
    assert (finding.code, finding.severity, finding.number) == ("non-finite", "note", 30 / 2000)


def test_copies_are_counted_exactly() -> None:
    base = logs(1000).unique(["user", "city", "price"], maintain_order=True)
    inputs = {"categorical": ["user", "city"], "numeric": ["price"]}
    train, other = base.head(600), base.tail(300)
    flipped = train.slice(40, 7).with_columns(y=1 - pl.col("y"))
    frames = {
        "train": pl.concat([train, train.head(11)]),
        "valid": pl.concat([other.head(150), train.slice(100, 25), flipped]),
        "test": pl.concat([other.tail(150), train.slice(200, 1), other.head(2)]),
    }
    found = check(frames, **inputs).duplicates
    assert found is not None
    assert found.exact
    got = {name: (r.rows, r.whole, r.inputs) for name, r in found.within.items()}
    assert got == {"train": (611, 11, 11), "valid": (182, 0, 0), "test": (153, 0, 0)}
    across = {name: (r.rows, r.whole, r.inputs) for name, r in found.across.items()}
    assert across == {("valid", "train"): (182, 25, 32), ("test", "train"): (153, 1, 1), ("test", "valid"): (153, 2, 2)}
    assert found.contradicted == 0
    told = check(frames, **inputs, limits=Limits(duplicates=0.1))
    severity = {(f.split, round((f.number or 0) * 1000)): f.severity for f in select(told, "duplicates")}
    assert severity == {("valid", 137): "error", ("test", 7): "note", ("test", 13): "warning", ("train", 18): "note"}


def test_rows_with_both_labels_are_counted() -> None:
    frame = pl.DataFrame({"y": [0, 1, 1, 0, 1, 0], "a": [1, 1, 1, 2, 3, 3], "b": ["x", "x", "x", "x", None, None]})
    found = check(frame, categorical=["a", "b"])
    assert found.duplicates is not None
    assert found.duplicates.contradicted == 5
    assert one(found, "contradicted").number == pytest.approx(5 / 6)


def timed(rows: int, first: int, unit: int = 1, seed: int = 0) -> pl.DataFrame:
    times = (np.arange(rows) + first) * unit
    return logs(rows, seed).with_columns(ts=pl.Series(times))


def test_splits_out_of_order() -> None:
    """30 of 200 test rows are not later than the last train row."""
    frames = {"train": timed(500, SECOND), "test": timed(200, SECOND + 470, seed=1)}
    data = {"categorical": ["user"], "context": {"time": "ts"}}
    finding = one(check(frames, **data), "time-order")
    assert (finding.severity, finding.split, finding.number) == ("warning", "test", 0.15)
    later = {**frames, "test": timed(200, SECOND + 500, seed=1)}
    assert not select(check(later, **data), "time-order")
    # A split by time cuts the given train rows; the last of them that trains is number 474.
    by_time = {"by": "time", "column": "ts", "valid": 0.05, "test": 0}
    finding = one(check(frames, **data, split=by_time), "time-order")
    assert (finding.severity, finding.split, finding.number) == ("error", "test", 0.025)


@pytest.mark.parametrize(("unit", "scale"), [("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)])
def test_units_other_than_seconds(unit: str, scale: int) -> None:
    data = {"categorical": ["user"], "context": {"time": "ts"}}
    finding = one(check(timed(300, SECOND, scale), **data), "time-unit")
    assert (finding.severity, finding.number) == ("warning", scale)
    assert unit in finding.message
    mixed = {"train": timed(300, SECOND), "test": timed(300, SECOND + 300, scale, seed=1)}
    errors = [f for f in select(check(mixed, **data), "time-unit") if f.severity == "error"]
    assert [f.split for f in errors] == ["test"]
    assert not select(check(timed(300, SECOND), **data), "time-unit")
    assert not select(check(timed(300, 0), **data), "time-unit"), "small numbers are no clock times"


def test_times_of_nobody() -> None:
    frame = timed(300, SECOND).with_columns(
        ts=pl.when(pl.int_range(300) < 12).then(0).when(pl.int_range(300) >= 295).then(9_999_999_999).otherwise("ts")
    )
    found = check(frame, categorical=["user"], context={"time": "ts"})
    assert sorted((f.number or 0) * 300 for f in select(found, "time-range")) == pytest.approx([5, 12])
    half = timed(300, SECOND).with_columns(
        ts=pl.when(pl.int_range(300) < 100).then(pl.col("ts") * 1000).otherwise("ts")
    )
    found = check(half, categorical=["user"], context={"time": "ts"})
    assert one(found, "time-unit").severity == "error"
    assert one(found, "time-unit").number == pytest.approx(1 / 3)
    assert not select(found, "time-range"), "milliseconds are not the far future"


def test_labels_rare_and_absent() -> None:
    rare = logs(3000).with_columns(y=(pl.int_range(3000) < 40).cast(int))
    finding = one(check(rare, categorical=["user"]), "imbalance")
    assert (finding.severity, finding.number) == ("warning", pytest.approx(40 / 3000))
    some = logs(30_000).with_columns(y=(pl.int_range(30_000) < 200).cast(int))
    assert one(check(some, categorical=["user"]), "imbalance").severity == "note"
    frames = {"train": logs(), "valid": logs(seed=1).with_columns(y=pl.lit(1))}
    found = check(frames, categorical=["user"])
    assert (one(found, "one-class").severity, one(found, "one-class").split) == ("warning", "valid")
    assert one(found, "drift", column="label").number == 1.0


def test_drift_of_values_is_found_and_chance_is_not() -> None:
    frames = {"train": logs(5000), "valid": logs(400, seed=1), "test": logs(5000, seed=2)}
    frames["test"] = frames["test"].with_columns(
        pl.lit("Oslo").alias("city"), pl.col("price") + 2, pl.when(pl.col("id") % 3 > 0).then("user").alias("user")
    )
    found = check(frames, categorical=["user", "city"], numeric=["price"])
    drifted = {(f.split, f.column) for f in select(found, "drift")}
    assert drifted == {("test", "city"), ("test", "price"), ("test", "user")}
    by_hand = stability_index(np.array([30, 10]), np.array([10, 30]))[0]
    assert by_hand == pytest.approx(2 * (20 / 41) * np.log(30.5 / 10.5))


def test_many_rare_values_are_no_drift() -> None:
    """Most values of the later split are unknown, as in any random split of a field with many rare values."""
    rng = np.random.default_rng(4)
    frames = {
        split: logs(rows, seed=seed).with_columns(rare=pl.Series(rng.zipf(1.1, rows) % 10**6))
        for seed, (split, rows) in enumerate([("train", 3000), ("test", 1000)])
    }
    found = check(frames, categorical=["rare"])
    assert found.columns["rare"].unknown["test"] > 0.3
    assert not select(found, "drift")


def test_values_that_cannot_be_encoded_are_a_finding() -> None:
    frames = {"train": logs(), "valid": logs(seed=1), "test": logs(seed=2).with_columns(y=pl.lit(2))}
    found = check(frames, categorical=["user"])
    finding = one(found, "encode")
    assert (finding.severity, finding.split) == ("error", "test")
    assert "expected 0 or 1, found 2" in finding.message
    assert found.duplicates is None
    assert found.findings[0] is finding, "the gravest first"
    assert set(found.drift) == {"valid"}


@pytest.mark.parametrize("batch_rows", [100, 1024])
def test_the_row_of_a_bad_value_is_told(batch_rows: int) -> None:
    test = logs(1000, seed=2).with_columns(y=pl.when(pl.int_range(1000) == 700).then(5).otherwise("y"))
    found = check({"train": logs(), "test": test}, categorical=["user"], batch_rows=batch_rows)
    assert one(found, "encode").message.startswith("cannot be encoded: row 701, label column 'y': expected 0 or 1")


def test_only_the_asked_rows_are_examined_whatever_the_block() -> None:
    frames = {"train": logs(3000), "test": logs(1500, seed=1)}
    found = check(frames, rows=1000, categorical=["user", "city"], numeric=["price"])
    assert {name: (s.rows, s.examined) for name, s in found.splits.items()} == {
        "train": (3000, 1000),
        "test": (1500, 1000),
    }
    small = check(frames, rows=1000, categorical=["user", "city"], numeric=["price"], batch_rows=64)
    assert small.to_json() == found.to_json()
    cut = {name: frame.head(1000) for name, frame in frames.items()}
    expected = check(cut, categorical=["user", "city"], numeric=["price"]).to_json()
    assert {k: v for k, v in found.to_json().items() if k not in ("rows_limit", "splits")} == {
        k: v for k, v in expected.items() if k not in ("rows_limit", "splits")
    }


def test_sound_data_has_no_findings() -> None:
    frames = {"train": logs(5000), "valid": logs(2000, seed=1), "test": logs(2000, seed=2)}
    assert check(frames, categorical=["user", "city"], numeric=["price"]).findings == []


def test_progress_is_told() -> None:
    told = []
    source = Given({"train": logs()})
    config = DataConfig.model_validate({"source": {}, "label": "y", "categorical": ["user"]})
    frames = split_rows(source, None)
    doctor.examine(frames, config, Encoder.fit(frames["train"], config), progress=lambda *a: told.append(a))
    assert told[-1] == ("examine train", 2000)
