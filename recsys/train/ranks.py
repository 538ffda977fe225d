"""Rows ranked by score inside their group; what depends on the order of equal scores is averaged over all orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Discount = Literal["rank_plus_one", "rank"]
"""1/log2(rank + 1), or 1/log2(rank) and 1 for the first."""


@dataclass(frozen=True)
class Ranks:
    """N rows sorted by group, then by falling score; rows of a group with equal scores are one tie.

    A place is counted from 0 in its group. A tie takes as many places as it has rows, and each of its rows is as
    likely to stand on one as on another.

    Args:
        order: `[N]` number of the row that was sorted to here.
        group: `[N]` number of its group, in `[0, groups)`, never falling.
        tie: `[N]` number of its tie, in `[0, ties)`, never falling.
        first: `[ties]` the first place of a tie.
        size: `[ties]` its rows.
        owner: `[ties]` its group.
    """

    order: Tensor
    group: Tensor
    tie: Tensor
    first: Tensor
    size: Tensor
    owner: Tensor

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.group[-1]) + 1 if len(self.group) else 0

    @property
    def inside(self) -> Tensor:
        """`[N]` how many places of its tie come before this one."""
        start = self.size.cumsum(0) - self.size
        return torch.arange(len(self.tie), device=self.tie.device) - start[self.tie]

    @property
    def place(self) -> Tensor:
        """`[N]` the places, from 0 in every group."""
        return self.first[self.tie] + self.inside

    def per_tie(self, x: Tensor) -> Tensor:
        """Sum over the rows of each tie, `[N] -> [ties]`; x in the order of the rows before they were sorted."""
        return x.new_zeros(len(self.size)).index_add_(0, self.tie, x[self.order])

    def per_group(self, x: Tensor) -> Tensor:
        """Sum over the places of each group, `[N] -> [groups]`; x in the sorted order."""
        return x.new_zeros(self.groups).index_add_(0, self.group, x)


def rank_rows(score: Tensor, group: Tensor, *also: Tensor) -> Ranks:
    """Sort rows by group, then by falling score, `[N], [N] int64`.

    Args:
        score: larger is nearer to the top.
        group: of each row.
        also: numbers of the rows, `[N]` each; ties are summed in the order of these, so that sums of equal rows are
            equal to the last bit, however the rows were ordered.
    """
    order = torch.arange(len(score), device=score.device)
    for key in (*also, -score, group):
        order = order[torch.argsort(key[order], stable=True)]
    group, score = group[order], score[order]
    new_group = torch.ones(len(order), dtype=torch.bool, device=order.device)
    new_group[1:] = group[1:] != group[:-1]
    new_tie = new_group.clone()
    new_tie[1:] |= score[1:] != score[:-1]
    member, tie = new_group.long().cumsum(0) - 1, new_tie.long().cumsum(0) - 1
    size = torch.bincount(tie) if len(tie) else tie
    owner = member[new_tie]
    start = size.cumsum(0) - size  # [ties], among all rows
    group_start = new_group.nonzero().flatten()
    return Ranks(order, member, tie, start - group_start[owner], size, owner)


def discounts(place: Tensor, discount: Discount, k: int | None) -> Tensor:
    """What a gain at each place (from 0) counts, `[N] int64 -> [N] float64`; nothing from place k on."""
    rank_ = (place + (2 if discount == "rank_plus_one" else 1)).clamp(min=2).double()
    return torch.where(place < (k or torch.iinfo(torch.int64).max), 1 / torch.log2(rank_), 0.0)
