"""What one client may ask of a server, and how a request that asks for more is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; all of them hold before memory is spent.

    Args:
        body: bytes of one request's body.
        rows: of one request.
        explained: rows of one request for explanations, each of which is scored once for every column.
        string: bytes of UTF-8 of one text.
        values: of one request: numbers, texts, lists and objects of its JSON together.
        held: bytes of bodies that are held at once, over all connections.
        head: bytes of a request's line and headers.
        timeout: seconds from the whole request to its scores.
        receive: seconds that a client may take to send a head, to send a body, and to take an answer.
        idle: seconds that a connection may stay open without a request.
        queue: requests that are worked on or wait at once.
        connections: that are open at once.
        rate: requests of one client address in a second, ten seconds' worth of which may come at once; 0: any number.
    """

    body: int = 8 << 20
    rows: int = 1024
    explained: int = 64
    string: int = 1024
    values: int = 1 << 18
    held: int = 32 << 20
    head: int = 16 << 10
    timeout: float = 1.0
    receive: float = 5.0
    idle: float = 30.0
    queue: int = 256
    connections: int = 1024
    rate: float = 0.0


class Refused(Exception):
    """A request that gets no scores.

    Args:
        status: of HTTP.
        problem: what is wrong and what would be right.
        close: whether the connection is of no further use.
    """

    def __init__(self, status: int, problem: str, *, close: bool = False) -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem
        self.close = close

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that the status asks for."""
        found = [(b"retry-after", b"1")] if self.status in (429, 503) else []
        found += [(b"www-authenticate", b"Bearer")] if self.status == 401 else []
        return [*found, (b"connection", b"close")] if self.close else found

    @property
    def body(self) -> bytes:
        """The answer's body, as the Open Inference Protocol writes errors."""
        return json.dumps({"error": self.problem}).encode()
