"""Raw values to ids and numbers, one at a time and many, as the training encoder reads them; without Polars."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data.limits import EXACT_DOUBLE, LARGEST, WHITE_SPACE
from recsys.data.splitmix import hash_text, mix
from recsys.deploy.spec import IdColumn, NumberColumn, Value, Vocabulary

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Key = int | str

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?(?:inf|infinity|nan)", re.IGNORECASE)
_ZEROS = re.compile(r"\.0+\Z")
_STEPS: dict[str, Callable[[str], str]] = {
    "nfc": lambda text: text if text.isascii() else unicodedata.normalize("NFC", text),
    "strip": lambda text: text.strip(WHITE_SPACE),
    "lower": str.lower,
}
_RANGES = {"int": (-(2**63), 2**63), "uint": (0, 2**64)}
_SEARCHED = 32
"""From so many values on, a search in a sorted array is faster than one look into a dict after another."""
_NAN = float("nan")
_NUMBERS: frozenset[type] = frozenset((float, int, type(None)))


def normalize(text: str, steps: Sequence[str]) -> str:
    """Return a text after `normalize` of a recipe, step by step."""
    for step in steps:
        text = _STEPS[step](text)
    return text


class _Never:
    """The class of no raw value."""


class Tokens:
    """The values that a recipe lists as missing; numbers are compared as such, everything else as text."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.texts = {str(v).lower() if isinstance(v, bool) else str(v) for v in values}
        numbers = [_as_number(v) for v in values]
        self.numbers = {n for n in numbers if n is not None}

    def has_number(self, value: float) -> bool:
        """Whether a number is one of them."""
        return bool(self.numbers) and _double(value) in self.numbers

    @property
    def rounds(self) -> bool:
        """Whether whole numbers beside one of them count as it, because as float64 they are equal."""
        return any(abs(n) >= EXACT_DOUBLE for n in self.numbers)


class _Sorted:
    """A table of whole numbers for many looks at once: their memory lies together, unlike that of a dict."""

    def __init__(self, table: Mapping[Any, int], kind: str) -> None:
        low, high = _RANGES[kind]
        self._type: type = np.int64 if kind == "int" else np.uint64
        inside = {key: i for key, i in table.items() if low <= key < high}
        keys = np.fromiter(inside.keys(), dtype=self._type, count=len(inside))
        order = keys.argsort()
        self._keys = keys[order]
        self._ids = np.fromiter(inside.values(), dtype=np.int64, count=len(inside))[order]

    def find(self, values: Sequence[int]) -> Ids | None:
        """`[n] -> [n]`; None where a value is out of range."""
        try:
            wanted: npt.NDArray[Any] = np.array(values, dtype=self._type)
        except OverflowError:
            return None
        if not len(self._keys):
            return np.full(len(wanted), UNKNOWN_ID, dtype=np.int64)
        order = wanted.argsort()  # neighbours then take the same way through the array
        wanted = wanted[order]
        at = np.searchsorted(self._keys, wanted)
        at[at == len(self._keys)] = 0
        found = np.empty(len(wanted), dtype=np.int64)
        found[order] = np.where(self._keys[at] == wanted, self._ids[at], UNKNOWN_ID)
        return found


class IdReader:
    """Reads the values of one column of ids.

    Args:
        column: how they are read.
        vocabulary: how they are compared.
        table: value → id; None for hash buckets.
        exact: floats from here on may have been rounded, so they are no ids.
    """

    def __init__(
        self,
        column: IdColumn,
        vocabulary: Vocabulary,
        table: dict[Any, int] | None,
        exact: float = EXACT_DOUBLE,
    ) -> None:
        self._kind = vocabulary.kind
        self._buckets = vocabulary.size
        self._table = table
        self._tokens = Tokens(column.null_values)
        self._steps = tuple(_STEPS[step] for step in column.normalize)
        self._max_bytes = column.max_bytes
        self._exact = exact
        text = self._kind == "text"
        direct = table is not None and not (text and self._steps) and not self._tokens.rounds
        self.direct: type = (str if text else int) if direct else _Never
        """Values of exactly this class are in `table`, or unknown."""
        self.table: dict[Any, int] = self._with_tokens() if direct else {}
        self._sorted = None if text or not direct else _Sorted(self.table, self._kind)

    def _with_tokens(self) -> dict[Any, int]:
        """The table with the values that mean missing; the same object where there are none."""
        table = self._table or {}
        if self._kind == "text":
            nulls: set[Any] = set(self._tokens.texts)
        else:
            nulls = {int(n) for n in self._tokens.numbers if n == n // 1}
        return {**table, **dict.fromkeys(nulls, NULL_ID)} if nulls else table

    def many(self, values: Sequence[Any]) -> Ids:
        """`[n] -> [n]` int64.

        Raises:
            ValueError: a value of a type or size that no id can have.
        """
        if self._sorted is not None and len(values) >= _SEARCHED and set(map(type, values)) == {int}:
            found_ids = self._sorted.find(values)
            if found_ids is not None:
                return found_ids
        get, direct, one = self.table.get, self.direct, self.one
        found = [get(v, UNKNOWN_ID) if v.__class__ is direct else one(v) for v in values]
        return np.array(found, dtype=np.int64)

    def one(self, value: Any) -> int:
        """Return the id of a raw value.

        Raises:
            ValueError: as `many`.
        """
        kind = value.__class__
        if value is None:
            return NULL_ID
        if kind is str:
            return self._text(value)
        if kind is bool:
            return self._text("true" if value else "false")
        if kind is int:
            return NULL_ID if self._tokens.has_number(value) else self._whole(value)
        if kind is float:
            return self._float(value, self._exact)
        return self._other(value)

    def _other(self, value: Any) -> int:
        if isinstance(value, np.generic):
            if isinstance(value, np.floating):
                return self._float(float(value), {2: 2.0**11, 4: 2.0**24}.get(value.itemsize, EXACT_DOUBLE))
            return self.one(value.item())
        if isinstance(value, Decimal):
            return self._float(float(value), EXACT_DOUBLE)
        if isinstance(value, datetime.datetime):
            utc = value if value.tzinfo is None else value.astimezone(datetime.UTC).replace(tzinfo=None)
            return self._text(f"{utc.isoformat(' ', 'microseconds')}")
        if isinstance(value, datetime.date):
            return self._text(value.isoformat())
        if isinstance(value, datetime.time):
            return self._text(value.isoformat("seconds"))
        raise ValueError(f"{shown(value)} is {type(value).__name__}; expected text, a whole number or null")

    def _float(self, value: float, exact: float) -> int:
        if value != value or self._tokens.has_number(value):
            return NULL_ID
        if abs(value) >= exact or value != value // 1:
            raise ValueError(f"{value!r} is no whole number that its type can hold exactly; ids are whole or text")
        return self._whole(int(value))

    def _whole(self, value: int) -> int:
        if self._kind == "text":
            return self._key(str(value)) if -(2**127) <= value < 2**128 else UNKNOWN_ID
        low, high = _RANGES[self._kind]
        return self._find(value) if low <= value < high else UNKNOWN_ID

    def _text(self, raw: str) -> int:
        if raw in self._tokens.texts:
            return NULL_ID
        if self._kind == "text":
            return self._key(raw)
        # Other programs write whole numbers as 12.0 as soon as one value of the column is missing.
        text = _ZEROS.sub("", raw.strip(WHITE_SPACE))
        digits = text.lstrip("+-").lstrip("0") or "0"
        if not _WHOLE.fullmatch(text) or len(digits) > 20 or (self._kind == "uint" and text[0] == "-"):
            return UNKNOWN_ID
        value = -int(digits) if text[0] == "-" else int(digits)
        low, high = _RANGES[self._kind]
        return self._find(value) if low <= value < high else UNKNOWN_ID

    def _key(self, text: str) -> int:
        for step in self._steps:
            text = step(text)
        return self._find(text)

    def _find(self, key: Key) -> int:
        if self._table is not None:
            return self._table.get(key, UNKNOWN_ID)
        if isinstance(key, int):
            return FIRST_ID + mix(key) % self._buckets
        try:
            if self._max_bytes is not None and len(key.encode()) > self._max_bytes:
                return UNKNOWN_ID
            return FIRST_ID + hash_text(key) % self._buckets
        except UnicodeEncodeError:  # half of a surrogate pair, which no file can hold
            return UNKNOWN_ID


class NumberReader:
    """Reads the values of one column of numbers."""

    def __init__(self, column: NumberColumn) -> None:
        self._tokens = Tokens(column.null_values)
        self._lenient = column.text_is_missing
        self.plain = not column.null_values

    def many(self, values: Sequence[Any]) -> Floats:
        """`[n] -> [n]` float64, NaN where missing.

        Raises:
            ValueError: a value that is no number.
        """
        x = plain_numbers(values, values) if self.plain else None
        if x is not None:
            x[~(np.abs(x) <= LARGEST)] = np.nan
            return x
        return np.array([self.one(v) for v in values], dtype=np.float64)

    def one(self, value: Any) -> float:
        """Return the number, NaN where it is missing.

        Raises:
            ValueError: as `many`.
        """
        if value is None:
            return _NAN
        x = self._read(value)
        return x if abs(x) <= LARGEST else _NAN

    def _read(self, value: Any) -> float:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            return _NAN if value in self._tokens.texts else self._text(value)
        if isinstance(value, bool):
            return _NAN if str(value).lower() in self._tokens.texts else float(value)
        if not isinstance(value, int | float | Decimal):
            raise ValueError(f"{shown(value)} is {type(value).__name__}; expected a number or null")
        x = _double(value)
        return _NAN if self._tokens.has_number(x) else x

    def _text(self, raw: str) -> float:
        text = raw.strip(WHITE_SPACE)
        if _NUMBER.fullmatch(text):
            return float(text)
        if self._lenient:
            return _NAN
        raise ValueError(f"{shown(raw)} is no number")


def plain_numbers(values: Sequence[Any], each: Iterable[Any]) -> Floats | None:
    """Numbers and nulls as float64, NaN where missing; None where they have to be looked at one by one.

    Args:
        values: `[n]`, or rows of the same length.
        each: all of the values.
    """
    if not _NUMBERS.issuperset(map(type, each)):
        return None
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        return None


def shown(value: Any, limit: int = 60) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 1000 else "a very long number"
    return text if len(text) <= limit else f"{text[:limit]}…"


def _double(value: float | int | Decimal) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _as_number(token: Value) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None
