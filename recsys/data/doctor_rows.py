"""Distinct values and repeated rows of logs of any size, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.hashing import U64, hash_series, mix_array

KEPT_VALUES = 1 << 17
"""Distinct values of a column are counted exactly up to this many."""
KEPT_ROWS = 1 << 23
"""Rows of all splits together are compared exactly up to this many."""
_EXACT = 2.0**53


def hash_cells(values: pl.Series) -> U64:
    """Return a hash of every cell, `[n]` uint64: equal for equal values, whichever width or type of number holds them.

    A missing value, NaN and the empty list hash alike in every row: they are the same to the encoder.
    """
    dtype = values.dtype
    if isinstance(dtype, pl.Array):
        values = values.arr.to_list()
    if isinstance(dtype, pl.List | pl.Array):
        return _hash_lists(values)
    if dtype.is_float():
        return _hash_floats(values.cast(pl.Float64))
    if dtype in (pl.Date, pl.Datetime):
        values = values.cast(pl.Datetime("us")).to_physical()
    return hash_series(values)


def _hash_floats(values: pl.Series) -> U64:
    """Hash whole numbers as integers do, all others by their bits."""
    number = values.fill_null(float("nan")).to_numpy()
    whole = (np.abs(number) <= _EXACT) & (np.floor(number) == number)
    bits = np.where(whole, np.where(whole, number, 0.0).astype(np.int64), number.view(np.int64))
    return np.where(np.isnan(number), np.uint64(0), mix_array(bits))


def _hash_lists(values: pl.Series) -> U64:
    length = values.list.len().fill_null(0).to_numpy().astype(np.int64)  # [n]
    full = length > 0
    total = np.zeros(len(length), np.uint64)
    if full.any():
        events = hash_cells(values.filter(pl.Series(full)).explode())  # [E]
        count = length[full]
        first = np.cumsum(count) - count
        position = np.arange(len(events)) - np.repeat(first, count)
        total[full] = np.add.reduceat(mix_array(events ^ mix_array(position)), first)
    return np.where(full, mix_array(total + length.astype(np.uint64)), np.uint64(0))


def hash_rows(cells: Sequence[U64], rows: int) -> U64:
    """Return a hash of every row from the hashes of its cells, column by column in order."""
    hashed = np.zeros(rows, np.uint64)
    for column in cells:
        hashed = mix_array(hashed ^ column)
    return hashed


def _below(level: int) -> np.uint64:
    """Return the largest hash that is kept at a level: 2^-level of all hashes lie at or below it."""
    return np.uint64((1 << (64 - level)) - 1)


class Distinct:
    """Counts the distinct values of a column.

    Exactly up to `most` values. Above, only values whose hash is small are kept, the bound halving whenever they
    become too many, and the number kept is scaled up (adaptive sampling: Flajolet, Computing 43, 1990; the standard
    error is about 1.2 / sqrt(most)). A value is kept with all its rows, or with none.
    """

    def __init__(self, most: int = KEPT_VALUES) -> None:
        self._most = most
        self._kept = pl.DataFrame(schema={"value": pl.UInt64, "count": pl.UInt32})
        self._pending: list[pl.DataFrame] = []
        self._waiting = 0
        self._level = 0
        self.present = 0

    def add(self, hashed: U64) -> None:
        """Count a block of hashes of present values, `[n]`."""
        self.present += len(hashed)
        if self._level:
            hashed = hashed[hashed <= _below(self._level)]
        block = pl.Series("value", hashed).value_counts(name="count", sort=False)
        self._pending.append(block.cast({"count": pl.UInt32}))
        self._waiting += block.height
        if self._waiting > self._most:
            self._merge()

    def _merge(self) -> None:
        self._kept = pl.concat([self._kept, *self._pending]).group_by("value").agg(pl.col("count").sum())
        self._pending, self._waiting = [], 0
        while self._kept.height > self._most:
            self._level += 1
            self._kept = self._kept.filter(pl.col("value") <= pl.lit(int(_below(self._level)), pl.UInt64))

    def result(self) -> tuple[int, bool, bool]:
        """Return (distinct values, whether that is exact, whether no kept value occurs twice)."""
        self._merge()
        once = bool((self._kept["count"] == 1).all()) and self._kept.height > 0
        return self._kept.height << self._level, self._level == 0, once


@dataclass(frozen=True)
class Repeated:
    """Rows that were there before.

    Args:
        rows: rows that were compared.
        inputs: those whose inputs were there before.
        whole: those whose inputs and labels were there before.
    """

    rows: int
    inputs: int
    whole: int

    @property
    def share(self) -> float:
        """Share of the rows that were there before with inputs and labels."""
        return self.whole / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class Duplicates:
    """Equal rows.

    Args:
        exact: whether all rows were compared; else a share of them that the hash chose, and numbers are scaled up.
        within: split → rows that repeat an earlier row of the same split.
        across: (split, earlier split) → rows of the split that the earlier split has too.
        contradicted: rows of the train split whose inputs it has with other labels too.
    """

    exact: bool
    within: Mapping[str, Repeated]
    across: Mapping[tuple[str, str], Repeated]
    contradicted: int


class RowHashes:
    """Keeps the hashes of rows, to find equal ones within and across splits.

    Exact up to `most` rows. Above, only rows whose inputs' hash is small are kept, so that equal rows are kept or
    dropped together and shares stay unbiased.
    """

    def __init__(self, most: int = KEPT_ROWS) -> None:
        self._most = most
        self._level = 0
        self._kept: dict[str, list[tuple[U64, U64]]] = {}
        self._rows = 0

    def add(self, split: str, inputs: U64, whole: U64) -> None:
        """Keep a block: hashes of the inputs and of inputs with labels, `[n]` each."""
        parts = self._kept.setdefault(split, [])
        parts.append(self._filtered(inputs, whole))
        self._rows += len(parts[-1][0])
        while self._rows > self._most:
            self._level += 1
            self._kept = {name: [self._filtered(*part) for part in some] for name, some in self._kept.items()}
            self._rows = sum(len(part[0]) for some in self._kept.values() for part in some)

    def _filtered(self, inputs: U64, whole: U64) -> tuple[U64, U64]:
        if not self._level:
            return inputs, whole
        small = inputs <= _below(self._level)
        return inputs[small], whole[small]

    def result(self) -> Duplicates:
        """Compare all splits with one another; call once."""
        columns: dict[str, tuple[U64, U64]] = {}
        for split in list(self._kept):
            parts = self._kept.pop(split)
            columns[split] = (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        unique = {split: (np.unique(inputs), np.unique(whole)) for split, (inputs, whole) in columns.items()}

        def scaled(rows: int, inputs: int, whole: int) -> Repeated:
            return Repeated(rows << self._level, inputs << self._level, whole << self._level)

        within = {
            split: scaled(len(inputs), len(inputs) - len(unique[split][0]), len(whole) - len(unique[split][1]))
            for split, (inputs, whole) in columns.items()
        }
        across = {
            (later, earlier): scaled(
                len(columns[later][0]),
                int(_is_in(columns[later][0], unique[earlier][0]).sum()),
                int(_is_in(columns[later][1], unique[earlier][1]).sum()),
            )
            for earlier, later in combinations(columns, 2)
        }
        contradicted = _contradicted(*columns["train"]) << self._level if "train" in columns else 0
        return Duplicates(self._level == 0, within, across, contradicted)


def _is_in(values: U64, known: U64) -> npt.NDArray[np.bool_]:
    """Return which of `values [n]` are in the sorted `known [m]`."""
    if not len(known):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    same: npt.NDArray[np.bool_] = known[at] == values
    return same


def _contradicted(inputs: U64, whole: U64) -> int:
    """Return how many rows have inputs that also occur with other labels."""
    rows = pl.DataFrame({"inputs": inputs, "whole": whole})
    groups = rows.group_by("inputs").agg(several=pl.col("whole").min() != pl.col("whole").max(), rows=pl.len())
    return int(groups.filter("several")["rows"].sum())
