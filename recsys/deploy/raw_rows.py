"""Raw rows as the tensors that a raw graph takes, for clients that have rows; needs NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.deploy.encode import lists_of
from recsys.deploy.spec import EncoderSpec, IdColumn, ListGroup
from recsys.deploy.values import NumberReader, Tokens, normalize, shown
from recsys.errors import RequestError

NULL = "<null>"
"""The text that means missing, unless another is chosen."""
MISSING_INT, MISSING_UINT = -(2**63), 2**64 - 1
"""The whole numbers that mean missing."""
Row = Mapping[str, Any]
Array = npt.NDArray[Any]


def length_input(group: ListGroup) -> str:
    """Return the name of the input for the lengths of a group's lists."""
    return f"{group.name}.length"


class RawRows:
    """Turns raw rows into the tensors of a raw graph.

    Args:
        spec: of the bundle.
        null: the text that means missing.
    """

    def __init__(self, spec: EncoderSpec, null: str = NULL) -> None:
        self._spec = spec
        self._null = null
        columns = [*spec.ids, *(c for group in spec.lists for c in group.columns)]
        self._tokens = {c.column: Tokens(c.null_values) for c in columns}
        self._numbers = {n.column: NumberReader(n) for n in spec.numbers}

    def tensors(self, rows: Sequence[Row]) -> dict[str, Array]:
        """Return the inputs: `[B, 1]` for each column, `[B, L]` for each column of lists, and their lengths `[B, 1]`.

        Raises:
            RequestError: a column is missing, or a value cannot be sent as its tensor's type.
        """
        found: dict[str, Array] = {}
        for column in self._spec.ids:
            found[column.column] = self._flat(column, _column(rows, column.column)).reshape(-1, 1)
        for name, reader in self._numbers.items():
            try:
                found[name] = reader.many(_column(rows, name)).reshape(-1, 1)
            except ValueError as error:
                raise RequestError(str(error), column=name) from None
        for group in self._spec.lists:
            found.update(self._lists(group, rows))
        return found

    def _lists(self, group: ListGroup, rows: Sequence[Row]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for column in group.columns:
            lists = lists_of(_column(rows, column.column), column.column, group)
            length = np.array([len(events) for events in lists], dtype=np.int64)
            flat = self._flat(column, [value for events in lists for value in events])
            longest = max(int(length.max(initial=0)), 1)
            padded = self._flat(column, [None] * (len(rows) * longest)).reshape(len(rows), longest)
            padded[np.arange(longest) < length[:, None]] = flat
            found[column.column] = padded
            found[length_input(group)] = length[:, None]
        return found

    def _flat(self, column: IdColumn, values: Sequence[Any]) -> Array:
        kind = self._spec.vocabularies[column.vocabulary].kind
        tokens = self._tokens[column.column]
        if kind == "text":
            texts = np.empty(len(values), dtype=object)
            texts[:] = [self._text(column, tokens, value) for value in values]
            return texts
        lost, dtype = (MISSING_UINT, np.uint64) if kind == "uint" else (MISSING_INT, np.int64)
        whole = [
            lost if value is None or value != value or value in tokens.texts else _whole(value, column.column)
            for value in values
        ]
        try:
            return np.array(whole, dtype=dtype)
        except OverflowError:
            raise RequestError(f"a whole number does not fit into {np.dtype(dtype)}", column=column.column) from None

    def _text(self, column: IdColumn, tokens: Tokens, value: Any) -> str:
        if value is None:
            return self._null
        text = str(value).lower() if isinstance(value, bool) else value
        if isinstance(text, int) or (isinstance(text, float) and text.is_integer()):
            text = self._null if tokens.has_number(text) else str(int(text))
        if not isinstance(text, str):
            raise RequestError(f"{shown(value)} is no text", column=column.column)
        return self._null if text in tokens.texts else normalize(text, column.normalize)


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    try:
        return [row[name] for row in rows]
    except KeyError:
        raise RequestError("there is no such column", column=name) from None


def _whole(value: Any, column: str) -> int:
    """A whole number, or a text that is one."""
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or (isinstance(value, float) and whole != value):
        raise RequestError(f"{shown(value)} is no whole number", column=column)
    return whole
