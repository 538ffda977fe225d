"""Ids of every kind and size, and text as it comes: equal stays equal, and what a type cannot hold is refused."""

import unicodedata
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data.encode import Encoder
from recsys.data.fit import learn
from recsys.data.reading import rows_of
from recsys.data.report import SplitReport
from recsys.data.schema import DataConfig
from recsys.data.values import normalized
from recsys.errors import DataError

WHITE_SPACE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace() and not 0x1C <= c <= 0x1F)


def config(**block: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {}, "label": "y", **block})


def ids(encoder: Encoder, column: pl.Series, report: SplitReport | None = None) -> list[int]:
    frame = pl.DataFrame({"c": column})
    return [n for b in encoder.transform(frame.lazy(), labels=False, report=report) for n in b.ids["c"].tolist()]


def fitted(column: pl.Series, **options: Any) -> Encoder:
    frame = pl.DataFrame({"c": column, "y": [n % 2 for n in range(len(column))]})
    return Encoder.fit(frame.lazy(), config(categorical={"c": options}))


BIG = [2**31 - 1, 2**31, 2**31 + 1, 2**32, 10**9, 2**53, 2**53 + 1, 2**63 - 1, -1, -(2**31) - 1, -(2**63), 0]


@pytest.mark.parametrize("dtype", [pl.Int64, pl.Int128, pl.String])
def test_b27_large_and_negative_ids_stay_apart(dtype: Any) -> None:
    values = pl.Series(BIG, dtype=pl.Int64).cast(dtype)
    encoder = fitted(values)
    found = ids(encoder, values)
    assert sorted(found) == list(range(FIRST_ID, FIRST_ID + len(BIG)))
    # What differs by a single bit, or only in the upper 32, was never seen.
    assert ids(encoder, pl.Series([2**53 + 2, 2**33, 2**62 - 1, 1], dtype=pl.Int64).cast(dtype)) == [UNKNOWN_ID] * 4


@pytest.mark.parametrize("options", [{}, {"hash_buckets": 1000}])
def test_b27_an_id_does_not_depend_on_the_type_that_holds_it(options: dict[str, Any]) -> None:
    small = [5, 7, 16_777_215, 7]
    encoder = fitted(pl.Series(small), **options)
    expected = ids(encoder, pl.Series(small))
    others = (pl.Int32, pl.UInt32, pl.UInt64, pl.Int128, pl.Float32, pl.Float64, pl.String, pl.Decimal(20, 3))
    for dtype in others:
        assert ids(encoder, pl.Series(small).cast(dtype)) == expected, dtype


def test_b27_unsigned_ids_beyond_int64() -> None:
    values = pl.Series([2**64 - 1, 2**63, 1, 2**63], dtype=pl.UInt64)
    assert ids(fitted(values), values) == [4, FIRST_ID, 3, FIRST_ID]
    assert ids(fitted(pl.Series([1, 2])), pl.Series([2**64 - 1, 1], dtype=pl.UInt64)) == [UNKNOWN_ID, FIRST_ID]


@pytest.mark.parametrize("value", [10**20, 2**63, -(2**63) - 1])
def test_b27_ids_beyond_64_bits_are_refused_in_training_and_unknown_in_scoring(value: int) -> None:
    column = pl.Series([1, value], dtype=pl.Int128)
    with pytest.raises(DataError, match=rf"^row 2, column 'c': {value} is no whole number that its type can hold"):
        fitted(column)
    assert ids(fitted(pl.Series([1, 2])), column) == [FIRST_ID, UNKNOWN_ID]
    rows = pl.DataFrame({"c": [1, 2], "g": column, "y": [0, 1]}).lazy()
    with pytest.raises(DataError, match=r"context group 'g': expected a value of 64 bits, found"):
        Encoder.fit(rows, config(categorical=["c"], context={"group": "g"}))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(16_777_217.0, pl.Float32), (16_777_216.0, pl.Float32), (2.0**53, pl.Float64), (1e20, pl.Float64)],
)
def test_b27_floats_that_may_have_been_another_id_are_refused(value: float, dtype: Any) -> None:
    column = pl.Series([1.0, value], dtype=dtype)
    with pytest.raises(DataError, match=r"row 2, column 'c': .* is no whole number that its type can hold exactly"):
        fitted(column)
    with pytest.raises(DataError, match=r"row 2, column 'c': "):
        ids(fitted(pl.Series([1, 2])), column)
    assert ids(fitted(pl.Series([16_777_217, 16_777_216])), pl.Series([16_777_217.0])) == [3]


ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=10)
ODD = st.sampled_from(
    ["İ", "ΑΣ", "ΑΣ ", "ß", "é", "e\u0301", "\u212b", " x\u3000", "\x1cx", "한", "שלום", "👩‍👩‍👧", ""]
)


@settings(max_examples=300)
@given(
    values=st.lists(st.none() | ASSIGNED | ODD, min_size=1, max_size=20),
    steps=st.lists(st.sampled_from(["nfc", "strip", "lower"]), max_size=3),
)
def test_b28_normalised_text_is_that_of_plain_python(values: list[str | None], steps: list[Any]) -> None:
    plain: dict[str, Callable[[str], str]] = {
        "nfc": lambda text: unicodedata.normalize("NFC", text),
        "strip": lambda text: text.strip(WHITE_SPACE),
        "lower": str.lower,
    }
    expected = values
    for step in steps:
        expected = [None if text is None else plain[step](text) for text in expected]
    assert normalized(pl.Series(values, dtype=pl.String), steps).to_list() == expected


NAMES = ["Café", "Cafe\u0301", "café", "CAFÉ ", "\u3000café", "x"]


@pytest.mark.parametrize(
    ("steps", "distinct"), [([], 6), (["nfc"], 5), (["nfc", "strip"], 4), (["nfc", "strip", "lower"], 2), ("lower", 5)]
)
def test_b28_what_is_normalised_is_one_category_everywhere(steps: list[str], distinct: int, tmp_path: Path) -> None:
    encoder = fitted(pl.Series(NAMES), normalize=steps)
    assert encoder.schema.fields[0].rows == FIRST_ID + distinct
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert len(set(ids(again, pl.Series(NAMES)))) == distinct
    hashed = fitted(pl.Series(NAMES), normalize=steps, hash_buckets=10**9)
    assert len(set(ids(hashed, pl.Series(NAMES)))) == distinct
    assert (ids(again, pl.Series(["cafÉ"])) == [UNKNOWN_ID]) == (distinct != 2 and steps != "lower")


def test_b28_a_shared_vocabulary_is_normalised_for_all_its_columns() -> None:
    frame = pl.DataFrame({"a": ["X", "y"], "b": [" x", "Y "], "past": [["X ", "y"], []], "y": [0, 1]})
    block = {"a": {"normalize": ["strip", "lower"]}, "b": {"share": "a"}}
    encoder = Encoder.fit(frame.lazy(), config(categorical=block, sequences={"h": {"columns": {"a": "past"}}}))
    encoded = next(encoder.transform(frame.lazy()))
    assert encoded.ids["a"].tolist() == encoded.ids["b"].tolist()
    assert encoded.history["h"].values[:, 0].tolist() == encoded.ids["a"].tolist()
    with pytest.raises(ValueError, match="normalize and max_bytes belong to the field that is shared"):
        config(categorical={"a": {}, "b": {"share": "a", "normalize": "lower"}})


@pytest.mark.parametrize("options", [{}, {"hash_buckets": 100}])
def test_b28_text_beyond_the_cap_is_unknown_and_counted(options: dict[str, Any]) -> None:
    column = pl.Series(["ä" * 512, "ä" * 513, "x" * 1_000_000, "x" * 1024, None, "y"])
    encoder = fitted(column, **options)
    report = SplitReport()
    found = ids(encoder, column, report)
    assert [n == UNKNOWN_ID for n in found] == [False, True, True, False, False, False]
    assert found[4] == NULL_ID
    assert (report.columns["c"].too_long, report.columns["c"].unknown, report.columns["c"].null) == (2, 2, 1)
    assert "2 too long values in column 'c'" in report.remark()
    if not options:
        assert encoder.schema.fields[0].rows == FIRST_ID + 3
        assert max(len(v) for v in encoder.lookups["c"].values) == 1024
    assert ids(fitted(column, max_bytes=10**6, **options), column).count(UNKNOWN_ID) == 0


def test_b28_text_is_kept_as_it_is_unless_told_otherwise() -> None:
    values = pl.Series(["a", "a ", "A", "é", "e\u0301", "שלום", "👩‍👩‍👧", "", "\u200f"])
    assert len(set(ids(fitted(values), values))) == len(values)


def test_b28_memory_of_counting_is_that_of_the_distinct_values() -> None:
    """Values that repeat take no more memory, however many rows there are."""
    frame = pl.DataFrame({"c": [n % 50 for n in range(20_000)], "y": [n % 2 for n in range(20_000)]})
    learned = learn(rows_of(frame.lazy(), "rows"), config(categorical=["c"], batch_rows=100))
    assert learned.lookups["c"].rows == FIRST_ID + 50


Odd = dict[str, pl.Series]
ODD_TYPES: Odd = {
    "UInt64": pl.Series([1, 2**63, 1, 3], dtype=pl.UInt64),
    "Int128": pl.Series([1, 2, 1, 3], dtype=pl.Int128),
    "Decimal": pl.Series([Decimal("1.00"), Decimal("2.00"), Decimal("1.00"), Decimal("3.00")]),
    "Boolean": pl.Series([True, False, True, None]),
    "Categorical": pl.Series(["a", "b", "a", None], dtype=pl.Categorical),
    "Enum": pl.Series(["a", "b", "a", None], dtype=pl.Enum(["b", "a"])),
    "Date": pl.Series([date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 1), None]),
    "Datetime": pl.Series([datetime(2024, 1, 1), datetime(2024, 1, 2), datetime(2024, 1, 1), None]),
    "Zone": pl.Series([datetime(2024, 1, d) for d in (1, 2, 1, 3)]).dt.replace_time_zone("Asia/Tokyo"),
    "Time": pl.Series([time(1), time(2), time(1), None]),
    "Duration": pl.Series([timedelta(n) for n in (1, 2, 1, 3)]),
    "Binary": pl.Series([b"a", b"b", b"a", None]),
    "List": pl.Series([[1], [2, 3], [1], None]),
    "ListText": pl.Series([["a"], ["b", "c"], ["a"], None]),
    "ListList": pl.Series([[[1]], [[2]], [[1]], None]),
    "Array": pl.Series([[1, 2], [3, 4], [1, 2], None], dtype=pl.Array(pl.Int64, 2)),
    "ListBinary": pl.Series([[b"a"], [b"b"], [b"a"], None]),
    "ListDuration": pl.Series([[timedelta(1)], [timedelta(2)], [timedelta(1)], None]),
    "Struct": pl.Series([{"a": 1}, {"a": 2}, {"a": 1}, None]),
    "Null": pl.Series([None] * 4, dtype=pl.Null),
}  # fmt: skip
ONE = {"UInt64", "Int128", "Decimal", "Boolean", "Categorical", "Enum", "Date", "Datetime", "Zone", "Time"}
NUMBERS = {"UInt64", "Int128", "Decimal", "Boolean"}
MANY = {"List", "ListText", "Array"}
USES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "categorical": ({"categorical": ["c"]}, ONE),
    "numeric": ({"numeric": ["c"]}, NUMBERS),
    "multi_valued": ({"multi_valued": ["c"]}, MANY),
    "sequence": ({"categorical": ["i"], "sequences": {"h": {"columns": {"i": "c"}}}}, MANY),
    "at_least": ({"categorical": ["i"], "label": {"t": {"column": "c", "at_least": 2}}}, NUMBERS - {"Boolean"}),
    "positive": ({"categorical": ["i"], "label": {"t": {"column": "c", "positive": ["1"]}}}, NUMBERS - {"Boolean"}),
    "weight": ({"categorical": ["i"], "context": {"weight": "c"}}, {"UInt64", "Int128", "Decimal"}),
    "time": ({"categorical": ["i"], "context": {"time": "c"}}, {"Int128", "Decimal", "Zone"}),
    "position": ({"categorical": ["i"], "context": {"position": "c"}}, {"Int128", "Decimal"}),
    "group": ({"categorical": ["i"], "context": {"group": "c"}}, {"UInt64", "Int128", "Decimal", "Zone"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_TYPES)
@pytest.mark.parametrize("use", USES)
def test_b34_a_type_is_read_exactly_or_refused_by_name(use: str, name: str) -> None:
    block, fine = USES[use]
    column = ODD_TYPES[name]
    frame = pl.DataFrame({"i": [1, 2, 1, 3], "y": [0, 1, 1, 0], "c": column})
    if name not in fine:
        with pytest.raises(DataError, match=r"'c'") as caught:
            list(Encoder.fit(frame.lazy(), config(**block)).transform(frame.lazy()))
        told = str(caught.value)
        inner = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
        value = "has no value" in told or "found null" in told or "found 9223372036854775808" in told
        assert str(column.dtype) in told or str(inner) in told or value or "needs both classes" in told, told
        return
    encoder = Encoder.fit(frame.lazy(), config(**block))
    encoded = next(encoder.transform(frame.lazy()))
    if use == "categorical":
        found = encoded.ids["c"].tolist()
        assert found[0] == found[2] == FIRST_ID
        assert (found[3] == NULL_ID) == (column[3] is None)
        assert len(set(found)) == 3
    elif use == "numeric":
        value = encoded.values["c"]
        assert value[0] == value[2] != value[1]
        assert bool(np.isnan(value[3])) == (column[3] is None)
    elif use in ("multi_valued", "sequence"):
        ragged = encoded.history["c" if use == "multi_valued" else "h"]
        lists = column.to_list()
        assert ragged.length.tolist() == [len(v or []) for v in lists]
    elif use in ("at_least", "positive"):
        expected = [0, 1, 0, 1] if use == "at_least" else [1, 0, 1, 0]
        assert encoded.label["t"].tolist() == expected
    else:
        value = encoded.context[use]  # type: ignore[index]
        assert value[0] == value[2] != value[1]
        if use == "time" and name == "Zone":
            assert value[0] == datetime(2023, 12, 31, 15).timestamp() - datetime(1970, 1, 1).timestamp()


def test_b34_a_moment_is_one_category_whatever_zone_and_unit_say() -> None:
    moments = pl.Series([datetime(2024, 1, 1, 12), datetime(2024, 1, 2)], dtype=pl.Datetime("us"))
    encoder = fitted(moments)
    expected = ids(encoder, moments)
    utc = moments.dt.replace_time_zone("UTC")
    for other in (moments.cast(pl.Datetime("ms")), moments.cast(pl.Datetime("ns")), utc):
        assert ids(encoder, other) == expected
    assert ids(encoder, utc.dt.convert_time_zone("America/New_York")) == expected
