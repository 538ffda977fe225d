"""Embeddings whose rows are found by a computation: a vector is a fixed function of P rows of one matrix."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.nn.kept import Keep, Kept, Rank, kept_columns, places, widen
from recsys.nn.layout import Column, Guard, Layout, scale

CLOSED = 1 << 31
"""Vocabularies of at most this many ids are walked through for the rows that they use."""
_BLOCK = 1 << 18
"""Ids looked at at once."""


class Address(Protocol):
    """Which rows of the matrix make a vector, for some columns; a `torch.nn.Module`."""

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows, and what else `join` needs to know of the ids: `[..., C] -> [..., C, P]`; ids are within range."""
        ...

    def join(self, rows: Tensor, extra: Tensor | None) -> Tensor:
        """`[..., C, P, d] -> [..., C, D]`."""
        ...

    def split(self, mask: Tensor) -> Tensor:
        """Which numbers of the P rows the numbers of a vector come from, `[..., D] -> [..., P, d]` bool."""
        ...

    def alone(self, column: int) -> Address:
        """The addresses of one of the columns."""
        ...

    def span(self, column: int) -> tuple[int, int]:
        """First and last row, plus one, that a column can use."""
        ...


class Addressed(nn.Module):
    """An embedding for all fields and histories over one matrix `[R, d]`, with rows found by `addresses`.

    Args:
        schema: of the inputs.
        dim: D.
        addresses: of the fields, then of each history.
        weight: the matrix, or what is left of it.
        kept: what each column keeps; the fields first, then the histories' columns.
        rank: which rows of the matrix are left.
        numbers: which of the d numbers of a row are left.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        dim: int,
        addresses: Sequence[Address],
        weight: Tensor,
        kept: Sequence[Kept] | None = None,
        rank: Rank | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.layout = schema, Layout.of(schema)
        self.fields = Fields(tuple(c.name for c in self.layout.fields), tuple(c.rows for c in self.layout.fields), dim)
        self.addresses = nn.ModuleList(cast("Sequence[nn.Module]", addresses))
        self.weight = nn.Parameter(weight)
        self.rank = rank
        self.rows = weight.shape[0]
        """R, rows that were gone from the start included."""
        self.width = weight.shape[1] if numbers is None else numbers.shape[0]
        self.place: Tensor | None
        cut = numbers is not None and not bool(numbers.all())
        self.register_buffer("place", places(cast("Tensor", numbers)) if cut else None, persistent=False)
        self.groups = tuple(self.layout.histories)
        whole = [Kept(torch.ones(dim, dtype=torch.bool, device="cpu"))] * len(self.layout.columns)
        self.kept: list[Kept] = whole if kept is None else list(kept)
        parts, first = column_groups(self.layout), 0
        self.guards, self.keeps = nn.ModuleList(), nn.ModuleList()
        for columns in parts:
            self.guards.append(Guard(columns))
            self.keeps.append(Keep(columns, self.kept[first : first + len(columns)]))
            first += len(columns)

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        e, safe = self._vectors(0, ids)
        return scale(e, safe, values, self.schema)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self._vectors(1 + self.groups.index(group), ids)[0]

    def _vectors(self, part: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> e [..., C, D], guarded ids [..., C]`."""
        safe = self.guards[part](ids)
        address = cast(Address, self.addresses[part])
        rows, extra = address(safe)
        return self.keeps[part](address.join(self._look_up(rows), extra), safe), safe

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[...] -> [..., d]`, zeros for the numbers that are gone."""
        rows = rows if self.rank is None else self.rank(rows)
        if self.training and self.weight.device.type == "cpu":  # as in Table: half the time, the same bits
            e = self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.weight.shape[1])
        else:
            e = F.embedding(rows, self.weight)
        return e if self.place is None else widen(e, self.place)

    def prune(self, selection: Selection) -> Addressed:
        """Return one that gives the same vectors, and exact zeros for what `selection` drops.

        Rows that no kept id of a closed vocabulary uses are gone, and numbers that no column keeps. What is gone from
        this one stays gone.
        """
        found = kept_columns(self.layout, self.fields.dim, selection)
        kept = [old.meet(new) for old, new in zip(self.kept, found, strict=True)]
        addresses = [cast(Address, copy.deepcopy(address).cpu()) for address in self.addresses]
        size = self.rows if self.rank is None else self.rank.size
        used, numbers = _used(self.layout, addresses, kept, size, self.width)
        if not bool(numbers.any()):
            numbers[0] = True  # a matrix without numbers cannot be read
        rank = Rank(used, self.weight.element_size() * int(numbers.sum()))
        if rank.whole and all(k.whole for k in kept):
            return copy.deepcopy(self)
        with torch.no_grad():
            device = self.weight.device
            weight = torch.cat([self._look_up(rows.to(device)) for rows in torch.split(rank.kept, _BLOCK)])
            weight = weight.index_select(1, numbers.nonzero().squeeze(1).to(device))
        cut = Addressed(self.schema, self.fields.dim, addresses, weight, kept, rank, numbers)
        # Without weights there is no device to be on: the constants are as ever.
        return (cut if device.type == "meta" else cut.to(device)).train(self.training)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The matrix, and every constant that finds its rows or says what is gone."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


def column_groups(layout: Layout) -> list[tuple[Column, ...]]:
    """The columns that are looked up together: the fields, then those of each history."""
    return [layout.fields, *layout.histories.values()]


def _used(
    layout: Layout, addresses: Sequence[Address], kept: Sequence[Kept], size: int, width: int
) -> tuple[Tensor, Tensor]:
    """The rows `[R]` and the numbers `[d]` of the matrix that anything kept comes from."""
    rows, numbers = torch.zeros(size, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
    columns = [(group, at) for group, part in enumerate(column_groups(layout)) for at in range(len(part))]
    for column, own, (group, at) in zip(layout.columns, kept, columns, strict=True):
        parts = addresses[group].split(own.dims)  # [P, d]
        if not bool(parts.any()):
            continue
        numbers |= parts.any(0)
        first, stop = addresses[group].span(at)
        if column.rows > CLOSED:
            rows[first:stop] = True
            continue
        address = addresses[group].alone(at)
        for low in range(0, column.rows, _BLOCK):
            high = min(low + _BLOCK, column.rows)
            found = address(torch.arange(low, high).unsqueeze(1))[0].squeeze(1)  # [n, P]
            rows[found[address.split(own.numbers(low, high)).any(2)]] = True
            if bool(rows[first:stop].all()):
                break
    return rows, numbers
