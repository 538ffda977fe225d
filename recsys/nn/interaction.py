"""Crosses of fields: factorisation machine, multilayer perceptron, cross network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.contracts import Fields
from recsys.nn.mlp import Activation, MLPBlock, Share, linear


class FM(nn.Module):
    """Second-order factorisation machine: all pairs of fields.

    logit = Σ_{i<j} ⟨e_i, e_j⟩ = ½ Σ_d [(Σ_f e_fd)² − Σ_f e_fd²], in O(F·D).
    The first-order term is the head's: `model.head: {wide: true}`.

    Rendle, "Factorization Machines", ICDM 2010.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.width = 1
        self.is_logit = True

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        e = e if e.dtype == torch.float64 else e.float()  # squares of half precision lose too much
        square_of_sum = e.sum(1).square()  # [B, D]
        sum_of_squares = e.square().sum(1)  # [B, D]
        return 0.5 * (square_of_sum - sum_of_squares).sum(1, keepdim=True)  # [B, 1]

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`pairs [B, F, F]`: what each pair adds to the logit, zero on the diagonal, each pair in both halves."""
        pairs = e @ e.transpose(1, 2)  # [B, F, F]
        return {"pairs": pairs - torch.diag_embed(pairs.diagonal(dim1=1, dim2=2))}


class MLP(nn.Module):
    """Multilayer perceptron on the concatenated embeddings: crosses of any order, found implicitly.

    h_0 = flatten(e), h_{l+1} = dropout(φ(BN(W_l h_l + b_l))).

    Covington et al., "Deep Neural Networks for YouTube Recommendations", RecSys 2016.

    Args:
        hidden: width of each layer.
        activation: the function φ after each layer.
        batch_norm: normalise before the activation; training then needs at least two rows per batch.
        dropout: share of the activations that is dropped in training.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        activation: Activation = "relu",
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.stack = MLPBlock(
            len(fields) * fields.dim, hidden, activation=activation, batch_norm=batch_norm, dropout=dropout
        )
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1]."""
        h: Tensor = self.stack(e.flatten(1))
        return h

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """Nothing to show."""
        return {}


class CrossNet(nn.Module):
    """Cross network of DCNv2: explicit crosses of degree up to layers + 1.

    x_0 = flatten(e), x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l; with `rank`, W_l = U_l V_lᵀ.

    Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021, arXiv 2008.13535.

    Args:
        layers: number of cross layers.
        rank: rank of the weight matrices; null for full matrices `[F·D, F·D]`.
    """

    def __init__(self, fields: Fields, *, layers: NonNegativeInt = 3, rank: PositiveInt | None = None) -> None:
        super().__init__()
        self.fields = fields
        self.width = len(fields) * fields.dim
        self.is_logit = False
        self.inner = nn.ModuleList(
            nn.Identity() if rank is None else linear(self.width, rank, bias=False) for _ in range(layers)
        )
        self.outer = nn.ModuleList(linear(rank or self.width, self.width) for _ in range(layers))

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, F·D]`."""
        x0 = e.flatten(1)  # [B, F·D]
        x = x0
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = torch.addcmul(x, x0, outer(inner(x)).to(x.dtype))
        return x

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`cross [layers, F, F]`: Frobenius norm of the block of W_l that crosses field i (of x_0) with field j."""
        f, d = len(self.fields), self.fields.dim
        norms = []
        for inner, outer in zip(self.inner, self.outer, strict=True):
            w: Tensor = outer.get_parameter("weight").detach()
            if isinstance(inner, nn.Linear):
                w = w @ inner.weight.detach()  # [F·D, rank] @ [rank, F·D]
            norms.append(w.view(f, d, f, d).square().sum((1, 3)).sqrt())
        return {"cross": torch.stack(norms)} if norms else {}
