"""ARM-Net and ARM-Net+: exponential neurons whose sparse gates choose, per row, which fields cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Component, Fields, MLPBlock, RecipeError, entmax, full_precision, hookimpl

Preset = Literal["paper", "official"]
Share = Annotated[float, Limits(ge=0, lt=1)]
Alpha = Annotated[float, Limits(ge=1, le=3)]

TERMS = 20
"""Interaction terms that `explain` lists."""


@dataclass(frozen=True)
class Variant:
    """What the paper and its authors' code disagree on.

    Args:
        scale: divide the scores by √D.
        batch_norm: normalise each neuron's output over the batch and its D values.
    """

    scale: bool
    batch_norm: bool


VARIANTS: dict[Preset, Variant] = {
    "paper": Variant(scale=False, batch_norm=False),
    "official": Variant(scale=True, batch_norm=True),
}


class ExponentialNeurons(nn.Module):
    """Products of powers of fields, the powers chosen for each row.

    z_i = α-entmax_j(q_iᵀ W_att e_j),  w_ij = z_ij·v_ij,  y_i = exp(Σ_j w_ij e_j) = Π_j exp(e_j)^{w_ij}

    for neurons i of all heads; the neurons of a head share W_att `[D, D]`, every neuron has its own query q_i `[D]`
    and values v_i `[F]`. Neurons come last in all results, for reductions over fields then run along them.

    Args:
        fields: F.
        dim: D.
        heads: K.
        neurons: o, of each head.
        alpha: of entmax.
        scale: divide the scores by √D.
        limit: largest absolute value of an exponent; None does not limit it.
    """

    def __init__(
        self, fields: int, dim: int, heads: int, neurons: int, alpha: float, scale: bool, limit: float | None
    ) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit
        self.scale = dim**-0.5 if scale else 1.0
        self.attention = nn.Parameter(torch.empty(heads, dim, dim))
        self.query = nn.Parameter(torch.empty(heads, neurons, dim))
        self.value = nn.Parameter(torch.empty(heads, neurons, fields))
        for parameter in (self.attention, self.query, self.value):
            nn.init.xavier_uniform_(parameter, gain=2**0.5)

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, D, K·o]`, at least float32 whatever autocast says: exponents bear no half precision."""
        with full_precision(e):
            e = e if e.dtype == torch.float64 else e.float()
            exponent = e.transpose(1, 2) @ self.weights(e)  # [B, D, K·o]
            if self.limit is not None:
                exponent = exponent.clamp(-self.limit, self.limit)
            return exponent.exp()

    def gates(self, e: Tensor) -> Tensor:
        """z, `[B, F, D] -> [B, F, K·o]`: not negative, adding up to one over the fields."""
        # Query and W_att make one vector per neuron, so that all scores are one product.
        vectors = (self.query @ self.attention.transpose(1, 2)).flatten(0, 1) * self.scale  # [K·o, D]
        return entmax(F.linear(e, vectors), self.alpha, dim=1)

    def weights(self, e: Tensor) -> Tensor:
        """w, `[B, F, D] -> [B, F, K·o]`."""
        return self.gates(e) * self.value.flatten(0, 1).T


class ARMNet(nn.Module):
    """Exponential neurons with sparse gates, then a perceptron on what they give.

    z_i = α-entmax_j(q_iᵀ W_att e_j),  y_i = exp(Σ_j z_ij v_ij e_j),  h = MLP([y_1; …; y_{K·o}])

    Each neuron is a product of powers of a few fields; which fields, its gates z decide for each row.

    Cai et al., "ARM-Net: Adaptive Relation Modeling Network for Structured Data", SIGMOD 2021, arXiv 2107.01830.

    Args:
        preset: whose variant. official: the authors' code, which the published numbers come from: scores divided by
            √D, batch normalisation of the neurons. paper: neither.
        heads: K; each head has its own W_att.
        neurons: o, exponential neurons of each head.
        alpha: sparsity of the gates, from 1 (softmax, no field is ever left out) over 2 (sparsemax) to 3.
        hidden: width of each layer of the perceptron; none leaves the neurons themselves.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
        scale: divide the scores by √D. null: as the preset has it.
        neuron_norm: normalise the neurons' outputs. null: as the preset has it.
        exponent_limit: largest absolute exponent, for exp overflows beyond 88. null: no limit, as published.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        preset: Preset = "official",
        heads: PositiveInt = 4,
        neurons: PositiveInt = 32,
        alpha: Alpha = 1.5,
        hidden: tuple[PositiveInt, ...] = (256, 256),
        batch_norm: bool = True,
        dropout: Share = 0.0,
        scale: bool | None = None,
        neuron_norm: bool | None = None,
        exponent_limit: PositiveFloat | None = 20.0,
    ) -> None:
        super().__init__()
        variant = VARIANTS[preset]
        scale = variant.scale if scale is None else scale
        neuron_norm = variant.batch_norm if neuron_norm is None else neuron_norm
        self.neurons = ExponentialNeurons(len(fields), fields.dim, heads, neurons, alpha, scale, exponent_limit)
        self.norm = nn.BatchNorm1d(heads * neurons) if neuron_norm else None
        self.network = MLPBlock(heads * neurons * fields.dim, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.network.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1], or K·o·D."""
        y = self.neurons(e)  # [B, D, K·o]
        if self.norm is not None:
            y = self.norm(y.flatten(0, 1)).view(y.shape)
        h: Tensor = self.network(y.flatten(1))
        return h

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """What the neurons cross, over all rows and for each.

        Returns:
            `importance [F]`: Σ_i |v_ij|, of each field, whatever the row.
            `local_importance [B, F]`: Σ_i |w_ij|, in each row.
            `weights [B, K·o, F]`: w, signed.
            `support [B, K·o, F]`: bool, the fields that a neuron's gates let through.
            `terms [T, F]`: bool, the sets of fields that are the support of most neurons, at most 20.
            `term_neurons [T]`: the mean number of neurons per row that have this very support.
            `order [F + 1]`: the share of supports with 0, 1, … F fields.
        """
        e = e if e.dtype == torch.float64 else e.float()
        with full_precision(e):
            gates = self.neurons.gates(e).transpose(1, 2)  # [B, K·o, F]
        value = self.neurons.value.flatten(0, 1)  # [K·o, F]
        weights = gates * value
        support = gates > 0
        terms, count = _sets(support.flatten(0, 1))
        size = support.sum(2).flatten()
        return {
            "importance": value.abs().sum(0),
            "local_importance": weights.abs().sum(1),
            "weights": weights,
            "support": support,
            "terms": terms[:TERMS],
            "term_neurons": count[:TERMS].to(e.dtype) / max(1, len(e)),
            "order": torch.bincount(size, minlength=support.shape[2] + 1).to(e.dtype) / max(1, len(size)),
        }


class ARMNetPlus(nn.Module):
    """ARM-Net and a perceptron on embeddings of its own, trained jointly; their logits are added.

    logit = w₁·ARMNet(e) + w₂·MLP(flatten(e′)) + b. Both tables are one, side by side: the first dimensions of an
    embedding are e, the rest e′, so that one lookup serves both and neither learns from the other's gradient. The
    head's projections of both parts take up w₁ and w₂.

    Cai et al., "ARM-Net: Adaptive Relation Modeling Network for Structured Data", SIGMOD 2021, arXiv 2107.01830.

    Args:
        preset: whose variant; see armnet.
        heads: K; each head has its own W_att.
        neurons: o, exponential neurons of each head.
        alpha: sparsity of the gates, from 1 (softmax) over 2 (sparsemax) to 3.
        hidden: width of each layer of ARM-Net's perceptron.
        batch_norm: normalise before the activations of both perceptrons; training then needs at least two rows.
        dropout: share of the activations of both perceptrons that is dropped in training.
        scale: divide the scores by √D. null: as the preset has it.
        neuron_norm: normalise the neurons' outputs. null: as the preset has it.
        exponent_limit: largest absolute exponent. null: no limit, as published.
        mlp_hidden: width of each layer of the perceptron beside ARM-Net.
        mlp_dim: dimensions of the embedding that are the perceptron's. null: half of them.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        preset: Preset = "official",
        heads: PositiveInt = 4,
        neurons: PositiveInt = 32,
        alpha: Alpha = 1.5,
        hidden: tuple[PositiveInt, ...] = (256, 256),
        batch_norm: bool = True,
        dropout: Share = 0.0,
        scale: bool | None = None,
        neuron_norm: bool | None = None,
        exponent_limit: PositiveFloat | None = 20.0,
        mlp_hidden: tuple[PositiveInt, ...] = (256, 256),
        mlp_dim: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if mlp_dim is None and fields.dim % 2:
            raise RecipeError(f"an embedding of {fields.dim} dimensions cannot be halved: make it even, or set mlp_dim")
        mlp_dim = mlp_dim or fields.dim // 2
        if mlp_dim >= fields.dim:
            raise RecipeError(f"mlp_dim is {mlp_dim}, must be below the embedding's {fields.dim} dimensions")
        self.dims = [fields.dim - mlp_dim, mlp_dim]
        self.relations = ARMNet(
            Fields(fields.names, fields.rows, self.dims[0]),
            preset=preset,
            heads=heads,
            neurons=neurons,
            alpha=alpha,
            hidden=hidden,
            batch_norm=batch_norm,
            dropout=dropout,
            scale=scale,
            neuron_norm=neuron_norm,
            exponent_limit=exponent_limit,
        )
        self.network = MLPBlock(len(fields) * mlp_dim, mlp_hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.relations.width + self.network.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] + mlp_hidden[-1]."""
        ours, theirs = torch.split(e, self.dims, 2)
        # Autocast gives both parts one precision, except where either has no layer.
        relations, network = self.relations(ours), self.network(theirs.flatten(1))
        return torch.cat([relations, network.to(relations.dtype)], 1)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """As ARM-Net."""
        return self.relations.explain(e[:, :, : self.dims[0]])


def _sets(members: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of `[n, F]` bool, most frequent first, and how often each occurs: `[T, F], [T]`."""
    if members.shape[1] > 62:
        rows, count = torch.unique(members, dim=0, return_counts=True)
    else:  # as bits of one integer, which sort much faster
        bits = 1 << torch.arange(members.shape[1], device=members.device)
        codes, count = torch.unique((members * bits).sum(1), return_counts=True)
        rows = (codes.unsqueeze(1) & bits) > 0
    order = count.argsort(descending=True, stable=True)
    return rows[order], count[order]


@hookimpl
def recsys_components() -> list[Component]:
    """Return both interactions."""
    return [Component("interaction", "armnet", ARMNet), Component("interaction", "armnet_plus", ARMNetPlus)]
