"""Group lasso: each field's vectors are one group, and pay for their norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from recsys.api import Best, Component, Fields, Selection, chosen, hookimpl, how_many, passing

MEMORY = 0.98
"""Of the moving average of the squares."""

Part = Annotated[float, pydantic.Field(ge=0, lt=1)]


class GroupLasso(nn.Module):
    """A price for the norm of all vectors of a field together, which keeps the vectors of useless fields short.

    Added to the loss is λ Σ_f √D r_f with r_f² = mean_b ‖e_bf‖² over the rows of the batch. This is the group lasso
    λ Σ_f √D ‖P_f^{½} E_f‖ on each field's part E_f of the table, where P_f has on its diagonal how often the field has
    each value, as a batch tells it: rows count as often as they are used, and a step touches the rows of its batch
    alone, whatever the vocabulary. The factor √D makes up for the size of a group, which is D for all.
    Its gradient, λ √D e_bf / (B r_f), does not fade as vectors get short, so a field has to gain more than that to be
    there at all; and nothing gates it: the selector passes vectors on as they are while it learns.

    It is no proximal method: the table belongs to the embedding, and its optimizer's steps end near zero, not at it. A
    field's score is r_f over training rows (a moving average of r_f² over batches); kept are the best, or those above
    a `threshold`. After the search evaluation sees zeros for the others. Weights behind short vectors can grow, and so
    the price buys less where they have no decay (`train.network_l2`); and being group by group, it never asks what two
    fields do together. The stage runs all its epochs and keeps the last, for the loss alone would choose an early one.

    First-order weights and histories pay nothing.

    Yuan and Lin, "Model selection and estimation in regression with grouped variables", JRSS B 2006; in networks:
    Scardapane et al., "Group sparse regularization for deep neural networks", Neurocomputing 2017, arXiv 1607.00485.

    Args:
        strength: λ.
        keep: how many of the fields are kept, a number or a share.
        threshold: instead of `keep`: the least r_f that is kept, as a part of the largest.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        strength: NonNegativeFloat = 1e-3,
        keep: Best = 0.5,
        threshold: Part | None = None,
    ) -> None:
        super().__init__()
        how_many(fields, keep)
        self.fields, self.strength, self.keep, self.threshold = fields, strength, keep, threshold
        self.progress: Tensor
        self.square: Tensor
        self.seen: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("square", torch.zeros(len(fields)))  # r²
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._norm: Tensor | None = None

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        self._norm = self.norms(e) if self.training else None
        if self._norm is not None:
            self._observe(self._norm.detach().square())
            return e
        return e * torch.where(self.progress < 1, torch.ones_like(self.square), self._passes()).to(e.dtype).unsqueeze(1)

    def norms(self, e: Tensor) -> Tensor:
        """r, `[B, F, D] -> [F]`, at least in float32."""
        precise = e if e.dtype == torch.float64 else e.float()
        r: Tensor = torch.linalg.vector_norm(precise, dim=(0, 2)) / len(e) ** 0.5
        return r

    @torch.no_grad()
    def _observe(self, square: Tensor) -> None:
        """Take a batch's r² `[F]` into the moving average."""
        fresh = 1 - MEMORY * (self.seen > 0).to(square.dtype)
        self.square.lerp_(square, fresh)
        self.seen.add_(1)

    def penalty(self) -> Tensor:
        """λ √D Σ r of the batch that `forward` saw last in training, `[]`."""
        if self._norm is None:
            return torch.zeros((), device=self.progress.device)
        price: Tensor = self.strength * self.fields.dim**0.5 * self._norm.sum()
        return price

    def anneal(self, progress: float) -> None:
        """Note how far the stage is; at 1 the search is over."""
        self.progress.fill_(progress)

    def reached(self) -> bool | None:
        """None before anything was paid, then False: a stage that pays keeps its last epoch."""
        return False if self.strength and int(self.seen) else None

    def kept(self) -> Selection:
        """The fields with the largest norms; all of them before any was seen."""
        return chosen(self.fields.names, self._passes())

    def scores(self) -> Mapping[str, Tensor]:
        """The norm r of each field, `[]`."""
        return dict(zip(self.fields.names, self.square.detach().sqrt(), strict=True))

    def _passes(self) -> Tensor:
        """`[F]` bool."""
        if self.threshold is None:
            return passing(self.fields, self.square, self.keep)
        return self.square >= self.threshold**2 * self.square.amax()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no batch: tensors that hang on a graph cannot be copied."""
        return {**self.__dict__, "_norm": None}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "fit", "name": "search"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "group_lasso", GroupLasso, stages)]
