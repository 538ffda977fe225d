"""One ONNX graph from raw columns to scores, or the two that it is made of; needs onnx, and no torch.

    recsys export runs/mine/bundle --onnx mine.onnx

Inputs: for each column `[B, 1]`: string, int64, uint64 or double; for each column of lists `[B, L]`, and for each group
of them `NAME.length [B, 1]` int64, the number of events in a row, which begin at the left. Outputs: logit `[B, T]` and
probability `[B, T]` (calibrated) float32, clipped `[B]` int64. A score may be infinite where a number is far too
large; the predictor refuses such rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import onnx
from onnx import GraphProto, ModelProto, compose, helper

from recsys.deploy.bundle import CALIBRATION, ENCODER, GRAPH, Bundle
from recsys.deploy.calibration import Calibration, Curve
from recsys.deploy.nodes import DOUBLE, FLOAT, INT64, Nodes
from recsys.deploy.predictor import tables_of
from recsys.deploy.raw_encoder import RawEncoder
from recsys.deploy.raw_rows import MISSING_INT, MISSING_UINT, NULL
from recsys.deploy.spec import EncoderSpec
from recsys.errors import ExportError

LARGEST = 1_900_000_000
"""Bytes of the largest graph."""
_MODEL = "model/"


@dataclass(frozen=True)
class RawGraphs:
    """The graphs of a bundle.

    Args:
        bundle: whose files were verified.
        null: the text that means missing.
        normalized: whether texts come already normalised, where the recipe normalises them.
    """

    bundle: Bundle
    null: str = NULL
    normalized: bool = False

    @cached_property
    def spec(self) -> EncoderSpec:
        """The bundle's encoder."""
        return EncoderSpec.of_json(self.bundle.read(ENCODER).decode(), str(self.bundle.folder / ENCODER))

    @cached_property
    def calibration(self) -> Calibration:
        """The bundle's calibration."""
        return Calibration.of_json(self.bundle.json(CALIBRATION), self.spec.tasks)

    def encoder(self) -> ModelProto:
        """Return the graph from raw columns to the inputs of the scorer, under the scorer's names after `model/`.

        Raises:
            ExportError: ONNX has no operators for what a column needs.
        """
        tables, spec = tables_of(self.bundle, self.spec), self.spec
        model = self._model()
        names = [_MODEL + value.name for value in model.graph.input]
        found = RawEncoder(spec, tables, names, null=self.null, normalized=self.normalized).model(model)
        return self._told(found)

    def scorer(self) -> bytes:
        """Return the graph from encoded inputs to scores: the bundle's own, byte by byte, unless it is calibrated."""
        if not self._calibrated:
            return self.bundle.read(GRAPH)
        model = self._model()
        renamed = {value.name: _MODEL + value.name for value in model.graph.output}
        names = [value.name for value in model.graph.input]
        joined = compose.merge_models(
            _prefixed(model, _MODEL), self._tail(model), io_map=[(name, name) for name in renamed.values()]
        )
        return _bytes(self._told(_with_inputs(joined, names)))

    def whole(self) -> bytes:
        """Return the graph from raw columns to scores.

        Raises:
            ExportError: as `encoder`, or it would be too large.
        """
        model = self._model()
        inner = _prefixed(model, _MODEL)
        encoded = [(value.name, value.name) for value in inner.graph.input]
        scored = [(value.name, value.name) for value in inner.graph.output]
        joined = compose.merge_models(self.encoder(), inner, io_map=encoded)
        joined = compose.merge_models(joined, self._tail(model), io_map=scored)
        return _bytes(self._told(joined))

    @property
    def _calibrated(self) -> bool:
        return any(curve.method != "none" for curve in self.calibration.curves.values())

    def _model(self) -> ModelProto:
        return onnx.load_model_from_string(self.bundle.read(GRAPH))

    def _tail(self, model: ModelProto) -> ModelProto:
        """The model's outputs under their own names, with probabilities as the calibration has them."""
        nodes = Nodes("tail/")
        tasks = self.spec.tasks
        shape: list[str | int] = ["B", len(tasks)]
        logit = nodes.input(f"{_MODEL}logit", FLOAT, shape)
        probability = nodes.input(f"{_MODEL}probability", FLOAT, shape)
        clipped = nodes.input(f"{_MODEL}clipped", INT64, ["B"])
        if self._calibrated:
            z = nodes.cast(logit, DOUBLE)
            split = [nodes.add("Gather", [z, nodes.int64([t])], {"axis": 1}) for t in range(len(tasks))]
            curves = [_curve(nodes, one, self.calibration.curves[task]) for one, task in zip(split, tasks, strict=True)]
            probability = nodes.cast(nodes.add("Concat", curves, {"axis": 1}), FLOAT)
        nodes.output("logit", FLOAT, shape, logit)
        nodes.output("probability", FLOAT, shape, probability)
        nodes.output("clipped", INT64, ["B"], clipped)
        return nodes.model("tail", model)

    def _told(self, model: ModelProto) -> ModelProto:
        missing = {"text": self.null, "int": MISSING_INT, "uint": MISSING_UINT, "number": "NaN"}
        facts = {
            "bundle": self.bundle.id,
            "missing": json.dumps(missing, ensure_ascii=False),
            "tasks": json.dumps(self.spec.tasks, ensure_ascii=False),
        }
        helper.set_model_props(model, facts)
        model.producer_name = "recsys"
        return model


def _curve(nodes: Nodes, z: str, curve: Curve) -> str:
    """`Curve.__call__` as nodes, `[B, 1] -> [B, 1]` double."""
    if curve.method != "isotonic":
        if curve.method != "none":
            z = nodes.add("Div", [z, nodes.double(curve.temperature)])
            z = nodes.add("Add", [z, nodes.double(curve.shift)])
        return nodes.add("Sigmoid", [z])
    if len(curve.logits) == 1:
        return nodes.add("Add", [nodes.add("Mul", [z, nodes.double(0.0)]), nodes.double(curve.probabilities[0])])
    passed = nodes.cast(nodes.add("GreaterOrEqual", [z, nodes.double(curve.logits)]), INT64)  # [B, points]
    total = nodes.add("ReduceSum", [passed, nodes.int64([1])], {"keepdims": 1})
    last = nodes.int64(len(curve.logits) - 2)
    at = nodes.add("Sub", [total, nodes.int64(1)])
    at = nodes.add("Min", [nodes.add("Max", [at, nodes.int64(0)]), last])
    after = nodes.add("Add", [at, nodes.int64(1)])

    def points(values: tuple[float, ...]) -> Callable[[str], str]:
        return lambda which: nodes.add("Gather", [nodes.double(values), which], {"axis": 0})

    x, p = points(curve.logits), points(curve.probabilities)
    share = nodes.add("Div", [nodes.add("Sub", [z, x(at)]), nodes.add("Sub", [x(after), x(at)])])
    share = nodes.add("Clip", [share, nodes.double(0.0), nodes.double(1.0)])
    return nodes.add("Add", [p(at), nodes.add("Mul", [share, nodes.add("Sub", [p(after), p(at)])])])


def _with_inputs(model: ModelProto, names: list[str]) -> ModelProto:
    """The model with inputs of other names."""
    new = {value.name: name for value, name in zip(model.graph.input, names, strict=True)}
    _rename(model.graph, lambda name: new.get(name, name))
    return model


def _prefixed(model: ModelProto, prefix: str) -> ModelProto:
    """The model with a prefix before every name, those within loops included, which may be of values outside."""
    _rename(model.graph, lambda name: f"{prefix}{name}" if name else name)
    return model


def _rename(graph: GraphProto, new: Callable[[str], str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        value.name = new(value.name)
    for node in graph.node:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _rename(inner, new)


def _bytes(model: ModelProto) -> bytes:
    size = model.ByteSize()
    if size > LARGEST:
        raise ExportError(f"the graph would have {size:,} bytes; ONNX holds at most {LARGEST:,} in one file")
    onnx.checker.check_model(model)
    return cast("bytes", model.SerializeToString(deterministic=True))
