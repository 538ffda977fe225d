"""ESMM and ESCM²: conversions of impressions, learned without pretending that clicked rows are all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import (
    Batch,
    Component,
    EncodedSchema,
    RecipeError,
    first_order,
    full,
    hookimpl,
    product_bce,
    row_mean,
)

Share = Annotated[float, Limits(gt=0, le=1)]


class ESMM(nn.Module):
    """Clicks and conversions over all impressions, through the product of the click and the conversion probability.

    L = BCE(o, σ(a)) + BCE(o z, σ(a) σ(b)), the mean over all rows: o is the click, z the conversion, a and b the logits
    of the two tasks. The task `conversion` gives b, so a served model says P(conversion | click); it is taught by the
    rows without a click too, and its label is never read there.

    Known bias: the product is what is fitted, and where clicked rows are those that convert more easily than their
    inputs tell, b comes out too high for the others; ESCM² is made against this.

    Ma et al., "Entire Space Multi-Task Model", SIGIR 2018.

    Args:
        click: task of the click.
        conversion: task of the conversion; 1 only where there was a click.

    Raises:
        RecipeError: the recipe has no such task.
    """

    def __init__(self, tasks: tuple[str, ...], *, click: str = "click", conversion: str = "conversion") -> None:
        super().__init__()
        _check(tasks, click, conversion, "esmm")
        self.click, self.conversion = click, conversion
        self.needs: tuple[str, ...] = ()

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        return _total(_parts(logits, batch, self.click, self.conversion))


class ESCM2(nn.Module):
    """Conversions of clicked rows weighted by how unlikely the click was, beside the two terms of ESMM.

    L = L_click + λ_c L_conversion + λ_g L_product, each the mean over all B rows, with the first and the last as in
    ESMM. With e = BCE(z, σ(b)), w = min(1 / max(sg(σ(a)), floor), cap) and sg no gradient:
    ips: L_conversion = mean_b o e w; dr: mean_b [ê + o (e − ê) w] + mean_b o w (sg(e) − ê)², ê without gradient in the
    first term. The probability of a click is never moved by L_conversion.

    ê comes from a head of the loss, with a weight h for each value of each field. error: ê = softplus(h), which may be
    any error, as the paper has it but for the sigmoid there; since it does not depend on b, the tower learns from the
    same gradient as with ips, and only the value of the loss varies less. soft_label: ê = softplus(b) − σ(h) b, the
    error against an imagined conversion σ(h), which teaches the tower on the rows without a click too.

    Every epoch tells of the weights of clicked rows: weight_mean, weight_ess_share, (Σw)²/Σw² as a share of them, and
    weight_bounded, the share that floor or cap holds down.

    Wang et al., "ESCM²: Entire Space Counterfactual Multi-Task Model for Post-Click Conversion Rate Estimation",
    SIGIR 2022.

    Args:
        click: task of the click.
        conversion: task of the conversion.
        form: ips or dr.
        imputation: soft_label or error, for dr.
        strength: λ_c; 0 leaves ESMM, for `product_strength` 1.
        product_strength: λ_g.
        floor: least probability of a click that is divided by.
        cap: largest weight.

    Raises:
        RecipeError: the recipe has no such task.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        click: str = "click",
        conversion: str = "conversion",
        form: Literal["ips", "dr"] = "ips",
        imputation: Literal["soft_label", "error"] = "soft_label",
        strength: NonNegativeFloat = 0.5,
        product_strength: NonNegativeFloat = 0.5,
        floor: Share = 0.01,
        cap: PositiveFloat = 100.0,
    ) -> None:
        super().__init__()
        _check(tasks, click, conversion, "escm2")
        self.click, self.conversion, self.imputation = click, conversion, imputation
        self.strength, self.product_strength = strength, product_strength
        self.floor, self.cap = floor, cap
        self.head = first_order(schema) if form == "dr" else None
        self.bias = nn.Parameter(torch.zeros(1)) if form == "dr" else None
        self._sums = torch.zeros(4, dtype=torch.float64)
        self.needs: tuple[str, ...] = ()

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        parts = self.parts(logits, batch)
        click, product = parts.pop("click"), parts.pop("product")
        return click + self.strength * _total(parts) + self.product_strength * product

    def parts(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Term → its mean over the rows, `[]`: click, conversion, with dr imputation, product; not yet weighted."""
        parts = _parts(logits, batch, self.click, self.conversion)
        logit = full(logits[self.conversion])
        clicked = batch.label[self.click].to(logit.dtype)
        label = batch.label[self.conversion].to(logit.dtype) * clicked
        error = F.softplus(logit) - label * logit
        weight = self.click_weights(logits[self.click]) * clicked
        bounded = (weight > 0) & (weight < (1 - 1e-6) / torch.sigmoid(full(logits[self.click].detach())))
        self._sums = torch.stack([(weight > 0).sum(), weight.sum(), weight.square().sum(), bounded.sum()]).double()
        imputed = self._imputed(logit, batch)
        if imputed is None:
            parts["conversion"] = row_mean(error * weight, batch)
            return parts
        fixed, learned = imputed
        parts["conversion"] = row_mean(fixed + (error - fixed) * weight, batch)
        parts["imputation"] = row_mean((error.detach() - learned).square() * weight, batch)
        return parts

    def click_weights(self, click: Tensor) -> Tensor:
        """What a clicked row counts for, from the logits of the click: `[B] -> [B]`, without gradient."""
        chance = torch.sigmoid(full(click.detach()))
        return chance.clamp(min=self.floor).reciprocal().clamp(max=self.cap)

    def sums(self) -> Tensor:
        """Of the batch that `forward` saw last, `[4]` float64, for `facts`."""
        return self._sums

    def facts(self, sums: Tensor) -> dict[str, float]:
        """What the sums of an epoch say of the weights of clicked rows; NaN where nothing was clicked."""
        rows, total, squares, bounded = sums.tolist()
        if not rows:
            return dict.fromkeys(("weight_mean", "weight_ess_share", "weight_bounded"), math.nan)
        found = (total / rows, total**2 / squares / rows, bounded / rows)
        return dict(zip(("weight_mean", "weight_ess_share", "weight_bounded"), found, strict=True))

    def _imputed(self, logit: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """ê for the tower to learn from, and for the head to learn by, each `[B]`; None with ips."""
        if self.head is None or self.bias is None:
            return None
        h = (full(self.head(batch.ids, batch.values)).sum((1, 2)) + self.bias).to(logit.dtype)
        if self.imputation == "error":
            learned = F.softplus(h)
            return learned.detach(), learned
        held, imagined = logit.detach(), torch.sigmoid(h)
        return F.softplus(logit) - imagined.detach() * logit, F.softplus(held) - imagined * held


def _total(parts: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms, `[]`."""
    return torch.stack(tuple(parts.values())).sum()


def _parts(logits: Mapping[str, Tensor], batch: Batch, click: str, conversion: str) -> dict[str, Tensor]:
    """The two terms of ESMM, each `[]`."""
    a, b = full(logits[click]), full(logits[conversion])
    clicked = batch.label[click].to(a.dtype)
    converted = batch.label[conversion].to(a.dtype) * clicked
    return {
        "click": row_mean(F.softplus(a) - clicked * a, batch),
        "product": row_mean(product_bce(a, b, converted), batch),
    }


def _check(tasks: tuple[str, ...], click: str, conversion: str, name: str) -> None:
    for option, task in (("click", click), ("conversion", conversion)):
        if task not in tasks:
            raise RecipeError(
                f"{name}: {option}: the recipe has no task '{task}'; tasks (data.label): {', '.join(tasks)}"
            )
    if click == conversion:
        raise RecipeError(f"{name}: click and conversion are both the task '{click}'")


@hookimpl
def recsys_components() -> list[Component]:
    """Return the losses."""
    return [Component("loss", "esmm", ESMM), Component("loss", "escm2", ESCM2)]
