"""The messages of the Open Inference Protocol for gRPC, made when they are first asked for; no generated code.

Names and numbers of the fields are those of the protocol's package `inference`, and of gRPC's own health check.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.wire import varint

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
_TYPES = {
    "double": 1,
    "float": 2,
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "bytes": 12,
    "uint32": 13,
}
_OPTIONAL, _REPEATED, _MESSAGE, _ENUM = 1, 3, 11, 14
_TENSOR = {
    "name": (1, "string"),
    "datatype": (2, "string"),
    "shape": (3, "int64*"),
    "parameters": (4, "map"),
    "contents": (5, "InferTensorContents"),
}
_TOLD = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*")}
_NAMED = {"name": (1, "string"), "version": (2, "string")}
CONTENTS = {
    "bool_contents": (1, "bool*"),
    "int_contents": (2, "int32*"),
    "int64_contents": (3, "int64*"),
    "uint_contents": (4, "uint32*"),
    "uint64_contents": (5, "uint64*"),
    "fp32_contents": (6, "float*"),
    "fp64_contents": (7, "double*"),
    "bytes_contents": (8, "bytes*"),
}
# message → field → (number, type); a star says that there may be many, `map` a map of texts to parameters.
_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {**_NAMED, "extensions": (3, "string*")},
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string*"),
        "platform": (3, "string"),
        "inputs": (4, "ModelMetadataResponse.TensorMetadata*"),
        "outputs": (5, "ModelMetadataResponse.TensorMetadata*"),
    },
    "ModelMetadataResponse.TensorMetadata": _TOLD,
    "InferParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "double_param": (4, "double"),
        "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": CONTENTS,
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map"),
        "inputs": (5, "ModelInferRequest.InferInputTensor*"),
        "outputs": (6, "ModelInferRequest.InferRequestedOutputTensor*"),
        "raw_input_contents": (7, "bytes*"),
    },
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, "map")},
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map"),
        "outputs": (5, "ModelInferResponse.InferOutputTensor*"),
        "raw_output_contents": (6, "bytes*"),
    },
    "ModelInferResponse.InferOutputTensor": _TENSOR,
}
_ONE_OF = {"InferParameter": "parameter_choice"}
_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
SERVING, NOT_SERVING = 1, 2


@functools.cache
def messages() -> Mapping[str, Any]:
    """Return name → class of the protocol's messages, without the package; `Health` asks and `Health.Answer` tells."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_inference())
    pool.Add(_health())
    found = {name: pool.FindMessageTypeByName(f"inference.{name}") for name in _MESSAGES}
    found |= {
        "Health": pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"),
        "Health.Answer": pool.FindMessageTypeByName("grpc.health.v1.HealthCheckResponse"),
    }
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


def _inference() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="recsys/inference.proto", package="inference", syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        message = made[name] = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
        if name in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[name])
        for field, (number, told) in fields.items():
            _add(message, field, number, told, f".inference.{name}", name in _ONE_OF)
    return file


def _add(message: Any, name: str, number: int, told: str, path: str, one_of: bool) -> None:
    label = _REPEATED if told.endswith("*") or told == "map" else _OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    kind = told.rstrip("*")
    if one_of:
        field.oneof_index = 0
    if kind in _TYPES:
        field.type = _TYPES[kind]
        return
    field.type = _MESSAGE
    if kind != "map":
        field.type_name = f".inference.{kind}"
        return
    # What a map is on the wire: many messages of key and value.
    entry = message.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=_OPTIONAL, type=_TYPES["string"])
    entry.field.add(name="value", number=2, label=_OPTIONAL, type=_MESSAGE, type_name=".inference.InferParameter")
    field.type_name = f"{path}.ParametersEntry"


def _health() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="recsys/health.proto", package="grpc.health.v1", syntax="proto3")
    file.message_type.add(name="HealthCheckRequest").field.add(
        name="service", number=1, label=_OPTIONAL, type=_TYPES["string"]
    )
    answer = file.message_type.add(name="HealthCheckResponse")
    states = answer.enum_type.add(name="ServingStatus")
    for number, state in enumerate(_STATES):
        states.value.add(name=state, number=number)
    path = ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    answer.field.add(name="status", number=1, label=_OPTIONAL, type=_ENUM, type_name=path)
    return file


_INSIDE = {"request": {4: "entry", 5: "tensor", 6: "output"}, "tensor": {4: "entry", 5: "contents"}}
_INSIDE |= {"output": {2: "entry"}, "contents": {}, "entry": {}}
_PACKED = {"tensor": {3: 0}, "contents": {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 4, 7: 8}}
"""Fields that hold many numbers in a row, and how many bytes each takes; 0: as many as it needs."""
_NONE: Mapping[int, int] = {}
_OBJECT = 16
"""Values that a message within a message counts for, by the memory that it takes."""


class _Count:
    """Values that were seen so far."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._seen = 0

    def add(self, more: int) -> None:
        self._seen += more
        if self._seen > self._limits.values:
            raise Refused(413, f"more than {self._limits.values:,} values in one request")


def check_values(content: bytes, limits: Limits) -> None:
    """Refuse a `ModelInferRequest` that would take far more memory than its bytes, before it is parsed.

    Raises:
        Refused: it has more values than the limit (413), or is no message (400).
    """
    try:
        _walk("request", content, 0, len(content), _Count(limits))
    except (ValueError, IndexError):
        raise Refused(400, "the body is no ModelInferRequest") from None


def _walk(message: str, content: bytes, at: int, end: int, count: _Count) -> None:
    inside, packed = _INSIDE[message], _PACKED.get(message, _NONE)
    plain = [number not in inside and number not in packed for number in range(16)]
    last, seen = end - 1, 0
    while at < end:
        key = content[at]
        if key & 0x87 == 2 and at < last and content[at + 1] < 128 and plain[key >> 3]:
            at += 2 + content[at + 1]  # a short text or bytes, of which there may be very many
            seen += 1
            if not seen % 1024:
                count.add(1024)
            continue
        count.add(1)
        key, at = varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, at = varint(content, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = varint(content, at)
            if at + size > end:
                raise ValueError("no message")
            if number in packed:
                count.add(_numbers(content[at : at + size], packed[number]))
            elif number in inside:
                count.add(_OBJECT)
                _walk(inside[number], content, at, at + size, count)
            at += size
        else:
            raise ValueError("no message")
    count.add(seen % 1024)
    if at != end:
        raise ValueError("no message")


def _numbers(content: bytes, width: int) -> int:
    return len(content) // width if width else int((np.frombuffer(content, np.uint8) < 128).sum())
