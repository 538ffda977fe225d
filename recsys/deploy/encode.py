"""Raw rows to the inputs of the graph: one row through prebuilt dicts, many rows column by column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID, NULL_ID, NUMERIC_VALUE_ID, UNKNOWN_ID
from recsys.data.limits import EXACT, EXACT_DOUBLE, LARGEST
from recsys.deploy.spec import EncoderSpec, IdColumn, ListGroup, NumberColumn
from recsys.deploy.values import Floats, IdReader, Ids, NumberReader, plain_numbers, shown
from recsys.errors import RequestError, did_you_mean, listing

if TYPE_CHECKING:
    import polars as pl

Row = Mapping[str, Any]
_SINGLY = 4
"""Up to so many rows are read one by one; more, column by column."""
_PLAIN: frozenset[type] = frozenset((str, int, type(None)))
"""Values of these classes that a dict finds are meant; True and 5.0 are found as well, but read otherwise."""
_MISSED = -1
_USUAL = 1e15
"""Numbers up to it, less a mean up to it, divided by no less than its inverse, are far below the largest float32."""


@dataclass(frozen=True)
class Encoded:
    """Rows as the graph takes them.

    Args:
        ids: `[B, F]` int64.
        values: `[B, F]` float32; None where the model has no numbers.
        lists: for each group (ids `[B, L, K]` int64, length `[B]` int64); L is the longest list of these rows.
    """

    ids: Ids
    values: npt.NDArray[np.float32] | None
    lists: tuple[tuple[Ids, Ids], ...] = ()


class RowEncoder:
    """Encodes raw rows exactly as the training encoder does.

    Args:
        spec: of the bundle.
        tables: vocabulary → value → id; None for hash buckets.
    """

    def __init__(self, spec: EncoderSpec, tables: Mapping[str, dict[Any, int] | None]) -> None:
        self.spec = spec
        self._tables = tables
        self._readers = {c.column: self._reader(c, EXACT_DOUBLE) for c in self._id_columns()}
        singles = [self._readers[c.column] for c in spec.ids]
        self._found, self._singles = [r.table for r in singles], [(r.direct, r.one) for r in singles]
        self._take = _taker([c.column for c in spec.ids])
        self._numbers = _Numbers(spec.numbers)
        self._number_ids = [NUMERIC_VALUE_ID] * len(spec.numbers)
        self._ones = np.ones((_SINGLY, len(spec.ids) + len(spec.numbers)), dtype=np.float32)

    def _id_columns(self) -> Iterable[IdColumn]:
        return chain(self.spec.ids, *(group.columns for group in self.spec.lists))

    def _reader(self, column: IdColumn, exact: float) -> IdReader:
        return IdReader(column, self.spec.vocabularies[column.vocabulary], self._tables[column.vocabulary], exact)

    def rows(self, rows: Sequence[Row]) -> Encoded:
        """Encode rows as JSON gives them.

        Raises:
            RequestError: a column is missing, or a value cannot be read.
        """
        for at, row in enumerate(rows):
            if row.__class__ is not dict and not isinstance(row, Mapping):
                raise RequestError(f"{shown(row)} is no object of column and value", row=at + 1)
        if 0 < len(rows) <= _SINGLY and not self.spec.lists:
            try:
                return self._singly(rows)
            except (KeyError, ValueError):
                pass  # read by column, the error tells where it is
        columns = {name: self._column(rows, name) for name in self.spec.columns}
        return self._columns(columns, self._readers, len(rows))

    def frame(self, frame: pl.DataFrame) -> Encoded:
        """Encode the rows of a Polars frame.

        Raises:
            RequestError: as `rows`.
        """
        columns: dict[str, Any] = {}
        readers = dict(self._readers)
        options = {c.column: c for c in self._id_columns()}
        for name in self.spec.columns:
            if name not in frame.columns:
                raise _no_column(name, frame.columns, None)
            series = frame.get_column(name)
            columns[name] = series.to_list()
            kind = str(series.dtype)
            rounded = next((limit for word, limit in EXACT.items() if word in kind), None)
            if rounded is not None and name in options:
                readers[name] = self._reader(options[name], rounded)
        return self._columns(columns, readers, frame.height)

    def _column(self, rows: Sequence[Row], name: str) -> list[Any]:
        try:
            return [row[name] for row in rows]
        except KeyError:
            at = next(i for i, row in enumerate(rows) if name not in row)
            raise _no_column(name, rows[at], at) from None

    def _singly(self, rows: Sequence[Row]) -> Encoded:
        """A few rows without lists, value by value.

        Raises:
            KeyError: a column is missing.
            ValueError: a value cannot be read.
        """
        ids = [self._ids(row) for row in rows]
        if not self.spec.numbers:
            return Encoded(np.array(ids, dtype=np.int64), None)
        x = self._numbers.rows(rows)
        scaled = self._numbers.scaled(x)
        if scaled is None:
            return self._with_numbers(np.array(ids, dtype=np.int64).reshape(len(rows), -1), self._numbers.coded(x))
        whole = np.array([found + self._number_ids for found in ids], dtype=np.int64)
        values = self._ones[: len(rows)].copy()
        values[:, -x.shape[1] :] = scaled
        return Encoded(whole, values)

    def _ids(self, row: Row) -> list[int]:
        """The ids of one row; few steps of Python, for each of them costs as much as several values."""
        values = self._take(row)
        if not _PLAIN.issuperset(map(type, values)):
            return [one(v) for v, (_, one) in zip(values, self._singles, strict=True)]
        ids = list(map(dict.get, self._found, values, repeat(_MISSED)))
        if _MISSED in ids:
            read = zip(ids, values, self._singles, strict=True)
            ids = [i if i >= 0 else UNKNOWN_ID if v.__class__ is direct else one(v) for i, v, (direct, one) in read]
        return ids

    def _columns(self, columns: Mapping[str, Sequence[Any]], readers: Mapping[str, IdReader], rows: int) -> Encoded:
        ids = np.empty((rows, len(self.spec.ids)), dtype=np.int64)
        for f, column in enumerate(self.spec.ids):
            ids[:, f] = _read(readers[column.column], columns[column.column], column.column)
        lists = tuple(self._group(group, columns, readers, rows) for group in self.spec.lists)
        if not self.spec.numbers:
            return Encoded(ids, None, lists)
        read = self._numbers.many([columns[number.column] for number in self.spec.numbers], rows)
        return self._with_numbers(ids, read, lists)

    def _with_numbers(self, ids: Ids, read: tuple[Ids, Floats], lists: tuple[tuple[Ids, Ids], ...] = ()) -> Encoded:
        number_ids, numbers = read
        whole = np.concatenate([ids, number_ids], axis=1)
        if not self.spec.has_values:
            return Encoded(whole, None, lists)
        values = np.ones(whole.shape, dtype=np.float32)
        values[:, ids.shape[1] :] = numbers
        return Encoded(whole, values, lists)

    def _group(
        self, group: ListGroup, columns: Mapping[str, Sequence[Any]], readers: Mapping[str, IdReader], rows: int
    ) -> tuple[Ids, Ids]:
        """`(ids [B, L, K], length [B])`."""
        events = [lists_of(columns[c.column], c.column, group) for c in group.columns]
        whole = [[len(row) for row in column] for column in events]
        for column, sizes in zip(group.columns[1:], whole[1:], strict=True):
            if sizes != whole[0]:
                at = next(i for i, (a, b) in enumerate(zip(whole[0], sizes, strict=True)) if a != b)
                first = group.columns[0].column
                raise RequestError(
                    f"{whole[0][at]} events in {first!r} but {sizes[at]} in {column.column!r}; "
                    "the columns of a sequence must have one value per event each",
                    row=at + 1,
                    column=column.column,
                )
        length = np.minimum(np.array(whole[0], dtype=np.int64), group.max_length)
        longest = max(int(length.max(initial=0)), 1)
        ids = np.full((rows, longest, len(group.columns)), NULL_ID, dtype=np.int64)
        inside = np.arange(longest) < length[:, None]  # [B, L]
        for k, (column, lists) in enumerate(zip(group.columns, events, strict=True)):
            kept = [row[-group.max_length :] for row in lists]
            ids[inside, k] = _read_events(readers[column.column], kept, column.column)
        return ids, length


class _Numbers:
    """The columns of numbers, read one by one and then scaled together."""

    def __init__(self, columns: Sequence[NumberColumn]) -> None:
        self._columns = columns
        self._readers = [(c.column, NumberReader(c)) for c in columns]
        self._take = _taker([c.column for c in columns])
        self._ones = [reader.one for _, reader in self._readers]
        self._all_plain = all(reader.plain for _, reader in self._readers)
        self._log = np.array([c.transform == "log" for c in columns], dtype=bool)
        self._any_log, self._all_log = bool(self._log.any()), bool(self._log.all())
        self._mean = np.array([c.mean for c in columns], dtype=np.float64)
        self._scale = np.array([c.scale for c in columns], dtype=np.float64)
        self._buckets = [
            (f, np.asarray(c.bounds, np.float64)) for f, c in enumerate(columns) if c.transform == "quantile"
        ]
        usual = np.abs(self._mean).max(initial=0) <= _USUAL and np.abs(self._scale).min(initial=1) >= 1 / _USUAL
        self._modest = bool(usual) and not self._buckets

    def rows(self, rows: Sequence[Row]) -> Floats:
        """Read rows, `[B, N]`, NaN where missing.

        Raises:
            KeyError, ValueError: as `RowEncoder._singly`.
        """
        taken = [self._take(row) for row in rows]
        x = plain_numbers(taken, chain.from_iterable(taken)) if self._all_plain else None
        if x is not None:
            return x
        return np.array([[one(v) for v, one in zip(values, self._ones, strict=True)] for values in taken])

    def many(self, columns: Sequence[Sequence[Any]], rows: int) -> tuple[Ids, Floats]:
        """Columns, each `[B]`, to `ids [B, N], values [B, N]`."""
        x = np.empty((rows, len(columns)), dtype=np.float64)
        for f, ((name, reader), column) in enumerate(zip(self._readers, columns, strict=True)):
            x[:, f] = _read(reader, column, name)
        return self.coded(x)

    def coded(self, x: Floats) -> tuple[Ids, Floats]:
        """`[B, N]`, NaN where missing, to `ids [B, N], values [B, N]`."""
        ids = np.full(x.shape, NUMERIC_VALUE_ID, dtype=np.int64)
        missing = ~(np.abs(x) <= LARGEST)  # NaN too
        with np.errstate(over="ignore", invalid="ignore"):
            values = self._standardised(x)
        np.minimum(values, LARGEST, out=values)
        np.maximum(values, -LARGEST, out=values)
        values[missing] = 1.0
        ids[missing] = NULL_ID
        for f, bounds in self._buckets:
            bucket = np.searchsorted(bounds, x[:, f], side="right") + FIRST_ID
            ids[:, f] = np.where(missing[:, f], NULL_ID, bucket)
            values[:, f] = 1.0
        return ids, values

    def scaled(self, x: Floats) -> Floats | None:
        """The values of numbers `[B, N]` that are all there and of a usual size, in few steps; else None."""
        # One number says it of all: a NaN makes it one, and what is far too large makes it large.
        return self._standardised(x) if self._modest and np.abs(x).max() <= _USUAL else None

    def _standardised(self, x: Floats) -> Floats:
        y = x
        if self._any_log:
            log = np.log1p(np.abs(x))
            np.copysign(log, x, out=log)
            y = log if self._all_log else np.where(self._log, log, x)
        scaled: Floats = (y - self._mean) / self._scale
        return scaled


def _taker(columns: Sequence[str]) -> Callable[[Row], tuple[Any, ...]]:
    """What takes the values of some columns out of a row, all at once."""
    if len(columns) > 1:
        return itemgetter(*columns)
    return lambda row: tuple(row[name] for name in columns)


def _read(reader: IdReader | NumberReader, values: Sequence[Any], column: str) -> Any:
    """Read a column, or say which row of it cannot be read."""
    try:
        return reader.many(values)
    except ValueError:
        for at, value in enumerate(values):
            try:
                reader.one(value)
            except ValueError as error:
                raise _bad_value(error, column, at) from None
        raise


def _read_events(reader: IdReader, lists: Sequence[Sequence[Any]], column: str) -> Ids:
    """Read the events of all rows, one after the other."""
    try:
        return reader.many(list(chain.from_iterable(lists)))
    except ValueError:
        for at, row in enumerate(lists):
            for value in row:
                try:
                    reader.one(value)
                except ValueError as error:
                    raise _bad_value(error, column, at) from None
        raise


def lists_of(values: Sequence[Any], column: str, group: ListGroup) -> list[Sequence[Any]]:
    """Return the lists of a column; an empty text, or a null, has no events.

    Raises:
        RequestError: a value is no list.
    """
    found: list[Sequence[Any]] = []
    for at, value in enumerate(values):
        if value is None:
            found.append(())
        elif isinstance(value, str):
            found.append(value.split(group.separator) if value else ())
        elif isinstance(value, list | tuple):
            found.append(value)
        elif isinstance(value, np.ndarray) and value.ndim == 1:
            found.append(value.tolist())
        else:
            text = f"{shown(value)} is {type(value).__name__}; expected a list, or text with {group.separator!r}"
            raise _bad_value(ValueError(text), column, at)
    return found


def _bad_value(error: ValueError, column: str, at: int) -> RequestError:
    return RequestError(str(error), row=at + 1, column=column)


def _no_column(name: str, known: Iterable[str], at: int | None) -> RequestError:
    names = [n for n in known if isinstance(n, str)]
    hint = f"{did_you_mean(name, names)} Columns: {listing(names)}"
    return RequestError(f"there is no such column.{hint}", row=None if at is None else at + 1, column=name)
