"""The encoder of a bundle as plain values: which column becomes which input, and how; read from JSON alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recsys.contracts import FIRST_ID
from recsys.errors import BundleError

VERSION = 1
"""Raised when the same raw rows would be encoded differently, or the file is laid out differently."""
KINDS = ("int", "uint", "text")
"""How values are compared: as int64, as uint64, or as text."""
Value = str | bool | int | float


@dataclass(frozen=True)
class Vocabulary:
    """The values of ids, or hash buckets.

    Args:
        kind: how values are compared.
        size: number of values, or of buckets.
        file: of the values, in the order of their ids; None for hash buckets.
    """

    kind: str
    size: int
    file: str | None = None

    @property
    def rows(self) -> int:
        """Number of ids, missing and unknown included."""
        return FIRST_ID + self.size


@dataclass(frozen=True)
class IdColumn:
    """A column of ids: one value in a row, or one in an event of a list.

    Args:
        column: of the logs.
        vocabulary: name of the vocabulary.
        null_values: raw values that mean missing.
        normalize: what is done to text, in order: nfc, strip, lower.
        max_bytes: text of more bytes of UTF-8 is unknown.
    """

    column: str
    vocabulary: str
    null_values: tuple[Value, ...] = ()
    normalize: tuple[str, ...] = ()
    max_bytes: int | None = None


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers.

    Args:
        column: of the logs.
        transform: standard, log, raw or quantile.
        mean: subtracted, after the logarithm if any.
        scale: divides.
        bounds: inner bounds of the buckets of quantile, ascending.
        null_values: raw values that mean missing.
        text_is_missing: a text that is no number counts as missing; otherwise it is an error.
    """

    column: str
    transform: str
    mean: float = 0.0
    scale: float = 1.0
    bounds: tuple[float, ...] = ()
    null_values: tuple[Value, ...] = ()
    text_is_missing: bool = False


@dataclass(frozen=True)
class ListGroup:
    """Columns of lists whose events belong together.

    Args:
        name: of the history.
        columns: one for each part of an event.
        max_length: the last so many events are kept.
        separator: between events, when a column is text.
    """

    name: str
    columns: tuple[IdColumn, ...]
    max_length: int
    separator: str


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that turns raw rows into the inputs of the graph.

    The graph's ids are those of `ids`, then one for each of `numbers`; its values are ones, then the numbers.
    """

    vocabularies: Mapping[str, Vocabulary]
    ids: tuple[IdColumn, ...]
    numbers: tuple[NumberColumn, ...]
    lists: tuple[ListGroup, ...]
    tasks: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        names = [*(c.column for c in self.ids), *(c.column for c in self.numbers)]
        return tuple(dict.fromkeys([*names, *(c.column for group in self.lists for c in group.columns)]))

    @property
    def has_values(self) -> bool:
        """Whether the graph takes numbers beside ids."""
        return any(number.transform != "quantile" for number in self.numbers)

    def to_json(self) -> str:
        """Return the text of the file."""
        body = {"version": VERSION, **asdict(self)}
        return json.dumps(body, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str, where: str) -> EncoderSpec:
        """Read what `to_json` gave.

        Raises:
            BundleError: another version, or not an encoder.
        """
        try:
            body = json.loads(text)
            if body["version"] != VERSION:
                raise BundleError(f"{where}: version {body['version']} of the encoder; this one reads {VERSION}")
            spec = cls(
                {name: Vocabulary(**v) for name, v in body["vocabularies"].items()},
                tuple(_id_column(c) for c in body["ids"]),
                tuple(_number_column(c) for c in body["numbers"]),
                tuple(_list_group(c) for c in body["lists"]),
                tuple(body["tasks"]),
            )
            _check(spec)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{where}: not a readable encoder: {type(error).__name__}: {error}") from None
        return spec


def _id_column(body: dict[str, Any]) -> IdColumn:
    return IdColumn(**_tuples(body, "null_values", "normalize"))


def _number_column(body: dict[str, Any]) -> NumberColumn:
    return NumberColumn(**_tuples(body, "null_values", "bounds"))


def _list_group(body: dict[str, Any]) -> ListGroup:
    return ListGroup(**{**body, "columns": tuple(_id_column(c) for c in body["columns"])})


def _tuples(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**body, **{name: tuple(body[name]) for name in names}}


def _check(spec: EncoderSpec) -> None:
    """Raise a ValueError for what could only fail later, when rows are scored."""
    _each(spec.vocabularies.values(), lambda v: v.kind in KINDS and v.size >= 0, "kind or size of a vocabulary")
    columns = [*spec.ids, *(c for group in spec.lists for c in group.columns)]
    _each(columns, lambda c: c.vocabulary in spec.vocabularies, "vocabulary of a column")
    _each(columns, lambda c: set(c.normalize) <= {"nfc", "strip", "lower"}, "`normalize` of a column")
    known = ("standard", "log", "raw", "quantile")
    _each(spec.numbers, lambda n: n.transform in known and n.scale != 0, "`transform` or `scale` of a number")
    _each(spec.lists, lambda g: g.max_length >= 1 and len(g.columns) >= 1, "`max_length` or `columns` of a list")
    if not spec.tasks:
        raise ValueError("no task")


def _each(items: Any, good: Callable[[Any], bool], what: str) -> None:
    for item in items:
        if not good(item):
            raise ValueError(f"{what} is unknown: {item}")
