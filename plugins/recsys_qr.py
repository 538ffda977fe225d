"""Compositional embeddings: the vector of a value is a product, or a sum, of two rows that few values share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isqrt
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
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
    hookimpl,
)

LARGEST = 1 << 40
"""A vocabulary of more ids than this was never counted, and two tables of the root of it are no small ones."""
_COLUMN_BYTES = 49
"""What a column's constants take."""


@dataclass(frozen=True)
class Block:
    """Rows of one vocabulary: `quotients` from `first` on, then `remainders`; or one for each id.

    Args:
        first: first row.
        quotients: q = ⌈n / m⌉; n, where each id has a row.
        remainders: m; 0, where each id has a row.
    """

    first: int
    quotients: int
    remainders: int

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.quotients + self.remainders


class Codes(nn.Module):
    """From ids to two rows each, unique as a pair: remainder r = id mod m, and (⌊id / m⌋ + r) mod q.

    With the bare quotient the m most frequent ids, which have the lowest numbers, would share one row. Turned by the
    remainder, they are spread over all of them; for each remainder it is a permutation, so the pair stays unique.
    """

    def __init__(self, columns: Sequence[Column], blocks: Sequence[Block], multiply: bool) -> None:
        super().__init__()
        self.columns, self.blocks, self.multiply = columns, blocks, multiply
        mine = [blocks[c.vocabulary] for c in columns]
        self.first: Tensor
        self.second: Tensor
        self.quotients: Tensor
        self.remainders: Tensor
        self.composed: Tensor
        ints = {
            "first": [b.first for b in mine],
            "second": [b.first + b.quotients for b in mine],
            "quotients": [b.quotients for b in mine],
            "remainders": [max(b.remainders, 1) for b in mine],
        }
        for name, values in ints.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        composed = torch.tensor([b.remainders > 0 for b in mine], dtype=torch.bool)
        self.register_buffer("composed", composed, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[..., C] -> [..., C, 2]`; both rows are the same where each id has one of its own."""
        remainder = ids % self.remainders
        row = self.first + (ids // self.remainders + remainder) % self.quotients
        return torch.stack([row, torch.where(self.composed, self.second + remainder, row)], -1), None

    def join(self, rows: Tensor, extra: Tensor | None) -> Tensor:
        """`[..., C, 2, D] -> [..., C, D]`."""
        one, other = rows.unbind(-2)
        both = one * other if self.multiply else one + other
        return torch.where(self.composed.unsqueeze(-1), both, one)

    def split(self, mask: Tensor) -> Tensor:
        """`[..., D] -> [..., 2, D]`."""
        return torch.stack([mask, mask], -2)

    def alone(self, column: int) -> Codes:
        """The addresses of one of the columns."""
        return Codes(self.columns[column : column + 1], self.blocks, self.multiply)

    def span(self, column: int) -> tuple[int, int]:
        """First and last row, plus one, that a column can use."""
        block = self.blocks[self.columns[column].vocabulary]
        return block.first, block.first + block.rows


class QR(nn.Module):
    """Two small tables for each vocabulary; a vector is the product, or the sum, of a row of each.

    e_f = Q_f[(⌊id / m⌋ + r) mod q] ⊙ R_f[r] · value_f, with r = id mod m and q = ⌈n_f / m⌉: no two ids have both rows
    in common. Vocabularies that q + m rows would not shrink have a row for each id. The initial weights are symmetric
    about zero in both tables, with such a spread that vectors have the standard deviation `init_std`.

    Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
    KDD 2020, arXiv 1909.02107.

    Args:
        dim: embedding dimension D.
        op: how the two rows are put together: mul or add.
        collisions: m, the number of remainders.
        budget: instead of collisions: share of the bytes of a table with a row for every id; the least m that meets it.
        init_std: standard deviation of the initial vectors.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        op: Literal["mul", "add"] = "mul",
        collisions: PositiveInt | None = None,
        budget: PositiveFloat | None = None,
        init_std: NonNegativeFloat = 1e-4,
    ) -> None:
        super().__init__()
        if (collisions is None) == (budget is None):
            raise RecipeError("give `collisions`, the ids that share a row, or `budget`, the share of the full table")
        layout = Layout.of(schema)
        _refuse_hashes(layout)
        blocks = _blocks(layout.rows, collisions or _affordable(layout, dim, budget or 0.0))
        addresses = [Codes(columns, blocks, op == "mul") for columns in column_groups(layout)]
        composed_std = init_std**0.5 if op == "mul" else init_std / 2**0.5
        weight = torch.empty(sum(b.rows for b in blocks), dim)
        for block in blocks:
            part = weight[block.first : block.first + block.rows]
            nn.init.normal_(part, std=composed_std if block.remainders else init_std)
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
        """Return the smaller one that gives the same vectors, and exact zeros for what `selection` drops."""
        return self.table.prune(selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """All tables as one, and the constants of every column."""
        return self.table.export_tables()


def _refuse_hashes(layout: Layout) -> None:
    for size, name in zip(layout.rows, layout.owners, strict=True):
        if size > LARGEST:
            raise RecipeError(
                f"'{name}' has {size:,} ids; two tables for them have {2 * isqrt(size):,} rows at least. Give it a "
                "vocabulary or fewer hash_buckets, or take an embedding that hashes"
            )


def _blocks(sizes: Sequence[int], collisions: int) -> list[Block]:
    blocks, first = [], 0
    for size in sizes:
        quotients = -(-size // collisions)
        shrinks = quotients + collisions < size
        blocks.append(Block(first, quotients, collisions) if shrinks else Block(first, size, 0))
        first += blocks[-1].rows
    return blocks


def _affordable(layout: Layout, dim: int, budget: float) -> int:
    """The least m with 4 D Σ_f min(n_f, ⌈n_f / m⌉ + m) and the constants within `budget · 4 N D` bytes.

    The sum is no monotone function of m: small vocabularies are whole again where m is large. So all m are tried up to
    the root of the largest vocabulary, after which no term falls.

    Raises:
        RecipeError: there is none.
    """
    full = 4 * dim * sum(layout.rows)
    constants = _COLUMN_BYTES * len(layout.columns)
    m = np.arange(1, isqrt(max(layout.rows)) + 2)
    rows = np.zeros(len(m), np.int64)
    for size in layout.rows:
        rows += np.minimum(size, -(-size // m) + m)
    needed = rows * (4 * dim) + constants
    if not (needed <= budget * full).any():
        least = int(needed.min())
        raise RecipeError(
            f"budget {budget:g} is {floor(budget * full):,} bytes of the full table's {full:,}; with "
            f"{m[needed.argmin()]:,} remainders two tables for each vocabulary still take {least:,}: "
            f"the least possible budget is {least / full:.3g}"
        )
    return int(m[(needed <= budget * full).argmax()])


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding."""
    return [Component("embedding", "qr", QR)]
