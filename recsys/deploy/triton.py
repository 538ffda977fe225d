"""A bundle as models of a repository of Triton Inference Server, without any code in it.

    DIR/NAME/config.pbtxt, 1/model.onnx, warmup/     one graph from raw columns to scores

or, as an ensemble, with the same inputs and outputs under the same name:

    DIR/NAME_encoder/…, 1/model.onnx                 raw columns to ids and numbers
    DIR/NAME_scorer/…, 1/model.onnx                  these to scores: the bundle's own graph
    DIR/NAME/config.pbtxt, 1/                        how the two are joined

Requests are gathered into batches; a list's length must be equal in the requests of one batch, or they are scored
apart.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, ValueInfoProto

from recsys.deploy.bundle import WARMUP
from recsys.deploy.raw_graph import RawGraphs
from recsys.deploy.raw_rows import RawRows
from recsys.deploy.text_proto import Word, entries, text_proto
from recsys.errors import ExportError

CONFIG = "config.pbtxt"
_TYPES: dict[int, str] = {
    TensorProto.STRING: "TYPE_STRING",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.FLOAT: "TYPE_FP32",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Batching:
    """How the server gathers requests.

    Args:
        rows: of a batch, at most.
        delay: microseconds that a request may wait for others.
        instances: of the model, on the CPU.
        threads: of each instance.
    """

    rows: int = 1024
    delay: int = 500
    instances: int = 1
    threads: int = 1


def write_triton(graphs: RawGraphs, folder: Path, name: str, *, ensemble: bool, batching: Batching) -> list[Path]:
    """Write the models of a bundle into a repository.

    Args:
        graphs: of the bundle.
        folder: the repository; it may have other models.
        name: of the model that clients ask.
        ensemble: write encoder and graph apart, joined by the server.
        batching: how the server gathers requests.

    Returns:
        The folders that were written.

    Raises:
        ExportError: the name is none, a model of it is there, or the bundle has no graph from raw columns.
    """
    if not _NAME.fullmatch(name):
        raise ExportError(f"--name {name}: a model's name has letters, digits, `_`, `-` and `.` only")
    names = [f"{name}_encoder", f"{name}_scorer", name] if ensemble else [name]
    for one in names:
        if (folder / one).exists():
            raise ExportError(f"{folder / one}: exists; remove it, or choose another --name")
    row = _typical(graphs)
    if not ensemble:
        return [_write(folder, name, graphs.whole(), row, batching)]
    encoder = graphs.encoder().SerializeToString(deterministic=True)
    scorer = graphs.scorer()
    written = [
        _write(folder, names[0], encoder, row, batching),
        _write(folder, names[1], scorer, _encoded(encoder, scorer, row), batching),
    ]
    config = _ensemble(names, onnx.load_model_from_string(encoder), onnx.load_model_from_string(scorer), batching)
    return [*written, _place(folder, name, {CONFIG: text_proto(config).encode()})]


def _write(folder: Path, name: str, graph: bytes, row: Tensors, batching: Batching) -> Path:
    """Write one model of one graph."""
    model = onnx.load_model_from_string(graph)
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": batching.rows,
        **_tensors(model.graph.input, model.graph.output),
        "dynamic_batching": {"max_queue_delay_microseconds": batching.delay},
        "instance_group": [{"kind": Word("KIND_CPU"), "count": batching.instances}],
        "parameters": entries(
            {
                "intra_op_thread_count": {"string_value": str(batching.threads)},
                "inter_op_thread_count": {"string_value": "1"},
            }
        ),
        "model_warmup": [_warm_up(model, row, rows) for rows in sorted({1, min(8, batching.rows)})],
    }
    files = {CONFIG: text_proto(config).encode(), "1/model.onnx": graph}
    files |= {f"warmup/{at}": _raw(row[value.name]) for at, value in enumerate(model.graph.input)}
    return _place(folder, name, files)


def _ensemble(
    names: Sequence[str], encoder: onnx.ModelProto, scorer: onnx.ModelProto, batching: Batching
) -> dict[str, Any]:
    raw = [value.name for value in encoder.graph.input]
    told = [value.name for value in scorer.graph.output]
    between = {value.name: _clear(f"encoded_{at}", raw) for at, value in enumerate(encoder.graph.output)}
    inner = dict(zip((value.name for value in scorer.graph.input), between.values(), strict=True))

    def step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
        maps = {"input_map": entries(inputs), "output_map": entries(outputs)}
        return {"model_name": model, "model_version": -1, **maps}

    return {
        "name": names[2],
        "platform": "ensemble",
        "max_batch_size": batching.rows,
        **_tensors(encoder.graph.input, scorer.graph.output),
        "ensemble_scheduling": {
            "step": [
                step(names[0], {name: name for name in raw}, between),
                step(names[1], inner, {name: name for name in told}),
            ]
        },
    }


def _clear(name: str, taken: Sequence[str]) -> str:
    """A name that no column has."""
    while name in taken:
        name += "_"
    return name


def _tensors(inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> dict[str, Any]:
    return {"input": [_tensor(value) for value in inputs], "output": [_tensor(value) for value in outputs]}


def _tensor(value: ValueInfoProto) -> dict[str, Any]:
    """An input or output as the configuration has it: without the rows; a tensor `[B]` is seen as `[B, 1]`."""
    shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
    kind = Word(_TYPES[value.type.tensor_type.elem_type])
    found: dict[str, Any] = {"name": value.name, "data_type": kind, "dims": shape[1:] or [1]}
    return found if shape[1:] else {**found, "reshape": {"shape": []}}


def _warm_up(model: onnx.ModelProto, row: Tensors, rows: int) -> dict[str, Any]:
    inputs = {
        value.name: {
            "data_type": Word(_TYPES[value.type.tensor_type.elem_type]),
            "dims": list(row[value.name].shape[1:]) or [1],
            "input_data_file": str(at),
        }
        for at, value in enumerate(model.graph.input)
    }
    return {"name": f"{rows} rows" if rows > 1 else "one row", "batch_size": rows, "inputs": entries(inputs)}


def _typical(graphs: RawGraphs) -> Tensors:
    """The row, of those that warm a predictor up, in which the fewest values are missing."""
    rows = graphs.bundle.lines(WARMUP)
    filled = [sum(value not in (None, [], "") for value in row.values()) for row in rows]
    return RawRows(graphs.spec, graphs.null).tensors([rows[int(np.argmax(filled))]])


def _encoded(encoder: bytes, scorer: bytes, row: Tensors) -> Tensors:
    """A raw row as the scorer takes it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    names = [value.name for value in onnx.load_model_from_string(scorer).graph.input]
    return dict(zip(names, session.run(None, dict(row)), strict=True))


def _raw(values: npt.NDArray[Any]) -> bytes:
    """A tensor as a warm-up file has it."""
    if values.dtype != object:
        return values.astype(values.dtype.newbyteorder("<")).tobytes()
    texts = [str(text).encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _place(folder: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write a model's folder, which is there as a whole or not at all."""
    final, draft = folder / name, folder / f".{name}.{os.getpid()}"
    try:
        (draft / "1").mkdir(parents=True)
        for path, content in files.items():
            (draft / path).parent.mkdir(exist_ok=True)
            (draft / path).write_bytes(content)
        os.rename(draft, final)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ExportError(f"{final}: cannot be written ({error.strerror})") from None
    return final
