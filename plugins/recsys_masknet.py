"""MaskNet: every row gates the layers by a mask that is computed from its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Dropout, Fields, MLPBlock, Share, hookimpl, linear


class MaskBlock(nn.Module):
    """One layer whose input is multiplied by the row's mask.

    mask = W₂ ReLU(W₁ v_emb + b₁) + b₂,  y = dropout(ReLU(LN(W (mask ∘ v)))).

    Args:
        embedded: width of v_emb.
        in_width: width of v.
        out_width: width of y.
        ratio: width between W₁ and W₂, as a multiple of `in_width`.
        layer_norm: normalise before the ReLU.
        dropout: share of y that is dropped in training.
    """

    def __init__(
        self, embedded: int, in_width: int, out_width: int, *, ratio: float, layer_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        between = max(1, int(ratio * in_width))
        self.mask = nn.Sequential(linear(embedded, between), nn.ReLU(), linear(between, in_width))
        self.linear = linear(in_width, out_width, bias=not layer_norm)  # the normalisation has a shift of its own
        self.norm = nn.LayerNorm(out_width) if layer_norm else nn.Identity()
        self.dropout = Dropout(dropout)

    def forward(self, embedded: Tensor, v: Tensor) -> Tensor:
        """`[B, embedded], [B, in_width] -> [B, out_width]`."""
        y: Tensor = self.dropout(self.norm(self.linear(self.mask(embedded) * v)).relu())
        return y


class MaskNet(nn.Module):
    """Layers under masks that each row computes from its own embeddings, one after the other or side by side.

    mask = W₂ ReLU(W₁ flatten(e) + b₁) + b₂,  block(v) = ReLU(LN(W (mask ∘ v))), v_0 = LN of each field.
    serial: v_{l+1} = block_l(v_l). parallel: MLP([block_1(v_0); block_2(v_0); …]).

    Wang et al., "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by Instance-Guided Mask",
    DLP-KDD 2021, arXiv 2102.07619.

    Args:
        structure: serial or parallel.
        hidden: serial: width of each block; parallel: width of each layer of the perceptron.
        blocks: number of parallel blocks.
        block_width: width of each parallel block.
        ratio: width inside the mask's network, as a multiple of the width that it masks.
        field_norm: normalise each field's embedding, with a gain and a shift of its own, before the first blocks.
        layer_norm: normalise inside the blocks.
        dropout: share of the blocks' and the perceptron's activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        structure: Literal["serial", "parallel"] = "parallel",
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        blocks: PositiveInt = 3,
        block_width: PositiveInt = 64,
        ratio: PositiveFloat = 2.0,
        field_norm: bool = True,
        layer_norm: bool = True,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.serial = structure == "serial"
        width = len(fields) * fields.dim
        ends = hidden if self.serial else (block_width,) * blocks
        starts = (width, *hidden[:-1]) if self.serial else (width,) * blocks
        self.blocks = nn.ModuleList(
            MaskBlock(width, start, end, ratio=ratio, layer_norm=layer_norm, dropout=dropout)
            for start, end in zip(starts, ends, strict=True)
        )
        self.stack = None if self.serial else MLPBlock(blocks * block_width, hidden, dropout=dropout)
        self.gain = nn.Parameter(torch.ones(len(fields), fields.dim)) if field_norm else None
        self.shift = nn.Parameter(torch.zeros(len(fields), fields.dim)) if field_norm else None
        self.width = (hidden[-1] if hidden else width) if self.stack is None else self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1]."""
        embedded = e.flatten(1)
        v = e
        if self.gain is not None and self.shift is not None:
            v = nn.functional.layer_norm(e, e.shape[2:]) * self.gain + self.shift
        v = v.flatten(1)  # [B, F·D]
        if self.stack is None:
            for block in self.blocks:
                v = block(embedded, v)
            return v
        y: Tensor = self.stack(torch.cat([block(embedded, v) for block in self.blocks], 1))
        return y

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`mask.<block> [B, F]`: mean of the mask over each field's dimensions; of the first block if serial."""
        blocks = list(self.blocks)[: 1 if self.serial else None]
        masks = [block.get_submodule("mask")(e.flatten(1)) for block in blocks]
        return {f"mask.{i}": mask.view(e.shape).mean(2) for i, mask in enumerate(masks)}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "masknet", MaskNet)]
