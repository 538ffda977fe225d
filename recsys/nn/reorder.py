"""The ids of a pruned model in another order, in which what is kept comes first: then nothing has to map ids to rows.

Only the vocabularies say which id a raw value has, so whoever renumbers a model must renumber them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys.contracts import FIRST_ID, Batch, Fields
from recsys.nn.layout import Layout

if TYPE_CHECKING:
    from recsys.nn.compact import RowSource

Orders = tuple[Tensor | None, ...]
"""For every vocabulary of a layout its old ids, `[rows]` int64, in their new order; None where they stay."""


def kept_first(layout: Layout, kept: Sequence[Tensor], *, narrow: bool = False) -> Orders:
    """Return the order of ids that puts first what is kept.

    What more of the columns keep stands before what fewer keep, so that each column keeps a prefix wherever one keeps
    all that the next one does. Among equals the old order stays. Missing and unknown keep their ids. Vocabularies that
    columns read to different lengths stay as they are.

    Args:
        layout: of the columns.
        kept: for every column of the layout, what it keeps, `[rows]` or `[rows, D]` bool.
        narrow: dimensions are gone too, of which `kept` does not tell.
    """
    orders: list[Tensor | None] = []
    for v, size in enumerate(layout.rows):
        masks = [m for c, m in zip(layout.columns, kept, strict=True) if c.vocabulary == v]
        if any(len(m) != size for m in masks):
            orders.append(None)
            continue
        votes = torch.stack([m.view(size, -1).any(1).long() for m in masks]).sum(0)
        votes[:FIRST_ID] = len(masks) + 1
        orders.append(votes.argsort(descending=True, stable=True))
    # With zeros for the missing and the unknown value nothing may be gone any more: that is no smaller table.
    whole = not narrow and all(bool(m.all()) for m in moved(layout, tuple(orders), kept))
    return (None,) * len(orders) if whole else tuple(orders)


def moved(layout: Layout, orders: Orders, kept: Sequence[Tensor]) -> list[Tensor]:
    """Return what every column keeps, in the new order.

    Where no column of a renumbered vocabulary keeps the missing or the unknown value, but some keep others, they keep
    it from now on, and a zero is stored for it: those two cannot move, and a gap would need a map for all ids.

    Args:
        layout: of the columns.
        orders: the new order.
        kept: for every column of the layout, what it keeps in the old order, `[rows]` or `[rows, D]` bool.
    """
    masks = [m.clone() for m in kept]
    for v, order in enumerate(orders):
        readers = [i for i, c in enumerate(layout.columns) if c.vocabulary == v]
        if order is None:
            continue
        for i in readers:
            masks[i] = masks[i][order]
        for reserved in range(min(FIRST_ID, len(order))):
            if not any(bool(masks[i][reserved].any()) for i in readers):
                for i in readers:
                    masks[i][reserved] = masks[i].any(0)
    return masks


class Reordered:
    """A source of rows in the new order."""

    def __init__(self, source: RowSource, orders: Orders) -> None:
        self.layout: Layout = source.layout
        self.fields: Fields = source.fields
        self._source, self._orders = source, orders

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`."""
        order = self._orders[vocabulary]
        return self._source.read(vocabulary, rows if order is None else order.to(rows.device)[rows])


def by_column(layout: Layout, orders: Orders) -> dict[str, Tensor]:
    """Return the order of the ids of every column that is renumbered."""
    found = ((c.name, orders[c.vocabulary]) for c in layout.columns)
    return {name: order for name, order in found if order is not None}


def renumbered(batch: Batch, layout: Layout, orders: Orders) -> Batch:
    """Return the batch with the new ids; its ids must be within the columns' rows."""
    new = {name: order.argsort() for name, order in by_column(layout, orders).items()}

    def move(ids: Tensor, names: Sequence[str]) -> Tensor:
        parts = [new[n].to(ids.device)[ids[..., i]] if n in new else ids[..., i] for i, n in enumerate(names)]
        return torch.stack(parts, -1) if parts else ids

    history: Mapping[str, tuple[Tensor, Tensor]] = {
        group: (move(ids, [c.name for c in layout.histories[group]]), length)
        for group, (ids, length) in batch.history.items()
    }
    return replace(batch, ids=move(batch.ids, [c.name for c in layout.fields]), history=history)
