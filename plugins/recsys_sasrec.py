"""SASRec: causal self-attention over the events; the state after the newest one speaks for the history."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field as Limits
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Component, Dropout, RecipeError, hookimpl, linear

Share = Annotated[float, Limits(ge=0, lt=1)]


class Block(nn.Module):
    """Attention, then two layers on each event, as the authors' code has them.

    x = LN(s),  a = x + softmax(W_q x (W_k s)ᵀ / √d') W_v s,  y = LN(a),  out = y + W_2 ReLU(W_1 y + b_1) + b_2.
    What is normalised is also what is added. The heads are put side by side, without a projection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width, eps=1e-8), nn.LayerNorm(width, eps=1e-8)
        self.query = linear(width, width)
        self.key = linear(width, width, bias=False)  # a bias would add the same to all scores of an event: nothing
        self.value = linear(width, width)
        self.network = nn.Sequential(
            linear(width, width), nn.ReLU(), Dropout(dropout), linear(width, width), Dropout(dropout)
        )

    def forward(self, asking: Tensor, s: Tensor, seen: Tensor) -> Tensor:
        """`[B, Q, W], [B, L, W], [B, Q or 1, L] bool -> [B, Q, W]`: events that ask, all events, who sees whom."""
        x = self.before(asking)
        q, k, v = (self._split(y) for y in (self.query(x), self.key(s), self.value(s)))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), dropout_p=dropout)
        y = self.between(x + mixed.transpose(1, 2).flatten(2))
        out: Tensor = y + self.network(y)
        return out

    def _split(self, y: Tensor) -> Tensor:
        """`[B, Q, W] -> [B, heads, Q, W / heads]`."""
        return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)


class SASRec(nn.Module):
    """Self-attentive sequential recommendation: every event looks at the events before it.

    s_t = √W h_t + p_{n−1−t}, then the blocks, then out = LN(s_{n−1}), the state of the newest event; zeros for an
    empty history. Positions count from the newest event, as left padding makes them in the authors' code; older ones
    than the last position share its vector. Of the last block only the newest event's row is computed. The target is
    not used: it meets the state in the interaction.

    Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781.

    Args:
        blocks: number of blocks.
        heads: number of attention heads, each W / heads wide.
        positions: number of position vectors.
        dropout: share of the inputs, attention weights and activations that is dropped in training.
    """

    def __init__(
        self,
        width: int,
        *,
        blocks: PositiveInt = 2,
        heads: PositiveInt = 1,
        positions: PositiveInt = 50,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"width {width} cannot be split over {heads} heads")
        self.width = width
        self.position = nn.Parameter(torch.empty(positions, width))
        nn.init.normal_(self.position, std=0.01)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-8)

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        place = torch.arange(history.shape[1], device=history.device)
        count = length.clamp(min=1).unsqueeze(1)  # an empty history has one event of zeros, and its result is removed
        valid = place < count  # [B, L]
        age = (count - 1 - place).clamp(0, self.position.shape[0] - 1)  # [B, L]
        events = history.masked_fill((place >= length.unsqueeze(1)).unsqueeze(-1), 0.0)
        s = self.dropout(events * self.width**0.5 + F.embedding(age, self.position))
        seen = (place <= place.unsqueeze(1)) & valid.unsqueeze(1)  # [B, L, L]
        for block in self.blocks[:-1]:
            s = block(s, s, seen)
        newest = s.gather(1, (count - 1).unsqueeze(-1).expand(-1, -1, self.width))  # [B, 1, W]
        state = self.norm(self.blocks[-1](newest, s, valid.unsqueeze(1))).squeeze(1)  # [B, W]
        out: Tensor = state.masked_fill((length == 0).unsqueeze(1), 0.0)
        return out


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoder."""
    return [Component("sequence", "sasrec", SASRec)]
