"""Losses of rows that were observed by a biased policy: inverse propensity scores, plain and self-normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field as Limits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recsys.api import Batch, Component, WeightMode, hookimpl, make_weight

TINY = 1e-30
"""Least divisor: a batch of which nothing was observed has a loss of 0."""
DEFAULTS: Mapping[str, float] = {"floor": 0.05, "cap": 20.0, "power": 0.5, "shrink": 20.0}
"""Mode → its value where the recipe has none."""


class IPS(nn.Module):
    """Cross-entropy of observed rows by inverse propensity scores, an unbiased estimate of that of all rows.

    loss = (1/N) Σ_{o=1} e/θ, e = softplus(z) − y z. The divisor is the number of rows of the batch, those that were not
    observed (`observed` 0) included: their labels are never looked at. A log of observed rows alone gives the share of
    all rows that they are as `exposure`; the loss is then exposure · mean(e/θ), else N/n times as large.

    Schnabel et al., "Recommendations as Treatments: Debiasing Learning and Evaluation", ICML 2016, arXiv 1602.05352.

    Args:
        mode: how weights 1/θ are kept down: none, floor (1/max(θ, value)), cap (min(1/θ, value)), power (θ^−value),
            shrink (w·value/(w² + value)) or selfnorm (w/mean w of the batch).
        value: of the mode; by default a floor of .05, a cap of 20, the power .5, or 20 for shrink.
        exposure: n/N, for a log of observed rows alone.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        *,
        mode: WeightMode = "floor",
        value: float | None = None,
        exposure: Annotated[float, Limits(gt=0, le=1)] | None = None,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.exposure, self.allow_low_ess = tasks, exposure, allow_low_ess
        self.mode, self.value = mode, value if value is not None else DEFAULTS.get(mode)
        make_weight(torch.ones(1), self.mode, self.value)  # refuses a value that the mode does not take
        self.needs: tuple[str, ...] = ("propensity",)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        weight = _weight(batch, self.mode, self.value)
        scale = 1.0 if self.exposure is None else self.exposure
        return scale * _weighted(self.tasks, logits, batch, weight) / len(batch)

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """1/θ of the observed rows, before and after it was kept down, each `[B]`."""
        return _weight(batch, "none", None), _weight(batch, self.mode, self.value)


class SNIPS(nn.Module):
    """Cross-entropy of observed rows by self-normalised inverse propensity scores: the weights' own sum divides.

    loss = Σ_{o=1} e/θ / Σ_{o=1} 1/θ, e = softplus(z) − y z. A batch's own divisor would be biased where batches are
    small; here it is B times a running mean of Σ_{o=1} (1/θ) / B over the steps, which all processes share. Less
    variance than `ips`, a bias of order 1/n; all propensities may be too large by one factor. Where the number of all
    rows is known, and that is to divide, use `ips`.

    Swaminathan and Joachims, "The Self-Normalized Estimator for Counterfactual Learning", NIPS 2015; for
    recommendation Schnabel et al., ICML 2016, arXiv 1602.05352.

    Args:
        mode: how weights 1/θ are kept down: none, floor (1/max(θ, value)), cap (min(1/θ, value)), power (θ^−value) or
            shrink (w·value/(w² + value)).
        value: of the mode; by default a floor of .05, a cap of 20, the power .5, or 20 for shrink.
        decay: of the running mean; 0 takes the batch alone.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.
    """

    mean: Tensor
    total: Tensor

    def __init__(
        self,
        tasks: tuple[str, ...],
        *,
        mode: WeightMode = "floor",
        value: float | None = None,
        decay: Annotated[float, Limits(ge=0, lt=1)] = 0.9,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.decay, self.allow_low_ess = tasks, decay, allow_low_ess
        self.mode, self.value = mode, value if value is not None else DEFAULTS.get(mode)
        make_weight(torch.ones(1), self.mode, self.value)  # refuses a value that the mode does not take
        self.needs: tuple[str, ...] = ("propensity",)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        weight = _weight(batch, self.mode, self.value)
        divisor = len(batch) * self._mean(weight, batch)
        return _weighted(self.tasks, logits, batch, weight) / divisor.clamp(min=TINY)

    @torch.no_grad()
    def _mean(self, weight: Tensor, batch: Batch) -> Tensor:
        """The mean weight of a row, `[B] -> []`: of this batch and, in training, of those before it."""
        if "weight" in batch.context:
            weight = weight * batch.context["weight"]
        now = weight.mean()
        if self.training:
            if dist.is_available() and dist.is_initialized():
                now = now * batch.share
                dist.all_reduce(now)
                now /= dist.get_world_size()
            self.mean.lerp_(now.to(self.mean.dtype), 1 - self.decay)
            self.total.lerp_(torch.ones_like(self.total), 1 - self.decay)
        elif not bool(self.total):
            return now
        return self.mean / self.total

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """1/θ of the observed rows, before and after it was kept down, each `[B]`."""
        return _weight(batch, "none", None), _weight(batch, self.mode, self.value)


def _weight(batch: Batch, mode: WeightMode, value: float | None) -> Tensor:
    """The weights of the observed rows, 0 of the others, `[B]`; without a column `observed` all are."""
    return make_weight(batch.context["propensity"], mode, value, rows=batch.context.get("observed"))


def _weighted(tasks: tuple[str, ...], logits: Mapping[str, Tensor], batch: Batch, weight: Tensor) -> Tensor:
    """Σ_b w_b e_b, averaged over the tasks, `[]`."""
    if "weight" in batch.context:
        weight = weight * batch.context["weight"]
    losses = []
    for task in tasks:
        z = logits[task] if logits[task].dtype == torch.float64 else logits[task].float()
        y = torch.where(weight > 0, batch.label[task].to(z.dtype), 0.0)
        losses.append((weight * binary_cross_entropy_with_logits(z, y, reduction="none")).sum())
    return torch.stack(losses).mean()


@hookimpl
def recsys_components() -> list[Component]:
    """Return what this plugin brings."""
    return [Component("loss", "ips", IPS), Component("loss", "snips", SNIPS)]
