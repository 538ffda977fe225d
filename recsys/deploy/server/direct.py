"""Scores of raw rows without the web framework, whose routing and request objects take longer than a small model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from recsys.deploy.server.limits import Refused
from recsys.errors import RequestError

Answer = Callable[[bytes, Scope], Awaitable[bytes]]


class Direct:
    """An ASGI application that answers one route itself, as the application behind it would, and leaves it the others.

    Args:
        app: that answers everything else, and describes the route.
        path: of the route, by POST.
        answer: body and scope → JSON.
    """

    def __init__(self, app: ASGIApp, path: str, answer: Answer) -> None:
        self._app = app
        self._path = path
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        message = await receive()
        parts = [message.get("body", b"")]
        while message.get("more_body"):
            message = await receive()
            parts.append(message.get("body", b""))
        try:
            status, body, headers = 200, await self._answer(b"".join(parts), scope), []
        except Refused as refused:
            status, body, headers = refused.status, refused.body, refused.headers
        except RequestError as error:
            status, body, headers = 422, Refused(422, str(error)).body, []
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
