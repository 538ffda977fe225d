"""Looks through the bytes of an ONNX graph for what could reach outside of it; without the package onnx.

A bundle's graph holds all of its numbers itself. What is refused, before a runtime sees it: tensors whose data lie in
other files, sparse tensors, training information, and operators of domains that are not ONNX's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from recsys.deploy.wire import varint
from recsys.errors import BundleError

Fields = Mapping[int, str]
# message → field number → message that the field holds; the numbers are those of onnx.proto
_INSIDE: dict[str, Fields] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {},
}
_FORBIDDEN: dict[str, Mapping[int, str]] = {
    "model": {20: "training information"},
    "graph": {15: "a sparse tensor"},
    "attribute": {22: "a sparse tensor", 23: "sparse tensors"},
    "tensor": {13: "a tensor whose data are in another file"},
}
_DOMAIN, _LOCATION = 7, 14
_DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
_DEEPEST = 16


def check_graph(content: bytes, where: str) -> None:
    """Raise a `BundleError` unless the graph is self-contained and of plain operators."""
    try:
        if not content:
            raise ValueError("the file is empty")
        _walk("model", memoryview(content), 0)
    except (ValueError, IndexError) as error:
        raise BundleError(f"{where}: {error}") from None


def _walk(message: str, content: memoryview, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("graphs within graphs, too deep")
    inside, forbidden = _INSIDE[message], _FORBIDDEN.get(message, {})
    for number, value in _fields(content):
        if number in forbidden:
            raise ValueError(f"holds {forbidden[number]}; a bundle's graph holds all of its numbers itself")
        if message == "tensor" and number == _LOCATION and value != 0:
            raise ValueError("holds a tensor whose data are in another file; a graph holds all of its numbers itself")
        if message == "node" and number == _DOMAIN and isinstance(value, memoryview) and bytes(value) not in _DOMAINS:
            raise ValueError(f"has an operator of the domain {bytes(value)[:60]!r}, which is not ONNX's own")
        if number in inside:
            if not isinstance(value, memoryview):
                raise ValueError("is no ONNX graph")
            _walk(inside[number], value, depth + 1)


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the (number, value) of a message's fields, in the wire format of protocol buffers."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(content, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = varint(content, at)
        if size is None or number == 0 or at + size > len(content):
            raise ValueError("is no ONNX graph, or is cut short")
        yield number, content[at : at + size]
        at += size
