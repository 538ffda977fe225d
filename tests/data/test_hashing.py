"""The fixed hash: golden values, and the vectorised form against the scalar one."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.hashing import hash_series, hash_text, mix, mix_array

# splitmix64 seeded with 0 gives these first three outputs (reference implementation by S. Vigna).
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_splitmix_gives_its_published_stream() -> None:
    gamma = 0x9E3779B97F4A7C15
    assert [mix(i * gamma) for i in range(3)] == SPLITMIX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0xE220A8397B1DCDAF),
        ("a", 0x008DBFB7F6A331DE),
        ("12", 0x0D823746A350AE36),
        ("12345678", 0xDDDE9EF8E528997D),
        ("123456789", 0x78F6DFD894D182D1),
        ("Ünïcødé ✓", 0xE10EB3618C456E84),
    ],
)
def test_text_hash_never_changes(text: str, expected: int) -> None:
    assert hash_text(text) == expected


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), max_size=30))
def test_columns_of_text_hash_like_single_texts(texts: list[str | None]) -> None:
    expected = [0 if t is None else hash_text(t) for t in texts]
    assert hash_series(pl.Series(texts, dtype=pl.String)).tolist() == expected


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_columns_of_integers_hash_like_single_ones(values: list[int]) -> None:
    assert hash_series(pl.Series(values, dtype=pl.Int64)).tolist() == [mix(v % 2**64) for v in values]


def test_the_width_of_an_integer_does_not_matter_but_its_type_does() -> None:
    narrow, wide = pl.Series([12, -3], dtype=pl.Int8), pl.Series([12, -3], dtype=pl.Int64)
    assert hash_series(narrow).tolist() == hash_series(wide).tolist()
    assert hash_series(pl.Series(["12"]))[0] != hash_series(pl.Series([12]))[0]
    assert hash_series(pl.Series([True, False])).tolist() == [mix(1), mix(0)]


def test_many_texts_are_hashed_in_chunks_alike() -> None:
    texts = [f"value-{i}" for i in range(70_000)]
    hashed = hash_series(pl.Series(texts))
    assert [int(h) for h in hashed[[0, 65_535, 65_536, 69_999]]] == [
        hash_text(texts[i]) for i in (0, 65_535, 65_536, 69_999)
    ]
    assert len(np.unique(hashed)) == len(texts)


def test_buckets_fill_evenly() -> None:
    counts = np.bincount((hash_series(pl.Series([f"u{i}" for i in range(20_000)])) % np.uint64(16)).astype(np.int64))
    expected = 20_000 / 16
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square, 15 degrees of freedom: p < 0.0005


def test_mix_array_wraps_like_the_scalar() -> None:
    assert mix_array(np.array([-1, 0, 2**63 - 1])).tolist() == [mix(2**64 - 1), mix(0), mix(2**63 - 1)]
