"""What a selection keeps of tables whose rows do not stand one for each id: hashed, shared or composed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.contracts import Selection
from recsys.nn.bits import WORD, count_below, pack_words
from recsys.nn.compact import element_masks, keep_masks
from recsys.nn.layout import Column, Layout


@dataclass(frozen=True)
class Kept:
    """What is kept of one column; nothing of the size of the vocabulary is held for a column that keeps all its ids.

    Args:
        dims: `[D]` bool, the dimensions that any id keeps; none: the column is gone.
        ids: `[rows]` bool, the kept ids; `[rows, D]`, where single numbers are dropped; None keeps all ids.
    """

    dims: Tensor
    ids: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is dropped."""
        return self.ids is None and bool(self.dims.all())

    def meet(self, other: Kept) -> Kept:
        """What both keep."""
        if self.ids is None or other.ids is None:
            return _tidy(self.dims & other.dims, other.ids if self.ids is None else self.ids)
        one, two = self.ids, other.ids
        if one.dim() != two.dim():
            one, two = (ids if ids.dim() == 2 else ids.unsqueeze(1) for ids in (one, two))
        return _tidy(self.dims & other.dims, one & two)

    def numbers(self, first: int, stop: int) -> Tensor:
        """Which numbers of the ids from `first` to `stop` are kept, `[stop - first, D]` bool."""
        if self.ids is None:
            return self.dims.expand(stop - first, -1)
        part = self.ids[first:stop]
        return (part if part.dim() == 2 else part.unsqueeze(1)) & self.dims


def kept_columns(layout: Layout, dim: int, selection: Selection) -> list[Kept]:
    """What a selection keeps of every column of a layout.

    Raises:
        DataError: the selection names an unknown column, or a mask has the wrong length.
    """
    named = {*selection.rows, *selection.elements}

    def light(columns: Sequence[Column]) -> tuple[Column, ...]:
        # A mask as long as the vocabulary only where the selection has one: there may be 2^62 ids.
        return tuple(c if c.name in named else replace(c, rows=1) for c in columns)

    histories = {group: light(columns) for group, columns in layout.histories.items()}
    small = replace(layout, fields=light(layout.fields), histories=histories)
    if selection.elements:
        found = [(torch.ones(dim, dtype=torch.bool), mask) for mask in element_masks(small, dim, selection)]
    else:
        found = [(dims, rows) for rows, dims in keep_masks(small, dim, selection)]
    masks = []
    for column, (dims, ids) in zip(small.columns, found, strict=True):
        if column.name in named:
            masks.append(_tidy(dims, ids))
        else:
            masks.append(Kept(dims & ids[0]))
    return masks


def _tidy(dims: Tensor, ids: Tensor | None) -> Kept:
    """The same in the least space; `dims [D]`, `ids [rows]` or `[rows, D]`."""
    if ids is None:
        return Kept(dims)
    if ids.dim() == 2:
        ids = ids & dims
        rows, dims = ids.any(1), ids.any(0)
        if torch.equal(ids, rows.unsqueeze(1) & dims):
            return _tidy(dims, rows)
        return Kept(dims, ids)
    if bool(ids.all()) or not bool(ids.any()):
        return Kept(dims & ids.any())
    return Kept(dims, ids)


class Keep(nn.Module):
    """Exact zeros for what is dropped: one bit for each dimension of a column, and for each id where ids are dropped.

    Args:
        columns: what the ids belong to.
        kept: what each of them keeps.
    """

    def __init__(self, columns: Sequence[Column], kept: Sequence[Kept]) -> None:
        super().__init__()
        self.whole = all(k.whole for k in kept)
        self.by_id = any(k.ids is not None for k in kept)
        dim = kept[0].dims.shape[0] if kept else 0
        # Bits for each id: one, or D as soon as one column drops single numbers.
        self.wide = dim if any(k.ids is not None and k.ids.dim() == 2 for k in kept) else 1
        self.dims: Tensor
        self.bits: Tensor
        self.first: Tensor
        self.step: Tensor
        if self.whole:
            return
        self.register_buffer("dims", torch.stack([k.dims for k in kept]), persistent=False)
        if self.by_id:
            bits, first = self._bits(columns, kept)
            step = [self.wide if k.ids is not None else 0 for k in kept]
            self.register_buffer("bits", bits, persistent=False)
            self.register_buffer("first", torch.tensor(first), persistent=False)
            self.register_buffer("step", torch.tensor(step), persistent=False)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[..., C, D], [..., C] -> [..., C, D]`; ids within their ranges."""
        if self.whole:
            return e
        shown = self.dims
        if self.by_id:
            place = (self.first + ids * self.step).unsqueeze(-1) + torch.arange(self.wide, device=ids.device)
            byte = self.bits.index_select(0, (place >> 3).flatten()).view(place.shape).long()
            shown = shown & ((byte >> (place & 7)) & 1).bool()  # [..., C, D]
        return torch.where(shown, e, torch.zeros((), dtype=e.dtype, device=e.device))

    def _bits(self, columns: Sequence[Column], kept: Sequence[Kept]) -> tuple[Tensor, list[int]]:
        """The bits of all ids, eight in a byte, after those that columns without a mask read; where each begins."""
        parts, first, length = [torch.ones(self.wide, dtype=torch.bool)], [], self.wide
        done: dict[tuple[int, bytes], int] = {}
        for column, own in zip(columns, kept, strict=True):
            if own.ids is None:
                first.append(0)
                continue
            key = (column.vocabulary, own.ids.numpy().tobytes())
            if key not in done:
                done[key] = length
                wide = own.ids if own.ids.dim() == 2 else own.ids.unsqueeze(1).expand(-1, self.wide)
                parts.append(wide.flatten())
                length += parts[-1].numel()
            first.append(done[key])
        return torch.from_numpy(np.packbits(torch.cat(parts).numpy(), bitorder="little")), first


class Rank(nn.Module):
    """From rows of a table to the rows that are left of it: new row = number of rows before it that are left.

    One bit for each row, and a count for every 64: 1.5 bits a row. Where that takes more than it saves, only rows
    after the last used one go. A row that is gone reads another one; `Keep` sets what comes of it to zero.

    Jacobson, "Space-efficient Static Trees and Graphs", FOCS 1989.

    Args:
        used: `[R]` bool, the rows to be left.
        row_bytes: what a row takes.
    """

    def __init__(self, used: Tensor, row_bytes: int) -> None:
        super().__init__()
        used = used.clone()
        used[0] |= not bool(used.any())  # a table without rows cannot be read
        stop = int(used.nonzero().max()) + 1
        words = -(-stop // WORD)
        count = int(used.sum())
        self.direct = (stop - count) * row_bytes <= words * 12
        kept = torch.arange(stop) if self.direct else used.nonzero().squeeze(1)
        self.kept = kept
        """The rows that are left, ascending."""
        self.size = len(used)
        self.whole = len(kept) == len(used)
        self.words: Tensor
        self.before: Tensor
        if not self.direct:
            packed, before = pack_words(used[:stop])
            kind = torch.int32 if count < 2**31 else torch.int64
            self.register_buffer("words", packed, persistent=False)
            self.register_buffer("before", before.to(kind), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """`[...] -> [...]` int64."""
        if not self.direct:
            at = (rows >> 6).flatten().clamp(max=self.words.shape[0] - 1)
            word = self.words.index_select(0, at).view(rows.shape)
            rows = self.before.index_select(0, at).view(rows.shape).long() + count_below(word, rows & 63)
        return rows if self.whole else rows.clamp(max=self.kept.shape[0] - 1)


def widen(e: Tensor, place: Tensor) -> Tensor:
    """Put numbers where they belong, and zeros elsewhere: `[..., d], [D] -> [..., D]`.

    Args:
        e: the numbers that are stored.
        place: for each dimension which of them, d for none.
    """
    if e.shape[-1] == place.shape[0]:
        return e
    return F.pad(e, (0, 1)).index_select(-1, place)


def places(kept: Tensor) -> Tensor:
    """For each dimension its place among the kept ones, their number for one that is not kept: `[D] bool -> [D]`."""
    return torch.where(kept, kept.cumsum(0) - 1, kept.sum())
