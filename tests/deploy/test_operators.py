"""What is written into a graph in place of the exporter's own operators gives what torch gives."""

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from recsys.deploy.operators import translations
from recsys.nn.bits import count_below, count_bits

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
