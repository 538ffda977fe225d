"""Logistic regression: every value of every field has one weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Component, Fields, hookimpl


class LR(nn.Module):
    """Logistic regression: the embedding, of dimension 1, holds the weight of each value.

    logit = b + Σ_f w[f, id_f] · value_f, where w[f, id] = Σ_d e_fd. Wider embeddings are the same model with
    more parameters than it needs.

    As an interaction, and not as the head's first-order term alone, it works with selectors and histories.

    Richardson et al., "Predicting Clicks: Estimating the Click-Through Rate for New Ads", WWW 2007.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.width = 1
        self.is_logit = True

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        return _full(e).sum((1, 2)).unsqueeze(1)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`fields [B, F]`: what each field adds to the logit."""
        return {"fields": _full(e).sum(2)}


def _full(e: Tensor) -> Tensor:
    """Raise half precision to float32."""
    return e if e.dtype == torch.float64 else e.float()


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "logistic_regression", LR)]
