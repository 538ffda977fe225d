"""A small writer of ONNX graphs: nodes and constants by unique names; needs the package onnx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

ML = "ai.onnx.ml"
ML_VERSION = 4
Shape = Sequence[str | int]
INT64, UINT64, DOUBLE, FLOAT, STRING = (
    TensorProto.INT64,
    TensorProto.UINT64,
    TensorProto.DOUBLE,
    TensorProto.FLOAT,
    TensorProto.STRING,
)


class Nodes:
    """The graph so far.

    Args:
        prefix: of the names of all that lies between inputs and outputs.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._tensors: list[TensorProto] = []
        self._inputs: dict[str, ValueInfoProto] = {}
        self._outputs: list[ValueInfoProto] = []

    def input(self, name: str, kind: int, shape: Shape) -> str:
        """Declare an input; the same one may be asked for again."""
        self._inputs.setdefault(name, helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Shape, value: str) -> None:
        """Give a value under the name of an output."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """Return the name of a constant; equal ones are held once."""
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype))
        array = array.reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"{self._prefix}constant_{len(self._constants)}"
            self._tensors.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def int64(self, value: npt.ArrayLike) -> str:
        """Return a constant of int64."""
        return self.constant(value, np.int64)

    def double(self, value: npt.ArrayLike) -> str:
        """Return a constant of float64."""
        return self.constant(value, np.float64)

    def add(self, op: str, values: Sequence[str], attributes: dict[str, Any] | None = None, domain: str = "") -> str:
        """Add a node of one output; return the output's name."""
        name = f"{self._prefix}{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(values), [name], name=name, domain=domain, **(attributes or {})))
        return name

    def cast(self, value: str, kind: int) -> str:
        """Return the value as another type."""
        return self.add("Cast", [value], {"to": kind})

    def any_of(self, conditions: Sequence[str]) -> str:
        """Return whether one of several (at least one) conditions holds."""
        whole = conditions[0]
        for condition in conditions[1:]:
            whole = self.add("Or", [whole, condition])
        return whole

    def graph(self, name: str) -> GraphProto:
        """Return what was written."""
        return helper.make_graph(self._nodes, name, list(self._inputs.values()), self._outputs, self._tensors)

    def model(self, name: str, like: ModelProto) -> ModelProto:
        """Return a model of the same versions as another, so that the two can be joined."""
        opsets = [helper.make_opsetid(o.domain, o.version) for o in like.opset_import if o.domain != ML]
        return helper.make_model(
            self.graph(name),
            opset_imports=[*opsets, helper.make_opsetid(ML, ML_VERSION)],
            ir_version=like.ir_version,
            producer_name="recsys",
        )
