"""Bodies of requests: strict JSON, of a size that is known before it is parsed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.values import shown

_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A text of JSON, also one without its end: whatever the body, matching takes time linear in its length."""


def parse(body: bytes, limits: Limits) -> Any:
    """Return the value of a body.

    Repeated names, NaN, numbers that no double holds, and bytes that are not UTF-8 are refused.

    Raises:
        Refused: it is no such JSON (400), or has too many values (413).
    """
    if not body:
        raise Refused(400, "the body is empty; expected JSON")
    _check_size(body, limits)
    try:
        return json.loads(
            body.decode(), object_pairs_hook=_object, parse_float=_number, parse_constant=_constant, parse_int=_whole
        )
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from None


def check_rows(rows: Any, limits: Limits) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a request: those of a list, or the one that stands alone.

    Raises:
        Refused: they are no rows (422), or are too many or hold a text that is too long (413).
    """
    found = [rows] if isinstance(rows, dict) else rows
    if not isinstance(found, list):
        raise Refused(422, f"{shown(rows)} is no row; expected an object of column and value, or a list of them")
    if not found:
        raise Refused(422, "there are no rows; expected an object of column and value, or a list of them")
    if len(found) > limits.rows:
        raise Refused(413, f"{len(found):,} rows in one request; at most {limits.rows:,}")
    for at, row in enumerate(found):
        if not isinstance(row, dict):
            raise Refused(422, f"row {at + 1}: {shown(row)} is no object of column and value")
        for name, value in row.items():
            kind = value.__class__
            if kind is str:
                check_text(value, limits, at, name)
            elif kind is list:
                for event in value:
                    if event.__class__ is str:
                        check_text(event, limits, at, name)
    return found


def check_text(value: str, limits: Limits, at: int, name: str) -> None:
    """Refuse a text that is too long, or has a character that no log can hold."""
    if len(value) * 4 > limits.string:
        size = len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
        if size > limits.string:
            raise Refused(
                413, f"row {at + 1}, column {shown(name)}: a text of {size:,} bytes; at most {limits.string:,}"
            )
    if "\0" in value:
        raise Refused(422, f"row {at + 1}, column {shown(name)}: a text with the character NUL")


def _check_size(body: bytes, limits: Limits) -> None:
    """Refuse what would take far more memory as values than as text; texts are left out only where it matters."""
    objects = 2 * limits.rows + 1024
    if _marks(body) > limits.values or body.count(b"{") > objects:
        bare = _TEXT.sub(b"", body)
        if _marks(bare) > limits.values:
            raise Refused(413, f"more than {limits.values:,} values in one request")
        if bare.count(b"{") > objects:
            raise Refused(413, f"more than {objects:,} objects in one request; rows are at most {limits.rows:,}")


def _marks(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any double")
    return value


def _whole(text: str) -> int:
    if len(text) > 400:
        raise ValueError("a whole number of more than 400 digits")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON; write null where a value is missing")
