"""The second port of a server: metrics, and the exchange of the model for who has the token for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recsys.deploy.server.access import Token
from recsys.deploy.server.content import parse
from recsys.deploy.server.limits import Refused
from recsys.deploy.server.service import Service, inside
from recsys.errors import RecsysError

METRICS = "text/plain; version=0.0.4; charset=utf-8"


def endpoint(path: str) -> str:
    """Return the endpoint that a path is counted under."""
    return {"/metrics": "metrics", "/v1/swap": "swap"}.get(path, "admin_other")


def make_admin(service: Service, *, root: Path, token: Token | None) -> Starlette:
    """Return the application.

    Args:
        service: whose model may be exchanged.
        root: the one folder that bundles are taken from.
        token: that an exchange needs; None refuses every exchange.
    """

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=METRICS)

    async def swap(request: Request) -> Response:
        if token is None:
            raise Refused(403, "models are not exchanged here; start the server with an admin token")
        token.check(_header(request))
        wanted = parse(await request.body(), service.limits)
        if not isinstance(wanted, dict) or set(wanted) != {"bundle"}:
            raise Refused(422, 'expected {"bundle": "NAME"}, the name of a folder')
        folder = inside(root, wanted["bundle"])
        try:
            bundle = await asyncio.get_running_loop().run_in_executor(None, service.swap, folder)
        except RecsysError as error:
            service.metrics.swapped("refused")
            raise Refused(422, str(error).replace(str(root), "")) from None
        service.metrics.swapped("done")
        return JSONResponse({"bundle": bundle})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {key.decode(): value.decode() for key, value in error.headers}
        return Response(error.body, error.status, headers, "application/json")

    async def elsewhere(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return JSONResponse({"error": "there is no such path or method"}, status)

    handlers: Mapping[Any, Any] = {Refused: refused, HTTPException: elsewhere}
    routes = [Route("/metrics", metrics), Route("/v1/swap", swap, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers=handlers)


def _header(request: Request) -> bytes | None:
    return dict(request.scope["headers"]).get(b"authorization")
