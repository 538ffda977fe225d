"""From representations to one logit per task, or to one per task and member of an ensemble."""

from __future__ import annotations

import functools
import itertools
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

    With several members, `interactions` are those of the first member, then of the second, and so on; each member has
    a w, v and b of its own, and the logit is the mean of theirs.

    Args:
        wide: add the first-order term.
        members: number of equal parts of `interactions`.
    """

    def __init__(
        self, schema: EncodedSchema, interactions: Sequence[Interaction], *, wide: bool = False, members: int = 1
    ) -> None:
        super().__init__()
        self.tasks = schema.tasks
        self.members = members
        self.count = len(interactions) // members
        own = interactions[: self.count]
        self.is_logit = tuple(i.is_logit for i in own)
        width = sum(i.width for i in own if not i.is_logit)
        logits = members * len(self.tasks)
        self.bias = nn.Parameter(torch.zeros(logits))
        self.weight = nn.Parameter(torch.empty(logits, width)) if width else None
        if self.weight is not None:  # xavier-normal of the [1, width] projection that each logit has
            nn.init.normal_(self.weight, std=(2.0 / (width + 1)) ** 0.5)
        self.wide = first_order(schema, logits) if wide else None

    def forward(self, outputs: Sequence[Tensor], ids: Tensor, values: Tensor | None) -> dict[str, Tensor]:
        """Outputs of the interactions, each `[B, H_i]`; `[B, F], [B, F] -> {task: [B]}` in float32."""
        each = self.each(outputs, ids, values)
        if self.members == 1:
            return each[0]
        return {task: torch.stack([member[task] for member in each]).mean(0) for task in self.tasks}

    def each(self, outputs: Sequence[Tensor], ids: Tensor, values: Tensor | None) -> tuple[dict[str, Tensor], ...]:
        """Logits of every member, as those of `forward`."""
        # [B, F, members · tasks] -> [B, members · tasks]
        first = None if self.wide is None else full(self.wide(ids, values)).sum(1)
        return tuple(self._member(m, outputs[m * self.count :][: self.count], ids, first) for m in range(self.members))

    def _member(self, m: int, outputs: Sequence[Tensor], ids: Tensor, first: Tensor | None) -> dict[str, Tensor]:
        """Logits of one member from the outputs of its interactions."""
        tasks = len(self.tasks)
        own = slice(m * tasks, (m + 1) * tasks)
        logit = full(self.bias[own])  # [tasks], and [B, tasks] with the first of what follows
        if self.weight is not None:
            open_ones = [o for o, done in zip(outputs, self.is_logit, strict=True) if not done]
            logit = logit + full(_projected(open_ones, self.weight[own]))
        for output, done in zip(outputs, self.is_logit, strict=True):
            if done:
                logit = logit + full(output).sum(1, keepdim=True)
        if first is not None:
            logit = logit + first[:, own]
        return {task: logit[:, t] for t, task in enumerate(self.tasks)}

    @torch.no_grad()
    def reorder(self, orders: Mapping[str, Tensor]) -> None:
        """Put the first-order weights of the fields named into a new order of ids, each `[rows]` of old ids."""
        if self.wide is None:
            return
        renumbered = {c.vocabulary: c for c in self.wide.layout.fields if c.name in orders}
        for c in renumbered.values():
            own = self.wide.weight[self.wide.layout.offsets[c.vocabulary] :][: c.rows]
            own.copy_(own[orders[c.name].to(own.device)])

    def table_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that table-wide L2 covers."""
        return {} if self.wide is None else {"wide.weight": self.wide.weight}


WIDE = 512
"""From so many numbers on, an exported graph would take long to turn all of them into double precision."""


def _projected(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """`[B, H_i], [T, Σ H_i] -> [B, T]`."""
    if not torch.compiler.is_exporting():
        return nn.functional.linear(torch.cat(list(parts), 1), weight)
    # A graph need not write them side by side. Slices: it can fold those of a constant. In double precision, for
    # runtimes add up a single column one by one, and the terms, which cancel, are the largest numbers of a model.
    ends = itertools.accumulate(part.shape[1] for part in parts)
    slices = [weight[:, end - p.shape[1] : end] for p, end in zip(parts, ends, strict=True)]
    logits = [_exactly(p, w) for p, w in zip(parts, slices, strict=True)]
    return functools.reduce(torch.add, logits).to(weight.dtype)


def _exactly(part: Tensor, weight: Tensor) -> Tensor:
    """`[B, H], [T, H] -> [B, T]` in double precision; of one task and many numbers, the sums of each 64 of them."""
    if len(weight) > 1 or part.shape[1] < WIDE or part.shape[1] % 64:
        return nn.functional.linear(part.double(), weight.double())
    return (part * weight).view(part.shape[0], -1, 64).sum(2).double().sum(1, keepdim=True)


def first_order(schema: EncodedSchema, outputs: int = 1) -> Table:
    """Return a weight per value of every scalar field and output: `[B, F], [B, F] -> [B, F, outputs]`, to be summed.

    Numeric fields: weight times value.
    """
    return Table(_scalar(schema), dim=outputs)


def full(x: Tensor) -> Tensor:
    """Raise half precision to float32; sums of logits are never taken in less."""
    return x if x.dtype == torch.float64 else x.float()


def _scalar(schema: EncodedSchema) -> EncodedSchema:
    """The schema without its histories; a field that shared a history's vocabulary gets its own first-order rows."""
    names = {f.name for f in schema.fields}
    fields = tuple(f if f.shares in names else replace(f, shares=None) for f in schema.fields)
    return replace(schema, fields=fields, histories=())
