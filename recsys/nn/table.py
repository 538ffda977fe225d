"""The fused embedding table: one parameter, one gather, whatever the number of fields."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.nn.compact import CompactTable, RowSource, drops_nothing
from recsys.nn.layout import Column, Guard, Layout, index_for, scale
from recsys.nn.sparse import ElementTable, compact


class Table(nn.Module):
    """One embedding table for all fields and histories.

    e_f = V[offset_f + id_f] · value_f, with V `[N, D]` shared by every field; fields (and history columns) that
    share a vocabulary share its rows. Ids outside a field's range are read as unknown (categorical) or missing
    (numeric), never as the row of another field.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation.
    """

    def __init__(self, schema: EncodedSchema, *, dim: PositiveInt = 16, init_std: NonNegativeFloat = 1e-4) -> None:
        super().__init__()
        self.schema = schema
        self.layout = Layout.of(schema)
        self.fields = Fields(tuple(c.name for c in self.layout.fields), tuple(c.rows for c in self.layout.fields), dim)
        self.weight = nn.Parameter(torch.empty(sum(self.layout.rows), dim))
        nn.init.normal_(self.weight, std=init_std)
        self.reader = Reader(self.layout.fields, self.layout.offsets)
        self.groups = tuple(self.layout.histories)
        self.readers = nn.ModuleList(Reader(c, self.layout.offsets) for c in self.layout.histories.values())

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        rows, safe = self.reader(ids)
        return scale(self._look_up(rows), safe, values, self.schema)  # [B, F, D]

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        rows, _ = self.readers[self.groups.index(group)](ids)
        return self._look_up(rows)

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`."""
        if self.training and self.weight.device.type == "cpu":
            # The same values and the same gradient, bit for bit; but the gradient of `index_select` sorts the rows
            # first, and so walks through the table once, which takes about half the time.
            return self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.weight.shape[1])
        return F.embedding(rows, self.weight)

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`, detached."""
        return self.weight.detach().index_select(0, rows + self.layout.offsets[vocabulary])

    def prune(self, selection: Selection) -> Table | CompactTable | ElementTable:
        """Return the smaller table that gives the same vectors, and exact zeros for what `selection` drops.

        A selection that drops nothing gives a copy of this table.
        """
        if drops_nothing(self.layout, self.fields.dim, selection):
            return copy.deepcopy(self)
        return compact(self.schema, self, selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """`weight [N, D]`."""
        return {"weight": self.weight.detach()}


def pruned_table(schema: EncodedSchema, source: RowSource, selection: Selection) -> Table | CompactTable | ElementTable:
    """Return the smallest table with the rows of `source` and zeros for what `selection` drops; whole if it drops none.

    Args:
        schema: of the inputs.
        source: whose rows are copied.
        selection: what is kept.
    """
    layout, dim = source.layout, source.fields.dim
    if not drops_nothing(layout, dim, selection):
        return compact(schema, source, selection)
    none = source.read(0, torch.zeros(0, dtype=torch.int64))
    device = none.device
    rows = torch.cat([source.read(v, index_for(none, torch.arange(size))) for v, size in enumerate(layout.rows)])
    with torch.random.fork_rng(devices=[]):
        whole = Table(schema, dim=dim)
    whole = whole if device.type == "meta" else whole.to(device)
    whole.weight = nn.Parameter(rows)
    return whole


class Reader(nn.Module):
    """From a column's own ids to rows of the fused table."""

    def __init__(self, columns: tuple[Column, ...], offsets: tuple[int, ...]) -> None:
        super().__init__()
        self.guard = Guard(columns)
        self.offset: Tensor
        first = torch.tensor([offsets[c.vocabulary] for c in columns], dtype=torch.int64)
        self.register_buffer("offset", first, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> rows [..., C], guarded ids [..., C]`."""
        safe: Tensor = self.guard(ids)
        return safe + self.offset, safe
