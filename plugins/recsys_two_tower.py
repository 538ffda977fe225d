"""Two towers: what a user asks for and what an item offers, as vectors that meet in one dot product."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from recsys.api import Component, Fields, MLPBlock, RecipeError, Share, hookimpl, linear


class TwoTower(nn.Module):
    """Two towers: a perceptron on the item's fields, one on all others, and the dot product of what they give.

    logit = ⟨p, q⟩ / τ, p = W_U MLP_U(x_U), q = W_I MLP_I(x_I), both of length 1 with `normalize`. x_I are the vectors
    of the item's fields; x_U all others, pooled histories included. Neither tower sees the other's fields, so that
    items can be put into an index ahead of time (`recsys export --index`), which a sequence encoder that looks at the
    item, such as `din`, would prevent. Trained on rows with labels, or as a retriever with `sampling:` and
    `loss: sampled_softmax`.

    Huang et al., "Learning Deep Structured Semantic Models for Web Search using Clickthrough Data", CIKM 2013; Yi et
    al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019 (vectors of length
    1, and τ).

    Args:
        item: fields of the item; the name of a sequence or of a multi-valued field stands for all of its columns.
        hidden: width of each layer of both perceptrons; with none of them, each tower is one linear map.
        dim: W, the width of p and q.
        normalize: divide p and q by their length.
        temperature: τ.
        batch_norm: normalise before the perceptrons' activations; training then needs at least two rows per batch.
        dropout: share of the perceptrons' activations that is dropped in training.
    """

    item: Tensor
    user: Tensor

    def __init__(
        self,
        fields: Fields,
        *,
        item: tuple[str, ...] = ("item",),
        hidden: tuple[PositiveInt, ...] = (128,),
        dim: PositiveInt = 32,
        normalize: bool = True,
        temperature: PositiveFloat = 0.1,
        batch_norm: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        mine, others = _divided(fields, item)
        self.width = 1
        self.is_logit = True
        self.normalize, self.temperature = normalize, temperature
        self.register_buffer("item", torch.tensor(mine), persistent=False)
        self.register_buffer("user", torch.tensor(others), persistent=False)
        self.towers = nn.ModuleList()
        for places in (others, mine):
            block = MLPBlock(len(places) * fields.dim, hidden, batch_norm=batch_norm, dropout=dropout)
            self.towers.append(nn.Sequential(block, linear(block.width, dim)))

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        p, q = self.sides(e)
        return (p * q).sum(1, keepdim=True)

    def sides(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What the logit is the product of, p / τ and q, `[B, F, D] -> [B, W], [B, W]`, float32 at least."""
        found = []
        for places, tower in zip((self.user, self.item), self.towers, strict=True):
            v: Tensor = tower(e.index_select(1, places).flatten(1))
            v = v if v.dtype == torch.float64 else v.float()
            found.append(functional.normalize(v, dim=1) if self.normalize else v)
        return found[0] / self.temperature, found[1]

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`user [B, W]`: p / τ; `item [B, W]`: q."""
        p, q = self.sides(e)
        return {"user": p, "item": q}


def _divided(fields: Fields, item: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Places of the item's fields, and of all others."""
    path = ("model", "interaction", "item")
    owners = [{name, name.partition(".")[0]} for name in fields.names]  # `genres.genres` goes by `genres` too
    for name in item:
        if not any(name in owner for owner in owners):
            near = difflib.get_close_matches(name, fields.names, 1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise RecipeError(f"item: no field '{name}'{hint} Fields: {', '.join(fields.names)}", path=path)
    mine = [f for f, owner in enumerate(owners) if not owner.isdisjoint(item)]
    others = [f for f, owner in enumerate(owners) if owner.isdisjoint(item)]
    if not mine or not others:
        side = "item" if not mine else "user"
        raise RecipeError(f"item: two towers need a field each, and none of {len(fields)} is the {side}'s", path=path)
    return mine, others


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "two_tower", TwoTower)]
