"""Stands before the application: tokens, bodies within limits, errors in one form, counts and the log of requests."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys.deploy.server.access import Token
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.metrics import Metrics
from recsys.deploy.server.rate import Rate

LOG = logging.getLogger("recsys.serve")
_LINGER = 1.0
"""Seconds in which the rest of a refused body is read and thrown away, so that its client gets to see the answer."""
_BODY = ("POST", "PUT", "PATCH")
_MEDIA = (b"application/json", b"application/octet-stream")


class Gone(Exception):
    """The client has closed the connection."""


class Gate:
    """An ASGI application around another.

    Args:
        app: that answers.
        limits: of bodies.
        metrics: that are counted.
        endpoint: path → the endpoint that it is counted under.
        token: that requests need; None lets everybody in.
        open_endpoints: that need none.
        log: gets one line of JSON for each request, without its headers and values; None writes nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        endpoint: Callable[[str], str],
        *,
        token: Token | None = None,
        open_endpoints: frozenset[str] = frozenset(),
        log: TextIO | None = None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._endpoint = endpoint
        self._token = token
        self._open = open_endpoints
        self._log = log
        self._held = 0
        self._rate = Rate(limits.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        told = _Told(send)
        endpoint = self._endpoint(scope["path"])
        try:
            await self._guarded(scope, receive, told, endpoint)
        except Gone:
            told.status = 499
            return
        finally:
            seconds = time.perf_counter() - began
            self._metrics.answered(endpoint, told.status, seconds)
            if self._log is not None:
                about = {"endpoint": endpoint, "status": told.status, "bytes": told.bytes}
                write_line(self._log, scope["method"], seconds, {**about, **scope.get("state", {}).get("told", {})})

    async def _guarded(self, scope: Scope, receive: Receive, told: _Told, endpoint: str) -> None:
        held = 0
        try:
            headers = dict(scope["headers"])
            if endpoint not in self._open:
                self._rate.take((scope.get("client") or ("",))[0])
            if self._token is not None and endpoint not in self._open:
                self._token.check(headers.get(b"authorization"))
            if scope["method"] in _BODY:
                body = await self._body(headers, receive)
                held = len(body)
                self._held += held
                receive = _whole(body)
            await self._app(scope, receive, told.send)
        except Refused as refused:
            await told.refuse(refused)
            if refused.close:
                await _drain(receive)
                await told.finish()
        except (Gone, asyncio.CancelledError):
            raise
        except Exception as error:  # nothing that a client sends may end in a traceback that it can read
            LOG.error("a request to %s failed: %s", endpoint, type(error).__name__, exc_info=error)
            if not told.started:
                await told.refuse(Refused(500, "the server failed"))
        finally:
            self._held -= held

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        limits = self._limits
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise Refused(415, "compressed bodies are not read; send it as it is", close=True)
        if headers.get(b"transfer-encoding", b"chunked").strip().lower() != b"chunked":
            raise Refused(415, "compressed bodies are not read; the transfer encoding may be chunked alone", close=True)
        media = headers.get(b"content-type", _MEDIA[0]).split(b";")[0].strip().lower()
        if media not in _MEDIA:
            raise Refused(415, "expected the content type application/json", close=True)
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > limits.body:
            raise Refused(413, f"a body of {int(stated[:20]):,} bytes; at most {limits.body:,}", close=True)
        content = bytearray()
        try:
            async with asyncio.timeout(limits.receive):
                return await self._read(receive, content)
        except TimeoutError:
            raise Refused(408, f"no whole body within {limits.receive:g} seconds", close=True) from None
        finally:
            self._held -= len(content)

    async def _read(self, receive: Receive, content: bytearray) -> bytes:
        """Read a body; what is held of it on the way is counted, and stands in `content`."""
        limits = self._limits
        while True:
            message = await _received(receive)
            piece: bytes = message.get("body", b"")
            if len(content) + len(piece) > limits.body:
                raise Refused(413, f"a body of more than {limits.body:,} bytes", close=True)
            if not message.get("more_body"):
                return bytes(content + piece) if content else piece
            content += piece
            self._held += len(piece)
            if self._held > limits.held:
                raise Refused(503, "too many large bodies at once; try again later", close=True)


def write_line(log: TextIO, method: str, seconds: float, about: Mapping[str, Any]) -> None:
    """Log one request; neither its path nor its headers, which may hold secrets, nor its values."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "method": method,
        "milliseconds": round(seconds * 1000, 3),
        **about,
    }
    print(json.dumps(line), file=log, flush=True)


class _Told:
    """What a client has been told so far."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.bytes = 0
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        body = refused.body
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *refused.headers]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": refused.close})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _received(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Gone
    return message


async def _drain(receive: Receive) -> None:
    try:
        async with asyncio.timeout(_LINGER):
            message: Message = {"more_body": True}
            while message.get("more_body"):
                message = await _received(receive)
    except (TimeoutError, Gone):
        return


def _whole(body: bytes) -> Receive:
    """Give a body at once; after that, wait for a disconnection that nobody asks about."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


__all__ = ["Gate", "write_line"]
