"""Google-style docstrings, read for `recsys show` and for the descriptions in the recipe schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields|Examples?|Notes?|Shapes?):\s*$")
_ARGUMENT = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True)
class Doc:
    """A docstring in parts.

    Args:
        summary: the first line.
        body: what follows it (formula, shapes, paper), without the sections.
        args: description per name of the `Args:` section.
    """

    summary: str = ""
    body: str = ""
    args: dict[str, str] = field(default_factory=dict)


def read(factory: Callable[..., Any]) -> Doc:
    """Read the docstring of a class or a function; the `Args:` may stand in the class or in its `__init__`."""
    own = parse(factory.__doc__ or "")
    if isinstance(factory, type):
        constructor = vars(factory).get("__init__")
        return Doc(own.summary, own.body, parse(getattr(constructor, "__doc__", None) or "").args | own.args)
    return own


def parse(text: str) -> Doc:
    """Split a Google-style docstring into summary, body and arguments."""
    lines = inspect.cleandoc(text).splitlines()
    body: list[str] = []
    sections: dict[str, list[str]] = {}
    into = body
    for line in lines[1:]:
        if header := _SECTION.match(line):
            into = sections.setdefault(header[1], [])
        elif into is not body and line and not line.startswith(" "):
            into = body  # an unindented line ends a section
            into.append(line)
        else:
            into.append(line)
    return Doc(
        lines[0].strip() if lines else "",
        re.sub(r"\n{3,}", "\n\n", "\n".join(body)).strip(),
        _arguments(sections.get("Args", sections.get("Arguments", []))),
    )


def _arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    name: str | None = None
    for line in inspect.cleandoc("\n" + "\n".join(lines)).splitlines():
        argument = _ARGUMENT.match(line)
        if argument and not line.startswith(" "):
            name = argument[1].lstrip("*")
            found[name] = [argument[2].strip()]
        elif name is not None and line.strip():
            found[name].append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}
