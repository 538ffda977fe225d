"""The table of which single numbers were left out: what is kept stands back to back, found through one bit each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.nn.compact import CompactTable, RowSource, Slots, element_masks, slot_bytes, slot_maps
from recsys.nn.layout import Column, Layout, index_for, scale
from recsys.nn.reorder import Orders, Reordered, kept_first, moved
from recsys.nn.selection import both

PATTERNS = 256
"""So many rows of bits can be told apart by one byte."""
SAMPLE = 4096
"""Rows in which more patterns than that show without a look at all."""


class ElementTable(nn.Module):
    """Kept numbers of kept rows, each row with D bits that say which.

    The numbers stand in one flat parameter, row after row. A row has ⌈D/8⌉ bytes of bits, or one byte that says which
    of at most 256 patterns of bits it has, where that takes less: so it is when whole blocks of rows keep the same
    dimensions. It has the place of its first number counted from that of the first of R rows, in a byte or two; R rows
    share a place in full. The k-th coordinate stands at the row's place plus the number of bits before k. Rows without
    any number are not stored. Outputs are `[B, F, D]` as before, with exact zeros where something is gone.

    Columns that share a vocabulary may keep different numbers of it; stored is what any of them keeps. Numbers have the
    type that the source gives; integers can be looked up, and do not learn.
    """

    def __init__(self, schema: EncodedSchema, source: RowSource, selection: Selection) -> None:
        super().__init__()
        self.schema, self.layout, self.fields = schema, source.layout, source.fields
        self.kept: list[Tensor] = element_masks(source.layout, source.fields.dim, selection)  # each [rows, D]
        if isinstance(source, ElementTable):
            self.kept = [new & old for new, old in zip(self.kept, source.kept, strict=True)]
        columns = self.layout.columns
        unions = [_union(columns, self.kept, v, size) for v, size in enumerate(self.layout.rows)]
        flat = _numbers(source, unions)
        self.flat = nn.Parameter(flat, requires_grad=flat.is_floating_point())
        self.bits: Tensor
        self.pattern: Tensor | None
        self.near: Tensor
        self.far: Tensor
        self.slots: Tensor
        bits, base, own = _bit_rows(columns, self.kept, unions, self.layout.rows)
        bits, pattern = _in_patterns(bits)
        near, far = _places(_starts(unions), self.fields.dim)
        around = [(m.any(1), m.any().expand(self.fields.dim)) for m in self.kept]
        found, limits, where = slot_maps(columns, around, self.layout.rows)
        buffers = {"bits": bits, "pattern": pattern, "near": near, "far": far, "slots": found}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        parts = list(zip(columns, base, own, where, limits, strict=True))
        count = len(self.layout.fields)
        self.reader = ElementReader(parts[:count], self.fields.dim)
        self.groups = tuple(self.layout.histories)
        self.readers = nn.ModuleList()
        for group in self.layout.histories.values():
            self.readers.append(ElementReader(parts[count : count + len(group)], self.fields.dim))
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
        e, safe = reader(ids, self.flat, (self.bits, self.pattern), (self.near, self.far), self.slots)
        return e, safe

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`, zeros where nothing is stored."""
        union = _union(self.layout.columns, self.kept, vocabulary, self.layout.rows[vocabulary])
        before = sum(
            int(_union(self.layout.columns, self.kept, v, size).sum())
            for v, size in enumerate(self.layout.rows[:vocabulary])
        )
        place = (before + union.flatten().cumsum(0)).view(union.shape)  # one number stands in front of all
        at = torch.where(union, place, 0)[rows.cpu()].to(self.flat.device)  # [n, D]
        return self.flat.detach().index_select(0, at.flatten()).view(at.shape).masked_fill(at == 0, 0)

    def kept_rows(self) -> Mapping[str, Tensor]:
        """Column → `[rows]` bool, the ids of which it stores any number."""
        return {c.name: m.any(1) for c, m in zip(self.layout.columns, self.kept, strict=True)}

    def prune(self, selection: Selection) -> ElementTable:
        """Return a smaller table still; what is gone stays gone."""
        return ElementTable(self.schema, self, selection)

    def row_order(self) -> Orders:
        """The order of ids in which those with kept numbers come first."""
        return kept_first(self.layout, self.kept)

    def reordered(self, orders: Orders) -> tuple[CompactTable | ElementTable, Selection]:
        """Return the table for ids in the new order, and the selection that prunes a whole table to its like."""
        names = [c.name for c in self.layout.columns]
        masks = moved(self.layout, orders, self.kept)
        kept = tuple(n for n, m in zip(names, masks, strict=True) if bool(m.any()) and n in self.fields.names)
        selection = Selection(kept, elements=dict(zip(names, masks, strict=True)))
        # Stored in fewer bits, it still has the layout that was chosen for float32, as a fresh one will.
        return compact(self.schema, Reordered(self, orders), selection, size=4), selection

    def export_tables(self) -> Mapping[str, Tensor]:
        """The numbers, bits and places of the rows, the id maps, and where each column finds its part."""
        tables = {"flat": self.flat.detach(), **dict(self.named_buffers(recurse=False))}
        names = ("fields", *(f"history.{g}" for g in self.groups))
        for name, reader in zip(names, (self.reader, *self.readers), strict=True):
            tables |= {f"{name}.{k}": v for k, v in reader.named_buffers(recurse=False)}
        return tables


class ElementReader(nn.Module):
    """From a column's own ids to rows of bits, and through them to numbers."""

    def __init__(self, parts: Sequence[tuple[Column, int, int, tuple[int, int], int]], dim: int) -> None:
        super().__init__()
        columns, base, own, where, limits = (list(x) for x in zip(*parts, strict=True)) if parts else ([],) * 5
        self.slots = Slots(columns, where, limits)
        self.dim = dim
        self.same = base == own
        self.together = _together(dim)[0]
        self.base: Tensor
        self.own: Tensor
        self.register_buffer("base", torch.tensor(base, dtype=torch.int64), persistent=False)
        self.register_buffer("own", torch.tensor(own, dtype=torch.int64), persistent=False)

    def forward(
        self,
        ids: Tensor,
        flat: Tensor,
        bits: tuple[Tensor, Tensor | None],
        places: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`[..., C] -> e [..., C, D], guarded ids [..., C]`."""
        slot, safe = self.slots(ids, slots)
        gone = slot < 0
        row = torch.where(gone, 0, self.base + slot)  # [..., C]; row 0 has no number
        stored = self._unpack(bits, row)  # [..., C, D]
        near, far = (
            t.index_select(0, r.flatten()).long() for t, r in zip(places, (row, row // self.together), strict=True)
        )
        place = (near + far).view(row.shape).unsqueeze(-1) + stored.cumsum(-1) - 1
        shown = stored if self.same else self._unpack(bits, torch.where(gone, 0, self.own + slot))
        numbers = flat.index_select(0, torch.where(shown.bool(), place, 0).flatten()).view(place.shape)
        return torch.where(shown.bool(), numbers, 0.0), safe

    def _unpack(self, stored: tuple[Tensor, Tensor | None], row: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]` of zeros and ones, int64."""
        bits, pattern = stored
        place = row.flatten() if pattern is None else pattern.index_select(0, row.flatten()).long()
        packed = bits.index_select(0, place).view(*row.shape, bits.shape[1], 1).long()
        single = (packed >> torch.arange(8, device=bits.device)) & 1  # [..., C, ⌈D/8⌉, 8]
        return single.flatten(-2)[..., : self.dim]


def compact(
    schema: EncodedSchema, source: RowSource, selection: Selection, *, size: int | None = None
) -> CompactTable | ElementTable:
    """Return the smallest table that gives the rows of `source` with zeros for what `selection` drops.

    Rows × dimensions, or single numbers with a bit for each: whichever takes fewer bytes. The choice depends on the
    selection and on the type of the numbers alone, so that a table can be built again from it.

    Args:
        schema: of the inputs.
        source: whose rows are copied; what is gone from a compact table stays gone.
        selection: what is kept.
        size: bytes of a number by which the layout is chosen; by default those that it has.
    """
    if isinstance(source, ElementTable):
        return source.prune(selection)
    if not selection.elements:
        return CompactTable(schema, source, selection)
    if isinstance(source, CompactTable):
        names = [c.name for c in source.layout.columns]
        old = [dict(zip(names, masks, strict=True)) for masks in zip(*source.kept, strict=True)]
        selection = both(selection, Selection(source.fields.names, *old))
    masks = element_masks(source.layout, source.fields.dim, selection)
    own = source.read(0, torch.zeros(0, dtype=torch.int64)).element_size()
    around = rows_times_dims(source.layout, masks, own if size is None else size)
    if around is None:
        return ElementTable(schema, source, selection)
    names = [c.name for c in source.layout.columns]
    rows, dims = ({name: pair[i] for name, pair in zip(names, around, strict=True)} for i in (0, 1))
    return CompactTable(schema, Masked(source, masks), Selection(selection.fields, rows, dims))


def rows_times_dims(layout: Layout, masks: Sequence[Tensor], size: int = 4) -> list[tuple[Tensor, Tensor]] | None:
    """The (rows, dims) of every column that contain its kept numbers `[rows, D]`; None if bits take fewer bytes.

    Args:
        layout: of the columns.
        masks: of each column.
        size: bytes of a number.
    """
    columns, sizes = layout.columns, layout.rows
    unions = [_union(columns, masks, v, rows) for v, rows in enumerate(sizes)]
    dim = masks[0].shape[1]
    hull = sum(size * int(u.any(1).sum()) * int(u.any(0).sum()) for u in unions)
    stored = sum(int(u.any(1).sum()) for u in unions)
    bits = _bit_rows(columns, masks, unions, sizes)[0]
    single = size * sum(int(u.sum()) for u in unions) + _bit_bytes(bits) + _place_bytes(stored, dim)
    # Zeros of the block itself are what a column sees within its rows × dimensions; other gaps need bits.
    told = all(
        torch.equal(unions[c.vocabulary][: c.rows] & m.any(1, keepdim=True) & m.any(0), m)
        for c, m in zip(columns, masks, strict=True)
    )
    return None if single < hull or not told else [(m.any(1), m.any(0)) for m in masks]


def element_bytes(layout: Layout, masks: Sequence[Tensor], number: int = 4) -> int:
    """Bytes of what an `ElementTable` exports when each of its numbers takes `number`."""
    columns, dim = layout.columns, masks[0].shape[1]
    unions = [_union(columns, masks, v, size) for v, size in enumerate(layout.rows)]
    rows = [int(u.any(1).sum()) for u in unions]
    numbers = 1 + sum(int(u.sum()) for u in unions)
    kept = [(m.any(1), m.any().expand(dim)) for m in masks]
    bits = _bit_bytes(_bit_rows(columns, masks, unions, layout.rows)[0])
    places = _place_bytes(1 + sum(rows), dim, far=_place_type(numbers)) + (8 + 8) * len(columns)
    return number * numbers + bits + places + slot_bytes(columns, kept, layout.rows)


class Masked:
    """A source of rows with zeros where no column of the vocabulary keeps a number."""

    def __init__(self, source: RowSource, masks: Sequence[Tensor]) -> None:
        self.layout: Layout = source.layout
        self.fields: Fields = source.fields
        self._source, self._masks = source, masks

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]`."""
        union = _union(self.layout.columns, self._masks, vocabulary, self.layout.rows[vocabulary])
        found = self._source.read(vocabulary, rows)
        return found.masked_fill(~union[rows.cpu()].to(found.device), 0)


def _union(columns: Sequence[Column], masks: Sequence[Tensor], vocabulary: int, size: int) -> Tensor:
    """What a block must store, `[size, D]`: any number that a column reading it keeps."""
    union = torch.zeros(size, masks[0].shape[1], dtype=torch.bool)
    for c, mask in zip(columns, masks, strict=True):
        if c.vocabulary == vocabulary:
            union[: c.rows] |= mask
    return union


def _numbers(source: RowSource, unions: Sequence[Tensor]) -> Tensor:
    """The kept numbers of all blocks, row after row, after one number that nothing reads."""
    pieces = [source.read(0, torch.zeros(0, dtype=torch.int64)).new_zeros(1)]
    for v, union in enumerate(unions):
        rows = union.any(1).nonzero().squeeze(1)
        part = source.read(v, index_for(pieces[0], rows)).flatten()
        pieces.append(part.index_select(0, index_for(part, union[rows].flatten().nonzero().squeeze(1))))
    return torch.cat(pieces)


def _bit_rows(
    columns: Sequence[Column], masks: Sequence[Tensor], unions: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[Tensor, list[int], list[int]]:
    """Bits `[N', ⌈D/8⌉]` of the stored rows; each column's first row there, and the first of its own bits.

    Row 0 has no number. A column that keeps less than its block stores has bits of its own, after those of the blocks.
    """
    dim = masks[0].shape[1]
    stored = [torch.zeros(1, dim, dtype=torch.bool), *(u[u.any(1)] for u in unions)]
    first = torch.tensor([len(s) for s in stored]).cumsum(0).tolist()
    base = [first[c.vocabulary] for c in columns]
    own, extra, length = [], [], first[-1]
    for c, mask in zip(columns, masks, strict=True):
        union = unions[c.vocabulary]
        if torch.equal(mask, union[: len(mask)]):
            own.append(first[c.vocabulary])
            continue
        own.append(length)
        whole = torch.zeros(sizes[c.vocabulary], dim, dtype=torch.bool)
        whole[: c.rows] = mask
        extra.append(whole[union.any(1)])
        length += len(extra[-1])
    packed = np.packbits(torch.cat([*stored, *extra]).numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed), base, own


def _starts(unions: Sequence[Tensor]) -> Tensor:
    """The place of the first number of every stored row, `[N]`; the one in front of all has none."""
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), *(u[u.any(1)].sum(1) for u in unions)])
    return 1 + counts.cumsum(0) - counts


def _in_patterns(bits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The different rows of `bits [N', b]`, and for each row which of them it is; None where that takes no less."""
    rows, width = bits.shape
    if width == 1 or len(torch.unique(bits[:SAMPLE], dim=0)) > PATTERNS:
        return bits, None
    kind = "<u8" if width <= 8 else f"V{width}"  # as one number, which is sorted much faster, where that can be
    whole = np.pad(bits.numpy(), ((0, 0), (0, max(8 - width, 0)))).view(kind).ravel()
    found, which = np.unique(whole, return_inverse=True)
    if len(found) > PATTERNS or len(found) * width + rows >= rows * width:
        return bits, None
    different = found.view(np.uint8).reshape(len(found), -1)[:, :width].copy()
    return torch.from_numpy(different), torch.from_numpy(which.astype(np.uint8))


def _bit_bytes(bits: Tensor) -> int:
    """Bytes of the bits as they are stored."""
    different, pattern = _in_patterns(bits)
    return different.nbytes + (0 if pattern is None else pattern.nbytes)


def _together(dim: int) -> tuple[int, torch.dtype]:
    """How many rows R share a place in full, a power of two, and the type that counts from there: the fewest bytes."""

    def most(kind: torch.dtype) -> int:
        return 1 << (torch.iinfo(kind).max // dim + 1).bit_length() - 1

    sizes = {kind: kind.itemsize + 4 / most(kind) for kind in (torch.uint8, torch.int16)}
    kind = min(sizes, key=lambda kind: sizes[kind])
    return most(kind), kind


def _places(start: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """First places `[N]` as `near [N]`, counted from `far [⌈N/R⌉]`."""
    together, kind = _together(dim)
    far = start[::together]
    near = start - far.repeat_interleave(together)[: len(start)]
    return near.to(kind), far.to(_place_type(int(start[-1]) + dim))


def _place_bytes(rows: int, dim: int, far: torch.dtype = torch.int32) -> int:
    """Bytes of the places of so many rows."""
    together, kind = _together(dim)
    return rows * kind.itemsize + -(-rows // together) * far.itemsize


def _place_type(numbers: int) -> torch.dtype:
    return torch.int32 if numbers < 2**31 else torch.int64
