"""Encoded rows at hand, mapped or in memory, and the batches that are gathered from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.contracts import Batch
from recsys.data.layout import Bytes, Layout

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """The lists of one history: row i has events `offsets[i] : offsets[i + 1]` of `values [E, K]`."""

    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """Some rows as they are stored: `records [rows, record]` bytes and the events of every history."""

    records: Bytes
    events: tuple[Events, ...]


Taken = tuple[Piece, Any, Rows]
"""A piece, where its rows go in the batch (a mask or a slice of `[B]`), and which of its rows they are."""


def gather(layout: Layout, taken: Sequence[Taken], size: int) -> Batch:
    """Return a batch of `size` rows that come from one or several pieces; nothing of it shares memory with them."""
    if len(taken) == 1:
        records = taken[0][0].records.take(taken[0][2], axis=0)  # [B, record]
    else:
        records = np.empty((size, layout.size), np.uint8)
        for piece, where, rows in taken:
            records[where] = piece.records.take(rows, axis=0)
    ids, values, label, context = layout.unpack(records)
    return Batch(
        ids=torch.from_numpy(ids),
        values=None if values is None else torch.from_numpy(values),
        history=_histories(layout, taken, size),
        label={k: torch.from_numpy(v) for k, v in label.items()},
        context={k: torch.from_numpy(v) for k, v in context.items()},
    )


def _histories(layout: Layout, taken: Sequence[Taken], size: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for index, history in enumerate(layout.schema.histories):
        length = np.zeros(size, np.int64)
        for piece, where, rows in taken:
            offsets = piece.events[index].offsets
            length[where] = offsets[rows + 1] - offsets[rows]
        longest = max(int(length.max(initial=0)), 1)
        ids = np.zeros((size, longest, len(history.columns)), np.int64)  # [B, L, K], NULL_ID where padded
        for piece, where, rows in taken:
            ids[where] = _padded(piece.events[index], rows, longest)
        found[history.name] = (torch.from_numpy(ids), torch.from_numpy(length))
    return found


def _padded(events: Events, rows: Rows, longest: int) -> npt.NDArray[np.int64]:
    """Return the lists of `rows [B]` as `[B, L, K]`, zero (`NULL_ID`) after their end."""
    start, end = events.offsets[rows], events.offsets[rows + 1]
    at = start[:, None] + np.arange(longest)  # [B, L]
    real = at < end[:, None]
    if not len(events.values):
        return np.zeros((len(rows), longest, events.values.shape[1]), np.int64)
    ids = events.values.take(np.where(real, at, 0), axis=0).astype(np.int64)  # [B, L, K]
    ids *= real[:, :, None]
    return ids


def join(batches: Sequence[Batch]) -> Batch:
    """Return the rows of several batches of one schema, one batch after the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    values = [b.values for b in batches if b.values is not None]
    return Batch(
        ids=torch.cat([b.ids for b in batches]),
        values=torch.cat(values) if values else None,
        history={name: _join_lists([b.history[name] for b in batches]) for name in first.history},
        label={name: torch.cat([b.label[name] for b in batches]) for name in first.label},
        context={name: torch.cat([b.context[name] for b in batches]) for name in first.context},
    )


def _join_lists(lists: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    longest = max(ids.shape[1] for ids, _ in lists)
    ids = [pad(ids, (0, 0, 0, longest - ids.shape[1])) for ids, _ in lists]  # [B, L, K], NULL_ID where padded
    return torch.cat(ids), torch.cat([length for _, length in lists])
