"""The table after pruning: what was dropped takes no memory, what was kept gives the same vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.errors import DataError, did_you_mean, listing
from recsys.nn.bits import WORD, count_below, pack_words
from recsys.nn.layout import Column, Guard, Layout, index_for, scale
from recsys.nn.reorder import Orders, Reordered, kept_first, moved


class RowSource(Protocol):
    """A table whose rows can be read for pruning."""

    layout: Layout
    fields: Fields

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`, with zeros where nothing is stored."""
        ...


class CompactTable(nn.Module):
    """Kept rows × kept dimensions, stored back to back in one flat parameter.

    A vocabulary block keeps k rows of d dimensions: k·d numbers. The flat storage starts with D zeros, to which
    everything that was dropped points, and which get no gradient; so outputs are `[B, F, D]` as before, with exact
    zeros. A block that lost rows has two bits for each id, of which its row is counted.

    Columns that share a vocabulary may keep different parts of it; the block then stores what any of them keeps.
    History columns are called `group.column`; a selection that does not name them keeps all that they read.

    Numbers have the type that the source gives; integers can be looked up, and do not learn.
    """

    def __init__(self, schema: EncodedSchema, source: RowSource, selection: Selection) -> None:
        super().__init__()
        self.schema = schema
        self.layout = source.layout
        self.fields = source.fields
        columns = self.layout.columns
        kept = keep_masks(self.layout, self.fields.dim, selection)
        if isinstance(source, CompactTable):
            kept = [(r & old_r, d & old_d) for (r, d), (old_r, old_d) in zip(kept, source.kept, strict=True)]
        self.kept: list[tuple[Tensor, Tensor]] = kept
        blocks, flat = _pack(source, columns, kept, self.fields.dim)
        self.flat = nn.Parameter(flat, requires_grad=flat.is_floating_point())
        slots, limits, where = slot_maps(columns, kept, self.layout.rows)
        self.slots: Tensor
        self.register_buffer("slots", slots, persistent=False)
        whole_rows = all(bool(d.all()) for _, d in kept if bool(d.any()))
        parts = [
            _Part(c, blocks[c.vocabulary], m, limit, d)
            for c, m, limit, (_, d) in zip(columns, where, limits, kept, strict=True)
        ]
        count = len(self.layout.fields)
        self.reader = CompactReader(parts[:count], self.fields.dim, whole_rows)
        self.groups = tuple(self.layout.histories)
        self.readers = nn.ModuleList()
        for group in self.layout.histories.values():
            self.readers.append(CompactReader(parts[count : count + len(group)], self.fields.dim, whole_rows))
            count += len(group)

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        e, safe = self.look_up(ids)
        return scale(e, safe, values, self.schema)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self.look_up(ids, group)[0]

    def look_up(self, ids: Tensor, group: str | None = None) -> tuple[Tensor, Tensor]:
        """What is stored for ids of the fields, or of a history, `[..., C] -> [..., C, D]`, and the guarded ids."""
        reader = self.reader if group is None else self.readers[self.groups.index(group)]
        e, safe = reader(ids, self.flat, self.slots)
        return e, safe

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`, zeros where nothing is stored."""
        kept_rows, kept_dims = _union(self.layout.columns, self.kept, vocabulary, self.layout.rows[vocabulary])
        first, width = _starts(self.layout, self.kept, self.fields.dim)[vocabulary]
        slot = (kept_rows.cumsum(0) - 1)[rows.cpu()].unsqueeze(1)  # [n, 1]
        column = (kept_dims.cumsum(0) - 1).unsqueeze(0)  # [1, D]
        stored = kept_rows[rows.cpu()].unsqueeze(1) & kept_dims  # [n, D]
        element = torch.where(stored, first + slot * width + column, 0)
        return self.flat.detach().index_select(0, element.flatten().to(self.flat.device)).view(element.shape)

    def kept_rows(self) -> Mapping[str, Tensor]:
        """Column → `[rows]` bool, the ids of which it stores any number."""
        return {c.name: r & d.any() for c, (r, d) in zip(self.layout.columns, self.kept, strict=True)}

    def prune(self, selection: Selection) -> Any:
        """Return a smaller table still, one of single numbers where they are named; what is gone stays gone."""
        if selection.elements:
            from recsys.nn.sparse import compact  # which stands on this module

            return compact(self.schema, self, selection)
        return CompactTable(self.schema, self, selection)

    def row_order(self) -> Orders:
        """The order of ids in which what is kept comes first."""
        narrow = not all(bool(dims.all()) for _, dims in self.kept)
        return kept_first(self.layout, [rows for rows, _ in self.kept], narrow=narrow)

    def reordered(self, orders: Orders) -> tuple[CompactTable, Selection]:
        """Return the table for ids in the new order, and the selection that prunes a whole table to its like."""
        names = [c.name for c in self.layout.columns]
        rows = moved(self.layout, orders, [rows for rows, _ in self.kept])
        kept = tuple(n for n, r in zip(names, rows, strict=True) if bool(r.any()) and n in self.fields.names)
        dims = [dims for _, dims in self.kept]
        selection = Selection(kept, dict(zip(names, rows, strict=True)), dict(zip(names, dims, strict=True)))
        return CompactTable(self.schema, Reordered(self, orders), selection), selection

    def export_tables(self) -> Mapping[str, Tensor]:
        """The flat storage, the id maps, and where each column finds its part."""
        tables = {"flat": self.flat.detach(), "slots": self.slots}
        names = ("fields", *(f"history.{g}" for g in self.groups))
        for name, reader in zip(names, (self.reader, *self.readers), strict=True):
            tables |= {f"{name}.{k}": v for k, v in reader.named_buffers(recurse=False)}
        return tables


class _Part:
    """Where one column finds its rows: the block's first element and width, its id map, its dimensions."""

    def __init__(
        self, column: Column, block: tuple[int, int, Tensor], slot_map: tuple[int, int], limit: int, dims: Tensor
    ) -> None:
        self.column = column
        self.first, self.width, block_dims = block
        self.slot_map, self.limit = slot_map, limit
        self.position = torch.where(dims & block_dims, block_dims.cumsum(0) - 1, -1)  # [D]


class CompactReader(nn.Module):
    """From a column's own ids to elements (or whole rows) of the flat storage."""

    def __init__(self, parts: Sequence[_Part], dim: int, whole_rows: bool) -> None:
        super().__init__()
        self.slots = Slots([p.column for p in parts], [p.slot_map for p in parts], [p.limit for p in parts])
        self.whole_rows = whole_rows
        self.first: Tensor
        self.width: Tensor
        self.position: Tensor
        for name, values in {"first": [p.first for p in parts], "width": [p.width for p in parts]}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        position = torch.stack([p.position for p in parts]) if parts else torch.zeros(0, dim)
        self.register_buffer("position", position.to(torch.int16), persistent=False)

    def forward(self, ids: Tensor, flat: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> e [..., C, D], guarded ids [..., C]`."""
        slot, safe = self.slots(ids, slots)  # [..., C], -1 where the row is gone
        gone = slot < 0
        if self.whole_rows:
            dim = self.position.shape[-1]
            row = torch.where(gone, 0, self.first // dim + slot)
            return F.embedding(row, flat.view(-1, dim), padding_idx=0), safe
        position = self.position.long()  # [C, D]
        element = (self.first + slot * self.width).unsqueeze(-1) + position  # [..., C, D]
        stored = ~gone.unsqueeze(-1) & (position >= 0)
        # index_select, whose backward adds number by number, is five times faster here than an embedding of width one.
        numbers = flat.index_select(0, torch.where(stored, element, 0).flatten()).view(element.shape)
        return torch.where(stored, numbers, 0.0), safe


class Slots(nn.Module):
    """From a column's own ids to the rows of its block, -1 where the row is gone.

    Args:
        columns: the columns.
        where: for each column the first words of the bits of its block and of its own; -1 if it needs none.
        limits: without bits, ids below this are rows of the block, and the others are gone.
    """

    def __init__(self, columns: Sequence[Column], where: Sequence[tuple[int, int]], limits: Sequence[int]) -> None:
        super().__init__()
        self.guard = Guard(columns)
        self.block: Tensor
        self.own: Tensor
        self.limit: Tensor
        self.same = all(block == own for block, own in where)
        self.in_order = all(block < 0 for block, _ in where)  # what is kept comes first everywhere
        tables = {"block": [b for b, _ in where], "own": [o for _, o in where], "limit": list(limits)}
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> slot [..., C], guarded ids [..., C]`."""
        safe: Tensor = self.guard(ids)
        if self.in_order:
            return torch.where(safe < self.limit, safe, -1), safe
        mapped, bit = self.block >= 0, safe & 63
        words, before = self._read(slots, torch.where(mapped, self.block + (safe >> 6), 0)).unbind(-1)
        own = words if self.same else self._read(slots, torch.where(mapped, self.own + (safe >> 6), 0))[..., 0]
        found = torch.where((own >> bit) & 1 > 0, before + count_below(words, bit), -1)
        return torch.where(mapped, found, torch.where(safe < self.limit, safe, -1)), safe

    def _read(self, slots: Tensor, at: Tensor) -> Tensor:
        """`[..., C] -> [..., C, 2]`."""
        return slots.index_select(0, at.flatten()).view(*at.shape, 2)


def keep_masks(layout: Layout, dim: int, selection: Selection) -> list[tuple[Tensor, Tensor]]:
    """The kept (rows `[rows]`, dims `[D]`) of every column of a layout.

    Raises:
        DataError: the selection names an unknown column, or a mask has the wrong length.
    """
    columns = layout.columns
    known = [c.name for c in columns]
    for name in (*selection.fields, *selection.rows, *selection.dims, *selection.elements):
        if name not in known:
            raise DataError(
                f"the selection names '{name}', which the model does not have."
                f"{did_you_mean(name, known)} Columns: {listing(known)}"
            )
    scalar = {c.name for c in layout.fields}
    masks = []
    for c in columns:
        rows, dims = _mask(selection.rows, c.name, c.rows, "rows"), _mask(selection.dims, c.name, dim, "dims")
        if (c.name in scalar and c.name not in selection.fields) or not rows.any() or not dims.any():
            rows, dims = torch.zeros_like(rows), torch.zeros_like(dims)
        masks.append((rows, dims))
    return masks


def drops_nothing(layout: Layout, dim: int, selection: Selection) -> bool:
    """Whether every number of every column is kept.

    Raises:
        DataError: as `keep_masks`.
    """
    masks = (*(m for pair in keep_masks(layout, dim, selection) for m in pair), *selection.elements.values())
    return all(bool(m.all()) for m in masks)


def element_masks(layout: Layout, dim: int, selection: Selection) -> list[Tensor]:
    """The kept numbers `[rows, D]` of every column of a layout.

    Raises:
        DataError: as `keep_masks`.
    """
    masks = []
    for c, (rows, dims) in zip(layout.columns, keep_masks(layout, dim, selection), strict=True):
        mask = rows.unsqueeze(1) & dims
        if c.name in selection.elements:
            own = selection.elements[c.name].detach().cpu().bool()
            if own.shape != (c.rows, dim):
                raise DataError(
                    f"the selection's elements of '{c.name}' have shape {tuple(own.shape)}, expected ({c.rows}, {dim})"
                )
            mask = mask & own
        masks.append(mask)
    return masks


def _mask(masks: Mapping[str, Tensor], name: str, size: int, what: str) -> Tensor:
    if name not in masks:
        return torch.ones(size, dtype=torch.bool)
    mask = masks[name].detach().cpu().bool()
    if mask.shape != (size,):
        raise DataError(f"the selection's {what} of '{name}' has shape {tuple(mask.shape)}, expected ({size},)")
    return mask


Masks = Sequence[tuple[Tensor, Tensor]]


def _union(columns: Sequence[Column], kept: Masks, vocabulary: int, size: int) -> tuple[Tensor, Tensor]:
    """What a block must store: any row, and any dimension, that a column reading it keeps."""
    rows, dims = torch.zeros(size, dtype=torch.bool), torch.zeros_like(kept[0][1])
    for c, (r, d) in zip(columns, kept, strict=True):
        if c.vocabulary == vocabulary:
            rows[: c.rows] |= r
            dims |= d
    return rows, dims


def _starts(layout: Layout, kept: Masks, dim: int) -> list[tuple[int, int]]:
    """First element and width of every block; the first `dim` elements are the zeros."""
    starts, first = [], dim
    for v, size in enumerate(layout.rows):
        rows, dims = _union(layout.columns, kept, v, size)
        width = int(dims.sum())
        starts.append((first, width))
        first += int(rows.sum()) * width
    return starts


def _pack(
    source: RowSource, columns: Sequence[Column], kept: Masks, dim: int
) -> tuple[list[tuple[int, int, Tensor]], Tensor]:
    """Copy what is kept into the flat storage; returns each block's (first element, width, dims) and the storage."""
    blocks, pieces = [], [source.read(0, torch.zeros(0, dtype=torch.int64)).new_zeros(dim)]
    starts = _starts(source.layout, kept, dim)
    for v, size in enumerate(source.layout.rows):
        rows, dims = _union(columns, kept, v, size)
        part = source.read(v, index_for(pieces[0], rows.nonzero().squeeze(1)))
        pieces.append(part.index_select(1, index_for(part, dims.nonzero().squeeze(1))).flatten())
        blocks.append((*starts[v], dims))
    return blocks, torch.cat(pieces)


Places = list[tuple[int, int]]


def slot_maps(columns: Sequence[Column], kept: Masks, sizes: Sequence[int]) -> tuple[Tensor, list[int], Places]:
    """Bits of the kept ids, back to back; each column's limit, and where the bits of its block and its own start.

    `[W, 2]` int64: 64 bits, and how many of the set stand before them. The first word is empty. A column needs none
    (-1) when it keeps its first ids, and nothing before them is missing from the block.
    """
    needed, limits, where = _needed_maps(columns, kept, sizes)
    packed = [torch.stack(pack_words(rows), 1) for rows in needed]
    return torch.cat([torch.zeros(1, 2, dtype=torch.int64), *packed]), limits, where


def _needed_maps(
    columns: Sequence[Column], kept: Masks, sizes: Sequence[int]
) -> tuple[list[Tensor], list[int], Places]:
    """The sets of rows of which bits are needed; limits and starts as of `slot_maps`."""
    needed: list[Tensor] = []
    limits, where, length = [], [], 1
    done: dict[tuple[int, bytes], int] = {}

    def place(vocabulary: int, rows: Tensor) -> int:
        nonlocal length
        key = (vocabulary, rows.numpy().tobytes())
        if key not in done:
            done[key] = length
            needed.append(rows)
            length += -(-len(rows) // WORD)
        return done[key]

    for c, (rows, dims) in zip(columns, kept, strict=True):
        union, _ = _union(columns, kept, c.vocabulary, sizes[c.vocabulary])
        count = int(rows.sum()) if dims.any() else 0
        limits.append(count)
        if bool(rows[:count].all()) and bool(union[:count].all()):
            where.append((-1, -1))
            continue
        whole = torch.zeros_like(union)
        whole[: len(rows)] = rows
        where.append((place(c.vocabulary, union), place(c.vocabulary, whole)))
    return needed, limits, where


def slot_bytes(columns: Sequence[Column], kept: Masks, sizes: Sequence[int]) -> int:
    """Bytes of the bits that `slot_maps` makes."""
    return 16 * (1 + sum(-(-len(rows) // WORD) for rows in _needed_maps(columns, kept, sizes)[0]))


def compact_bytes(layout: Layout, dim: int, kept: Masks, number: int = 4) -> int:
    """Bytes of what a `CompactTable` exports when each of its numbers takes `number`."""
    numbers = dim
    for v, size in enumerate(layout.rows):
        rows, dims = _union(layout.columns, kept, v, size)
        numbers += int(rows.sum()) * int(dims.sum())
    places = (8 + 8 + 2 * dim) * len(layout.columns)  # first, width and position of every column
    return number * numbers + places + slot_bytes(layout.columns, kept, layout.rows)
