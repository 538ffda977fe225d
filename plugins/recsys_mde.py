"""Mixed-dimension embeddings: the larger a vocabulary, the fewer numbers for each of its values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import floor, log2
from typing import Any, TypeVar, cast

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import (
    Column,
    Component,
    EncodedSchema,
    Fields,
    Guard,
    Keep,
    Layout,
    Rank,
    RecipeError,
    Selection,
    column_groups,
    hookimpl,
    kept_columns,
    places,
    scale,
    widen,
)

LARGEST = 1 << 40
"""A vocabulary of more ids than this was never counted; every id has a row here."""
_COLUMN_BYTES = 48
"""What a column's constants take."""

M = TypeVar("M", bound=nn.Module)


class Width(nn.Module):
    """The table of all vocabularies of one width w, and their projections to D dimensions.

    Args:
        weight: `[R, w]`, or the rows that are left.
        projection: `[V, w, D]`, or what is left of it; None where w is D.
        rank: which rows are left.
        slot: for each of the V vocabularies its matrix; None if none is gone.
        place: for each of the D dimensions where it is stored, by `places`; None if none is gone.
    """

    def __init__(
        self,
        weight: Tensor,
        projection: Tensor | None,
        rank: Rank | None = None,
        slot: Tensor | None = None,
        place: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.projection = None if projection is None else nn.Parameter(projection)
        self.rank = rank
        self.slot: Tensor | None
        self.place: Tensor | None
        self.register_buffer("slot", slot, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def forward(self, rows: Tensor, vocabulary: Tensor) -> Tensor:
        """`[..., C], [C] -> [..., C, D]`."""
        e = self._look_up(rows)
        if self.projection is not None:
            which = vocabulary if self.slot is None else self.slot.index_select(0, vocabulary)
            e = torch.einsum("...cw,cwd->...cd", e, self.projection.index_select(0, which))
        return e if self.place is None else widen(e, self.place)

    def cut(self, used: Tensor, vocabularies: Tensor, dims: Tensor) -> Width:
        """Only these rows `[R]`, vocabularies `[V]` and dimensions `[D]`; each at least once.

        Rows, vocabularies and dimensions are numbered as at the start, whatever is gone already.
        """
        device = self.weight.device
        vocabularies[0] |= not bool(vocabularies.any())
        dims[0] |= not bool(dims.any())
        narrow = self.projection is not None
        rank = Rank(used, 4 * (self.weight.shape[1] if narrow else int(dims.sum())))
        with torch.no_grad():
            weight = self._look_up(rank.kept.to(device))
            if self.projection is None:
                weight = self._cut_dims(weight, dims)
                return _on(Width(weight, None, rank, None, None if dims.all() else places(dims)), device)
            which = vocabularies.nonzero().squeeze(1).to(device)
            which = which if self.slot is None else self.slot.index_select(0, which)
            projection = self._cut_dims(self.projection.index_select(0, which), dims)
        slot = None if vocabularies.all() else places(vocabularies).clamp(max=len(which) - 1)
        return _on(Width(weight, projection, rank, slot, None if dims.all() else places(dims)), device)

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[...] -> [..., w]`."""
        rows = rows if self.rank is None else self.rank(rows)
        if self.training and self.weight.device.type == "cpu":  # the same bits as F.embedding in half the time
            return self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.weight.shape[1])
        return F.embedding(rows, self.weight)

    def _cut_dims(self, x: Tensor, dims: Tensor) -> Tensor:
        wide = x if self.place is None else widen(x, self.place)
        return wide.index_select(-1, dims.nonzero().squeeze(1).to(x.device))


def _on(module: M, device: torch.device) -> M:
    """The module on a device; one without weights as it is, for its constants have values."""
    return module if device.type == "meta" else module.to(device)


class Where(nn.Module):
    """Which of some columns have a width, and where their rows begin.

    Args:
        columns: all columns that are looked up together.
        vocabularies: those of the width, in the order of its table.
        firsts: first row of each vocabulary in its table.
    """

    def __init__(self, columns: Sequence[Column], vocabularies: Sequence[int], firsts: Sequence[int]) -> None:
        super().__init__()
        self.columns = [k for k, c in enumerate(columns) if c.vocabulary in vocabularies]
        mine = [columns[k].vocabulary for k in self.columns]
        self.at: Tensor
        self.first: Tensor
        self.vocabulary: Tensor
        ints = {
            "at": self.columns,
            "first": [firsts[v] for v in mine],
            "vocabulary": [vocabularies.index(v) for v in mine],
        }
        for name, values in ints.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """All columns' ids to the rows of those with this width, `[..., C] -> [..., C_w]`."""
        return ids.index_select(-1, self.at) + self.first


class Mixed(nn.Module):
    """Vectors of D dimensions from tables of several widths; one look-up for each width, whatever the fields.

    Args:
        schema: of the inputs.
        widths: of each vocabulary.
        tables: width → its table.
        dim: D.
        kept: what each column keeps; everything by default.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        widths: Sequence[int],
        tables: Mapping[int, Width],
        dim: int,
        kept: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.layout, self.widths = schema, Layout.of(schema), tuple(widths)
        self.fields = Fields(tuple(c.name for c in self.layout.fields), tuple(c.rows for c in self.layout.fields), dim)
        self.order = sorted(tables)
        self.tables = nn.ModuleList(tables[w] for w in self.order)
        with torch.device("cpu"):  # wherever the weights are
            everything = kept_columns(self.layout, dim, Selection(self.fields.names))
        self.kept = list(everything if kept is None else kept)
        self.groups = tuple(self.layout.histories)
        self.wheres, self.guards, self.keeps = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        vocabularies = [[v for v, own in enumerate(widths) if own == w] for w in self.order]
        firsts = first_rows(self.layout.rows, widths)
        done = 0
        for part, columns in enumerate(column_groups(self.layout)):
            wheres = [Where(columns, own, firsts) for own in vocabularies]
            self.wheres.append(nn.ModuleList(wheres))
            self.guards.append(Guard(columns))
            self.keeps.append(Keep(columns, self.kept[done : done + len(columns)]))
            done += len(columns)
            found = [k for where in wheres for k in where.columns]
            place = [found.index(k) for k in range(len(columns))]
            self.register_buffer(f"place_{part}", torch.tensor(place, dtype=torch.int64), persistent=False)

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
        wheres = cast("Sequence[Where]", self.wheres[part])
        found = [table(where(safe), where.vocabulary) for table, where in zip(self.tables, wheres, strict=True)]
        e = torch.cat(found, -2).index_select(-2, self.get_buffer(f"place_{part}"))
        return self.keeps[part](e, safe), safe

    def prune(self, selection: Selection) -> Mixed:
        """Return one that gives the same vectors, and exact zeros for what `selection` drops.

        Rows that no column keeps are gone, and dimensions and matrices that none needs. What is gone from this one
        stays gone.
        """
        found = kept_columns(self.layout, self.fields.dim, selection)
        kept = [old.meet(new) for old, new in zip(self.kept, found, strict=True)]
        if all(k.whole for k in kept):
            return copy.deepcopy(self)
        tables = {}
        firsts = first_rows(self.layout.rows, self.widths)
        for w, table in zip(self.order, self.tables, strict=True):
            mine = [v for v, width in enumerate(self.widths) if width == w]
            rows = torch.zeros(sum(self.layout.rows[v] for v in mine), dtype=torch.bool)
            dims = torch.zeros(self.fields.dim, dtype=torch.bool)
            vocabularies = torch.zeros(len(mine), dtype=torch.bool)
            for c, own in zip(self.layout.columns, kept, strict=True):
                if c.vocabulary not in mine or not bool(own.dims.any()):
                    continue
                rows[firsts[c.vocabulary] :][: c.rows] |= own.numbers(0, c.rows).any(1)
                vocabularies[mine.index(c.vocabulary)] = True
                dims |= own.dims
            tables[w] = cast(Width, table).cut(rows, vocabularies, dims)
        cut = Mixed(self.schema, self.widths, tables, self.fields.dim, kept)
        return _on(cut, next(self.parameters()).device).train(self.training)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The tables and matrices of every width, and every constant that finds a row or says what is gone."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


class MDE(nn.Module):
    """Vectors of fewer dimensions for larger vocabularies, each brought to D by a matrix of its vocabulary.

    e_f = V_f[id] P_f · value_f, with V_f `[n_f, d_f]`, P_f `[d_f, D]`, and d_f the power of two that is next to
    D · (n_min / n_f)^α; a vocabulary that this would not shrink keeps D numbers for each value and no matrix.

    Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021,
    arXiv 1909.11810.

    Args:
        dim: embedding dimension D.
        alpha: α, how fast the dimensions fall; 0: all vocabularies have D.
        budget: instead of alpha: share of the bytes of a table with D numbers for every id; the least α that meets it.
        init_std: standard deviation of the initial vectors.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        alpha: NonNegativeFloat | None = None,
        budget: PositiveFloat | None = None,
        init_std: NonNegativeFloat = 1e-4,
    ) -> None:
        super().__init__()
        if (alpha is None) == (budget is None):
            raise RecipeError("give `alpha`, how fast the dimensions fall, or `budget`, the share of the full table")
        layout = Layout.of(schema)
        for size, name in zip(layout.rows, layout.owners, strict=True):
            if size > LARGEST:
                raise RecipeError(
                    f"'{name}' has {size:,} ids, each with a row here; give it a vocabulary or fewer hash_buckets"
                )
        chosen = _affordable(layout, dim, budget) if alpha is None and budget is not None else alpha or 0.0
        widths = widths_of(layout.rows, dim, chosen)
        tables = {}
        for w in sorted(set(widths)):
            sizes = [size for size, width in zip(layout.rows, widths, strict=True) if width == w]
            weight = torch.empty(sum(sizes), w)
            nn.init.normal_(weight, std=init_std)
            projection = None
            if w < dim:  # as large as the vectors themselves would be
                projection = torch.empty(len(sizes), w, dim)
                nn.init.normal_(projection, std=w**-0.5)
            tables[w] = Width(weight, projection)
        self.table = Mixed(schema, widths, tables, dim)
        self.fields = self.table.fields

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`."""
        e: Tensor = self.table(ids, values)
        return e

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self.table.history(group, ids)

    def prune(self, selection: Selection) -> Mixed:
        """Return the smaller one that gives the same vectors, and exact zeros for what `selection` drops."""
        return self.table.prune(selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """As of the tables of all widths."""
        return self.table.export_tables()


def widths_of(sizes: Sequence[int], dim: int, alpha: float) -> tuple[int, ...]:
    """d_f of every vocabulary: a power of two, or D where fewer dimensions and their matrix take no fewer numbers."""
    smallest = min(sizes)
    found = []
    for size in sizes:
        wanted = dim * (smallest / size) ** alpha
        width = min(dim, 1 << max(0, floor(log2(wanted) + 0.5))) if wanted > 0 else 1
        found.append(width if size * width + width * dim < size * dim else dim)
    return tuple(found)


def first_rows(sizes: Sequence[int], widths: Sequence[int]) -> list[int]:
    """First row of every vocabulary in the table of its width."""
    ends: dict[int, int] = {}
    firsts = []
    for size, width in zip(sizes, widths, strict=True):
        firsts.append(ends.get(width, 0))
        ends[width] = firsts[-1] + size
    return firsts


def _needed(layout: Layout, dim: int, alpha: float) -> int:
    """Bytes of everything, for one α."""
    numbers = 0
    for size, width in zip(layout.rows, widths_of(layout.rows, dim, alpha), strict=True):
        numbers += size * width + (width * dim if width < dim else 0)
    return 4 * numbers + _COLUMN_BYTES * len(layout.columns)


def _affordable(layout: Layout, dim: int, budget: float) -> float:
    """The least α whose tables, matrices and constants fit into the budget; bytes fall with α.

    Raises:
        RecipeError: one dimension for every value but the smallest vocabulary's is still too much.
    """
    full = 4 * dim * sum(layout.rows)
    low, high = 0.0, 64.0  # at 2^64 times fewer, every vocabulary but the smallest ones has one dimension
    if _needed(layout, dim, high) > budget * full:
        least = _needed(layout, dim, high)
        raise RecipeError(
            f"budget {budget:g} is {floor(budget * full):,} bytes of the full table's {full:,}; with one dimension "
            f"for all vocabularies but the smallest it still takes {least:,}: the least possible budget is "
            f"{least / full:.3g}"
        )
    if _needed(layout, dim, low) <= budget * full:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _needed(layout, dim, middle) <= budget * full else (middle, high)
    return high


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding."""
    return [Component("embedding", "mde", MDE)]
