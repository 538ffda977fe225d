"""From representations to one logit per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Interaction
from recsys.nn.table import Table


class Head(nn.Module):
    """Adds up everything that speaks for a click.

    logit_t = w_tᵀ [h_1; h_2; …] + Σ (logits of the interactions that give logits) + Σ_f v_{t,f} + b_t,
    where h are the outputs that are not logits yet, and v the first-order ("wide") weights of the field values,
    one per value and task (numeric fields: weight times value). The wide term covers the scalar fields.
    Several interactions concatenated under one projection are the same as their projected logits summed.

    Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016 (the wide term).

    Args:
        wide: add the first-order term.
    """

    def __init__(self, schema: EncodedSchema, interactions: Sequence[Interaction], *, wide: bool = False) -> None:
        super().__init__()
        self.tasks = schema.tasks
        self.is_logit = tuple(i.is_logit for i in interactions)
        width = sum(i.width for i in interactions if not i.is_logit)
        self.bias = nn.Parameter(torch.zeros(len(self.tasks)))
        self.weight = nn.Parameter(torch.empty(len(self.tasks), width)) if width else None
        if self.weight is not None:  # xavier-normal of the [1, width] projection that each task has
            nn.init.normal_(self.weight, std=(2.0 / (width + 1)) ** 0.5)
        self.wide = Table(_scalar(schema), dim=len(self.tasks)) if wide else None

    def forward(self, outputs: Sequence[Tensor], ids: Tensor, values: Tensor | None) -> dict[str, Tensor]:
        """Outputs of the interactions, each `[B, H_i]`; `[B, F], [B, F] -> {task: [B]}` in float32."""
        logit = full(self.bias).expand(ids.shape[0], -1)  # [B, tasks]
        if self.weight is not None:
            h = torch.cat([o for o, done in zip(outputs, self.is_logit, strict=True) if not done], 1)
            logit = logit + full(nn.functional.linear(h, self.weight))
        for output, done in zip(outputs, self.is_logit, strict=True):
            if done:
                logit = logit + full(output).sum(1, keepdim=True)
        if self.wide is not None:
            logit = logit + full(self.wide(ids, values)).sum(1)  # [B, F, tasks] -> [B, tasks]
        return {task: logit[:, t] for t, task in enumerate(self.tasks)}

    def table_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that table-wide L2 covers."""
        return {} if self.wide is None else {"wide.weight": self.wide.weight}


def full(x: Tensor) -> Tensor:
    """Raise half precision to float32; sums of logits are never taken in less."""
    return x if x.dtype == torch.float64 else x.float()


def _scalar(schema: EncodedSchema) -> EncodedSchema:
    """The schema without its histories; a field that shared a history's vocabulary gets its own first-order rows."""
    names = {f.name for f in schema.fields}
    fields = tuple(f if f.shares in names else replace(f, shares=None) for f in schema.fields)
    return replace(schema, fields=fields, histories=())
