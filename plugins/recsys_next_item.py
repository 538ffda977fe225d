"""Rows for "will this user take this item next?" from a log of what users took, with sampled negatives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field as Limits
from pydantic import PositiveInt
from typing_extensions import TypedDict  # typing.TypedDict is no type for pydantic before Python 3.12

from recsys.api import Component, DataError, DataRoot, hookimpl

Ints = npt.NDArray[np.int64]
Share = Annotated[float, Limits(gt=0, lt=0.5)]
Words = npt.NDArray[np.uint64]
SPLITS = ("train", "valid", "test")
ROUNDS = 200
"""Draws per negative before a user is said to have nearly every item."""


class ItemTable(TypedDict):
    """A property of every item: `{path: items.parquet, on: item, column: category}`."""

    path: str
    on: str
    column: str


class UserTable(TypedDict):
    """A property of every user: `{path: users.parquet, on: user_id, column: gender}`."""

    path: str
    on: str
    column: str


class NextItem:
    """Every event of a log as a positive row, with negatives drawn at random and the user's earlier events.

    The columns of a row are those named by `user`, `item` and `time`, then `label` (1, or 0 for a negative),
    `history` (list of the items of the user's earlier events, oldest first) and, with `items`, the item's property
    under its own name and `history_property` (the same of the events). Events of equal time never see each other.
    With `users`, the user's property is there under its own name, and its class under `property_class`: the place of
    the value among all values of that table in ascending order, from 0, and -1 where it is not known; as the context
    `attribute` of a loss, for instance.

    Negatives: of each positive, `negatives` rows with the same user, time and history, whose items are drawn
    independently and uniformly from all items of the log that the user has nowhere in the log. A draw depends on
    nothing but the seed, the user's and the event's place in the log sorted by user and time, and its own number.

    Splits: with `split: last`, a user's last event (with its negatives) is test, the one before it valid, the others
    train; with `split: time`, all events are cut at two moments, equal times staying together. Histories reach back
    over the cut.

    Args:
        path: Parquet file with one row per event.
        user: column of the user.
        item: column of the item.
        time: column that orders a user's events; rows without a value are left out.
        negatives: negatives per positive.
        least: events that a user must have before a row, so that there is a history.
        max_length: newest events kept in a history.
        items: property of the items that is added: `{path, on, column}`; of a list, its last value.
        users: property of the users that is added: `{path, on, column}`.
        split: last or time.
        valid: share of the events for valid, for `split: time`.
        test: share of the events for test, for `split: time`.
        seed: of the negatives.
    """

    def __init__(
        self,
        root: DataRoot,
        *,
        path: str,
        user: str = "user",
        item: str = "item",
        time: str = "time",
        negatives: PositiveInt = 1,
        least: PositiveInt = 1,
        max_length: PositiveInt = 50,
        items: ItemTable | None = None,
        users: UserTable | None = None,
        split: Literal["last", "time"] = "last",
        valid: Share = 0.1,
        test: Share = 0.1,
        seed: int = 0,
    ) -> None:
        self._root, self._path, self._items, self._users = root, path, items, users
        self._user, self._item, self._time = user, item, time
        self._negatives, self._least, self._max_length = negatives, least, max_length
        self._split, self._valid, self._test, self._seed = split, valid, test, seed
        self._rows: pl.DataFrame | None = None

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the rows of `train`, `valid` or `test`, by time, then user; a positive before its negatives.

        Raises:
            DataError: another split; a file or column is missing; a user has nearly every item.
        """
        if split not in SPLITS:
            raise DataError(f"source next_item: no {split!r} split; it gives {', '.join(SPLITS)}")
        if self._rows is None:
            self._rows = self._build()
        return self._rows.lazy().filter(pl.col("__split") == SPLITS.index(split)).drop("__split")

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        names = [self._path, *(table["path"] for table in (self._items, self._users) if table)]
        digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for name in names for f in self._root.find(name)]
        options = (self._user, self._item, self._time, self._negatives, self._least, self._max_length)
        described = (digests, options, self._items, self._split, self._valid, self._test, self._seed)
        return repr(described if self._users is None else (*described, self._users))

    def _build(self) -> pl.DataFrame:
        log = self._read(self._path, (self._user, self._item, self._time))
        log = log.drop_nulls().sort(self._user, self._time, self._item)
        user, taken = _codes(log[self._user]), _codes(log[self._item])
        first = np.flatnonzero(np.diff(user, prepend=-1))[user]  # the user's first event
        moment = log.select(pl.struct(self._user, self._time).rle_id()).to_series().to_numpy().astype(np.int64)
        stop = np.searchsorted(moment, moment)  # one past the newest event that a row may see
        part = self._parts(log, user, first)
        rows = np.flatnonzero(stop - first >= self._least)
        start = np.maximum(first, stop - self._max_length)
        names = log[self._item].unique().sort()  # in the order of the codes
        drawn = self._draw(rows, user, taken, len(names))  # [negatives, rows]
        target = np.concatenate([taken[rows][None], drawn]).T.flatten()  # a positive, then its negatives
        event = np.repeat(rows, 1 + self._negatives)
        frame = log[event].select(self._user, self._time)
        frame = frame.with_columns(
            names.gather(target).alias(self._item),
            pl.Series("label", np.tile(np.arange(1 + self._negatives) == 0, len(rows)).astype(np.int8)),
            _lists("history", log[self._item], start[event], stop[event]),
            pl.Series("__split", part[event]),
        )
        if self._items is not None:
            value = self._property(names, self._items)
            name = self._items["column"]
            frame = frame.with_columns(
                value.gather(target).alias(name),
                _lists(f"history_{name}", value.gather(taken), start[event], stop[event]),
            )
        if self._users is not None:
            users = log[self._user].unique().sort()
            value = self._property(users, self._users)
            every = self._read(self._users["path"], (self._users["column"],)).to_series().drop_nulls().unique().sort()
            place = (
                value.to_frame()
                .join(
                    pl.DataFrame({value.name: every, "__class": np.arange(len(every))}),
                    on=value.name,
                    how="left",
                    maintain_order="left",
                )["__class"]
                .fill_null(-1)
            )
            frame = frame.with_columns(
                value.gather(user[event]).alias(self._users["column"]),
                place.gather(user[event]).alias(f"{self._users['column']}_class"),
            )
        return frame.sort(self._time, maintain_order=True)

    def _parts(self, log: pl.DataFrame, user: Ints, first: Ints) -> Ints:
        """Return which split every event belongs to, `[n]`, as its place in `SPLITS`."""
        if self._split == "last":
            behind = np.bincount(user)[user] - (np.arange(len(user)) - first) - 1  # events after this one
            last: Ints = np.maximum(2 - behind, 0)
            return last
        rank = log[self._time].rank("min").to_numpy() - 1  # events that are strictly earlier
        cuts = [round(len(user) * (1 - self._valid - self._test)), round(len(user) * (1 - self._test))]
        part: Ints = np.searchsorted(cuts, rank, side="right")
        return part

    def _draw(self, rows: Ints, user: Ints, taken: Ints, count: int) -> Ints:
        """Return the negatives of some events, `[negatives, rows]` item codes below `count`."""
        owned = np.unique(user * count + taken)
        which = np.arange(len(rows) * self._negatives)
        event = np.tile(rows, self._negatives)
        found = np.zeros(len(which), np.int64)
        key = _mix(_mix(event.astype(np.uint64)) ^ np.uint64(self._seed % 2**64)) + (which // len(rows)).astype(
            np.uint64
        )
        for turn in range(ROUNDS):
            word = _mix(_mix(key[which]) + np.uint64(turn))
            item = (word % np.uint64(count)).astype(np.int64)
            code = user[event[which]] * count + item
            at = np.minimum(np.searchsorted(owned, code), len(owned) - 1)
            free = owned[at] != code
            found[which[free]] = item[free]
            which = which[~free]
            if not len(which):
                return found.reshape(self._negatives, len(rows))
        raise DataError(f"source next_item: a user of {self._path!r} has nearly all of the {count} items; none is left")

    def _property(self, names: pl.Series, table: ItemTable | UserTable) -> pl.Series:
        """Return the property of the items or users, in the order of `names`; null where the table lacks one."""
        known = self._read(table["path"], (table["on"], table["column"]))
        twice = known.filter(pl.col(table["on"]).is_duplicated())
        if not twice.is_empty():
            raise DataError(f"{table['path']}: {table['on']} {twice[table['on']][0]!r} is there twice")
        if isinstance(known.schema[table["column"]], pl.List):
            known = known.with_columns(pl.col(table["column"]).list.last())
        known = known.with_columns(pl.col(table["on"]).cast(names.dtype))
        found = names.alias(table["on"]).to_frame().join(known, on=table["on"], how="left", maintain_order="left")
        return found[table["column"]]

    def _read(self, path: str, columns: tuple[str, ...]) -> pl.DataFrame:
        files = self._root.find(path)
        frame = pl.scan_parquet(files)
        have = frame.collect_schema().names()
        for column in columns:
            if column not in have:
                raise DataError(f"{files[0]}: no column {column!r}. Columns: {', '.join(have)}")
        return frame.select(columns).collect()


def _codes(values: pl.Series) -> Ints:
    """Return the place of each value among the sorted distinct ones, `[n]`."""
    return values.rank("dense").to_numpy().astype(np.int64) - 1


def _lists(name: str, values: pl.Series, start: Ints, stop: Ints) -> pl.Series:
    """Return `values[start[i]:stop[i]]` for every i as a list."""
    length = stop - start
    place = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    flat = values.gather(np.repeat(start, length) + place).alias(name)
    row = pl.Series("row", np.repeat(np.arange(len(length)), length))
    grouped = pl.DataFrame([row, flat]).group_by("row", maintain_order=True).agg(name)
    every = pl.DataFrame({"row": np.arange(len(length))}).join(grouped, on="row", how="left", maintain_order="left")
    return every[name].fill_null([])


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), `[n] -> [n]`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@hookimpl
def recsys_components() -> list[Component]:
    """Return the source."""
    return [Component("source", "next_item", NextItem)]
