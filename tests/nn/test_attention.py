"""Attention among few vectors: by hand, by torch's kernel and as exports have it, beside loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from recsys.nn.attention import AttentionSizes, attend


def looped(e: Tensor, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes) -> Tensor:
    """Row by row, vector by vector, head by head."""
    width, head = sizes.width, sizes.width // sizes.heads
    out = torch.zeros(*e.shape[:2], width, dtype=e.dtype)
    for b, row in enumerate(e):
        projected = torch.stack([weight @ x if bias is None else (weight @ x + bias).clamp(min=0) for x in row])
        for m in range(len(row)):
            for h in range(sizes.heads):
                own = slice(h * head, (h + 1) * head)
                q, k, v = (projected[:, p * width : (p + 1) * width][:, own] for p in range(3))
                scores = [sizes.scale * float(q[m] @ k[j]) for j in range(len(row))]
                total = sum(math.exp(s) for s in scores)
                for j, s in enumerate(scores):
                    out[b, m, own] += math.exp(s) / total * v[j]
            if len(weight) > 3 * width:
                out[b, m] += projected[m, 3 * width :]
    return out.clamp(min=0) if sizes.rectified else out


class Layer(nn.Module):
    """What is exported."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: AttentionSizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.sizes = sizes

    def forward(self, e: Tensor) -> Tensor:
        return attend(e, self.weight, self.bias, self.sizes)


@pytest.mark.parametrize("dim", [3, 8, 11])  # narrower than a head of eight, as wide, wider
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_every_way_is_the_loop(dim, heads, parts, biased):
    torch.manual_seed(dim)
    sizes = AttentionSizes(8 * heads, heads, 0.7, rectified=parts == 4)
    weight = torch.randn(parts * sizes.width, dim, dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64) if biased else None
    e = 0.5 * torch.randn(4, 5, dim, dtype=torch.float64)
    expected = looped(e, weight, bias, sizes)
    layer = Layer(weight, bias, sizes)
    with torch.no_grad():
        torch.testing.assert_close(layer(e), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(e.clone().requires_grad_()), expected, rtol=0, atol=1e-12)
    program = torch.export.export(layer, (e,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    torch.testing.assert_close(program.module()(e), expected, rtol=0, atol=1e-12)


def test_the_export_of_narrow_vectors_projects_nothing_but_the_last_product():
    """Rows times projections of their own would be as wide as the heads, several times over."""
    sizes = AttentionSizes(64, 2, 1.0, rectified=True)
    layer = Layer(torch.randn(256, 16), None, sizes)
    program = torch.export.export(layer, (torch.randn(4, 39, 16),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "call_function"]
    assert [s[2] for s in shapes if len(s) == 3 and s[1] == 39 and s[2] > 39] == [48, 64, 64]  # cat, product, ReLU
