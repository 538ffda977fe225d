"""The wire format of protocol buffers, as far as it is read without their library."""

from __future__ import annotations


def varint(content: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a place, and the place behind it.

    Raises:
        IndexError: the content ends within it.
        ValueError: it has more bytes than any number has.
    """
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("has a number of more than ten bytes")
