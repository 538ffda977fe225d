"""FwFM: a factorisation machine whose pairs of fields have weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.api import Component, Fields, RecipeError, hookimpl


class FwFM(nn.Module):
    """Field-weighted factorisation machine: one learned weight for each pair of fields.

    logit = Σ_{i<j} r_ij ⟨v_i, v_j⟩ + linear = Σ_i ⟨v_i, Σ_{j>i} r_ij v_j⟩ + linear. The second form is one product
    of the strict upper triangle R `[F, F]` with the vectors, O(F²·D) operations and no tensor above `[B, F, D]`.

    Pan et al., "Field-weighted Factorization Machines for Click-Through Rate Prediction in Display Advertising",
    WWW 2018, arXiv 1806.03514.

    Args:
        linear: the first-order term. field: ⟨v_i, w_i⟩ with one vector per field (the paper's FiLV, its best).
            value: ⟨v_i, w_i⟩ with one vector per value (FeLV); the embedding then holds both, v in the first half of
            its dimensions and w in the second. none: no term here; with `model.head: {wide: true}` this is one
            weight per value (LW).
    """

    pairs: Tensor

    def __init__(self, fields: Fields, *, linear: Literal["field", "value", "none"] = "field") -> None:
        super().__init__()
        if linear == "value" and fields.dim % 2:
            raise RecipeError(f"`linear: value` halves the embedding, whose dimension is {fields.dim}: make it even")
        self.count, self.linear = len(fields), linear
        self.width = 1
        self.is_logit = True
        rows, columns = torch.triu_indices(self.count, self.count, offset=1)
        self.register_buffer("pairs", rows * self.count + columns, persistent=False)
        count = self.count * (self.count - 1) // 2
        self.weight = nn.Parameter(torch.empty(count))  # r, row by row
        nn.init.normal_(self.weight, std=(2.0 / (count + 1)) ** 0.5)
        self.field = nn.Parameter(torch.empty(self.count, fields.dim)) if linear == "field" else None
        if self.field is not None:
            nn.init.normal_(self.field, std=(2.0 / (self.field.numel() + 1)) ** 0.5)

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        e = e if e.dtype == torch.float64 else e.float()  # products of half precision lose too much
        v, w = e.chunk(2, dim=2) if self.linear == "value" else (e, self.field)
        later = (v.transpose(1, 2) @ self.matrix().T.to(v.dtype)).transpose(1, 2)  # [B, F, D], Σ_{j>i} r_ij v_j
        later = later if w is None else later + w
        return (v * later).sum((1, 2)).unsqueeze(1)

    def matrix(self) -> Tensor:
        """`R [F, F]`, zero on and below the diagonal."""
        zeros = self.weight.new_zeros(self.count * self.count)
        return zeros.index_copy(0, self.pairs, self.weight).view(self.count, self.count)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`pairs [B, F, F]`: what each pair adds to the logit, in both halves; `weights [F, F]`: r, symmetric."""
        v = e.chunk(2, dim=2)[0] if self.linear == "value" else e
        weights = self.matrix() + self.matrix().T
        return {"pairs": weights * (v @ v.transpose(1, 2)), "weights": weights}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "fwfm", FwFM)]
