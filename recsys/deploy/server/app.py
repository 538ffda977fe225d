"""The routes of a server: raw rows, the Open Inference Protocol, health, and the document that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

import recsys
from recsys.deploy.encode import Row
from recsys.deploy.predictor import Predictor
from recsys.deploy.server.content import check_rows, parse
from recsys.deploy.server.direct import Answer, Direct
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.oip import Call, inputs_of, outputs_of
from recsys.deploy.server.schema import ref, schemas
from recsys.deploy.server.service import Service
from recsys.errors import RequestError

SCORE = "/v1/score"
LENGTH = "inference-header-content-length"
OPEN = frozenset(("live", "ready"))
"""Endpoints that need no token."""
_ERRORS: Mapping[int | str, str] = {
    400: "Not a readable request",
    401: "No valid token",
    408: "Sent too slowly",
    413: "Larger than the limits",
    415: "Compressed, or not JSON",
    422: "Rows that the model cannot read",
    429: "Too many requests of one client",
    431: "Too large a head",
    503: "Busy, or not ready",
}


def endpoint(path: str) -> str:
    """Return the endpoint that a path is counted under; there are few, whatever clients ask."""
    if path in ("/v1/score", "/v1/explain"):
        return path.rsplit("/", 1)[1]
    if path in ("/v2/health/live", "/v2/health/ready"):
        return path.rsplit("/", 1)[1]
    if path.startswith("/v2/models/"):
        return "infer" if path.endswith("/infer") else "model"
    return "other"


def make_app(service: Service, name: str) -> ASGIApp:
    """Return the application.

    Args:
        service: that answers.
        name: of the model, in paths and answers.
    """
    score = _scoring(service, name)
    return Direct(_framed(service, name, score), SCORE, score)


def _framed(service: Service, name: str, score: Answer) -> FastAPI:
    """All routes."""
    app = FastAPI(title="recsys", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_scores(app, score)
    _add_explanations(app, service, name)
    _add_health(app, service, name)
    _add_models(app, service, name)
    _add_errors(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        told = get_openapi(title="recsys", version=recsys.__version__, routes=app.routes)
        predictor = service.current().predictor if service.ready else None
        told["components"] = {"schemas": schemas(predictor, service.limits)}
        for methods in told["paths"].values():
            for about in methods.values():
                if "requestBody" not in about:
                    about["responses"].pop("422", None)  # FastAPI's own, for paths that are any text here
        return _json(told)

    return app


def _scoring(service: Service, name: str) -> Answer:
    def read(body: bytes, predictor: Predictor, limits: Limits) -> Sequence[Row]:
        return check_rows(parse(body, limits), limits)

    async def score(body: bytes, scope: Scope) -> bytes:
        answer = await service.answer(body, read)
        probability = answer.scores.probability
        rows = zip(*(probability[task].tolist() for task in probability), strict=True)
        scores = [dict(zip(probability, row, strict=True)) for row in rows]
        scope.setdefault("state", {})["told"] = {"rows": len(scores), "bundle": answer.bundle}
        return _text({"model": name, "bundle": answer.bundle, "scores": scores})

    return score


def _add_scores(app: FastAPI, answer: Answer) -> None:
    @app.post(SCORE, **_described("Scores", body="Rows"))
    async def score(request: Request) -> Response:
        """Score raw rows: one object of column and value, or a list of them."""
        return Response(await answer(await request.body(), request.scope), media_type="application/json")


def _add_explanations(app: FastAPI, service: Service, name: str) -> None:
    def read(body: bytes, predictor: Predictor, limits: Limits) -> Sequence[Row]:
        rows = check_rows(parse(body, limits), limits)
        if len(rows) > limits.explained:
            raise Refused(413, f"{len(rows):,} rows to explain in one request; at most {limits.explained:,}")
        return rows

    @app.post("/v1/explain", **_described("Explanations", body="Rows"))
    async def explain(request: Request) -> Response:
        """Tell what each column of raw rows does to the logit: by how much it falls where the column is missing."""
        bundle, found = await service.explain(await request.body(), read)
        rows = []
        for at in range(len(found)):
            logit = {task: float(z[at]) for task, z in found.logit.items()}
            parts = {
                task: dict(zip(found.names, c[at].tolist(), strict=True)) for task, c in found.contribution.items()
            }
            rows.append({"logit": logit, "contributions": parts})
        request.state.told = {"rows": len(rows), "bundle": bundle}
        return _json({"model": name, "bundle": bundle, "base": dict(found.base), "explanations": rows})


def _add_health(app: FastAPI, service: Service, name: str) -> None:
    @app.get("/v2/health/live", **_described("Live"))
    async def live() -> Response:
        """Say that the server runs."""
        return _json({"live": True})

    @app.get("/v2/health/ready", **_described("Ready"))
    async def ready() -> Response:
        """Say whether a model has been verified and has given its golden answers."""
        return _json({"ready": True}) if service.ready else _not_ready()

    @app.get("/v2", **_described("Server"))
    async def server() -> Response:
        """Tell of the server."""
        return _json({"name": "recsys", "version": recsys.__version__, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/models/{model}/ready", **_described("ModelReady", 404))
    @app.get("/v2/models/{model}/versions/{version}/ready", **_described("ModelReady", 404))
    async def model_ready(model: str, version: str | None = None) -> Response:
        """Say whether the model, and this version of it, answers."""
        if not service.ready:
            return _not_ready()
        _known(service, name, model, version)
        return _json({"name": name, "ready": True})


def _add_models(app: FastAPI, service: Service, name: str) -> None:
    @app.get("/v2/models/{model}", **_described("Model", 404))
    @app.get("/v2/models/{model}/versions/{version}", **_described("Model", 404))
    async def metadata(model: str, version: str | None = None) -> Response:
        """Tell of a model: one input for each raw column; the version is the bundle's id."""
        predictor = _known(service, name, model, version)
        about = {"name": name, "versions": [predictor.id], "platform": "recsys_bundle"}
        return _json({**about, "inputs": inputs_of(predictor), "outputs": outputs_of(predictor)})

    @app.post("/v2/models/{model}/infer", **_described("Inference", 404, body="InferenceRequest"))
    @app.post("/v2/models/{model}/versions/{version}/infer", **_described("Inference", 404, body="InferenceRequest"))
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Score rows that are given as one tensor for each raw column."""
        _known(service, name, model, version)
        header = request.headers.get(LENGTH)
        calls: list[Call] = []

        def read(body: bytes, predictor: Predictor, limits: Limits) -> Sequence[Row]:
            if version not in (None, predictor.id):
                raise _unknown("version", "is not the one that is served")
            calls.append(Call.of_body(body, None if header is None else header.encode(), limits))
            return calls[-1].rows(predictor)

        answer = await service.answer(await request.body(), read)
        body, length = calls[-1].reply(name, answer.bundle, tuple(answer.scores.logit), answer.scores)
        request.state.told = {"rows": len(answer.scores), "bundle": answer.bundle}
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={LENGTH: str(length)})


def _add_errors(app: FastAPI) -> None:
    @app.post("/v1/swap", include_in_schema=False)
    @app.post("/v2/repository/{rest:path}", include_in_schema=False)
    async def exchange() -> Response:
        raise Refused(403, "models are not exchanged on this port")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {key.decode(): value.decode() for key, value in error.headers}
        return Response(error.body, error.status, headers, "application/json")

    @app.exception_handler(RequestError)
    async def unread(request: Request, error: RequestError) -> Response:
        return Response(Refused(422, str(error)).body, 422, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        about = {404: "there is no such path", 405: "the path does not take this method"}
        return Response(
            Refused(error.status_code, about.get(error.status_code, str(error.detail))).body,
            error.status_code,
            error.headers,
            "application/json",
        )


def _known(service: Service, name: str, model: str, version: str | None) -> Predictor:
    """Return the model of a path; names are compared, and never looked for in files."""
    if model != name:
        raise _unknown("model", f"is not served here; the model is {name!r}")
    predictor = service.current().predictor
    if version not in (None, predictor.id):
        raise _unknown("version", "is not the one that is served")
    return predictor


def _unknown(what: str, why: str) -> Refused:
    return Refused(404, f"the {what} {why}")


def _not_ready() -> Response:
    refused = Refused(503, "the model is being loaded and checked")
    headers = {key.decode(): value.decode() for key, value in refused.headers}
    return Response(refused.body, 503, headers, "application/json")


def _text(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _json(value: Any) -> Response:
    return Response(_text(value), media_type="application/json")


def _described(reply: str, *statuses: int, body: str | None = None) -> dict[str, Any]:
    """What the document tells of a route."""
    possible = dict(_ERRORS) if body is not None else {key: _ERRORS[key] for key in (401, 429, 431, 503)}
    possible |= dict.fromkeys(statuses, "No such model or version")
    error = {"content": {"application/json": {"schema": ref("Error")}}}
    replies: dict[int | str, Any] = {key: {"description": text, **error} for key, text in possible.items()}
    replies[200] = {"description": reply, "content": {"application/json": {"schema": ref(reply)}}}
    extra: dict[str, Any] = {}
    if body is not None:
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(body)}}}}
    return {"responses": replies, "openapi_extra": extra, "response_model": None}


__all__ = ["OPEN", "endpoint", "make_app"]
