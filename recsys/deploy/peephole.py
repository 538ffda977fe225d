"""Steps of a graph that change nothing, and that its exporter leaves: each costs a row as much as many sums."""

from __future__ import annotations

from typing import Any

import numpy as np

_RANGE = ("Less", "GreaterOrEqual")


def simplify(model: Any) -> None:
    """Take out what changes nothing; every output keeps its name and its bits.

    That is a guard behind a guard, for a graph guards its inputs, and so does whatever reads a table by itself; and the
    only column of a matrix that is made a matrix again.

    Args:
        model: `onnx_ir.Model`; changed in place.
    """
    from onnx_ir import convenience
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        same = _twice_guarded(node) or _only_column(node)
        if same is None or same.producer() is None or same.is_graph_output():
            continue
        outer, name = node.outputs[0], node.outputs[0].name
        served = outer.is_graph_output()
        convenience.replace_all_uses_with(outer, same, replace_graph_outputs=True)
        if served:
            outer.name, same.name = f"{name}_again", name
    RemoveUnusedNodesPass()(model)


def _twice_guarded(node: Any) -> Any:
    """What a guard gets, if that comes from a guard of the same ranges."""
    ids = _guarded(node)
    before = None if ids is None else ids.producer()
    if before is None or _guarded(before) is None:
        return None
    return ids if all(map(_same, _bounds(node), _bounds(before))) else None


def _only_column(node: Any) -> Any:
    """X `[B, 1]`, if the node is `Unsqueeze(Gather(x, 0, axis=1), 1)`."""
    if node.op_type != "Unsqueeze" or not _is(node.inputs[1], 1):
        return None
    column = node.inputs[0].producer()
    if column is None or column.op_type != "Gather" or "axis" not in column.attributes:
        return None
    if column.attributes["axis"].as_int() != 1:
        return None
    whole, at = column.inputs
    flat = whole.shape is not None and len(whole.shape) == 2 and whole.shape[1] == 1
    return whole if flat and _is(at, 0) else None


def _guarded(node: Any) -> Any:
    """The ids that a node guards: x of `Where(Or(Less(x, 0), GreaterOrEqual(x, rows)), fallback, x)`; else None."""
    if node.op_type != "Where":
        return None
    choice, _, ids = node.inputs
    either = choice.producer()
    if either is None or either.op_type != "Or":
        return None
    sides = [side.producer() for side in either.inputs]
    if tuple(None if s is None else s.op_type for s in sides) != _RANGE or any(s.inputs[0] is not ids for s in sides):
        return None
    return ids if all(bound.const_value is not None for bound in _bounds(node)) else None


def _bounds(node: Any) -> tuple[Any, Any, Any]:
    """Lowest id, end of the ids, and what stands for ids outside."""
    low, high = (side.producer() for side in node.inputs[0].producer().inputs)
    return low.inputs[1], high.inputs[1], node.inputs[1]


def _same(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(a.const_value.numpy(), b.const_value.numpy())


def _is(value: Any, number: int) -> bool:
    return value.const_value is not None and value.const_value.numpy().tolist() in (number, [number])
