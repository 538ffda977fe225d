"""What is written into a graph in place of the exporter's own operators gives what torch gives."""

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from recsys.contracts import EncodedSchema, Field, Interaction
from recsys.deploy.operators import translations
from recsys.nn.bits import count_below, count_bits
from recsys.nn.head import Head

WHOLE = torch.tensor([0, 1, -1, 5, -7, 2**63 - 1, -(2**63), 2**40, -(2**40) + 3])
COUNTS = torch.tensor([0, 1, 2, 3, 63, 62, 61, 5, 7])


class Shifts(torch.nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        halves = (x >> 1, x << 3, torch.bitwise_right_shift(x, 5), torch.bitwise_left_shift(x, n))
        return (x >> n, x << n, *halves, count_bits(x), count_below(x, n), x.int() >> 2, x.int() << 2)


class Extremes(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.amax(), x.amin(), x.amax(1), x.amin(-1, keepdim=True), x.amax((0, 1)), x.amax(keepdim=True, dim=())


class Choices(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        some = x > 0
        return torch.where(some, y > 0, x > y), torch.where(some.any(), y > 0, some), torch.where(some, x, y), some


def same(module: torch.nn.Module, *inputs: Tensor) -> None:
    found = torch.onnx.export(module, inputs, dynamo=True, verbose=False, custom_translation_table=translations())
    assert found is not None
    session = onnxruntime.InferenceSession(found.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    for a, b in zip(got, module(*inputs), strict=True):
        assert a.dtype == b.numpy().dtype
        np.testing.assert_array_equal(a, b.numpy())


def test_shifts_of_signed_numbers() -> None:
    same(Shifts(), WHOLE, COUNTS)


def test_extremes_over_some_and_over_all_dimensions() -> None:
    same(Extremes(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) - 4)


def test_choices_between_truth_values_and_between_numbers() -> None:
    random = torch.Generator().manual_seed(2)
    same(Choices(), torch.randn(4, 5, generator=random), torch.randn(4, 5, generator=random))


class Projected(torch.nn.Module):
    """The head over representations whose terms are large, and cancel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        schema = EncodedSchema((Field("a", 3),), tasks=("click",))
        self.head = Head(schema, [cast("Interaction", SimpleNamespace(width=width, is_logit=False))])

    def forward(self, h: Tensor) -> Tensor:
        ids = torch.zeros(h.shape[0], 1, dtype=torch.int64)
        return cast("Tensor", self.head([h], ids, None)["click"])


def added_up(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a graph makes of large terms of both signs, their exact sums, and those of adding one after the other."""
    random = torch.Generator().manual_seed(3)
    head = Projected(width).eval()
    h = 100 * torch.rand(64, width, generator=random)
    with torch.no_grad():
        head.head.weight.copy_(torch.randn(1, width, generator=random))  # type: ignore[union-attr]
    found = torch.onnx.export(
        head, (h,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    assert found is not None
    session = onnxruntime.InferenceSession(found.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: h.numpy()})
    weight = head.head.weight.detach().numpy()[0]  # type: ignore[union-attr]
    exact = [math.fsum(a * b for a, b in zip(row, weight.tolist(), strict=True)) for row in h.tolist()]
    in_turn = (h.numpy() * weight).cumsum(1, dtype=np.float32)[:, -1]
    return got.astype(np.float64), np.array(exact), in_turn.astype(np.float64)


def test_a_graph_adds_up_terms_that_cancel_as_if_they_were_exact() -> None:
    got, exact, _ = added_up(300)
    np.testing.assert_allclose(got, exact, rtol=7e-8)  # half a unit in the last place


def test_of_very_many_terms_a_graph_adds_up_only_a_few_in_single_precision() -> None:
    got, exact, in_turn = added_up(2560)
    assert np.abs(got - exact).max() < 0.2 * np.abs(in_turn - exact).max()
