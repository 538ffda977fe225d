"""Tables whose numbers are stored in fewer bits: halves, or integers of eight bits and a step for each vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.nn.compact import CompactTable, RowSource
from recsys.nn.layout import Layout, index_for, scale
from recsys.nn.reorder import Orders
from recsys.nn.sparse import ElementTable
from recsys.nn.table import Table

Stored = Literal["float32", "float16", "int8"]
"""How numbers are stored."""
NUMBER_BYTES: Mapping[Stored, int] = {"float32": 4, "float16": 2, "int8": 1}
HIGHEST = 127


def step_bytes(layout: Layout, stored: Stored) -> int:
    """Bytes of the steps that a table has beside its numbers."""
    return 4 * len(layout.rows) if stored == "int8" else 0


class QuantizedTable(nn.Module):
    """A table of which the numbers are stored in fewer bits; they can be looked up, and no longer be trained.

    w = q · Δ_v, with q an integer of eight bits and Δ_v = max |w| / 127 the step of the vocabulary v; or w rounded to
    half precision. Rounding is to the nearest, ties to even.

    Args:
        schema: of the inputs.
        table: whose numbers are stored so already; its storage has the type that tells how.
        step: of each vocabulary, `[V]` float32; None for half precision.
    """

    def __init__(self, schema: EncodedSchema, table: CompactTable | ElementTable, step: Tensor | None) -> None:
        super().__init__()
        self.schema, self.layout = schema, table.layout
        self.fields: Fields = table.fields
        self.table: CompactTable | ElementTable = table
        self.table.flat.requires_grad_(False)
        self.step: Tensor | None
        self.register_buffer("step", step)
        self.groups = tuple(self.layout.histories)
        for i, columns in enumerate((self.layout.fields, *self.layout.histories.values())):
            vocabularies = torch.tensor([c.vocabulary for c in columns], dtype=torch.int64)
            self.register_buffer(f"vocabularies_{i}", vocabularies, persistent=False)

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]` float32.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        e, safe = self.table.look_up(ids)
        return scale(self._widened(e, 0), safe, values, self.schema)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]` float32."""
        return self._widened(self.table.look_up(ids, group)[0], 1 + self.groups.index(group))

    def _widened(self, e: Tensor, part: int) -> Tensor:
        """`[..., C, D]` of any type to float32."""
        if self.step is None:
            return e.float()
        return e.float() * self.step.index_select(0, self.get_buffer(f"vocabularies_{part}")).unsqueeze(-1)

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]` float32, zeros where nothing is stored."""
        found = self.table.read(vocabulary, rows).float()
        return found if self.step is None else found * self.step[vocabulary]

    def prune(self, selection: Selection) -> QuantizedTable:
        """Return a smaller table still; what is gone stays gone."""
        return QuantizedTable(self.schema, self.table.prune(selection), self.step)

    def row_order(self) -> Orders:
        """As of the table."""
        return self.table.row_order()

    def reordered(self, orders: Orders) -> tuple[QuantizedTable, Selection]:
        """As of the table."""
        table, selection = self.table.reordered(orders)
        return QuantizedTable(self.schema, table, self.step), selection

    def export_tables(self) -> Mapping[str, Tensor]:
        """Those of the table, and the steps."""
        tables = self.table.export_tables()
        return tables if self.step is None else {**tables, "step": self.step}


class _Codes:
    """The numbers of a table as they are stored."""

    def __init__(self, source: RowSource, stored: Stored, step: Tensor) -> None:
        self.layout: Layout = source.layout
        self.fields: Fields = source.fields
        self._source, self._stored, self._step = source, stored, step

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`."""
        found = self._source.read(vocabulary, rows)
        if self._stored == "float16":
            return found.to(torch.float16)
        return (found / self._step[vocabulary]).round().clamp(-HIGHEST, HIGHEST).to(torch.int8)


def quantized(schema: EncodedSchema, table: Table | CompactTable | ElementTable, stored: Stored) -> QuantizedTable:
    """Return the numbers of a table, as evaluation shows them, in fewer bits.

    Args:
        schema: of the inputs.
        table: whole or pruned.
        stored: float16 or int8.
    """
    layout = table.layout
    tops = []
    for v, size in enumerate(layout.rows):
        none = table.read(v, torch.zeros(0, dtype=torch.int64))
        found = table.read(v, index_for(none, torch.arange(size)))
        tops.append(found.abs().max().float() if found.numel() else found.new_zeros((), dtype=torch.float32))
    top = torch.stack(tops)
    step = torch.where(top > 0, top / HIGHEST, 1.0)
    codes = _Codes(table, stored, step)
    if isinstance(table, Table):
        small: CompactTable | ElementTable = CompactTable(schema, codes, Selection(table.fields.names))
    else:
        _, selection = table.reordered((None,) * len(layout.rows))
        small = type(table)(schema, codes, selection)
    return QuantizedTable(schema, small, step if stored == "int8" else None)
