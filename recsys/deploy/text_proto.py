"""Writes the text form of protocol buffers, as configuration files have it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Word(str):
    """The name of an enumerator: written without quotes."""


def text_proto(message: Mapping[str, Any]) -> str:
    """Return a message: field → text, number, boolean, `Word`, message, or a list of these.

    A list of messages is a repeated field, one block for each; `entries` gives those of a map.
    """
    return "\n".join(_fields(message, "")) + "\n"


def entries(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a map is in text: repeated messages of key and value."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _fields(message: Mapping[str, Any], indent: str) -> Iterable[str]:
    for name, value in message.items():
        messages = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        for one in messages:
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _fields(one, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_value(one)}"


def _value(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return f"[ {', '.join(_value(one) for one in value)} ]" if value else "[ ]"
    return str(value)
