"""Histories to one vector per column."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanPool(nn.Module):
    """The mean of the events.

    out = (1 / length) Σ_{t < length} h_t, and zeros for an empty history. The target is not used.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        position = torch.arange(history.shape[1], device=history.device)
        valid = position < length.unsqueeze(1)  # [B, L]
        # Filling (not multiplying) keeps even a NaN in the padding out; the count is at least one, so an
        # empty history divides 0 by 1 and has a finite gradient.
        total = history.masked_fill(~valid.unsqueeze(-1), 0.0).sum(1)  # [B, W]
        return total / valid.sum(1, keepdim=True).clamp(min=1)
