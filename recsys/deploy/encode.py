"""Raw rows to the inputs of the graph: one row through prebuilt dicts, many rows column by column."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID, NULL_ID, NUMERIC_VALUE_ID, UNKNOWN_ID
from recsys.data.limits import EXACT, EXACT_DOUBLE, LARGEST
from recsys.deploy.spec import EncoderSpec, IdColumn, ListGroup, NumberColumn
from recsys.deploy.values import Floats, IdReader, Ids, NumberReader, shown
from recsys.errors import RequestError, did_you_mean, listing

if TYPE_CHECKING:
    import polars as pl

Row = Mapping[str, Any]
_SINGLY = 4
"""Up to so many rows are read one by one; more, column by column."""


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

    def __init__(self, spec: EncoderSpec, tables: Mapping[str, Mapping[Any, int] | None]) -> None:
        self.spec = spec
        self._tables = tables
        self._readers = {c.column: self._reader(c, EXACT_DOUBLE) for c in self._id_columns()}
        self._singles = [(r.direct, r.get, r.one) for r in (self._readers[c.column] for c in spec.ids)]
        self._take = _taker([c.column for c in spec.ids])
        self._numbers = _Numbers(spec.numbers)

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
        ids: list[list[int]] = []
        values: list[list[float]] = []
        for row in rows:
            read = zip(self._take(row), self._singles, strict=True)
            found = [get(v, UNKNOWN_ID) if v.__class__ is direct else one(v) for v, (direct, get, one) in read]
            numbers = [1.0] * len(found)
            self._numbers.add(row, found, numbers)
            ids.append(found)
            values.append(numbers)
        own = np.array(ids, dtype=np.int64).reshape(len(rows), -1)
        return Encoded(own, np.array(values, dtype=np.float32).reshape(own.shape) if self.spec.has_values else None)

    def _columns(self, columns: Mapping[str, Sequence[Any]], readers: Mapping[str, IdReader], rows: int) -> Encoded:
        ids = np.empty((rows, len(self.spec.ids)), dtype=np.int64)
        for f, column in enumerate(self.spec.ids):
            ids[:, f] = _read(readers[column.column], columns[column.column], column.column)
        lists = tuple(self._group(group, columns, readers, rows) for group in self.spec.lists)
        if not self.spec.numbers:
            return Encoded(ids, None, lists)
        read = self._numbers.many([columns[number.column] for number in self.spec.numbers], rows)
        return self._with_numbers(ids, read, lists)

    def _with_numbers(self, ids: Ids, read: tuple[Ids, Any], lists: tuple[tuple[Ids, Ids], ...] = ()) -> Encoded:
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
        self._singles = [(r.plain, r.one) for _, r in self._readers]
        self._scales = [
            (c.transform == "log", c.mean, c.scale, c.bounds if c.transform == "quantile" else None) for c in columns
        ]
        self._log = np.array([c.transform == "log" for c in columns], dtype=bool)
        self._any_log, self._all_log = bool(self._log.any()), bool(self._log.all())
        self._mean = np.array([c.mean for c in columns], dtype=np.float64)
        self._scale = np.array([c.scale for c in columns], dtype=np.float64)
        self._buckets = [(f, c.bounds) for f, c in enumerate(columns) if c.transform == "quantile"]

    def add(self, row: Row, ids: list[int], values: list[float]) -> None:
        """Read one row, and append to the lists of its ids and values.

        Raises:
            KeyError, ValueError: as `RowEncoder._singly`.
        """
        read = zip(self._take(row), self._singles, strict=True)
        numbers: list[float] = [
            v if plain and v.__class__ is float and -LARGEST <= v <= LARGEST else one(v) for v, (plain, one) in read
        ]
        # Of an array, because the logarithm of `math` differs in the last digit.
        logs: list[float] = np.log1p(np.abs(np.array(numbers, np.float64))).tolist() if self._any_log else numbers
        for x, log, (is_log, mean, scale, bounds) in zip(numbers, logs, self._scales, strict=True):
            if x != x:  # NaN
                ids.append(NULL_ID)
                values.append(1.0)
            elif bounds is not None:
                ids.append(bisect_right(bounds, x) + FIRST_ID)
                values.append(1.0)
            else:
                y = x if not is_log else log if x >= 0 else -log
                scaled = (y - mean) / scale
                ids.append(NUMERIC_VALUE_ID)
                values.append(min(max(scaled, -LARGEST), LARGEST))

    def many(self, columns: Sequence[Sequence[Any]], rows: int) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Columns, each `[B]`, to `ids [B, N], values [B, N]`."""
        x = np.empty((rows, len(columns)), dtype=np.float64)
        for f, ((name, reader), column) in enumerate(zip(self._readers, columns, strict=True)):
            x[:, f] = _read(reader, column, name)
        ids, values = self._scaled(x)
        for f, bounds in self._buckets:
            bucket = np.searchsorted(np.asarray(bounds, np.float64), x[:, f], side="right") + FIRST_ID
            ids[:, f] = np.where(np.isnan(x[:, f]), NULL_ID, bucket)
            values[:, f] = 1.0
        return ids, values

    def _scaled(self, x: Floats) -> tuple[Ids, npt.NDArray[np.float32]]:
        y = x
        if self._any_log:
            log = np.sign(x) * np.log1p(np.abs(x))
            y = log if self._all_log else np.where(self._log, log, x)
        with np.errstate(over="ignore"):
            scaled = (y - self._mean) / self._scale
        np.minimum(scaled, LARGEST, out=scaled)
        np.maximum(scaled, -LARGEST, out=scaled)
        missing = x != x  # NaN
        scaled[missing] = 1.0
        ids = np.full(x.shape, NUMERIC_VALUE_ID, dtype=np.int64)
        ids[missing] = NULL_ID
        return ids, scaled.astype(np.float32)


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
