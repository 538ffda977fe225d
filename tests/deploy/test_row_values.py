"""The encoder of a bundle gives the ids and numbers of the training encoder, for any raw value of any type."""

import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import FIRST_ID
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.vocabulary import Vocabulary
from recsys.deploy.encode import Encoded, RowEncoder
from recsys.deploy.golden import batch_of
from recsys.deploy.spec import EncoderSpec
from recsys.deploy.write import spec_of
from recsys.errors import DataError, RequestError


def encoder_of(frame: pl.DataFrame, **block: Any) -> Encoder:
    return Encoder.fit(frame.lazy(), DataConfig.model_validate({"source": {}, "label": "y", **block}))


def rows_of(encoder: Encoder) -> RowEncoder:
    spec = EncoderSpec.of_json(spec_of(encoder).to_json(), "here")  # through its file, as a bundle has it
    tables = {
        name: dict(zip(found.values.to_list(), range(FIRST_ID, found.rows), strict=True))
        if isinstance(found, Vocabulary)
        else None
        for name, found in encoder.lookups.items()
    }
    return RowEncoder(spec, tables)


LABELS = [0, 1] * 8
WHOLE = [3, 3, -1, 0, 7, 12, 2**40, 2**53, -(2**63), 2**63 - 1, 5, 16_777_215, 1, 2, 9, 10]
WORDS = ["a", "", " ", "12", "é", "e\u0301", "İ", "ß", "ς", "true", "2020-01-02", "x" * 30, "-1", "a|b", "😀", "NA"]
NUMBERS = [0.5, -1.0, 3.0, 1e6, -2e5, 0.0, 7.25, 1.0, 2.0, 3.5, 8.0, -9.0, 4.0, 11.0, 12.0, 13.0]
FRAME = pl.DataFrame(
    {
        "whole": WHOLE,
        "unsigned": pl.Series([abs(n) for n in WHOLE[:8]] + [2**63, 2**64 - 1, *range(20, 26)], dtype=pl.UInt64),
        "word": WORDS,
        "y": LABELS,
        "number": NUMBERS,
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "int": {"categorical": {"whole": {"null_values": [-1, "?", 12]}}},
    "uint": {"categorical": {"unsigned": {}}},
    "large_token": {"categorical": {"whole": {"null_values": [2**53, "a"]}}},
    "text": {"categorical": {"word": {"null_values": ["NA", -1, True]}}},
    "normalized": {"categorical": {"word": {"normalize": ["nfc", "strip", "lower"], "null_values": ["NA"]}}},
    "short": {"categorical": {"word": {"max_bytes": 3}}},
    "hashed_int": {"categorical": {"whole": {"hash_buckets": 1000, "null_values": [7]}}},
    "hashed_text": {"categorical": {"word": {"hash_buckets": 1000, "max_bytes": 12, "normalize": ["strip", "lower"]}}},
    "standard": {"numeric": {"number": {"null_values": [-1, "NA"]}}},
    "log": {"numeric": {"number": {"transform": "log"}}},
    "raw": {"numeric": {"number": {"transform": "raw", "null_values": [True]}}},
    "quantile": {"numeric": {"number": {"transform": "quantile", "buckets": 5}}},
    "lenient": {"numeric": {"number": {}}, "bad_rows": {"number": "map"}},
}
ENCODERS = {kind: encoder_of(FRAME, **block) for kind, block in KINDS.items()}
ROWS = {kind: rows_of(encoder) for kind, encoder in ENCODERS.items()}
COLUMN = {
    kind: next(iter({**block.get("categorical", {}), **block.get("numeric", {})})) for kind, block in KINDS.items()
}

texts = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.integers(-20, 20).map(lambda n: f" {n}.00\u00a0"),
    st.from_regex(r"[+-]?[0-9]{0,25}(\.[0-9]{0,3})?(e[+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        ["nan", "-inf", "Infinity", "+iNf", "1_000", "٣", "0x10", "-0", "+5", "007", "\x1c5", "5\n.0", "1e", "."]
    ),
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(WHOLE),
    st.integers(-(2**64), 2**65),
    st.floats(),
    st.integers(-(2**54), 2**54).map(float),
    texts,
    st.datetimes(min_value=datetime.datetime(1, 1, 2)),
    st.dates(),
    st.just(datetime.date(2020, 1, 2)),
    st.decimals(min_value=-(10**9), max_value=10**9, places=2),
    st.integers(-(10**6), 10**6).map(Decimal),
)


def trained(encoder: Encoder, frame: pl.DataFrame) -> Encoded | None:
    """What the training encoder gives; None where it refuses the rows."""
    try:
        (block,) = encoder.transform(frame.lazy(), labels=False)
    except DataError:
        return None
    batch = batch_of(encoder, block)
    lists = tuple((ids.numpy(), length.numpy()) for ids, length in batch.history.values())
    return Encoded(batch.ids.numpy(), None if batch.values is None else batch.values.numpy(), lists)


def same(found: Encoded, wanted: Encoded) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    assert (found.values is None) == (wanted.values is None)
    if found.values is not None and wanted.values is not None:
        assert found.values.dtype == wanted.values.dtype
        np.testing.assert_array_equal(found.values, wanted.values)
    for (ids, length), (other, expected) in zip(found.lists, wanted.lists, strict=True):
        np.testing.assert_array_equal(length, expected)
        np.testing.assert_array_equal(ids, other)


def compare(kind: str, value: Any) -> None:
    column = COLUMN[kind]
    frame = pl.DataFrame({column: pl.Series([value])})
    wanted = trained(ENCODERS[kind], frame)
    for many in (1, 9, 40):  # row by row, column by column, and many whole numbers at once
        rows = [{column: value, "other": 1}] * many
        if wanted is None:
            with pytest.raises(RequestError, match=rf"^row 1, column '{column}': ") as refused:
                ROWS[kind].rows(rows)
            assert (refused.value.row, refused.value.column) == (1, column)
            continue
        repeated = None if wanted.values is None else np.repeat(wanted.values, many, 0)
        same(ROWS[kind].rows(rows), Encoded(np.repeat(wanted.ids, many, 0), repeated))
    if wanted is None:
        with pytest.raises(RequestError):
            ROWS[kind].frame(frame)
    else:
        same(ROWS[kind].frame(frame), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_read_as_in_training(kind: str) -> None:
    @settings(max_examples=150)
    @given(values)
    def check(value: Any) -> None:
        compare(kind, value)

    check()


@pytest.mark.parametrize("kind", ["int", "uint", "large_token", "hashed_int"])
@settings(max_examples=60)
@given(st.lists(st.sampled_from(WHOLE) | st.integers(-30, 30) | st.integers(-(2**65), 2**65), min_size=32, max_size=80))
def test_many_whole_numbers_are_read_as_each_alone(kind: str, whole: list[int]) -> None:
    column = COLUMN[kind]
    each = [ROWS[kind].rows([{column: value}]).ids for value in whole]
    np.testing.assert_array_equal(ROWS[kind].rows([{column: value} for value in whole]).ids, np.concatenate(each))


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_numbers_are_read_as_in_training(kind: str) -> None:
    column = COLUMN[kind]
    for value in (np.int32(3), np.uint8(7), np.float32(12), np.float64(5), np.float32("nan"), np.bool_(True)):
        wanted = trained(ENCODERS[kind], pl.DataFrame({column: pl.Series(np.array([value]))}))
        assert wanted is not None
        same(ROWS[kind].rows([{column: value}]), wanted)
    if "numeric" not in KINDS[kind]:
        with pytest.raises(RequestError, match="no whole number that its type can hold exactly"):
            ROWS[kind].rows([{column: np.float32(16_777_216)}])


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Int8, pl.UInt64, pl.Int128, pl.Categorical, pl.Decimal(20, 3)])
def test_frames_of_other_types_are_read_as_in_training(dtype: Any) -> None:
    for kind, column in COLUMN.items():
        raw = pl.Series(["3", "7", None, "12"]) if dtype == pl.Categorical else pl.Series([3, 7, None, 12])
        frame = pl.DataFrame({column: raw.cast(dtype)})
        if dtype == pl.Categorical and "numeric" in KINDS[kind]:
            continue
        wanted = trained(ENCODERS[kind], frame)
        assert wanted is not None
        same(ROWS[kind].frame(frame), wanted)
    large = pl.DataFrame({"whole": pl.Series([16_777_216.0], dtype=pl.Float32)})
    assert trained(ENCODERS["int"], large) is None
    with pytest.raises(RequestError, match="no whole number"):
        ROWS["int"].frame(large)


LISTS = pl.DataFrame(
    {
        "item": [1, 2, 3, 4] * 2,
        "shop": ["s", "t", "u", "v"] * 2,
        "price": [1.0, 2.0, None, 5.0] * 2,
        "tags": [["x", "y"], ["z"], [], None] * 2,
        "words": ["a b c", "", None, "c"] * 2,
        "past": [[1, 2, 3, 4, 1], [2], None, [3, 3]] * 2,
        "past_shop": [["s", "t", None, "v", "w"], ["t"], None, ["u", "u"]] * 2,
        "y": [0, 1] * 4,
    }
)
LIST_BLOCK: dict[str, Any] = {
    "categorical": ["item", "shop"],
    "numeric": ["price"],
    "multi_valued": {"tags": {"max_length": 2}, "words": {"separator": " ", "max_length": 3, "null_values": ["b"]}},
    "sequences": {"clicks": {"columns": {"item": "past", "shop": "past_shop"}, "max_length": 4}},
}
LIST_ENCODER = encoder_of(LISTS, **LIST_BLOCK)
LIST_ROWS = rows_of(LIST_ENCODER)
tags = st.none() | st.lists(st.sampled_from(["x", "y", "z", "new", "", None]), max_size=5)
words = st.none() | st.lists(st.sampled_from(["a", "b", "c", "é", ""]), max_size=5).map(" ".join)
past = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 99, None]), st.sampled_from(["s", "t", "?", None])), max_size=7)
list_rows = st.fixed_dictionaries(
    {
        "item": st.none() | st.integers(0, 6),
        "shop": st.none() | st.sampled_from(["s", "t", "new"]),
        "price": st.none() | st.floats(),
        "tags": tags,
        "words": words,
        "events": past,
    }
)


@given(st.lists(list_rows, min_size=1, max_size=12))
def test_lists_are_read_as_in_training(raw: list[dict[str, Any]]) -> None:
    rows = [
        {
            **{name: value for name, value in row.items() if name != "events"},
            "past": [item for item, _ in row["events"]],
            "past_shop": [shop for _, shop in row["events"]],
        }
        for row in raw
    ]
    schema = {name: dtype for name, dtype in LISTS.schema.items() if name != "y"}
    frame = pl.DataFrame({n: [row[n] for row in rows] for n in schema}, schema=schema)
    wanted = trained(LIST_ENCODER, frame)
    assert wanted is not None
    same(LIST_ROWS.rows(rows), wanted)
    same(LIST_ROWS.frame(frame), wanted)


def test_what_is_wrong_with_a_request_is_said_with_its_address() -> None:
    good = {"item": 1, "shop": "s", "price": 1.0, "tags": ["x"], "words": "a", "past": [1], "past_shop": ["s"]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"price": "cheap"}, "row 2, column 'price': 'cheap' is no number"),
        ({"price": [1]}, r"row 2, column 'price': \[1\] is list; expected a number or null"),
        ({"item": {}}, "row 2, column 'item': {} is dict; expected text, a whole number or null"),
        ({"item": 1.5}, "row 2, column 'item': 1.5 is no whole number"),
        ({"tags": 5}, "row 2, column 'tags': 5 is int; expected a list, or text"),
        ({"tags": ["x", {}]}, "row 2, column 'tags': {} is dict"),
        ({"past": [1, 2]}, "row 2, column 'past_shop': 2 events in 'past' but 1 in 'past_shop'"),
    ]
    for change, message in cases:
        with pytest.raises(RequestError, match=rf"^{message}") as refused:
            LIST_ROWS.rows([good, {**good, **change}])
        assert refused.value.row == 2
    bad = {**{name: value for name, value in good.items() if name != "price"}, "prise": 1.0}
    with pytest.raises(RequestError, match=r"^row 2, column 'price': there is no such column. Did you mean 'prise'\?"):
        LIST_ROWS.rows([good, bad])
    with pytest.raises(RequestError, match=r"^column 'price': there is no such column"):
        LIST_ROWS.frame(LISTS.drop("price"))
    with pytest.raises(RequestError, match=r"^row 2: 7 is no object"):
        LIST_ROWS.rows([good, 7])  # type: ignore[list-item]


def test_no_rows_are_none() -> None:
    found = LIST_ROWS.rows([])
    assert found.ids.shape == (0, 3)
    assert [ids.shape for ids, _ in found.lists] == [(0, 1, 1), (0, 1, 1), (0, 1, 2)]
