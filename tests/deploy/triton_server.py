"""Reads a model repository as Triton does: a configuration by its schema, models by their wiring; for the tests.

The schema is stated here from the documentation of the server's model configuration, as far as it may be used.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

STRING, BOOL, INT32, UINT32, INT64, UINT64, ENUM, MESSAGE = 9, 8, 5, 13, 3, 4, 14, 11
ENUMS = {
    "DataType": [
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
        "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
    ],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}  # fmt: skip
MANY, MAP = "many", "map"
# message → field → (number, type or name of an enumeration or message, None or MANY or MAP with its values' type)
MESSAGES: dict[str, dict[str, tuple[Any, ...]]] = {
    "Reshape": {"shape": (1, INT64, MANY)},
    "Input": {
        "name": (1, STRING), "data_type": (2, "DataType"), "dims": (4, INT64, MANY), "reshape": (5, "Reshape"),
        "allow_ragged_batch": (7, BOOL), "optional": (8, BOOL),
    },
    "Output": {
        "name": (1, STRING), "data_type": (2, "DataType"), "dims": (3, INT64, MANY), "reshape": (5, "Reshape"),
        "label_filename": (4, STRING),
    },
    "Group": {"name": (1, STRING), "kind": (4, "Kind"), "count": (2, INT32), "gpus": (3, INT32, MANY)},
    "Batching": {
        "preferred_batch_size": (1, INT32, MANY), "max_queue_delay_microseconds": (2, UINT64),
        "preserve_ordering": (3, BOOL),
    },
    "Step": {
        "model_name": (1, STRING), "model_version": (2, INT64), "input_map": (3, STRING, MAP),
        "output_map": (4, STRING, MAP),
    },
    "Ensembling": {"step": (1, "Step", MANY)},
    "Parameter": {"string_value": (1, STRING)},
    "WarmupInput": {
        "data_type": (1, "DataType"), "dims": (2, INT64, MANY), "zero_data": (3, BOOL), "random_data": (4, BOOL),
        "input_data_file": (5, STRING),
    },
    "Warmup": {
        "name": (1, STRING), "batch_size": (2, UINT32), "inputs": (3, "WarmupInput", MAP), "count": (4, UINT32),
    },
    "Config": {
        "name": (1, STRING), "platform": (2, STRING), "backend": (17, STRING), "max_batch_size": (4, INT32),
        "input": (5, "Input", MANY), "output": (6, "Output", MANY), "dynamic_batching": (11, "Batching"),
        "ensemble_scheduling": (15, "Ensembling"), "instance_group": (7, "Group", MANY),
        "default_model_filename": (8, STRING), "parameters": (14, "Parameter", MAP),
        "model_warmup": (16, "Warmup", MANY),
    },
}  # fmt: skip
DTYPES = {"TYPE_STRING": object, "TYPE_INT64": np.int64, "TYPE_UINT64": np.uint64, "TYPE_FP64": np.float64}
DTYPES["TYPE_FP32"] = np.float32
ONNX_TYPES = {
    "tensor(string)": "TYPE_STRING",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(double)": "TYPE_FP64",
    "tensor(float)": "TYPE_FP32",
}


def _schema() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, *how) in fields.items():
            if how == [MAP]:
                entry = message.nested_type.add(name="".join(part.title() for part in field.split("_")) + "Entry")
                entry.options.map_entry = True
                _field(entry, "key", 1, STRING)
                _field(entry, "value", 2, kind)
                _field(message, field, number, f"{name}.{entry.name}", repeated=True)
            else:
                _field(message, field, number, kind, repeated=how == [MANY])
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Config"))


def _field(message: Any, name: str, number: int, kind: Any, repeated: bool = False) -> None:
    field = message.field.add(name=name, number=number, label=3 if repeated else 1)
    if isinstance(kind, int):
        field.type = kind
    else:
        field.type, field.type_name = (ENUM if kind in ENUMS else MESSAGE), f".t.{kind}"


CONFIG = _schema()


class Model:
    """One model of a repository: its configuration must be one that the server accepts, and fit its graph."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        self.config = text_format.Parse(text, CONFIG())
        assert self.config.name == folder.name
        assert self.config.max_batch_size > 0
        versions = [path.name for path in folder.iterdir() if path.is_dir() and path.name != "warmup"]
        assert versions == ["1"]
        tensors = [*self.config.input, *self.config.output]
        assert len({t.name for t in tensors}) == len(tensors) > 1
        assert all(t.data_type > 0 and len(t.dims) > 0 and all(d == -1 or d > 0 for d in t.dims) for t in tensors)
        self.ensemble = self.config.platform == "ensemble"
        if self.ensemble:
            assert not self.config.HasField("dynamic_batching")
            assert not self.config.instance_group
            assert list((folder / "1").iterdir()) == []
            return
        assert self.config.backend == "onnxruntime"
        assert self.config.HasField("dynamic_batching")
        assert [(g.kind, g.count > 0) for g in self.config.instance_group] == [(2, True)]
        self.session = onnxruntime.InferenceSession(
            (folder / "1" / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"]
        )
        for told, real in (
            (self.config.input, self.session.get_inputs()),
            (self.config.output, self.session.get_outputs()),
        ):
            assert [t.name for t in told] == [value.name for value in real]
            for t, value in zip(told, real, strict=True):
                assert ENUMS["DataType"][t.data_type] == ONNX_TYPES[value.type]
                seen = list(t.reshape.shape) if t.HasField("reshape") else list(t.dims)
                assert isinstance(value.shape[0], str)  # the rows
                assert seen == [d if isinstance(d, int) else -1 for d in value.shape[1:]]

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Score a batch as the server hands it over: each input `[B, *dims]`."""
        assert set(feeds) == {t.name for t in self.config.input}
        rows = len(next(iter(feeds.values())))
        assert rows <= self.config.max_batch_size
        for t in self.config.input:
            array = feeds[t.name]
            assert array.dtype == DTYPES[ENUMS["DataType"][t.data_type]], t.name
            assert len(array.shape) == 1 + len(t.dims)
            assert all(d in (-1, real) for d, real in zip(t.dims, array.shape[1:], strict=True)), t.name
        if self.ensemble:
            return self._through_steps(feeds)
        given = {
            t.name: feeds[t.name].reshape(rows, *t.reshape.shape) if t.HasField("reshape") else feeds[t.name]
            for t in self.config.input
        }
        names = [t.name for t in self.config.output]
        found = dict(zip(names, self.session.run(names, given), strict=True))
        return {
            t.name: found[t.name].reshape(rows, *t.dims) if t.HasField("reshape") else found[t.name]
            for t in self.config.output
        }

    def _through_steps(self, feeds: dict[str, Any]) -> dict[str, Any]:
        tensors = dict(feeds)
        for step in self.config.ensemble_scheduling.step:
            assert step.model_version == -1
            model = Model(self.folder.parent / step.model_name)
            found = model.run({inner: tensors[outer] for inner, outer in step.input_map.items()})
            fresh = {outer: found[inner] for inner, outer in step.output_map.items()}
            assert not set(fresh) & set(tensors)
            tensors |= fresh
        wanted = {t.name: t for t in self.config.output}
        for name, t in wanted.items():
            assert list(tensors[name].shape[1:]) == list(t.dims)
        return {name: tensors[name] for name in wanted}

    def warm_up(self) -> list[dict[str, Any]]:
        """Run every warm-up request; return what it was made of."""
        made = []
        for request in self.config.model_warmup:
            feeds = {}
            assert request.batch_size >= 1
            for name, entry in request.inputs.items():
                content = (self.folder / "warmup" / entry.input_data_file).read_bytes()
                kind = ENUMS["DataType"][entry.data_type]
                flat = _texts(content) if kind == "TYPE_STRING" else np.frombuffer(content, DTYPES[kind])
                row = flat.reshape(1, *entry.dims)
                feeds[name] = np.concatenate([row] * request.batch_size)
            self.run(feeds)
            made.append(feeds)
        return made


def _texts(content: bytes) -> Any:
    found, at = [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        found.append(content[at + 4 : at + 4 + size].decode())
        at += 4 + size
    assert at == len(content)
    texts = np.empty(len(found), dtype=object)
    texts[:] = found
    return texts
