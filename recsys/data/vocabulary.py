"""Values to ids: vocabularies learned from counts, and hash buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data.hashing import hash_series
from recsys.data.values import STORED, Kind

Ids = npt.NDArray[np.int64]
_RESERVED = np.arange(FIRST_ID)
_DENSE_SPACE = 1 << 16
"""Integer vocabularies whose values span at most this, or four times their size, are looked up in an array."""
_PENDING = 1 << 17
"""Counts of blocks kept beside the total before they are merged; more when the total is larger."""


class Counts:
    """Counts distinct values block by block; memory grows with the distinct values, not with the rows."""

    def __init__(self, kind: Kind) -> None:
        self._total = pl.DataFrame(schema={"value": STORED[kind], "count": pl.UInt64})
        self._pending: list[pl.DataFrame] = []
        self._waiting = 0

    def add(self, values: pl.Series) -> None:
        """Count the values of a block, `[n]` of the kind's stored type; nulls are left out."""
        block = values.drop_nulls().alias("value").value_counts(name="count", sort=False)
        self._pending.append(block.cast({"count": pl.UInt64}))
        self._waiting += block.height
        if self._waiting > max(_PENDING, self._total.height // 2):
            self._merge()

    def _merge(self) -> None:
        self._total = pl.concat([self._total, *self._pending]).group_by("value").agg(pl.col("count").sum())
        self._pending, self._waiting = [], 0

    def table(self) -> pl.DataFrame:
        """Return (value, count) of every distinct value, the most frequent first, ties by value."""
        self._merge()
        return self._total.sort(["count", "value"], descending=[True, False])


@dataclass(frozen=True)
class Vocabulary:
    """The values of a field in id order; value i has id `FIRST_ID + i`.

    Args:
        kind: how values are compared.
        values: `[size]` of the kind's stored type, each once.
    """

    kind: Kind
    values: pl.Series

    @classmethod
    def learn(cls, kind: Kind, counts: pl.DataFrame, min_count: int, max_size: int | None) -> Vocabulary:
        """Keep the values seen at least `min_count` times, at most `max_size` of them, in the order of `counts`."""
        kept = counts.filter(pl.col("count") >= min_count)
        return cls(kind, kept["value"] if max_size is None else kept["value"].head(max_size))

    @property
    def rows(self) -> int:
        """Number of ids, missing and unknown included."""
        return FIRST_ID + len(self.values)

    def reordered(self, order: Ids) -> Vocabulary:
        """Return the same values with other ids: new id i is what was `order[i]`, `[rows]`.

        Raises:
            ValueError: `order` moves the missing or the unknown value, or is no order of the ids.
        """
        if not np.array_equal(np.sort(order), np.arange(self.rows)) or not np.array_equal(order[:FIRST_ID], _RESERVED):
            raise ValueError("an order names every id once, and starts with those of the missing and the unknown value")
        return Vocabulary(self.kind, self.values.gather(order[FIRST_ID:] - FIRST_ID))

    def digest(self) -> str:
        """SHA-256 of the values and their order, in hex."""
        found = hashlib.sha256(f"{self.kind} {len(self.values)}\n".encode())
        if self.kind == "text":
            found.update(self.values.str.len_bytes().to_numpy().astype("<u4").tobytes())
            found.update((self.values.str.join("").item() if len(self.values) else "").encode())
        else:
            found.update(self.values.to_numpy().astype("<i8").tobytes())
        return found.hexdigest()

    def ids(self, values: pl.Series, present: npt.NDArray[np.bool_]) -> Ids:
        """Return the ids of a block.

        Args:
            values: `[n]` of the kind's stored type; null where missing or not convertible.
            present: `[n]`, False where the raw value is missing.

        Returns:
            `[n]` int64: `NULL_ID` where missing, `UNKNOWN_ID` where not in the vocabulary.
        """
        found = self._look_up_text(values) if self.kind == "text" else self._look_up_number(values)
        return np.where(present, found, NULL_ID)

    @cached_property
    def _text_table(self) -> pl.DataFrame:
        return pl.DataFrame({"value": self.values, "id": np.arange(FIRST_ID, self.rows, dtype=np.int64)})

    def _look_up_text(self, values: pl.Series) -> Ids:
        block = values.alias("value").to_frame()
        if len(self.values) > 4 * len(values):  # hash the few values of the block, not the whole vocabulary
            few = self._text_table.join(block.unique(), on="value", how="semi")
        else:
            few = self._text_table
        joined = block.join(few, on="value", how="left", maintain_order="left")
        return joined["id"].fill_null(UNKNOWN_ID).to_numpy()

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        values = self.values.to_numpy()
        order = np.argsort(values)
        return values[order], order + FIRST_ID

    @cached_property
    def _dense(self) -> tuple[int, npt.NDArray[np.int64]] | None:
        """The first value and an array of ids by value, with one UNKNOWN at either end for what lies outside."""
        if not len(self.values):
            return None
        values, ids = self._sorted
        low, span = int(values[0]), int(values[-1]) - int(values[0]) + 1
        if span > max(_DENSE_SPACE, 4 * len(values)) or abs(low) > 1 << 61:
            return None
        table = np.full(span + 2, UNKNOWN_ID, np.int64)
        table[(values - values.dtype.type(low)).astype(np.int64) + 1] = ids
        return low, table

    def _look_up_number(self, values: pl.Series) -> Ids:
        null = values.is_null().to_numpy() if values.null_count() else None
        raw = values.fill_null(0).to_numpy() if null is not None else values.to_numpy()
        if not len(self.values):
            return np.full(len(raw), UNKNOWN_ID, np.int64)
        keys, ids = self._sorted
        if self._dense is not None:
            low, table = self._dense
            high = low + len(table) - 2  # first value above
            below = max(low - 1, 0) if self.kind == "uint" else low - 1
            kept = np.clip(raw, keys.dtype.type(below), keys.dtype.type(high))
            at = kept.astype(np.int64) - (low - 1)
            found = table[at]
        else:
            at = np.minimum(np.searchsorted(keys, raw), len(keys) - 1)
            found = np.where(keys[at] == raw, ids[at], UNKNOWN_ID)
        return found if null is None else np.where(null, UNKNOWN_ID, found)


@dataclass(frozen=True)
class Buckets:
    """Hash buckets: id `FIRST_ID + hash % size`; nothing is unknown, different values may share an id."""

    kind: Kind
    size: int

    @property
    def rows(self) -> int:
        """Number of ids, missing and unknown included."""
        return FIRST_ID + self.size

    def digest(self) -> str:
        """What says which id a value has."""
        return f"{self.kind} {self.size}"

    def ids(self, values: pl.Series, present: npt.NDArray[np.bool_]) -> Ids:
        """Return the ids of a block, as of `Vocabulary.ids`; unknown only where a value does not convert."""
        hashed = (hash_series(values) % np.uint64(self.size)).astype(np.int64) + FIRST_ID
        found = np.where(values.is_null().to_numpy(), UNKNOWN_ID, hashed)
        return np.where(present, found, NULL_ID)


Lookup = Vocabulary | Buckets


def lookup_kind(kinds: Sequence[Kind]) -> Kind:
    """Return how columns that share a vocabulary are compared: as text as soon as their kinds differ."""
    return kinds[0] if len(set(kinds)) == 1 else "text"
