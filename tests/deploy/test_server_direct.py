"""The short way to scores answers as the application behind it does, whatever is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import pytest

from recsys.deploy.server.app import SCORE, make_app
from recsys.deploy.server.direct import Direct
from recsys.deploy.server.limits import Limits
from recsys.deploy.server.metrics import Metrics
from recsys.deploy.server.service import Service

ROWS = made.LOGS.drop("click", "buy").head(3).to_dicts()
LIST = json.dumps(ROWS, default=str).encode()
ONE = json.dumps(ROWS[0], default=str).encode()
BODIES = {
    "one row": ONE,
    "rows": LIST,
    "more rows than one request may have": json.dumps([{}] * 5).encode(),
    "no rows": b"[]",
    "no body": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"user": "\xff"}',
    "no columns": b"{}",
    "no object": b"[7]",
}


@pytest.fixture(scope="module")
def app(whole: Path) -> Iterator[Direct]:
    service = Service(Limits(rows=4), Metrics(), threads=1)
    service.swap(whole)
    found = make_app(service, "mine")
    assert isinstance(found, Direct)
    yield found
    service.close()


def asked(app: Any, pieces: list[bytes], path: str = SCORE, method: str = "POST") -> tuple[Any, ...]:
    """Status, headers, body and what the log is told."""
    sent: list[dict[str, Any]] = []
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {},
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body, scope["state"].get("told")


@pytest.mark.parametrize("name", BODIES)
def test_it_answers_as_the_application_does(app: Direct, name: str) -> None:
    body = BODIES[name]
    direct, framed = asked(app, [body]), asked(app._app, [body])
    assert direct == framed
    assert direct[0] == {"one row": 200, "rows": 200, "no body": 400, "no JSON": 400, "no UTF-8": 400}.get(
        name, 413 if name.startswith("more") else 422
    )
    assert asked(app, [body[:7], body[7:], b""]) == direct, "in pieces"


def test_before_a_model_is_there_it_says_so() -> None:
    service = Service(Limits(), Metrics(), threads=1)
    empty: Any = make_app(service, "mine")
    assert asked(empty, [ONE]) == asked(empty._app, [ONE])
    status, headers, _, _ = asked(empty, [ONE])
    assert (status, headers[b"retry-after"]) == (503, b"1")
    service.close()


def test_other_routes_and_methods_are_the_applications(app: Direct) -> None:
    assert asked(app, [b""], method="GET")[0] == 405
    assert json.loads(asked(app, [b""], "/v2/health/live", "GET")[2]) == {"live": True}
    assert asked(app, [ONE], SCORE + "/")[0] == 404
    document = json.loads(asked(app, [b""], "/openapi.json", "GET")[2])
    assert "post" in document["paths"][SCORE]
