"""The past events of every row of a log, without leakage: what a row sees is strictly earlier than the row.

For a log of rows (user, time, values) in the order of time, the history of row i is

    H_i = (values of j : j is an event, user_j = user_i, time_j < time_i), oldest first, the newest `max_length`

Rows of equal time never see each other, whatever their order in the log, so a history cannot hold the row itself, nor
what was shown beside it. Which rows are events is a rule of its own (clicks only, say); a row that is no event has a
history all the same. This is the input of models such as DIN (Zhou et al., "Deep Interest Network for Click-Through
Rate Prediction", KDD 2018), whose behaviour sequences end before the impression.

The log is read in blocks. Between blocks only the newest `max_length` events of every user are kept, as numbers of
distinct values: `4 · users · max_length · columns` bytes, up to twice that while the array grows, and the distinct
values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data.hashing import hash_series
from recsys.data.values import kind_of
from recsys.errors import DataError, RecipeError, did_you_mean, listing

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Where = Callable[[pl.Expr], str]
"""Gives "file, row N" of the first row for which an expression holds; called only when an error is raised."""
_EXACT = 2.0**53


class Numbering:
    """Distinct values of a column as 1, 2, …; null is 0. It grows with the values it meets.

    Integers, floats, booleans and dates are told apart by their 64 bits, text by its fixed 64-bit hash and then by the
    text itself.

    Args:
        dtype: of the column; categories and enums are kept as text.
    """

    def __init__(self, dtype: pl.DataType) -> None:
        numeric = dtype.is_numeric() or dtype.is_temporal() or dtype == pl.Boolean
        self._dtype = dtype if numeric else pl.String()
        self.values = pl.Series([None], dtype=self._dtype)
        """`[distinct + 1]`, the value of every number."""
        self._keys = np.empty(0, np.int64)
        self._codes = np.empty(0, np.int32)

    def codes(self, values: pl.Series) -> Codes:
        """Return the numbers of a column's values, `[n]` int32.

        Raises:
            DataError: two different texts have the same hash.
        """
        values = values.cast(self._dtype)
        present = values.is_not_null().to_numpy()
        some = values if present.all() else values.drop_nulls()
        unique, first, inverse = np.unique(self._bits(some), return_index=True, return_inverse=True)
        at = np.searchsorted(self._keys, unique)
        known = at < len(self._keys)
        known[known] = self._keys[at[known]] == unique[known]
        code = np.empty(len(unique), np.int32)
        code[known] = self._codes[at[known]]
        new = ~known
        if new.any():
            code[new] = np.arange(len(self.values), len(self.values) + int(new.sum()))
            self.values = pl.concat([self.values, some.gather(first[new]).alias("")], rechunk=True)
            self._keys = np.insert(self._keys, at[new], unique[new])
            self._codes = np.insert(self._codes, at[new], code[new])
        found = np.zeros(len(values), np.int32)
        found[present] = code[inverse]
        if self._dtype == pl.String and not bool((self.values.gather(found[present]) == some).all()):
            raise DataError(
                f"column {values.name!r}: two different texts have the same 64-bit hash; change one of them"
            )
        return found

    def _bits(self, values: pl.Series) -> Ints:
        if self._dtype == pl.String:
            return hash_series(values).view(np.int64)
        if self._dtype.is_float():
            return values.cast(pl.Float64).to_numpy().view(np.int64)
        if self._dtype == pl.UInt64:
            return values.to_numpy().view(np.int64)
        return values.to_physical().cast(pl.Int64).to_numpy()


def user_type(column: str, dtype: pl.DataType) -> pl.DataType:
    """Return the type that the users of a column are compared as: int64, uint64 or text.

    Raises:
        DataError: the type has no defined text or integer form.
    """
    types: Mapping[str, pl.DataType] = {"int": pl.Int64(), "uint": pl.UInt64(), "text": pl.String()}
    return types[kind_of(column, dtype)]


def users_of(values: pl.Series, where: Where) -> pl.Series:
    """Return a column of users as `user_type` says; NaN counts as null.

    Raises:
        DataError: a number is not whole.
    """
    dtype = user_type(values.name, values.dtype)
    if values.dtype.is_float():
        column = pl.col(values.name)
        wrong = column.is_not_nan() & ((column.floor() != column) | (column.abs() > _EXACT))
        bad = values.to_frame().select(column.filter(wrong).head(1)).to_series()
        if len(bad):
            raise DataError(
                f"{where(wrong)}, column {values.name!r}: {bad[0]!r} is no whole number that a float can hold exactly; "
                "users must be whole numbers or text"
            )
        values = values.fill_nan(None)
    return values.cast(dtype)


@dataclass(frozen=True)
class Windows:
    """Where the histories of n rows lie in a pool of events: row i has `pool[first[i] : stop[i]]`, oldest first.

    Args:
        pool: `[P, C]` int32, the numbers of the events' values.
        first: `[n]` int64, the oldest event of the row's user in the pool.
        stop: `[n]` int64, one past the newest event that the row may see.
    """

    pool: Codes
    first: Ints
    stop: Ints

    def lists(self, column: int, values: pl.Series, max_length: int) -> pl.Series:
        """Return the newest `max_length` events of every row, `[n]` lists; empty where there are none.

        Args:
            column: which of the C columns.
            values: `[distinct + 1]`, the value of every number.
            max_length: of a list.
        """
        events = values.gather(self.pool[:, column])
        start = pl.Series(np.maximum(self.first, self.stop - max_length))
        ranges = pl.select(i=pl.int_ranges(start, pl.Series(self.stop)))
        # Element by element, so Polars may call it once for all lists at once, and does.
        picked = pl.element().map_batches(events.gather, return_dtype=values.dtype, is_elementwise=True)
        return ranges.select(pl.col("i").list.eval(picked)).to_series()


class HistoryBuilder:
    """Histories of a log that comes in the order of time, block by block of any size.

    Args:
        columns: number of columns that an event has, C.
        max_length: events kept per user, L.
    """

    def __init__(self, columns: int, max_length: int) -> None:
        self._max_length = max_length
        # Events before the last time that was seen; user u has the first `_length[u]` of `_state[u]`, oldest first.
        self._state = np.zeros((0, max_length, columns), np.int32)
        self._length = np.zeros(0, np.int64)
        # Events at the last time that was seen: rows of the next block at the same time must not see them.
        self._pending_user = np.zeros(0, np.int64)
        self._pending = np.zeros((0, columns), np.int32)
        self._last: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes held between blocks."""
        return self._state.nbytes + self._length.nbytes + self._pending.nbytes + self._pending_user.nbytes

    def step(self, user: Ints, time: npt.NDArray[Any], event: Bools, values: Codes) -> Windows:
        """Return where the histories of the next rows are, and take their events in.

        Args:
            user: `[n]` int64 from 0; -1 for a row without a user, which has no history and is no event.
            time: `[n]`, not before the last block's, never decreasing, without NaN.
            event: `[n]` bool.
            values: `[n, C]` int32.

        Raises:
            ValueError: the rows are not in the order of time.
        """
        if not len(user):
            return Windows(values, np.zeros(0, np.int64), np.zeros(0, np.int64))
        if not (time[1:] >= time[:-1]).all() or (self._last is not None and not time[0] >= self._last):
            raise ValueError("the rows are not in the order of time")
        # Times as 0, 1, 2, …: 0 is the last time of the block before.
        moved = np.concatenate([[self._last is None or time[0] != self._last], time[1:] != time[:-1]])
        rank = np.cumsum(moved).astype(np.int64)
        self._last = time[-1]
        named = user >= 0
        waiting = len(self._pending_user)
        active, local = np.unique(np.concatenate([self._pending_user, user[named]]), return_inverse=True)
        if not len(active):
            return Windows(values[:0], np.zeros(len(user), np.int64), np.zeros(len(user), np.int64))
        own = np.zeros(len(user), np.int64)
        own[named] = local[waiting:]
        event = event & named
        new = _sorted_by_user(
            np.concatenate([local[:waiting], own[event]]),
            np.concatenate([np.zeros(waiting, np.int64), rank[event]]),
            np.concatenate([self._pending, values[event]]),
        )
        self._grow(int(active[-1]) + 1)
        length = self._length[active]
        pool, first, new_first = self._pool(active, length, new)
        key = new.user * (rank[-1] + 1) + new.rank
        earlier = np.searchsorted(key, own * (rank[-1] + 1) + rank) - new_first[own]
        stop = np.where(named, first[own] + length[own] + earlier, first[own])
        self._keep(active, pool, first, first + length, new, int(rank[-1]))
        return Windows(pool, first[own], stop)

    def _grow(self, users: int) -> None:
        if users > len(self._length):
            more = max(users, 2 * len(self._length)) - len(self._length)
            self._state = np.concatenate([self._state, np.zeros((more, *self._state.shape[1:]), np.int32)])
            self._length = np.concatenate([self._length, np.zeros(more, np.int64)])

    def _pool(self, active: Ints, length: Ints, new: _Events) -> tuple[Codes, Ints, Ints]:
        """Put kept and new events of every active user one after the other.

        Returns:
            (pool `[P, C]`, where each active user begins in it, where each begins among the new events)
        """
        count = np.bincount(new.user, minlength=len(active))
        first, new_first = _begins(length + count), _begins(count)
        pool = np.empty((int((length + count).sum()), self._state.shape[2]), np.int32)
        owner, position = _ragged(length)
        pool[first[owner] + position] = self._state[active[owner], position]
        pool[(first + length - new_first)[new.user] + np.arange(len(new.user))] = new.values
        return pool, first, new_first

    def _keep(self, active: Ints, pool: Codes, first: Ints, kept: Ints, new: _Events, last: int) -> None:
        """Keep the newest events before the last time as state, and those at the last time as pending."""
        past = new.rank < last
        added = np.bincount(new.user[past], minlength=len(active))
        changed = np.flatnonzero(added)
        stop = (kept + added)[changed]
        start = np.maximum(first[changed], stop - self._max_length)
        owner, position = _ragged(stop - start)
        self._state[active[changed][owner], position] = pool[start[owner] + position]
        self._length[active[changed]] = stop - start
        behind = np.cumsum(np.bincount(new.user, minlength=len(active)))[new.user] - np.arange(len(new.user))
        waiting = ~past & (behind <= self._max_length)
        self._pending_user, self._pending = active[new.user[waiting]], new.values[waiting]


@dataclass(frozen=True)
class _Events:
    """Events by user, and of one user by time: `user [E]`, `rank [E]` int64, `values [E, C]` int32."""

    user: Ints
    rank: Ints
    values: Codes


def _sorted_by_user(user: Ints, rank: Ints, values: Codes) -> _Events:
    order = np.argsort(user, kind="stable")
    return _Events(user[order], rank[order], values[order])


def _begins(count: Ints) -> Ints:
    """Return where each of consecutive runs begins, `[A] -> [A]`."""
    return np.cumsum(count) - count


def _ragged(count: Ints) -> tuple[Ints, Ints]:
    """Return (run, position in the run) of every element of consecutive runs, `[A] -> [sum], [sum]`."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - _begins(count)[owner]


@dataclass(frozen=True)
class EventRule:
    """Which rows are events: those where a column is true, equals a value, or is at least a number.

    Args:
        column: of the logs.
        equals: the value, compared as a number in a column of numbers, else as text.
        at_least: the number.
    """

    column: str
    equals: str | None = None
    at_least: float | None = None

    @classmethod
    def parse(cls, text: str, columns: list[str]) -> EventRule:
        """Read `COLUMN`, `COLUMN=VALUE` or `COLUMN>=NUMBER`; nothing is evaluated.

        Raises:
            RecipeError: none of the three, or no such column.
        """
        if text in columns:
            return cls(text)
        name, least, number = text.partition(">=")
        if not least:
            name, _, value = text.partition("=")
        name = name.strip()
        if name not in columns:
            raise RecipeError(
                f"--events {text}: expected COLUMN, COLUMN=VALUE or COLUMN>=NUMBER; no column {name!r}."
                f"{did_you_mean(name, columns)} Columns: {listing(columns)}"
            )
        if least:
            return cls(name, at_least=_number(number, text))
        return cls(name, equals=value.strip())

    def mask(self, values: pl.Series, where: Where) -> Bools:
        """Return which rows are events, `[n]` bool; null is none.

        Raises:
            DataError: a value is no number where one is needed.
            RecipeError: the column has numbers and `equals` is none.
        """
        column, dtype = pl.col(values.name), values.dtype
        if self.equals is not None and not dtype.is_numeric():
            kind_of(values.name, dtype)
            hit = column.cast(pl.String) == self.equals
        elif dtype == pl.Boolean and self.at_least is None:
            hit = column
        else:
            number = self._numbers(values, where)
            if self.equals is not None:
                hit = number == _number(self.equals, f"{self.column}={self.equals}")
            else:
                hit = number != 0 if self.at_least is None else number >= self.at_least
            hit = hit & ~number.is_nan()
        return values.to_frame().select(hit.fill_null(False)).to_series().to_numpy()

    def _numbers(self, values: pl.Series, where: Where) -> pl.Expr:
        column, dtype = pl.col(values.name), values.dtype
        if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null)):
            raise DataError(f"--events: column {values.name!r} is {dtype}; expected numbers or true and false")
        number = (column.str.strip_chars() if dtype == pl.String else column).cast(pl.Float64, strict=False)
        wrong = column.is_not_null() & number.is_null()
        bad = values.to_frame().select(column.filter(wrong).head(1)).to_series()
        if len(bad):
            raise DataError(f"{where(wrong)}, column {values.name!r} (--events): {bad[0]!r} is no number")
        return number


def _number(text: str, rule: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise RecipeError(f"--events {rule}: {text.strip()!r} is no number") from None
    if number != number:
        raise RecipeError(f"--events {rule}: nothing is or exceeds NaN")
    return number
