"""Negatives that nobody judged: a second model says how likely it is that they would have been."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from recsys.api import Batch, Component, EncodedSchema, RecipeError, hookimpl, pairs, second_model

MOST = 30.0
"""Largest exponent of a weight, so that it stays finite."""


class CET(nn.Module):
    """Coupled estimation: ranker and observer weigh each other's sampled negatives by how trustworthy these are.

    w_R = 1/(1 − σ(s_j/τ)),  w_S = 1/(1 − σ(r_j/τ)), both without gradients
    loss = (1/P) Σ_{i,j} y_i(1 − y_j)·[w_R·softplus(−(r_i − r_j)) + w_S·softplus(−(s_i − s_j))], averaged over the tasks

    r is the model that is trained and served, s the observer, a second model of this loss: a factorisation machine on
    all fields. i are the logged rows, j the rows sampled for them, P = N·m. A negative that looked likely to be judged,
    and has no label, is trusted more; one that was unlikely to be may be a positive that nobody saw. The negatives
    should be ones that rank high: `sampling.sampler: dns`, or logged candidates.

    Cai et al., "Hard negatives or false negatives: correcting pooling bias in training neural ranking models", CIKM
    2022 (arXiv 2209.05072); the pairwise form of its public code. Weights are not normalised there: what they do to
    the step size is measured by their mean, which every epoch tells, ranker_weight and observer_weight.

    Args:
        tau: τ; larger ones bound the weights: |s| ≤ 10 and τ = 10 give 1.37 to 3.72.
        dim: width of the observer's embedding.
        selfnorm: divide the weights of a batch by their mean.
        listwise: ln of the softmax of a positive among its own negatives instead of pairs, where negatives count by
            their weight over the mean weight of that list; not of the paper.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        tau: float = 10.0,
        dim: int = 16,
        selfnorm: bool = False,
        listwise: bool = False,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise RecipeError(f"loss.tau is {tau}, must be above 0", path=("loss", "tau"))
        self.tasks = tasks
        self.tau = tau
        self.selfnorm = selfnorm
        self.listwise = listwise
        self.observer = second_model(schema, dim)
        self._sums = torch.zeros(3, dtype=torch.float64)
        self.needs: tuple[str, ...] = ("positive",)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        observed = self.observer(batch)
        losses = []
        for task in self.tasks:
            given = logits[task]
            r = given if given.dtype == torch.float64 else given.float()
            ranker, observer = self.both(r, observed[task].to(r.dtype), batch, task)
            losses.append(ranker + observer)
        return torch.stack(losses).mean()

    def both(self, r: Tensor, s: Tensor, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
        """The ranker's loss and the observer's, from their logits `[B]`: exchanging these exchanges the losses."""
        y_i, y_j = pairs(batch.label[task].to(r.dtype), batch)
        counts = y_i[:, None] * (1.0 - y_j)  # [N, m]
        (r_i, r_j), (s_i, s_j) = pairs(r, batch), pairs(s, batch)
        weights = self.weight(s_j), self.weight(r_j)
        self._sums = torch.stack([counts.sum(), *((counts * weight).sum() for weight in weights)]).double()
        return self._one(r_i, r_j, weights[0], counts), self._one(s_i, s_j, weights[1], counts)

    def sums(self) -> Tensor:
        """Of the batch and the task that `both` saw last, `[3]` float64, for `facts`."""
        return self._sums

    def facts(self, sums: Tensor) -> dict[str, float]:
        """The mean weights of an epoch's pairs, before they are divided by anything; NaN without a pair."""
        count, ranker, observer = sums.tolist()
        mean = (ranker / count, observer / count) if count else (math.nan, math.nan)
        return {"ranker_weight": mean[0], "observer_weight": mean[1]}

    def weight(self, other: Tensor) -> Tensor:
        """The weight of negatives from the other model's logits, elementwise: 1/(1 − σ(a)) = 1 + e^a."""
        return 1.0 + (other.detach() / self.tau).clamp_max(MOST).exp()

    def _one(self, x_i: Tensor, x_j: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if self.listwise:
            weight = weight / weight.mean(1, keepdim=True)
            negatives = torch.where(counts > 0, x_j + weight.log(), -torch.inf)
            every = torch.cat([x_i[:, None], negatives], 1).logsumexp(1)
            return (counts.amax(1) * (every - x_i)).mean()
        if self.selfnorm:
            weight = weight / weight.mean()
        return (counts * weight * softplus(x_j - x_i[:, None])).mean()


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "cet", CET)]
