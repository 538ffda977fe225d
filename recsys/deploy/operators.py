"""What the exporter of torch cannot write, or onnxruntime not run: shifts, extremes, choices between truth values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SIGN = 1 << 63


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return operator → how it is written, as `torch.onnx.export` takes them."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    def unsigned(x: Any) -> Any:
        return op.Cast(x, to=ir.DataType.UINT64)

    def count(n: Any) -> Any:
        return unsigned(op.Constant(value_int=n) if isinstance(n, int) else n)

    def right(x: Any, n: Any) -> Any:
        """Write x >> n = ((x + 2^63) >> n) - (2^63 >> n), where both shifts bring in zeros."""
        by, sign = count(n), unsigned(op.Constant(value_int=-_SIGN))
        moved = op.BitShift(op.BitwiseXor(unsigned(x), sign), by, direction="RIGHT")
        return op.CastLike(op.Sub(signed(moved), signed(op.BitShift(sign, by, direction="RIGHT"))), x)

    def left(x: Any, n: Any) -> Any:
        return op.CastLike(op.BitShift(unsigned(x), count(n), direction="LEFT"), x)

    def signed(x: Any) -> Any:
        return op.Cast(x, to=ir.DataType.INT64)

    def where(condition: Any, x: Any, y: Any) -> Any:
        """Write a choice between truth values as what it is, for the runtime has none."""
        if x.dtype != ir.DataType.BOOL:
            return op.Where(condition, x, y)
        return op.Or(op.And(condition, x), op.And(op.Not(condition), y))

    def extreme(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def written(x: Any, dim: Any = (), keepdim: Any = False) -> Any:
            axes = [op.Constant(value_ints=list(dim))] if dim else []
            return reduce(x, *axes, keepdims=int(keepdim))

        return written

    aten: Any = torch.ops.aten
    rights = [aten.__rshift__.Tensor, aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor]
    lefts = [aten.__lshift__.Tensor, aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor]
    rights.append(aten.bitwise_right_shift.Tensor_Scalar)
    lefts.append(aten.bitwise_left_shift.Tensor_Scalar)
    extremes = {aten.amax.default: extreme(op.ReduceMax), aten.amin.default: extreme(op.ReduceMin)}
    return {aten.where.self: where, **extremes, **dict.fromkeys(rights, right), **dict.fromkeys(lefts, left)}
