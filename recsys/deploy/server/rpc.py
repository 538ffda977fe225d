"""The Open Inference Protocol over gRPC: the same answers, limits, tokens and refusals as over HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TextIO

import grpc

import recsys
from recsys.deploy.encode import Row
from recsys.deploy.predictor import Predictor
from recsys.deploy.server.access import Token
from recsys.deploy.server.gate import write_line
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.messages import HEALTH, NOT_SERVING, SERVICE, SERVING, check_values, messages
from recsys.deploy.server.oip import Call, inputs_of, outputs_of, stacked
from recsys.deploy.server.rate import Rate
from recsys.deploy.server.service import Service
from recsys.deploy.values import shown
from recsys.errors import RecsysError, RequestError

LOG = logging.getLogger("recsys.serve")
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""Status of HTTP → that of gRPC; others are internal errors."""
_RETRY = (("grpc-retry-pushback-ms", "1000"),)
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype → the field that its values stand in; FP16 comes as raw bytes alone."""
Method = Callable[[Any], Awaitable[Any]]


class Rpc:
    """Answers the calls of the protocol, and gRPC's own health check.

    Args:
        service: that answers.
        name: of the model.
        token: that calls need, but for those that ask for health; None lets everybody in.
        log: gets one line of JSON for each call, without its values; None writes nothing.
    """

    def __init__(self, service: Service, name: str, *, token: Token | None = None, log: TextIO | None = None) -> None:
        self._service = service
        self._name = name
        self._token = token
        self._log = log
        self._made = messages()
        self._held = 0
        self._rate = Rate(service.limits.rate)

    async def start(self, host: str, port: int) -> tuple[Any, int]:
        """Listen; return the server, to be stopped, and its port.

        Raises:
            RecsysError: the port is taken.
        """
        limits = self._service.limits
        seconds = 1000
        options = [
            ("grpc.max_receive_message_length", limits.body),
            ("grpc.max_metadata_size", limits.head),
            ("grpc.absolute_max_metadata_size", limits.head),
            ("grpc.max_concurrent_streams", limits.queue),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.max_connection_idle_ms", int(limits.idle * seconds)),
            ("grpc.server_handshake_timeout_ms", int(limits.receive * seconds)),
            ("grpc.so_reuseport", 0),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=limits.queue)
        server.add_generic_rpc_handlers((self._inference(), self._health()))
        shown_host = f"[{host}]" if ":" in host else host
        try:
            bound = server.add_insecure_port(f"{shown_host}:{port}")
        except RuntimeError:
            raise RecsysError(f"{host}:{port}: cannot listen there for gRPC") from None
        await server.start()
        return server, bound

    def _inference(self) -> Any:
        asked: dict[str, tuple[Method, bool]] = {
            "ServerLive": (self._live, True),
            "ServerReady": (self._ready, True),
            "ServerMetadata": (self._server, False),
            "ModelReady": (self._model_ready, False),
            "ModelMetadata": (self._metadata, False),
        }
        handlers = {name: self._handler(name, *method) for name, method in asked.items()}
        handlers["ModelInfer"] = self._handler("ModelInfer", self._infer, False, raw=True)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _health(self) -> Any:
        return grpc.method_handlers_generic_handler(HEALTH, {"Check": self._handler("Health", self._check, True)})

    def _handler(self, name: str, method: Method, is_open: bool, raw: bool = False) -> Any:
        """Return what gRPC calls: `method` on the message, or on its bytes where these are to be counted first."""
        kind = self._made["Health" if name == "Health" else f"{name}Request"]
        endpoint = {"ServerLive": "live", "ServerReady": "ready", "ModelInfer": "infer", "Health": "ready"}.get(
            name, "model"
        )

        async def answer(content: bytes, context: Any) -> Any:
            began = time.perf_counter()
            told: dict[str, Any] = {"status": 500}
            self._held += len(content)
            try:
                return await self._answer(content, context, method, None if raw else kind, is_open, told)
            except Refused as refused:
                told["status"] = refused.status
                code = CODES.get(refused.status, grpc.StatusCode.INTERNAL)
                await context.abort(code, refused.problem, _RETRY if refused.status in (429, 503) else ())
            finally:
                self._held -= len(content)
                seconds = time.perf_counter() - began
                self._service.metrics.answered(f"grpc_{endpoint}", told["status"], seconds)
                if self._log is not None:
                    about = {"endpoint": f"grpc_{endpoint}", **told, "bytes": len(content)}
                    write_line(self._log, "GRPC", seconds, about)

        return grpc.unary_unary_rpc_method_handler(answer, None, _serialized)

    async def _answer(
        self, content: bytes, context: Any, method: Method, kind: Any, is_open: bool, told: dict[str, Any]
    ) -> Any:
        try:
            if not is_open:
                self._rate.take(_address(context.peer()))
            if self._token is not None and not is_open:
                self._token.check(_authorization(context.invocation_metadata()))
            if self._held > self._service.limits.held:
                raise Refused(503, "too many large bodies at once; try again later")
            answer = await method(content if kind is None else _parsed(kind, content))
        except RequestError as error:
            raise Refused(422, str(error)) from None
        except (Refused, grpc.aio.AbortError):
            raise
        except Exception as error:  # nothing that a client sends may end in a traceback that it can read
            LOG.error("a call failed: %s", type(error).__name__, exc_info=error)
            raise Refused(500, "the server failed") from None
        told["status"] = 200
        return answer

    async def _live(self, request: Any) -> Any:
        return self._made["ServerLiveResponse"](live=True)

    async def _ready(self, request: Any) -> Any:
        return self._made["ServerReadyResponse"](ready=self._service.ready)

    async def _check(self, request: Any) -> Any:
        if request.service not in ("", SERVICE):
            raise Refused(404, "there is no such service")
        return self._made["Health.Answer"](status=SERVING if self._service.ready else NOT_SERVING)

    async def _server(self, request: Any) -> Any:
        return self._made["ServerMetadataResponse"](name="recsys", version=recsys.__version__)

    async def _model_ready(self, request: Any) -> Any:
        self._known(request.name, request.version)
        return self._made["ModelReadyResponse"](ready=True)

    async def _metadata(self, request: Any) -> Any:
        predictor = self._known(request.name, request.version)
        about = {"name": self._name, "versions": [predictor.id], "platform": "recsys_bundle"}
        return self._made["ModelMetadataResponse"](**about, inputs=inputs_of(predictor), outputs=outputs_of(predictor))

    async def _infer(self, content: bytes) -> Any:
        calls: list[tuple[Any, Call]] = []

        def read(body: bytes, predictor: Predictor, limits: Limits) -> Sequence[Row]:
            check_values(body, limits)
            request = _parsed(self._made["ModelInferRequest"], body)
            self._known(request.model_name, request.model_version)
            if request.model_version not in ("", predictor.id):
                raise Refused(404, "the version is not the one that is served")
            calls.append((request, Call(*plain(request), limits)))
            return calls[-1][1].rows(predictor)

        answer = await self._service.answer(content, read)
        request, call = calls[-1]
        reply = self._made["ModelInferResponse"](
            model_name=self._name, model_version=answer.bundle, id="" if call.id is None else call.id
        )
        told = {"probability": answer.scores.probability, "logit": answer.scores.logit}
        for name in call.outputs:
            matrix = stacked(told[name], tuple(answer.scores.logit))
            tensor = reply.outputs.add(name=name, datatype="FP64", shape=matrix.shape)
            if request.raw_input_contents:
                reply.raw_output_contents.append(matrix.astype("<f8").tobytes())
            else:
                tensor.contents.fp64_contents.extend(matrix.ravel())
        return reply

    def _known(self, name: str, version: str) -> Predictor:
        if name != self._name:
            raise Refused(404, f"the model is not served here; the model is {self._name!r}")
        predictor = self._service.current().predictor
        if version not in ("", predictor.id):
            raise Refused(404, "the version is not the one that is served")
        return predictor


def plain(request: Any) -> tuple[dict[str, Any], bytes]:
    """Return a `ModelInferRequest` as the object that JSON would give, and the bytes of its raw tensors.

    Raises:
        Refused: values stand in a field that is not their type's, or are given twice.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Refused(400, f"{len(raw)} raw tensors for {len(request.inputs)} inputs")
    inputs = []
    for at, tensor in enumerate(request.inputs):
        told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if raw:
            if filled:
                raise Refused(400, f"the input {shown(tensor.name)} has both contents and raw bytes")
            told["parameters"] = {"binary_data_size": len(raw[at])}
        else:
            told["data"] = _values(tensor, filled)
        inputs.append(told)
    outputs = [{"name": output.name} for output in request.outputs]
    found = {
        "inputs": inputs,
        **({"outputs": outputs} if outputs else {}),
        **({"id": request.id} if request.id else {}),
    }
    return found, b"".join(raw)


def _values(tensor: Any, filled: Sequence[str]) -> list[Any]:
    wanted = _CONTENTS.get(tensor.datatype)
    if wanted is None:
        return []  # its datatype will be refused, or its missing values
    for name in filled:
        if name != wanted:
            raise Refused(400, f"the input {shown(tensor.name)} has values in {name}; {tensor.datatype} has {wanted}")
    values = list(getattr(tensor.contents, wanted))
    if tensor.datatype != "BYTES":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise Refused(400, f"the input {shown(tensor.name)} has a text that is not UTF-8") from None


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        return kind.FromString(content)
    except Exception:  # protocol buffers have an error class for each implementation
        raise Refused(400, f"the body is no {kind.DESCRIPTOR.name}") from None


def _serialized(message: Any) -> bytes:
    found: bytes = message.SerializeToString()
    return found


def _authorization(metadata: Any) -> bytes | None:
    for key, value in metadata or ():
        if key == "authorization":
            return value if isinstance(value, bytes) else str(value).encode(errors="replace")
    return None


def _address(peer: str) -> str:
    """Return a peer such as `ipv4:1.2.3.4:5678` without its port."""
    return peer.rpartition(":")[0]
