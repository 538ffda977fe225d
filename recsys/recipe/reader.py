"""YAML to plain values, with the line of every value; nothing in a recipe is evaluated, imported or interpolated.

Stricter than YAML's defaults where those surprise: a repeated key is an error, `no` and `on` are words,
`1e-3` is a number, `012` is not, tags and aliases are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recsys.errors import RecipeError, did_you_mean

Key = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "Null": None, "~": None, "": None}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_INFINITE = {".inf": float("inf"), "-.inf": float("-inf"), "+.inf": float("inf"), ".nan": float("nan")}


@dataclass(frozen=True)
class Document:
    """A read recipe.

    Args:
        value: mappings, lists and scalars.
        lines: path of a value → "file:line", for messages.
    """

    value: dict[str, Any]
    lines: Mapping[Key, str] = field(default_factory=dict)

    def where(self, path: Key) -> str:
        """Return "file:line" of the value at `path`, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return ""


def read(path: Path) -> Document:
    """Read a recipe and, below it, its one `base:`.

    Raises:
        RecipeError: missing file, bad YAML, repeated key, tag or alias; with file and line.
    """
    return _read(path, seen=())


def _read(path: Path, seen: tuple[Path, ...]) -> Document:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path}: recipes name each other as base: {' → '.join(p.name for p in (*seen, path))}")
    document = parse(_text(path), path.name)
    base = document.value.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise RecipeError(f"{document.where(('base',))}: base: expected the path of one recipe, got {base!r}")
    under = _read(path.parent / base, (*seen, path))
    return Document(merge(under.value, document.value), {**under.lines, **document.lines})


def _text(path: Path) -> str:
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise RecipeError(f"{path}: no such recipe.{near}")
    raw = path.read_bytes()
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(raw):,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path.name}:{line}: not UTF-8 text (byte {error.start}); a recipe is YAML") from None


def parse(text: str, name: str) -> Document:
    """Parse the text of a recipe; `name` stands for the file in messages.

    Raises:
        RecipeError: as `read`.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.events.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError(f"{name}:{line}: anchors and aliases are not used in recipes; write the value out")
            # Depth is checked on the flat stream of events, before anything recurses.
            depth += isinstance(event, yaml.events.CollectionStartEvent)
            depth -= isinstance(event, yaml.events.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecipeError(f"{name}:{line}: nested deeper than {MAX_DEPTH} levels")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    lines: dict[Key, str] = {}
    value = {} if node is None else _plain(node, (), name, lines)
    if not isinstance(value, dict):
        raise RecipeError(f"{name}:1: a recipe is a mapping (`data: …`, `model: …`), got {type(value).__name__}")
    return Document(value, lines)


def scalar(text: str) -> Any:
    """Return the value that an unquoted word of a recipe stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if text.lower() in _INFINITE:
        return _INFINITE[text.lower()]
    if _NUMBER.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text.replace("_", ""))
    return text


def value_of(text: str) -> Any:
    """Return the value of an override's right-hand side: a word, or a list or mapping in YAML's flow style."""
    if text[:1] in "[{\"'":
        return parse(f"value: {text}", "override").value["value"]
    return scalar(text)


def _plain(node: yaml.Node, path: Key, name: str, lines: dict[Key, str]) -> Any:
    line = f"{name}:{node.start_mark.line + 1}"
    lines[path] = line
    if node.tag.startswith("!") or "python" in node.tag:
        raise RecipeError(f"{line}: the tag {node.tag!r} is not used in recipes")
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), name, lines) for i, child in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key_node, child in node.value:
        key = key_node.value
        if not isinstance(key, str) or key == "<<":
            raise RecipeError(f"{name}:{key_node.start_mark.line + 1}: a key is a word, got {key!r}")
        if key in found:
            first = lines[(*path, key)].rsplit(":", 1)[1]
            again = f"{name}:{key_node.start_mark.line + 1}"
            raise RecipeError(f"{again}: the key '{key}' stands here a second time (first: line {first})")
        found[key] = _plain(child, (*path, key), name, lines)
        lines[(*path, key)] = f"{name}:{key_node.start_mark.line + 1}"
    return found


def merge(under: Any, over: Any) -> Any:
    """Lay `over` on `under`: mappings merge key by key, everything else is replaced.

    A component that names another `use` replaces the whole mapping, since the options were the old one's.
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if "use" in over and over["use"] != under.get("use"):
        return over
    merged = dict(under)
    for key, value in over.items():
        merged[key] = merge(under[key], value) if key in under else value
    return merged


def override(document: Document, text: str) -> Document:
    """Apply one `path.to.key=value` of the command line.

    Raises:
        RecipeError: not of that form, or the path goes through something that has no keys.
    """
    path_text, sign, value_text = text.partition("=")
    parts: list[str | int] = [
        int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path_text)
    ]
    if not sign or not parts:
        raise RecipeError(f"override '{text}': expected path.to.option=value, for example train.epochs=2")
    value = _set(document.value, tuple(parts), value_of(value_text), text)
    return Document(value, {**document.lines, tuple(parts): f"override '{text}'"})


def _set(under: Any, path: Key, value: Any, text: str) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(under, list):
        if isinstance(key, str) and key.isdigit():
            key = int(key)
        if not isinstance(key, int) or key >= len(under):
            raise RecipeError(f"override '{text}': '{key}' is no position in a list of {len(under)}")
        return [*under[:key], _set(under[key], rest, value, text), *under[key + 1 :]]
    if isinstance(under, str):
        under = {"use": under}  # a component written as just its name gets its first option
    if under is None:
        under = {}
    if not isinstance(under, dict) or isinstance(key, int):
        raise RecipeError(f"override '{text}': '{key}' lies inside {under!r}, which has no keys")
    if key == "use" and not rest and value != under.get("use"):
        return {"use": value}
    return {**under, key: _set(under.get(key), rest, value, text)}
