"""AFN and AFN+: crosses of fields whose orders are learned, through logarithms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, RecipeError, Share, hookimpl, linear


class LogarithmicLayer(nn.Module):
    """Products of powers of the fields, dimension by dimension, with learned exponents.

    y_j = BN(exp(Σ_f w_jf BN(ln max(|e_f|, floor)))); signs are lost. The normalisations are over rows and dimensions,
    one mean and variance per field and per neuron. Logarithm to exponential in float32, also under autocast.

    Args:
        count: number of fields.
        neurons: number of products.
        floor: least absolute value.
    """

    def __init__(self, count: int, neurons: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.orders = linear(count, neurons, bias=False)  # w [neurons, F]
        self.log_norm = nn.BatchNorm1d(count)
        self.exp_norm = nn.BatchNorm1d(neurons)

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, D · neurons]`."""
        kind = e.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return self._products(e)
        with torch.autocast(kind, enabled=False):
            return self._products(e.float())

    def _products(self, e: Tensor) -> Tensor:
        """As forward, in the precision of the input."""
        logs = e.abs().clamp(min=self.floor).log().transpose(1, 2).flatten(0, 1)  # [B·D, F]
        products = self.exp_norm(self.orders(self.log_norm(logs)).exp())  # [B·D, neurons]
        y: Tensor = products.view(e.shape[0], -1)
        return y


class AFN(nn.Module):
    """Adaptive factorisation network: products of powers of the fields, then a perceptron.

    y_j = BN(exp(Σ_f w_jf BN(ln |e_f|))), h = MLP([y_1; y_2; …]); with whole w_j it is the cross Π_f |e_f|^{w_jf}.

    Cheng et al., "Adaptive Factorization Network: Learning Adaptive-Order Feature Interactions", AAAI 2020,
    arXiv 1909.03276.

    Args:
        neurons: number of products (the paper's 600 to 1,500).
        hidden: width of each layer of the perceptron.
        batch_norm: normalise before the perceptron's activations; training then needs at least two rows per batch.
        dropout: share of the perceptron's activations that is dropped in training.
        floor: least absolute value before the logarithm.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        neurons: PositiveInt = 600,
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: Share = 0.0,
        floor: PositiveFloat = 1e-5,
    ) -> None:
        super().__init__()
        self.products = LogarithmicLayer(len(fields), neurons, floor)
        self.stack = MLPBlock(neurons * fields.dim, hidden, batch_norm=batch_norm, dropout=dropout)
        self.width = self.stack.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1]."""
        h: Tensor = self.stack(self.products(e))
        return h

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`orders [neurons, F]`: the exponent of each field in each product."""
        return {"orders": self.products.orders.weight.detach()}


class AFNPlus(nn.Module):
    """AFN beside a perceptron on embeddings of its own, trained jointly; their logits are added.

    Half of the embedding's dimensions are AFN's and half are the perceptron's, two tables of D / 2 in one.

    Cheng et al., "Adaptive Factorization Network: Learning Adaptive-Order Feature Interactions", AAAI 2020,
    arXiv 1909.03276.

    Args:
        neurons: number of products.
        hidden: width of each layer of AFN's perceptron.
        dropout: share of its activations that is dropped in training.
        floor: least absolute value before the logarithm.
        deep_hidden: width of each layer of the perceptron beside it.
        deep_dropout: share of its activations that is dropped in training.
        batch_norm: normalise before both perceptrons' activations; training then needs at least two rows per batch.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        neurons: PositiveInt = 600,
        hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        dropout: Share = 0.0,
        floor: PositiveFloat = 1e-5,
        deep_hidden: tuple[PositiveInt, ...] = (400, 400, 400),
        deep_dropout: Share = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if fields.dim % 2:
            raise RecipeError(f"the embedding is divided between two networks; its dimension {fields.dim} must be even")
        half = Fields(fields.names, fields.rows, fields.dim // 2)
        self.afn = AFN(half, neurons=neurons, hidden=hidden, batch_norm=batch_norm, dropout=dropout, floor=floor)
        self.deep = MLPBlock(len(half) * half.dim, deep_hidden, batch_norm=batch_norm, dropout=deep_dropout)
        self.width = self.afn.width + self.deep.width
        self.is_logit = False

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`, H = hidden[-1] + deep_hidden[-1]."""
        own, deep = e.chunk(2, dim=2)
        return torch.cat([self.afn(own), self.deep(deep.flatten(1))], 1)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """As AFN."""
        return self.afn.explain(e)


@hookimpl
def recsys_components() -> list[Component]:
    """Return both interactions."""
    return [Component("interaction", "afn", AFN), Component("interaction", "afn_plus", AFNPlus)]
