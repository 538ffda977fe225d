"""Tensors of the Open Inference Protocol, in JSON and in binary, to raw rows and back."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.deploy.encode import Row
from recsys.deploy.predictor import Predictor, Scores
from recsys.deploy.server.content import parse
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.values import shown

NUMPY = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
TYPES = ("BYTES", *NUMPY)
FLOATS = ("FP16", "FP32", "FP64")
OUTPUTS = ("probability", "logit")
_KINDS: Mapping[str, set[type]] = {
    "BOOL": {bool},
    "BYTES": {str},
    **{name: {int, float} for name in FLOATS},
}


def inputs_of(predictor: Predictor) -> list[dict[str, Any]]:
    """Return the inputs of a model as its metadata tells them: one tensor for each raw column."""
    of = {"integer": "INT64", "string": "BYTES", "number": "FP64"}
    found = []
    for column in predictor.schema["columns"]:
        lists = column["type"] == "list"
        kind = column["items"] if lists else column["type"]
        found.append({"name": column["name"], "datatype": of[kind], "shape": [-1, -1] if lists else [-1]})
    return found


def outputs_of(predictor: Predictor) -> list[dict[str, Any]]:
    """Return the outputs of a model as its metadata tells them; columns are tasks."""
    return [{"name": name, "datatype": "FP64", "shape": [-1, len(predictor.tasks)]} for name in OUTPUTS]


class Call:
    """One request: its rows, and the form that the answer is to have.

    Args:
        request: an object with `inputs`, as JSON gives it.
        blobs: the bytes of its binary tensors, one after the other.
        limits: of requests.

    Raises:
        Refused: it is no such request.
    """

    def __init__(self, request: Any, blobs: bytes | memoryview, limits: Limits) -> None:
        self._limits = limits
        self._binary = memoryview(blobs)
        if not isinstance(request, dict):
            raise Refused(400, f"{shown(request)} is no request; expected an object with `inputs`")
        self._inputs = _objects(request, "inputs", needed=True)
        self.id = request.get("id")
        if self.id is not None and not (isinstance(self.id, str) and len(self.id) <= limits.string):
            raise Refused(400, f"`id` is {shown(self.id)}; expected a text of at most {limits.string:,} characters")
        outputs = _objects(request, "outputs", needed=False)
        binary = _parameters(request).get("binary_data_output") is True
        self.outputs = {
            _name(output, "output"): _parameters(output).get("binary_data", binary) is True for output in outputs
        } or dict.fromkeys(OUTPUTS, binary)
        if len(outputs) not in (0, len(self.outputs)):
            raise Refused(400, "an output is asked for twice")
        for name in self.outputs:
            if name not in OUTPUTS:
                raise Refused(400, f"there is no output {shown(name)}; outputs: {', '.join(OUTPUTS)}")

    @classmethod
    def of_body(cls, body: bytes, header: bytes | None, limits: Limits) -> Call:
        """Read a request of HTTP.

        Args:
            body: JSON, and after it the bytes of binary tensors.
            header: value of `Inference-Header-Content-Length`, the length of the JSON; None for JSON alone.
            limits: of requests.

        Raises:
            Refused: it is no such request.
        """
        length = _length(header, len(body))
        return cls(parse(body[:length] if header is not None else body, limits), memoryview(body)[length:], limits)

    def rows(self, predictor: Predictor) -> Sequence[Row]:
        """Return the raw rows of the request.

        Raises:
            Refused: an input is missing, unknown, there twice, or not what it says.
        """
        wanted = {i["name"]: i for i in inputs_of(predictor)}
        columns: dict[str, Any] = {}
        for tensor in self._inputs:
            name = _name(tensor, "input")
            if name in columns:
                raise Refused(400, f"the input {shown(name)} is there twice")
            if name not in wanted:
                raise Refused(400, f"there is no input {shown(name)}; inputs: {', '.join(wanted)}"[:1000])
            columns[name] = self._column(name, tensor, wanted[name])
        if len(self._binary):
            raise Refused(400, f"{len(self._binary):,} bytes are left after the last binary tensor")
        for name in wanted:
            if name not in columns:
                raise Refused(400, f"the input {shown(name)} is missing")
        sizes = {name: len(values) for name, values in columns.items()}
        rows = next(iter(sizes.values()))
        for name, size in sizes.items():
            if size != rows:
                raise Refused(400, f"the input {shown(name)} has {size:,} rows, others have {rows:,}")
        if not rows:
            raise Refused(400, "there are no rows")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _column(self, name: str, tensor: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Any]:
        kind = tensor.get("datatype")
        if kind not in TYPES:
            raise Refused(400, f"the input {shown(name)} has the datatype {shown(kind)}; known: {', '.join(TYPES)}")
        if kind in FLOATS and wanted["datatype"] != "FP64":
            raise Refused(400, f"the input {shown(name)} holds ids; send BYTES or whole numbers, not {kind}")
        shape = self._shape(name, tensor.get("shape"), len(wanted["shape"]), kind)
        size = _parameters(tensor).get("binary_data_size")
        flat = self._plain(name, kind, shape, tensor) if size is None else self._bytes(name, kind, shape, size, tensor)
        if len(shape) == 1:
            return flat
        width = shape[1]
        return [flat[first * width : (first + 1) * width] for first in range(shape[0])]

    def _shape(self, name: str, shape: Any, rank: int, kind: str) -> list[int]:
        good = isinstance(shape, list) and all(n.__class__ is int and 0 <= n < 2**63 for n in shape)
        if not good or not shape:
            raise Refused(400, f"the input {shown(name)} has the shape {shown(shape)}; expected whole numbers from 0")
        if shape[0] > self._limits.rows:
            raise Refused(413, f"{shape[0]:,} rows in one request; at most {self._limits.rows:,}")
        if len(shape) == rank + 1 and shape[-1] == 1:
            shape = shape[:-1]
        text = rank == 2 and len(shape) == 1 and kind == "BYTES"  # a list as one text with separators
        if len(shape) != rank and not text:
            raise Refused(400, f"the input {shown(name)} has {len(shape)} dimensions; expected {rank}")
        if prod(shape) > self._limits.values:
            raise Refused(413, f"the input {shown(name)} has {prod(shape):,} values; at most {self._limits.values:,}")
        return list(shape)

    def _plain(self, name: str, kind: str, shape: list[int], tensor: Mapping[str, Any]) -> list[Any]:
        data: Any = tensor.get("data")
        if not isinstance(data, list):
            raise Refused(400, f"the input {shown(name)} has no list `data`")
        if data and len(shape) == 2 and all(part.__class__ is list for part in data):
            if len(data) != shape[0] or any(len(part) != shape[1] for part in data):
                raise Refused(400, f"the input {shown(name)} has lists in `data` that do not fit its shape")
            data = list(chain.from_iterable(data))
        if len(data) == shape[0] and shape == [len(data)] and all(p.__class__ is list and len(p) == 1 for p in data):
            data = [part[0] for part in data]
        if len(data) != prod(shape):
            raise Refused(400, f"the input {shown(name)} has {len(data):,} values, its shape says {prod(shape):,}")
        if not set(map(type, data)) <= _KINDS.get(kind, {int}):
            raise Refused(400, f"the input {shown(name)} has values that are no {kind}")
        if kind == "BYTES":
            for at, value in enumerate(data):
                self._text(value, len(value.encode(errors="surrogatepass")), at, name)
        elif kind in NUMPY and data and kind != "BOOL":
            low, high = _range(kind)
            if not low <= min(data) or not max(data) <= high:
                raise Refused(400, f"the input {shown(name)} has a value that is too large for {kind}")
        return list(data)

    def _bytes(self, name: str, kind: str, shape: list[int], size: Any, tensor: Mapping[str, Any]) -> list[Any]:
        if "data" in tensor:
            raise Refused(400, f"the input {shown(name)} has both `data` and `binary_data_size`")
        if size.__class__ is not int or not 0 <= size <= len(self._binary):
            raise Refused(
                400, f"the input {shown(name)} says {shown(size)} binary bytes; {len(self._binary):,} are left"
            )
        content, self._binary = self._binary[:size], self._binary[size:]
        if kind == "BYTES":
            return self._texts(name, content, prod(shape))
        dtype = np.dtype(NUMPY[kind])
        if size != prod(shape) * dtype.itemsize:
            raise Refused(
                400, f"the input {shown(name)} has {size:,} bytes; its shape needs {prod(shape) * dtype.itemsize:,}"
            )
        values: list[Any] = np.frombuffer(content, dtype).tolist()
        return values

    def _texts(self, name: str, content: memoryview, count: int) -> list[str]:
        found: list[str] = []
        at = 0
        while at < len(content) and len(found) < count:
            if at + 4 > len(content):
                break
            (size,) = struct.unpack_from("<I", content, at)
            end = at + 4 + size
            if end > len(content):
                break
            try:
                text = str(content[at + 4 : end], "utf-8")
            except UnicodeDecodeError:
                raise Refused(400, f"row {len(found) + 1}, column {shown(name)}: the text is not UTF-8") from None
            self._text(text, size, len(found), name)
            found.append(text)
            at = end
        if at != len(content) or len(found) != count:
            raise Refused(400, f"the input {shown(name)} has binary texts that do not fit its size and shape")
        return found

    def _text(self, value: str, size: int, at: int, name: str) -> None:
        if size > self._limits.string:
            limit = self._limits.string
            raise Refused(413, f"value {at + 1} of the input {shown(name)} has {size:,} bytes; at most {limit:,}")
        if "\0" in value:
            raise Refused(400, f"value {at + 1} of the input {shown(name)} has the character NUL")

    def reply(self, model: str, version: str, tasks: Sequence[str], scores: Scores) -> tuple[bytes, int | None]:
        """Return the body of the answer, and the length of its JSON where binary tensors come after it."""
        tensors: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        for name, binary in self.outputs.items():
            told = scores.probability if name == "probability" else scores.logit
            matrix = stacked(told, tasks)
            tensor: dict[str, Any] = {"name": name, "datatype": "FP64", "shape": list(matrix.shape)}
            if binary:
                blobs.append(matrix.astype("<f8").tobytes())
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = matrix.ravel().tolist()
            tensors.append(tensor)
        told_id = {} if self.id is None else {"id": self.id}
        head = {"model_name": model, "model_version": version, **told_id, "outputs": tensors}
        text = json.dumps(head, separators=(",", ":")).encode()
        return b"".join([text, *blobs]), len(text) if blobs else None


def stacked(told: Mapping[str, npt.NDArray[np.float64]], tasks: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return `{task: [B]}` as `[B, T]`."""
    return np.stack([told[task] for task in tasks], axis=1)


def _range(kind: str) -> tuple[float, float]:
    if kind in FLOATS:
        largest = float(np.finfo(NUMPY[kind]).max)
        return -largest, largest
    whole = np.iinfo(NUMPY[kind])
    return int(whole.min), int(whole.max)


def _length(header: bytes | None, size: int) -> int:
    if header is None:
        return size
    if not header.isdigit() or len(header) > 12 or int(header) > size:
        raise Refused(400, f"Inference-Header-Content-Length is no length within the body's {size:,} bytes")
    return int(header)


def _objects(request: Mapping[str, Any], key: str, *, needed: bool) -> list[Mapping[str, Any]]:
    found = request.get(key)
    if found is None and not needed:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found) or (needed and not found):
        raise Refused(400, f"`{key}` is {shown(found)}; expected a list of objects")
    return found


def _parameters(item: Mapping[str, Any]) -> Mapping[str, Any]:
    found = item.get("parameters", {})
    if not isinstance(found, dict):
        raise Refused(400, f"`parameters` is {shown(found)}; expected an object")
    return found


def _name(item: Mapping[str, Any], what: str) -> str:
    found = item.get("name")
    if not isinstance(found, str):
        raise Refused(400, f"an {what} has the name {shown(found)}; expected a text")
    return found
