"""The encoder against a slow reference that encodes one value at a time with dictionaries."""

import json
import math
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data import numeric
from recsys.data.blocks import EncodedColumns
from recsys.data.encode import Encoder
from recsys.data.hashing import hash_text, mix
from recsys.data.report import SplitReport
from recsys.data.schema import DataConfig
from recsys.errors import DataError


def config(**block: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {}, "label": "y", **block})


def encode(encoder: Encoder, frame: pl.DataFrame, **options: Any) -> EncodedColumns:
    """Encode a small frame, blocks put together again."""
    parts = list(encoder.transform(frame.lazy(), **options))
    return EncodedColumns(
        sum(p.rows for p in parts),
        {k: np.concatenate([p.ids[k] for p in parts]) for k in parts[0].ids},
        {k: np.concatenate([p.values[k] for p in parts]) for k in parts[0].values},
        {k: parts[0].history[k] for k in parts[0].history},
        {k: np.concatenate([p.label[k] for p in parts]) for k in parts[0].label},
        {k: np.concatenate([p.context[k] for p in parts]) for k in parts[0].context},
    )


def reference_vocabulary(values: list[Any], min_count: int, max_size: int | None) -> dict[Any, int]:
    counts = Counter(v for v in values if v is not None)
    # Ties go by value; texts compare by their UTF-8 bytes.
    order = sorted(counts, key=lambda v: (-counts[v], v.encode() if isinstance(v, str) else v))
    kept = [v for v in order if counts[v] >= min_count][:max_size]
    return {v: FIRST_ID + i for i, v in enumerate(kept)}


def reference_ids(values: list[Any], vocabulary: dict[Any, int]) -> list[int]:
    return [NULL_ID if v is None else vocabulary.get(v, UNKNOWN_ID) for v in values]


texts = st.one_of(st.none(), st.sampled_from(["a", "b", "é", "中", "🙂", "", " a"]), st.text(max_size=3))
small = st.one_of(st.none(), st.integers(-5, 5))
large = st.one_of(st.none(), st.sampled_from([-(2**62), 0, 2**40, 2**62, 7]), st.integers(-(2**63), 2**63 - 1))
unsigned = st.one_of(st.none(), st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))


@pytest.mark.parametrize(
    ("values", "dtype"), [(texts, pl.String), (small, pl.Int16), (large, pl.Int64), (unsigned, pl.UInt64)]
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_categorical_ids_equal_the_reference(values: Any, dtype: Any, data: Any) -> None:
    train = [*data.draw(st.lists(values, min_size=1, max_size=40)), 1 if dtype != pl.String else "x"]
    later = data.draw(st.lists(values, min_size=1, max_size=40))
    min_count, max_size = data.draw(st.integers(1, 3)), data.draw(st.one_of(st.none(), st.integers(1, 5)))
    labels = [0, 1] * len(train)
    rows = pl.DataFrame({"c": pl.Series(train, dtype=dtype), "y": labels[: len(train)]})
    encoder = Encoder.fit(
        rows.lazy(), config(categorical={"c": {"min_count": min_count, "max_size": max_size}}, batch_rows=7)
    )
    vocabulary = reference_vocabulary(train, min_count, max_size)
    report = SplitReport()
    frame = pl.DataFrame({"c": pl.Series(later, dtype=dtype)})
    found = encode(encoder, frame, labels=False, report=report).ids["c"].tolist()
    assert found == reference_ids(later, vocabulary)
    assert encoder.schema.fields[0].rows == FIRST_ID + len(vocabulary)
    counts = report.column("c")
    assert (counts.null, counts.unknown) == (found.count(NULL_ID), found.count(UNKNOWN_ID))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.none(), st.floats(width=32), st.integers(-100, 100)), min_size=2, max_size=50))
def test_numbers_equal_the_reference(values: list[float | None]) -> None:
    frame = pl.DataFrame({n: pl.Series(values, dtype=pl.Float64) for n in ("s", "l", "r")}).with_columns(
        y=pl.Series(([0, 1] * len(values))[: len(values)])
    )
    real = [v for v in values if v is not None and math.isfinite(v)]
    numeric = {"s": {}, "l": {"transform": "log"}, "r": {"transform": "raw"}}
    block = config(numeric=numeric, batch_rows=5, bad_rows={"non_finite": "map"})
    if not real:
        with pytest.raises(DataError, match="column 's' has no value"):
            Encoder.fit(frame.lazy(), block)
        return
    report = SplitReport()
    found = encode(Encoder.fit(frame.lazy(), block), frame, report=report).values
    logs = [math.copysign(math.log1p(abs(v)), v) for v in real]
    for name, kept, transform in (
        ("s", real, lambda v: v),
        ("l", logs, lambda v: math.copysign(math.log1p(abs(v)), v)),
    ):
        mean = math.fsum(kept) / len(kept)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / len(kept))
        scale = spread if spread > 1e-12 * max(abs(mean), 1) else 1
        if spread > 1e-9 * max(abs(mean), 1) or spread == 0:
            expected = [
                (transform(v) - mean) / scale if v is not None and math.isfinite(v) else math.nan for v in values
            ]
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        found["r"], np.array([v if v is not None and math.isfinite(v) else math.nan for v in values], np.float32)
    )
    assert report.column("s").null == values.count(None)
    assert report.column("s").non_finite == len(values) - len(real) - values.count(None)


def test_quantile_buckets_hold_about_equally_many_rows() -> None:
    values = np.random.default_rng(0).lognormal(0, 2, 10_000)
    frame = pl.DataFrame({"q": values, "y": np.arange(10_000) % 2})
    encoder = Encoder.fit(frame.lazy(), config(numeric={"q": {"transform": "quantile", "buckets": 8}}, batch_rows=999))
    ids = encode(encoder, frame).ids["q"]
    assert np.bincount(ids)[FIRST_ID:].tolist() == [1250] * 8
    order = np.argsort(values)
    assert (np.diff(ids[order]) >= 0).all()
    missing = encode(encoder, pl.DataFrame({"q": [None, math.nan, -1e9, 1e9]}), labels=False).ids["q"]
    assert missing.tolist() == [NULL_ID, NULL_ID, FIRST_ID, FIRST_ID + 7]
    assert not encoder.schema.fields[0].numeric


def test_quantiles_of_a_sample_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numeric, "SAMPLE_ROWS", 500)
    values = np.random.default_rng(1).normal(size=5000)
    frame = pl.DataFrame({"q": values, "y": np.arange(5000) % 2}).lazy()
    specs = [
        Encoder.fit(frame, config(numeric={"q": {"transform": "quantile", "buckets": 4}}, batch_rows=rows)).numerics
        for rows in (64, 1000, 5000)
    ]
    assert specs[0] == specs[1] == specs[2]
    np.testing.assert_allclose(specs[0]["q"].bounds, np.quantile(values, [0.25, 0.5, 0.75]), atol=0.15)


def test_a_large_mean_does_not_drown_the_spread() -> None:
    values = 1e9 + np.tile([0.0, 1.0, 2.0], 100)
    frame = pl.DataFrame({"n": values, "y": np.arange(300) % 2})
    spec = Encoder.fit(frame.lazy(), config(numeric=["n"], batch_rows=7)).numerics["n"]
    assert spec.scale == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_shared_vocabularies_are_learned_from_all_columns() -> None:
    frame = pl.DataFrame({"a": ["x", "x", "y"], "b": ["z", "x", None], "tags": [["y", "w"], [], None], "y": [0, 1, 0]})
    block = config(categorical={"a": None, "b": {"share": "a"}}, multi_valued={"tags": {"share": "a"}})
    encoder = Encoder.fit(frame.lazy(), block)
    vocabulary = reference_vocabulary(["x", "x", "y", "z", "x", "y", "w"], 1, None)
    found = encode(encoder, frame)
    assert found.ids["a"].tolist() == [vocabulary[v] for v in "xxy"]
    assert found.ids["b"].tolist() == [vocabulary["z"], vocabulary["x"], NULL_ID]
    assert found.history["tags"].values[:, 0].tolist() == [vocabulary["y"], vocabulary["w"]]
    assert found.history["tags"].length.tolist() == [2, 0, 0]
    fields = {f.name: f for f in encoder.schema.fields}
    assert (fields["a"].shares, fields["b"].shares, fields["b"].rows) == (None, "a", FIRST_ID + 4)


def test_sequences_share_the_rows_of_their_target_and_keep_the_newest_events() -> None:
    frame = pl.DataFrame(
        {
            "item": [1, 2, 3],
            "cat": ["a", "b", "a"],
            "past_items": [[1, 2, 3, 9], [], [2, None]],
            "past_cats": [["a", "b", "a", "c"], [], ["b", "b"]],
            "y": [0, 1, 0],
        }
    )
    columns = {"item": "past_items", "cat": "past_cats"}
    block = config(categorical=["item", "cat"], sequences={"past": {"columns": columns, "max_length": 3}})
    encoder = Encoder.fit(frame.lazy(), block)
    items = reference_vocabulary([1, 2, 3, 2, 3, 9, 2], 1, None)
    cats = reference_vocabulary(["a", "b", "a", "b", "a", "c", "b", "b"], 1, None)
    report = SplitReport()
    events = encode(encoder, frame, report=report).history["past"]
    assert events.length.tolist() == [3, 0, 2]
    assert events.values.tolist() == [
        [items[2], cats["b"]],
        [items[3], cats["a"]],
        [items[9], cats["c"]],
        [items[2], cats["b"]],
        [NULL_ID, cats["b"]],
    ]
    assert report.column("past_items").cut == 1
    history = encoder.schema.histories[0]
    assert [(c.name, c.rows, c.shares) for c in history.columns] == [
        ("past_items", FIRST_ID + 4, "item"),
        ("past_cats", FIRST_ID + 3, "cat"),
    ]
    assert history.target == ("item", "cat")


def test_lists_may_be_texts_with_separators() -> None:
    lists = pl.DataFrame({"t": [["a", "b"], [], None, ["b"]], "y": [0, 1, 0, 1]})
    joined = pl.DataFrame({"t": ["a;b", "", None, "b"], "y": [0, 1, 0, 1]})
    block = config(multi_valued={"t": {"separator": ";"}})
    from_lists = encode(Encoder.fit(lists.lazy(), block), lists).history["t"]
    from_texts = encode(Encoder.fit(joined.lazy(), block), joined).history["t"]
    assert from_lists.values.tolist() == from_texts.values.tolist()
    assert from_lists.length.tolist() == from_texts.length.tolist() == [2, 0, 0, 1]


def test_hash_buckets_use_the_fixed_hash_and_know_every_value() -> None:
    frame = pl.DataFrame({"t": ["a", "b", None], "n": [5, -1, 7], "y": [0, 1, 0]})
    block = config(categorical={"t": {"hash_buckets": 10}, "n": {"hash_buckets": 1000}})
    encoder = Encoder.fit(frame.lazy(), block)
    unseen = pl.DataFrame({"t": ["unseen", None, "a"], "n": [5, None, -1]})
    found = encode(encoder, unseen, labels=False).ids
    assert found["t"].tolist() == [FIRST_ID + hash_text("unseen") % 10, NULL_ID, FIRST_ID + hash_text("a") % 10]
    assert found["n"].tolist() == [FIRST_ID + mix(5) % 1000, NULL_ID, FIRST_ID + mix(2**64 - 1) % 1000]
    assert [f.rows for f in encoder.schema.fields] == [FIRST_ID + 10, FIRST_ID + 1000]


def test_declared_nulls_are_missing_and_not_unknown() -> None:
    frame = pl.DataFrame({"c": ["?", "a", "?"], "i": [-1, 3, 4], "n": ["NA", "1.5", "2"], "y": [0, 1, 0]})
    block = config(
        categorical={"c": {}, "i": {"null_values": -1}},
        numeric={"n": {"null_values": ["NA"], "transform": "raw"}},
        defaults={"null_values": ["?"]},
    )
    encoder = Encoder.fit(frame.lazy(), block)
    found = encode(encoder, frame)
    assert found.ids["c"].tolist() == [NULL_ID, FIRST_ID, NULL_ID]
    assert found.ids["i"].tolist() == [NULL_ID, FIRST_ID, FIRST_ID + 1]
    assert np.isnan(found.values["n"]).tolist() == [True, False, False]
    assert encoder.schema.fields[0].rows == FIRST_ID + 1


@pytest.mark.parametrize(
    "train",
    [
        pl.Series(["u", "v", "u"], dtype=pl.Categorical),
        pl.Series(["u", "v", "u"], dtype=pl.Enum(["v", "u"])),
        pl.Series([True, False, True]),
        pl.Series([date(2024, 1, 2), date(2024, 1, 1), date(2024, 1, 2)]),
        pl.Series([7.0, 3.0, 7.0], dtype=pl.Float32),
    ],
    ids=["categorical", "enum", "bool", "date", "float"],
)
def test_odd_types_are_vocabularies_too(train: pl.Series) -> None:
    frame = pl.DataFrame({"c": train, "y": [0, 1, 0]})
    encoder = Encoder.fit(frame.lazy(), config(categorical=["c"]))
    assert encode(encoder, frame).ids["c"].tolist() == [FIRST_ID, FIRST_ID + 1, FIRST_ID]


def test_numbers_and_their_text_are_the_same_value_at_prediction() -> None:
    numbers = pl.DataFrame({"c": [5, 12, 12], "y": [0, 1, 0]})
    encoder = Encoder.fit(numbers.lazy(), config(categorical=["c"]))
    as_text = pl.DataFrame({"c": ["12", "5", "abc", None, " 12"]})
    assert encode(encoder, as_text, labels=False).ids["c"].tolist() == [2, 3, UNKNOWN_ID, NULL_ID, 2]
    assert encode(encoder, pl.DataFrame({"c": [12.0, math.nan]}), labels=False).ids["c"].tolist() == [2, NULL_ID]
    texts_encoder = Encoder.fit(numbers.with_columns(pl.col("c").cast(pl.String)).lazy(), config(categorical=["c"]))
    assert encode(texts_encoder, numbers).ids["c"].tolist() == [3, 2, 2]


def test_labels_may_be_ruled() -> None:
    frame = pl.DataFrame({"c": [1, 2, 3, 4], "r": [1, 4, 5, 3], "s": ["buy", "see", "buy", "cart"], "y": [0, 1, 0, 1]})
    block = config(
        categorical=["c"],
        label={
            "liked": {"column": "r", "at_least": 4},
            "bought": {"column": "s", "positive": ["buy", "cart"]},
            "y": "y",
        },
    )
    label = encode(Encoder.fit(frame.lazy(), block), frame).label
    assert {k: v.tolist() for k, v in label.items()} == {
        "liked": [0, 1, 1, 0],
        "bought": [1, 0, 1, 1],
        "y": [0, 1, 0, 1],
    }


def test_context_columns() -> None:
    frame = pl.DataFrame(
        {
            "c": [1, 2],
            "w": [0.5, 2],
            "p": ["1", "3"],
            "g": ["u1", "u2"],
            "t": [date(1970, 1, 2), date(1970, 1, 3)],
            "y": [0, 1],
        }
    )
    block = config(categorical=["c"], context={"weight": "w", "position": "p", "group": "g", "time": "t"})
    found = encode(Encoder.fit(frame.lazy(), block), frame).context
    assert found["weight"].dtype == np.float32
    assert found["weight"].tolist() == [0.5, 2]
    assert found["position"].tolist() == [1, 3]
    assert found["time"].tolist() == [86_400, 172_800]
    assert found["group"].view(np.uint64).tolist() == [hash_text("u1"), hash_text("u2")]


def test_blocks_do_not_change_anything() -> None:
    rng = np.random.default_rng(3)
    frame = pl.DataFrame({"c": rng.integers(0, 50, 1000), "n": rng.normal(size=1000), "y": rng.integers(0, 2, 1000)})
    whole, pieces = (
        encode(Encoder.fit(frame.lazy(), block), frame)
        for block in (config(categorical=["c"], numeric=["n"]), config(categorical=["c"], numeric=["n"], batch_rows=13))
    )
    np.testing.assert_array_equal(whole.ids["c"], pieces.ids["c"])
    np.testing.assert_allclose(whole.values["n"], pieces.values["n"], rtol=1e-6)


def mixed() -> tuple[pl.DataFrame, DataConfig]:
    frame = pl.DataFrame(
        {
            "a/b": ["x", "ü", "x"],
            "u": pl.Series([2**64 - 1, 5, 5], dtype=pl.UInt64),
            "h": ["q", "r", "s"],
            "n": [0.1, 2.5, None],
            "q": [1, 2, 3],
            "tags": [["x"], [], ["ü", "w"]],
            "y": [0, 1, 0],
        }
    )
    block = config(
        categorical={"a/b": {}, "u": {}, "h": {"hash_buckets": 7}},
        numeric={"n": {"transform": "log"}, "q": {"transform": "quantile", "buckets": 3}},
        multi_valued={"tags": {"share": "a/b", "max_length": 1}},
        context={"group": "h"},
    )
    return frame, block


def test_a_saved_encoder_gives_the_same_bits(tmp_path: Path) -> None:
    frame, block = mixed()
    encoder = Encoder.fit(frame.lazy(), block)
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert again.schema == encoder.schema
    before, after = encode(encoder, frame), encode(again, frame)
    for name, ids in before.ids.items():
        assert ids.tolist() == after.ids[name].tolist()
    np.testing.assert_array_equal(before.values["n"], after.values["n"])
    assert before.history["tags"].values.tolist() == after.history["tags"].values.tolist()
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".pkl", ".pickle", ".pt")]


def test_an_edited_vocabulary_is_refused(tmp_path: Path) -> None:
    frame, block = mixed()
    Encoder.fit(frame.lazy(), block).save(tmp_path)
    file = tmp_path / "vocabulary" / "u.parquet"
    pl.read_parquet(file).reverse().write_parquet(file)
    with pytest.raises(DataError, match=r"u\.parquet: the vocabulary was altered"):
        Encoder.load(tmp_path)


def test_a_vocabulary_outside_the_folder_is_refused(tmp_path: Path) -> None:
    frame, block = mixed()
    Encoder.fit(frame.lazy(), block).save(tmp_path)
    body = json.loads((tmp_path / "encoder.json").read_text())
    body["lookups"]["u"]["file"] = "../../secret.parquet"
    (tmp_path / "encoder.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="no plain file name"):
        Encoder.load(tmp_path)
