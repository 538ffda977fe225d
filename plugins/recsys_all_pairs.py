"""All pairs of users and items, for losses that learn from what was not observed too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field as Limits
from typing_extensions import TypedDict  # typing.TypedDict is no type for pydantic before Python 3.12

from recsys.api import Component, DataError, DataRoot, hookimpl

Words = npt.NDArray[np.uint64]
SPLITS = ("train", "valid", "test")


class PairTable(TypedDict):
    """A value of pairs: `{path: propensities.parquet, column: propensity}`."""

    path: str
    column: str


class AllPairs:
    """Every pair of a user and an item, observed or not, from tables of the observed pairs.

    The columns of a row are those of `train`, and `observed`: 1 for a pair of that table; 0 for all others, whose
    further columns are 0 too, for no loss may look at them. The users and items are those of all tables. A share of
    the observed pairs, by their hash, is the split `valid`; these are no rows of `train` at all, since as unobserved
    ones they would teach the opposite of what they are. `test` has the pairs of its own table, all observed; they stand
    in `train` as unobserved pairs, without their values.

    Args:
        train: Parquet file of observed pairs: user, item, and numbers such as a rating.
        test: Parquet file of further observed pairs, such as those of a randomised trial.
        user: column of the user.
        item: column of the item.
        rows: all pairs in the split `train`, or the observed ones alone.
        valid: share of the observed pairs that are the split `valid`; 0 for no such split.
        pairs: a table with one more column of every pair, where `train` has it of the observed ones alone at most.
        users: Parquet file with further columns of the users.
        items: Parquet file with further columns of the items; a name that `users` has too gets `item_` before it.
        seed: of the choice of valid pairs.
    """

    def __init__(
        self,
        root: DataRoot,
        *,
        train: str,
        test: str,
        user: str = "user",
        item: str = "item",
        rows: Literal["all", "observed"] = "all",
        valid: Annotated[float, Limits(ge=0, lt=1)] = 0.1,
        pairs: PairTable | None = None,
        users: str | None = None,
        items: str | None = None,
        seed: int = 0,
    ) -> None:
        self._root, self._train, self._test, self._user, self._item = root, train, test, user, item
        self._rows, self._valid, self._pairs, self._seed = rows, valid, pairs, seed
        self._sides = {name: path for name, path in ((user, users), (item, items)) if path is not None}
        self._built: Mapping[str, pl.DataFrame] = {}

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the rows of `train`, `valid` or `test`, by user, then item.

        Raises:
            DataError: another split; a file or column is missing; a pair is there twice.
        """
        known = SPLITS if self._valid else ("train", "test")
        if split not in known:
            raise DataError(f"source all_pairs: no {split!r} split; it gives {', '.join(known)}")
        if not self._built:
            self._built = self._build()
        return self._built[split].lazy()

    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits."""
        return SPLITS if self._valid else ("train", "test")

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        names = [self._train, self._test, *self._sides.values(), *([self._pairs["path"]] if self._pairs else [])]
        digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for name in names for file in self._files(name)]
        options = (self._user, self._item, self._rows, self._valid, self._pairs, self._seed, sorted(self._sides))
        return repr((digests, options))

    def _build(self) -> dict[str, pl.DataFrame]:
        key = [self._user, self._item]
        log, test = (self._observed(path) for path in (self._train, self._test))
        log = log.select(name for name in log.columns if not self._pairs or name != self._pairs["column"])
        missing = sorted(set(log.columns) - set(test.columns))
        if missing:
            raise DataError(f"{self._test}: no column {missing[0]!r}, which {self._train} has")
        chosen = pl.Series(self._hash(log) < self._valid)
        valid, observed = log.filter(chosen), log.filter(~chosen)
        rows = observed.with_columns(observed=pl.lit(1, pl.Int8))
        if self._rows == "all":
            sides = [pl.concat([log.select(name), test.select(name)]).unique().sort(name) for name in key]
            every = sides[0].join(sides[1], how="cross").join(valid.select(key), on=key, how="anti")
            rows = every.join(rows, on=key, how="left").with_columns(pl.exclude(key).fill_null(0))
        splits = {"train": rows, "valid": valid, "test": test.select(log.columns)}
        return {name: self._complete(frame, name) for name, frame in splits.items()}

    def _complete(self, frame: pl.DataFrame, split: str) -> pl.DataFrame:
        """Add what is known of pairs, users and items."""
        key = [self._user, self._item]
        if "observed" not in frame.columns:
            frame = frame.with_columns(observed=pl.lit(1, pl.Int8))
        if self._pairs is not None:
            frame = self._joined(frame, self._pairs["path"], key, (self._pairs["column"],), split)
        for name, path in self._sides.items():
            frame = self._joined(frame, path, [name], None, split)
        return frame.sort(key)

    def _joined(
        self, frame: pl.DataFrame, path: str, on: list[str], columns: tuple[str, ...] | None, split: str
    ) -> pl.DataFrame:
        table = self._read(path, (*on, *(columns or ())))
        table = table.select(*on, *(columns or (name for name in table.columns if name not in on)))
        if table.select(on).is_duplicated().any():
            raise DataError(f"{path}: a row of {', '.join(on)} is there twice")
        table = table.rename({n: f"{on[0]}_{n}" for n in table.columns if n not in on and n in frame.columns})
        table = table.with_columns(pl.col(name).cast(frame.schema[name]) for name in on)
        lacking = frame.join(table, on=on, how="anti")
        if not lacking.is_empty():
            at = ", ".join(f"{name} {lacking[name][0]!r}" for name in on)
            raise DataError(f"{path}: nothing of {at}, which {split} has ({lacking.height} rows in all)")
        return frame.join(table, on=on, how="left", maintain_order="left")

    def _observed(self, path: str) -> pl.DataFrame:
        key = [self._user, self._item]
        frame = self._read(path, tuple(key)).sort(key)
        twice = frame.filter(pl.struct(key).is_duplicated())
        if not twice.is_empty():
            at = ", ".join(f"{name} {twice[name][0]!r}" for name in key)
            raise DataError(f"{path}: the pair of {at} is there twice")
        return frame

    def _read(self, path: str, columns: tuple[str, ...]) -> pl.DataFrame:
        files = self._files(path)
        frame = pl.scan_parquet(files)
        have = frame.collect_schema().names()
        for column in columns:
            if column not in have:
                raise DataError(f"{files[0]}: no column {column!r}. Columns: {', '.join(have)}")
        return frame.collect()

    def _files(self, path: str) -> list[str]:
        return self._root.find(path)

    def _hash(self, log: pl.DataFrame) -> npt.NDArray[np.float64]:
        """A number in [0, 1) of every pair, by its place in the sorted log and the seed."""
        x = _mix(np.arange(log.height, dtype=np.uint64) ^ _mix(np.array([self._seed % 2**64], np.uint64)))
        return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), `[n] -> [n]`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@hookimpl
def recsys_components() -> list[Component]:
    """Return what this plugin brings."""
    return [Component("source", "all_pairs", AllPairs)]
