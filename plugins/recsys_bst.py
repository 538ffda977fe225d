"""BST, the behaviour sequence transformer: the target stands among the events and looks at them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Component, Dropout, RecipeError, hookimpl, linear

Share = Annotated[float, Limits(ge=0, lt=1)]


class Block(nn.Module):
    """One encoder layer of a transformer, normalised after each half.

    a = LN(x + W_o [softmax(W_q x (W_k s)ᵀ / √d') W_v s; … heads]),  out = LN(a + W_2 LeakyReLU(W_1 a + b_1) + b_2).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (linear(width, width, bias=False) for _ in range(4))
        self.drop = Dropout(dropout)
        self.network = nn.Sequential(linear(width, hidden), nn.LeakyReLU(), Dropout(dropout), linear(hidden, width))
        self.between, self.after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, asking: Tensor, s: Tensor, valid: Tensor) -> Tensor:
        """`[B, Q, W], [B, L, W], [B, L] bool -> [B, Q, W]`: those that ask, those they look at."""
        q, k, v = (self._split(y) for y in (self.query(asking), self.key(s), self.value(s)))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None], dropout_p=dropout)
        a = self.between(asking + self.drop(self.out(mixed.transpose(1, 2).flatten(2))))
        out: Tensor = self.after(a + self.drop(self.network(a)))
        return out

    def _split(self, y: Tensor) -> Tensor:
        """`[B, Q, W] -> [B, heads, Q, W / heads]`."""
        return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)


class BST(nn.Module):
    """Behaviour sequence transformer: the events and the target as one sequence, through encoder layers.

    x_t = h_t + p_{n−t} for the events, x_n = q + p_0 for the target; after the layers, the target's vector (or the
    mean of all). Positions count backwards from the target; older events than the last position share its vector.
    The paper concatenates position vectors and reads all outputs; here they are added, and pooled to `[B, W]`. An
    empty history gives zeros.

    Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", DLP-KDD 2019,
    arXiv 1905.06874.

    Args:
        blocks: number of layers.
        heads: number of attention heads, each W / heads wide.
        hidden: width of the inner layer, as a multiple of W.
        positions: number of position vectors, the target's included.
        pool: target: its vector, so that of the last layer only one row is computed. mean: the mean of events and
            target.
        dropout: share of the attention weights and activations that is dropped in training.
    """

    def __init__(
        self,
        width: int,
        *,
        blocks: PositiveInt = 1,
        heads: PositiveInt = 2,
        hidden: PositiveInt = 4,
        positions: PositiveInt = 51,
        pool: Literal["target", "mean"] = "target",
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"width {width} cannot be split over {heads} heads")
        self.width, self.pool = width, pool
        self.position = nn.Parameter(torch.empty(positions, width))
        nn.init.normal_(self.position, std=0.01)
        self.blocks = nn.ModuleList(Block(width, heads, hidden * width, dropout) for _ in range(blocks))

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        place = torch.arange(history.shape[1], device=history.device)
        valid = place < length.unsqueeze(1)  # [B, L]
        age = (length.unsqueeze(1) - place).clamp(0, self.position.shape[0] - 1)  # [B, L]
        events = history.masked_fill(~valid.unsqueeze(-1), 0.0) + F.embedding(age, self.position)
        own = (target + self.position[0]).unsqueeze(1)  # [B, 1, W]
        s = torch.cat([own, events], 1)  # the target first: its place does not move with the padding
        valid = F.pad(valid, (1, 0), value=True)  # [B, 1 + L]
        for block in self.blocks[:-1]:
            s = block(s, s, valid)
        if self.pool == "target":
            out = self.blocks[-1](s[:, :1], s, valid).squeeze(1)  # [B, W]
        else:
            total = self.blocks[-1](s, s, valid).masked_fill(~valid.unsqueeze(-1), 0.0).sum(1)
            out = total / valid.sum(1, keepdim=True)
        pooled: Tensor = out.masked_fill((length == 0).unsqueeze(1), 0.0)
        return pooled


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoder."""
    return [Component("sequence", "bst", BST)]
