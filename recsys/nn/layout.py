"""Which rows of a fused table each input column reads, and the guard that keeps it inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.contracts import NULL_ID, UNKNOWN_ID, EncodedSchema, Field
from recsys.errors import DataError, did_you_mean, listing


@dataclass(frozen=True)
class Column:
    """One reader of a table: a scalar field, or one column of a history's events.

    Args:
        name: the field's name, or `group.column` for a column of a history.
        rows: ids are valid in `[0, rows)`.
        numeric: a wrong id counts as missing (`NULL_ID`), not as unknown (`UNKNOWN_ID`).
        vocabulary: index of the block of rows that it reads; columns that share one have the same index.
    """

    name: str
    rows: int
    numeric: bool
    vocabulary: int

    @property
    def fallback(self) -> int:
        """The id that stands in for one outside `[0, rows)`."""
        return NULL_ID if self.numeric or self.rows <= UNKNOWN_ID else UNKNOWN_ID


@dataclass(frozen=True)
class Layout:
    """The blocks of a fused table, in order, and the columns that read them.

    Args:
        rows: rows of each vocabulary block.
        fields: the scalar fields.
        histories: group → its columns.
        owners: name of the column whose vocabulary each block holds.
    """

    rows: tuple[int, ...]
    fields: tuple[Column, ...]
    histories: Mapping[str, tuple[Column, ...]]
    owners: tuple[str, ...]

    @classmethod
    def of(cls, schema: EncodedSchema) -> Layout:
        """Lay out a schema: one block per vocabulary, shared ones once.

        Raises:
            DataError: a column shares the vocabulary of a column that does not exist, or of itself.
        """
        named = {f.name: (f.name, f) for f in schema.fields}
        for h in schema.histories:
            for f in h.columns:
                named.setdefault(f.name, (f"{h.name}.{f.name}", f))
        block: dict[str, int] = {}
        rows: list[int] = []

        def column(name: str, f: Field) -> Column:
            owner = _owner(name, f, named)
            index = block.setdefault(owner, len(rows))
            if index == len(rows):
                rows.append(0)
            rows[index] = max(rows[index], f.rows)
            return Column(name, f.rows, f.numeric, index)

        fields = tuple(column(f.name, f) for f in schema.fields)
        histories = {h.name: tuple(column(f"{h.name}.{f.name}", f) for f in h.columns) for h in schema.histories}
        return cls(tuple(rows), fields, histories, tuple(block))

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each vocabulary block."""
        return tuple(sum(self.rows[:i]) for i in range(len(self.rows)))

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every column: the fields, then those of the histories."""
        return self.fields + tuple(c for columns in self.histories.values() for c in columns)


def _owner(name: str, f: Field, named: Mapping[str, tuple[str, Field]]) -> str:
    """Follow `shares` to the column that owns the vocabulary.

    A history's column may bear the name of the field it shares with; the field is then the owner.
    """
    seen = [name]
    while f.shares is not None:
        if f.shares not in named:
            raise DataError(
                f"column '{f.name}' shares the vocabulary of '{f.shares}', which is not a column."
                f"{did_you_mean(f.shares, named)} Columns: {listing(named)}"
            )
        name, f = named[f.shares]
        if name in seen:
            raise DataError(f"columns share each other's vocabulary in a circle: {listing(seen)}")
        seen.append(name)
    return name


class Guard(nn.Module):
    """Replaces ids outside a column's own range, so that a wrong id never reads a neighbour's row."""

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.rows: Tensor
        self.fallback: Tensor
        self.register_buffer("rows", torch.tensor([c.rows for c in columns], dtype=torch.int64), persistent=False)
        fallback = torch.tensor([c.fallback for c in columns], dtype=torch.int64)
        self.register_buffer("fallback", fallback, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`[..., C] -> [..., C]` int64."""
        return torch.where(self.outside(ids), self.fallback, ids)

    def outside(self, ids: Tensor) -> Tensor:
        """`[..., C] -> [..., C]` bool: True where the id is out of range; sum it to count them."""
        return (ids < 0) | (ids >= self.rows)


def scale(e: Tensor, ids: Tensor, values: Tensor | None, schema: EncodedSchema) -> Tensor:
    """Multiply by the numeric values; a missing number is its own row, unscaled. `[B, F, D], [B, F] -> [B, F, D]`.

    Raises:
        ValueError: the schema has numeric fields and `values` is None.
    """
    if values is None:
        if schema.has_numeric:
            raise ValueError("the schema has numeric fields: the embedding needs their values")
        return e
    values = torch.where(ids == NULL_ID, values.new_ones(()), values)
    return e * values.unsqueeze(-1)  # [B, F, 1]


def index_for(x: Tensor, index: Tensor) -> Tensor:
    """The index on the device of what it selects from; where that has no values, as it is."""
    return index if x.is_meta else index.to(x.device)
