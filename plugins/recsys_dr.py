"""Doubly robust losses: an imputation model fills in what was not observed, and observed rows correct it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from recsys.api import Batch, Component, EncodedSchema, RecipeError, hookimpl, make_weight

Share = Annotated[float, Limits(gt=0, le=1)]
LIMIT = 15.0
"""Largest size of a logit whose soft label lies outside [0, 1]: without it the loss has no least value."""


def doubly_robust(error: Tensor, imputed: Tensor, weight: Tensor) -> Tensor:
    """ê + w (e − ê): the imputed error, corrected where the true one is known, `[B], [B], [B] -> [B]`.

    w is o/θ: 0 where nothing was observed. The mean is right if the propensities are, or if the imputed errors are.
    """
    return imputed + weight * (error - imputed)


class DoublyRobust(nn.Module):
    """Doubly robust cross-entropy over observed and unobserved rows, with an imputation model that it trains itself.

    loss = (1/B) Σ_b [ê + (o/θ)(e − ê)], e = softplus(z) − y z where a row was observed (`observed` 1) and
    ê = softplus(z) − r z, r = σ(g) the imputed label, g a factorisation machine over the fields. The rows are to be all
    that might have been observed, or a uniform sample of them; labels of unobserved rows are never looked at. It is
    right if θ is, or if ê is. The model learns from this with r held fixed; g learns on observed rows, with z and e
    held fixed, in the same step:

        jl:    Σ_b (o/θ)(e − ê)²          mrdr:  Σ_b o (1 − θ)/θ² (e − ê)², which is the variance of the loss

    The value of the loss is the first line alone. A row whose soft label r + (o/θ)(y − r) lies outside [0, 1] has a
    loss without a least value: its logit counts as at most ±15. The rows' loss may be negative, and is not clipped.

    Every epoch tells of the imputation (first task): imputed_mean, the mean of ê over all rows; imputed_share, what
    part of the loss that is; and on observed rows imputed_ratio, Σê/Σe, near 1 where ê is right on the average, and
    imputed_correlation of ê with e; variance_saved, 1 − Var(ê + w (e − ê)) / Var(w e), w = o/θ: what imputation saves
    of the variance of plain weighting, negative where it adds to it.

    Wang et al., "Doubly Robust Joint Learning for Recommendation on Data Missing Not at Random", ICML 2019;
    Guo et al., "Enhanced Doubly Robust Learning for Debiasing Post-Click Conversion Rate Estimation", SIGIR 2021,
    arXiv 2105.13623.

    Args:
        mode: what the imputation model makes small: jl or mrdr.
        imputation: `error`, as above; or `label`, the cross-entropy of r against y with the same weights, as the code
            released with MRDR has it.
        fields: what the imputation model sees; by default all scalar fields.
        dim: dimensions of its vectors; 0 leaves first-order weights alone.
        floor: least propensity.
        allow_low_ess: go on where the weights leave less than 1 % effective rows.

    Raises:
        RecipeError: no such field.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        mode: Literal["jl", "mrdr"] = "jl",
        imputation: Literal["error", "label"] = "error",
        fields: tuple[str, ...] | None = None,
        dim: Annotated[int, Limits(ge=0)] = 8,
        floor: Share = 0.05,
        allow_low_ess: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.mode, self.imputation, self.floor = tasks, mode, imputation, floor
        self.allow_low_ess = allow_low_ess
        self.needs: tuple[str, ...] = ("propensity", "observed")
        self.imputer = Imputer(schema, len(tasks), dim, fields)
        self._sums = torch.zeros(12, dtype=torch.float64)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        observed = batch.context["observed"] != 0
        theta = batch.context["propensity"].detach()
        weight = make_weight(theta, "floor", self.floor, rows=observed)  # o/θ, [B]
        slope = weight * (1 - theta.clamp(min=self.floor)) * weight if self.mode == "mrdr" else weight
        rows = batch.context.get("weight", torch.ones_like(weight))
        with torch.autocast(batch.ids.device.type, enabled=False):
            imputed = self.imputer(batch)  # [B, tasks]
        values, lessons = [], []
        for i, task in enumerate(self.tasks):
            z = logits[task] if logits[task].dtype == torch.float64 else logits[task].float()
            y = torch.where(observed, batch.label[task].to(z.dtype), 0.0)
            value = self._value(z, y, imputed[:, i].detach(), weight)
            if i == 0:
                self._sums = _sums(z.detach(), y, imputed[:, 0].detach(), weight)
            values.append((rows * value).mean())
            lessons.append((rows * slope * self._lesson(z.detach(), y, imputed[:, i])).mean())
        lesson = torch.stack(lessons).mean()
        return torch.stack(values).mean() + (lesson - lesson.detach())

    def _value(self, z: Tensor, y: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """What the model learns from, `[B]`."""
        r = torch.sigmoid(g)
        soft = r + weight * (y - r)
        z = torch.where(soft > 1, z.clamp(max=LIMIT), torch.where(soft < 0, z.clamp(min=-LIMIT), z))
        return doubly_robust(softplus(z) - y * z, softplus(z) - r * z, weight)

    def _lesson(self, z: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """What the imputation model learns from, before its weights, `[B]`; (e − ê)² = z² (y − r)²."""
        if self.imputation == "label":
            return binary_cross_entropy_with_logits(g, y.to(g.dtype), reduction="none")
        return (z * (y - torch.sigmoid(g))) ** 2

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """1/θ of the observed rows, before and after θ was given a floor, each `[B]`."""
        theta, observed = batch.context["propensity"], batch.context["observed"]
        return make_weight(theta, rows=observed), make_weight(theta, "floor", self.floor, rows=observed)

    def sums(self) -> Tensor:
        """Of the batch that `forward` saw last, `[12]` float64, for `facts`."""
        return self._sums

    def facts(self, sums: Tensor) -> dict[str, float]:
        """What the sums of an epoch say of the imputation; NaN where nothing tells it."""
        n, imputed, robust, robust_squares, plain, plain_squares = sums[:6].tolist()
        seen, e, e_squares, g, g_squares, product = sums[6:].tolist()
        spread = (seen * e_squares - e**2) * (seen * g_squares - g**2)
        plain_variance = n * plain_squares - plain**2
        return {
            "imputed_mean": _ratio(imputed, n),
            "imputed_share": _ratio(imputed, robust),
            "imputed_ratio": _ratio(g, e),
            "imputed_correlation": _ratio(seen * product - e * g, math.sqrt(max(spread, 0.0))),
            "variance_saved": 1 - _ratio(n * robust_squares - robust**2, plain_variance),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@torch.no_grad()
def _sums(z: Tensor, y: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Sums of all rows and of the observed ones, which have a weight, `[12]`."""
    z, y, w = z.double(), y.double(), weight.double()
    e, imputed = softplus(z) - y * z, softplus(z) - torch.sigmoid(g.double()) * z
    robust, plain, one = doubly_robust(e, imputed, w), w * e, torch.ones_like(z)
    every = torch.stack([one, imputed, robust, robust**2, plain, plain**2]).sum(1)
    seen = torch.stack([one, e, e**2, imputed, imputed**2, e * imputed]) * (w > 0)
    return torch.cat([every, seen.sum(1)])


class Imputer(nn.Module):
    """g = b + Σ_f w_f + ½ (‖Σ_f v_f‖² − Σ_f ‖v_f‖²), for each task, over the rows of its own tables.

    Args:
        schema: fields and their sizes.
        tasks: number of outputs.
        dim: of the vectors v.
        fields: which fields; None for all.

    Raises:
        RecipeError: no such field.
    """

    offsets: Tensor
    places: Tensor

    def __init__(self, schema: EncodedSchema, tasks: int, dim: int, fields: tuple[str, ...] | None = None) -> None:
        super().__init__()
        names = [field.name for field in schema.fields]
        for name in fields or ():
            if name not in names:
                raise RecipeError(f"no field '{name}' for the imputation model; fields: {', '.join(names)}")
        places = [i for i, name in enumerate(names) if fields is None or name in fields]
        sizes = torch.tensor([schema.fields[i].rows for i in places])
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        count = int(sizes.sum())
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.first = nn.Parameter(torch.zeros(count, tasks))
        self.vectors = nn.Parameter(0.1 * torch.randn(count, tasks, dim)) if dim else None

    def forward(self, batch: Batch) -> Tensor:
        """`Batch -> [B, tasks]`."""
        ids = batch.ids[:, self.places] + self.offsets  # [B, F]
        values = None if batch.values is None else batch.values[:, self.places, None]  # [B, F, 1]
        first = self.first[ids] if values is None else self.first[ids] * values
        g = self.bias + first.sum(1)
        if self.vectors is None:
            return g
        v = self.vectors[ids]  # [B, F, tasks, dim]
        v = v if values is None else v * values[..., None]
        return g + 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(-1)


@hookimpl
def recsys_components() -> list[Component]:
    """Return what this plugin brings."""
    return [Component("loss", "dr", DoublyRobust)]
