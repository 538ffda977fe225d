"""Unified embedding: all fields read chunks of rows of one table, found by a hash, whatever the vocabularies hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Addressed,
    Column,
    Component,
    EncodedSchema,
    Layout,
    RecipeError,
    Selection,
    column_groups,
    hash_text,
    hookimpl,
    mix,
)

SPREAD = 0.05
"""Initial weights are uniform in ±SPREAD."""
LARGEST = 1 << 40
"""A vocabulary of more ids than this was never counted: its ids are hashes of the raw values."""
_POSITIVE = (1 << 63) - 1
_COLUMN_BYTES = 33
"""What a column's constants take beside eight bytes for each chunk."""


def signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return x - (1 << 64) if x >> 63 else x


def splitmix(x: Tensor) -> Tensor:
    """The bits of `recsys.api.mix` for every element, `[...] -> [...]` int64; products overflow as they should."""
    z = x + signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """The logical shift to the right; that of int64 brings copies of the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def salt(name: str, chunk: int) -> int:
    """What makes a chunk of a vocabulary hash apart from all others; only its name and number count."""
    return signed(mix(hash_text(name) ^ mix(chunk)))


@dataclass(frozen=True)
class Block:
    """Rows of one vocabulary: hashed into `[first, first + count)`, or `chunks` for each id from `first` on."""

    first: int
    count: int
    own: bool


class Hashed(nn.Module):
    """From ids to C rows each: first + (splitmix(id ⊕ salt) & (2^63 − 1)) mod count.

    Args:
        columns: of the ids.
        layout: of all columns.
        blocks: of each vocabulary.
        chunks: C.
        sign: multiply each row by ±1, by the bit of the hash that the row does not depend on.
    """

    def __init__(
        self, columns: Sequence[Column], layout: Layout, blocks: Sequence[Block], chunks: int, sign: bool
    ) -> None:
        super().__init__()
        self.columns, self.layout, self.blocks, self.chunks, self.sign = columns, layout, blocks, chunks, sign
        mine = [blocks[c.vocabulary] for c in columns]
        salts = [[salt(layout.owners[c.vocabulary], k) for k in range(chunks)] for c in columns]
        self.salt: Tensor
        self.first: Tensor
        self.count: Tensor
        self.own: Tensor
        self.register_buffer("salt", torch.tensor(salts, dtype=torch.int64).view(-1, chunks), persistent=False)
        for name, values in {"first": [b.first for b in mine], "count": [b.count for b in mine]}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        self.register_buffer("own", torch.tensor([b.own for b in mine], dtype=torch.bool), persistent=False)
        self.some_own = any(b.own for b in mine)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[..., C] -> rows [..., C, P], signs [..., C, P]`, P chunks."""
        mixed = splitmix(ids.unsqueeze(-1) ^ self.salt)
        place = (mixed & _POSITIVE) % self.count.unsqueeze(-1)
        flip = mixed < 0 if self.sign else None
        if self.some_own:
            own = self.own.unsqueeze(-1)
            place = torch.where(own, ids.unsqueeze(-1) * self.chunks + self._numbers(), place)
            flip = None if flip is None else flip & ~own
        return self.first.unsqueeze(-1) + place, flip

    def join(self, rows: Tensor, extra: Tensor | None) -> Tensor:
        """`[..., C, P, d] -> [..., C, P · d]`."""
        rows = rows if extra is None else torch.where(extra.unsqueeze(-1), -rows, rows)
        return rows.flatten(-2)

    def split(self, mask: Tensor) -> Tensor:
        """`[..., P · d] -> [..., P, d]`."""
        return mask.reshape(*mask.shape[:-1], self.chunks, -1)

    def alone(self, column: int) -> Hashed:
        """The addresses of one of the columns."""
        return Hashed(self.columns[column : column + 1], self.layout, self.blocks, self.chunks, self.sign)

    def span(self, column: int) -> tuple[int, int]:
        """First and last row, plus one, that a column can use."""
        block = self.blocks[self.columns[column].vocabulary]
        return block.first, block.first + block.count

    def _numbers(self) -> Tensor:
        return torch.arange(self.chunks, device=self.salt.device)


class Unified(nn.Module):
    """One table without vocabularies, of which every field reads chunks that a hash of the id finds.

    e_f = [E[h_f1(id)]; …; E[h_fC(id)]] · value_f, with E `[M, D / C]` and h_fc(id) = hash of (field, c, id) mod M. The
    hash knows a field by the name of the column that owns its vocabulary: columns that share one share rows, and other
    fields change nothing. Ids may be hashes themselves (`hash_buckets` up to 2^62); values that training never saw
    then have vectors too. Numeric fields have rows of their own. `prune` drops rows that no kept id uses, too.

    Coleman et al., "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems", NeurIPS 2023,
    arXiv 2305.12102.

    Args:
        dim: embedding dimension D.
        chunks: C, rows that make a vector.
        rows: M; the table has rows × dim / chunks numbers.
        budget: instead of rows: share of the bytes of a table with D numbers for every id; constants count too.
        sign: multiply every row by ±1, by another bit of its hash.
        small: vocabularies of at most so many ids have rows of their own, without collisions.
        private: give each vocabulary a part of the rows, in proportion to its ids, to compare with.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        chunks: PositiveInt = 2,
        rows: PositiveInt | None = None,
        budget: PositiveFloat | None = None,
        sign: bool = False,
        small: NonNegativeInt = 0,
        private: bool = False,
    ) -> None:
        super().__init__()
        if dim % chunks:
            raise RecipeError(f"dim {dim} cannot be cut into {chunks} chunks of equal width")
        if (rows is None) == (budget is None):
            raise RecipeError(
                "give `rows`, the size of the table, or `budget`, its share of the full table: one of them"
            )
        layout = Layout.of(schema)
        own = _own(layout, small)
        if rows is None:
            rows = _affordable(layout, own, dim, chunks, budget or 0.0)
        blocks, total = _blocks(layout, own, rows, chunks, private)
        addresses = [Hashed(columns, layout, blocks, chunks, sign) for columns in column_groups(layout)]
        weight = nn.init.uniform_(torch.empty(total, dim // chunks), -SPREAD, SPREAD)
        self.table = Addressed(schema, dim, addresses, weight)
        self.fields = self.table.fields

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`."""
        e: Tensor = self.table(ids, values)
        return e

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self.table.history(group, ids)

    def prune(self, selection: Selection) -> Addressed:
        """Return the smaller table that gives the same vectors, and exact zeros for what `selection` drops."""
        return self.table.prune(selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The table, and the constants of every column."""
        return self.table.export_tables()


def _own(layout: Layout, small: int) -> list[bool]:
    """Which vocabularies have rows of their own."""
    numeric = {c.vocabulary for c in layout.columns if c.numeric}
    return [v in numeric or size <= small for v, size in enumerate(layout.rows)]


def _affordable(layout: Layout, own: Sequence[bool], dim: int, chunks: int, budget: float) -> int:
    """The rows M that leave all bytes within `budget · 4 N D`.

    Raises:
        RecipeError: the vocabularies are not counted, or not one row is left.
    """
    for size, name in zip(layout.rows, layout.owners, strict=True):
        if size > LARGEST:
            raise RecipeError(
                f"budget is a share of a table with a row for every id, and '{name}' has {size:,} ids, whose values "
                "were never counted; give `rows` instead"
            )
    full = 4 * dim * sum(layout.rows)
    kept = sum(size for size, mine in zip(layout.rows, own, strict=True) if mine) * 4 * dim
    constants = len(layout.columns) * (_COLUMN_BYTES + 8 * chunks)
    row = 4 * (dim // chunks)
    rows = floor((budget * full - kept - constants) / row)
    if rows < 1:
        least = kept + constants + row
        raise RecipeError(
            f"budget {budget:g} is {floor(budget * full):,} bytes of the full table's {full:,}; rows of their own take "
            f"{kept:,}, constants {constants:,}: the least possible budget is {least / full:.3g}"
        )
    return rows


def _blocks(layout: Layout, own: Sequence[bool], rows: int, chunks: int, private: bool) -> tuple[list[Block], int]:
    """The block of every vocabulary, and the rows in all: the hashed ones first, so that no other field moves them."""
    hashed = [size for size, mine in zip(layout.rows, own, strict=True) if not mine]
    parts = iter(_shares(hashed, rows) if private else [rows] * len(hashed))
    blocks, shared, next_own = [], 0, rows if hashed else 0
    for size, mine in zip(layout.rows, own, strict=True):
        if mine:
            blocks.append(Block(next_own, size * chunks, True))
            next_own += size * chunks
        else:
            blocks.append(Block(shared, next(parts), False))
            shared += blocks[-1].count if private else 0
    return blocks, next_own


def _shares(sizes: Sequence[int], rows: int) -> list[int]:
    """Rows in proportion to sizes, at least one each, `rows` in all; what is left over goes to the largest remainders.

    Raises:
        RecipeError: there are more vocabularies than rows.
    """
    if rows < len(sizes):
        raise RecipeError(f"private tables for {len(sizes)} vocabularies need at least as many rows, not {rows:,}")
    total, spare = sum(sizes), rows - len(sizes)
    parts = [spare * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda v: -(spare * sizes[v] % total))
    for v in order[: spare - sum(parts)]:
        parts[v] += 1
    return [1 + part for part in parts]


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding."""
    return [Component("embedding", "unified", Unified)]
