"""Match, item and user as three causes of a click, of which ranking leaves the direct effect of the item out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, Fields, RecipeError, hookimpl, label_bce


class MACR(nn.Module):
    """Model-agnostic counterfactual reasoning on a matrix factorisation: popularity and activity have their own heads.

    k = ⟨v_u, v_i⟩,  a_i = σ(w_iᵀv_i),  a_u = σ(w_uᵀv_u)
    training: logit = k·a_i·a_u, and α·BCE(w_iᵀv_i) + β·BCE(w_uᵀv_u) is added to the loss
    ranking:  logit = (k − c)·a_i·a_u

    c is what the match would be for nobody in particular: the larger, the lower the items rank that are clicked because
    they are popular. Choose it on validation rows that are balanced over items; 30 to 40 in the paper. The logits
    of ranking are no log-odds, unless c = 0. Negatives are to be sampled: `sampling: {negatives: 1}`, `loss: bce`.
    With as many as positives of each user, the user's head learns a constant, and the larger β, the more firmly ½.

    It works as far as a_i tells popularity, and α sees to that. With an α as small as published, what a_i learns comes
    from the product: where most matches are negative, it is large for what is not popular (correlation −0.3 with the
    logarithm of popularity in a simulated world, 0.9 with α = 1), and no c > 0 helps. Choose α beside c, and
    train long: the product learns slowly.

    Wei et al., "Model-agnostic counterfactual reasoning for eliminating popularity bias in recommender systems", KDD
    2021, with matrix factorisation as its model; α = β = 10⁻³ there, α up to 10⁻².

    Args:
        user: field of the users.
        item: field of the items.
        c: reference match in evaluation and export; 0 ranks as training does.
        alpha: α, of the item's head.
        beta: β, of the user's head.
        branches: false leaves both heads out: k alone, the matrix factorisation.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        user: str = "user",
        item: str = "item",
        c: float = 30.0,
        alpha: float = 1e-3,
        beta: float = 1e-3,
        branches: bool = True,
    ) -> None:
        super().__init__()
        for option, name in (("user", user), ("item", item)):
            if name not in fields.names:
                raise RecipeError(
                    f"model.interaction.{option}: no field '{name}'; fields: {', '.join(fields.names)}",
                    path=("model", "interaction", option),
                )
        self.width = 1
        self.is_logit = True
        self.places = (fields.names.index(user), fields.names.index(item))
        self.c = c
        self.rates = (alpha, beta)
        self.heads = nn.Linear(fields.dim, 2, bias=False) if branches else None
        self._logits: tuple[Tensor, Tensor] | None = None

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        u, i = (e[:, place] if e.dtype == torch.float64 else e[:, place].float() for place in self.places)
        match = (u * i).sum(1, keepdim=True)  # [B, 1]
        if self.heads is None:
            return match
        popular, active = self._branches(u, i)
        if self.training:
            self._logits = (popular, active)
        factor = popular.sigmoid() * active.sigmoid()
        return (match if self.training else match - self.c) * factor[:, None]

    def _branches(self, u: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D], [B, D] -> [B], [B]`: logits of the item's and of the user's head."""
        assert self.heads is not None
        weight = self.heads.weight.to(u.dtype)
        return i @ weight[0], u @ weight[1]

    def auxiliary(self, batch: Batch) -> Tensor:
        """`α·BCE(item) + β·BCE(user)`, `[]`."""
        if self._logits is None:
            return torch.zeros((), device=batch.ids.device)
        (popular, active), self._logits = self._logits, None
        return self.rates[0] * label_bce(popular, batch) + self.rates[1] * label_bce(active, batch)

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`item [B]` and `user [B]`, the factors a_i and a_u."""
        if self.heads is None:
            return {}
        popular, active = self._branches(e[:, self.places[0]], e[:, self.places[1]])
        return {"item": popular.sigmoid(), "user": active.sigmoid()}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "macr", MACR)]
