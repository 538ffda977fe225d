"""Connections of a server: how many there may be, and how slow."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.metrics import Metrics

_EVERY = 0.25
"""Seconds between two looks at the connections."""
_STATUS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large", 503: b"Unavailable"}


class Watch:
    """Ends connections that are too many, too slow or too long without a request.

    Args:
        limits: of time, of heads and of connections.
        metrics: that are counted.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self.open: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> None:
        """Watch a connection from now on."""
        self.open.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for connection in list(self.open):
            connection.look(now)
        again = asyncio.get_running_loop().call_later
        self._timer = again(_EVERY, self._look) if self.open else None


class Connection(HttpToolsProtocol):
    """One connection; what uvicorn is given as its protocol, with the watch as the first argument."""

    def __init__(
        self,
        watch: Watch,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._watch = watch
        self._refused = False
        self._busy = False  # with a request whose head is whole
        self._head = 0
        self._since = time.monotonic()
        self._begun = False  # some of the next head is there
        self._blocked: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self._watch.open) >= self._watch.limits.connections:
            self._end("many", Refused(503, f"{len(self._watch.open):,} connections are open; try again later"))
        else:
            self._watch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._watch.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self._refused:
            return
        if not self._busy:
            if not self._begun:
                self._begun, self._since = True, time.monotonic()
            self._head += len(data)
        super().data_received(data)
        if not self._busy and self._begun and self._head > self._watch.limits.head:
            self._end("head", Refused(431, f"a head of more than {self._watch.limits.head:,} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Read a header; a name beside a whole body in the same packet is counted too."""
        super().on_header(name, value)
        if len(self.headers) > 100 or sum(len(n) + len(v) for n, v in self.headers) > self._watch.limits.head:
            raise ValueError("head")

    def on_headers_complete(self) -> None:
        """Begin a request."""
        super().on_headers_complete()
        self._busy, self._begun, self._head = True, False, 0

    def on_response_complete(self) -> None:
        """End a request."""
        super().on_response_complete()
        self._since = time.monotonic()
        self._busy = bool(self.cycle and not self.cycle.response_complete)

    def pause_writing(self) -> None:
        """Wait for a client that does not take its answer."""
        super().pause_writing()
        self._blocked = time.monotonic()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._blocked = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._end("invalid", Refused(400, "no valid request of HTTP/1.1, or a head that is too large"))

    def look(self, now: float) -> None:
        """End the connection if it is too slow, or has had no request for too long."""
        limits = self._watch.limits
        if self._blocked is not None and now - self._blocked > limits.receive:
            self._watch.metrics.dropped("answer")
            self.transport.abort()
        elif not self._busy and self._begun and now - self._since > limits.receive:
            self._end("slow", Refused(408, f"no whole head within {limits.receive:g} seconds"))
        elif not self._busy and now - self._since > limits.idle:
            self._watch.metrics.dropped("idle")
            self.transport.close()

    def _end(self, why: str, refused: Refused) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._watch.metrics.dropped(why)
        lines = [b"HTTP/1.1 %d %s" % (refused.status, _STATUS[refused.status]), b"content-type: application/json"]
        lines += [b"content-length: %d" % len(refused.body), b"connection: close"]
        lines += [name + b": " + value for name, value in refused.headers]
        self.transport.write(b"\r\n".join([*lines, b"", refused.body]))
        self.transport.close()
