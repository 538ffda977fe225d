"""The items of a train split: what belongs to each, how often it occurs, and who likes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.contracts import FIRST_ID, Batch, Items
from recsys.data.batches import EvalBatches
from recsys.data.shards import Shards
from recsys.errors import DataError

Numbers = npt.NDArray[np.int64]
_ROWS = 1 << 16
"""Rows that are read at once."""


@dataclass(frozen=True)
class Catalogue:
    """The items of the train split, numbered from 0.

    Args:
        items: their ids and counts.
        number: `[rows of the item field]` int64, id to number; -1 for an id that no row has.
        item_column: of the item field in `ids [B, F]`.
        user_column: of the user field; None if it is not known.
        columns: `[C]` int64, all columns of `ids` that belong to the item.
        newest: I rows, the newest one of each item; of its bags those that belong to the item.
        pairs: task → `[n]` int64 ascending, user·I + item of every positive row.
        every_pair: the same over all tasks.
        positive_rows: `[n]` int64 ascending, rows with a label of 1 in any task.
    """

    items: Items
    number: Numbers
    item_column: int
    user_column: int | None
    columns: Tensor
    newest: Batch
    pairs: Mapping[str, Numbers]
    every_pair: Numbers
    positive_rows: Numbers

    @property
    def context(self) -> Mapping[str, Tensor]:
        """Context of the newest row of each item, name → `[I]`."""
        return self.newest.context

    def numbers(self, batch: Batch) -> Numbers:
        """The numbers of the items of a batch, `[B]` int64; -1 where it is missing or unknown."""
        found: Numbers = self.number[batch.ids[:, self.item_column].numpy()]
        return found

    def users(self, batch: Batch) -> Numbers:
        """The ids of the users of a batch, `[B]` int64."""
        assert self.user_column is not None
        users: Numbers = batch.ids[:, self.user_column].numpy()
        return users

    def positive(self, task: str, users: Numbers, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Whether user ids and item numbers are positive pairs of a task; arrays that broadcast."""
        return _among(self.pairs[task], users * len(self.items) + numbers)

    def any_positive(self, users: Numbers, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """The same for positive pairs of any task."""
        return _among(self.every_pair, users * len(self.items) + numbers)

    def put(self, batch: Batch, numbers: Tensor) -> Batch:
        """Return the rows of a batch with other items, `[B]` int64 by their numbers."""
        ids = batch.ids.index_copy(1, self.columns, self.newest.ids[numbers])
        values = batch.values
        if values is not None and self.newest.values is not None:
            values = values.index_copy(1, self.columns, self.newest.values[numbers])
        bags = {group: (events[numbers], length[numbers]) for group, (events, length) in self.newest.history.items()}
        return replace(batch, ids=ids, values=values, history={**batch.history, **bags})


def read_catalogue(
    shards: Shards, item: str, fields: Sequence[str], user: str | None, *, positives_only: bool
) -> Catalogue:
    """Read all rows of a train split once.

    Args:
        shards: the rows.
        item: field that tells items apart.
        fields: other fields and bags of the item.
        user: field that tells users apart.
        positives_only: count rows with a label of 1 alone; only their items can be drawn.

    Raises:
        DataError: no row has a known item, or none that is trained on.
    """
    names = [f.name for f in shards.schema.fields]
    column, user_column = names.index(item), None if user is None else names.index(user)
    size = shards.schema.fields[column].rows
    rows, positives, last = np.zeros(size, np.int64), np.zeros(size, np.int64), np.full(size, -1, np.int64)
    liked: dict[str, list[Numbers]] = {task: [] for task in shards.schema.tasks}
    positive_rows = []
    for low, batch in EvalBatches(shards, _ROWS):
        ids = batch.ids[:, column].numpy()
        label = {task: value.numpy() > 0 for task, value in batch.label.items()}
        any_label = np.logical_or.reduce(list(label.values()))
        positive_rows.append(low + np.flatnonzero(any_label))
        taken = np.flatnonzero(any_label) if positives_only else np.arange(len(ids))
        rows += np.bincount(ids[taken], minlength=size)
        positives += np.bincount(ids[any_label], minlength=size)
        last[ids] = low + np.arange(len(ids))  # the newest row of an item wins
        if user_column is not None:
            users = batch.ids[:, user_column].numpy()
            for task, is_positive in label.items():
                liked[task].append(np.unique(users[is_positive] * size + ids[is_positive]))
    known = np.flatnonzero(rows)
    known = known[known >= FIRST_ID]
    if not len(known):
        what = "with a label of 1 has" if positives_only else "has"
        raise DataError(f"sampling: no row of the train split {what} a known '{item}' to draw")
    number = np.full(size, -1, np.int64)
    number[known] = np.arange(len(known))
    pairs = {task: _renumbered(parts, size, number, len(known)) for task, parts in liked.items()}
    columns = torch.tensor([i for i, name in enumerate(names) if name in (item, *fields)])
    return Catalogue(
        items=Items(known, rows[known], positives[known]),
        number=number,
        item_column=column,
        user_column=user_column,
        columns=columns,
        newest=_of_item(shards.gather(last[known]), columns, fields),
        pairs=pairs,
        every_pair=np.unique(np.concatenate(list(pairs.values()))),
        positive_rows=np.concatenate(positive_rows),
    )


def _of_item(rows: Batch, columns: Tensor, fields: Sequence[str]) -> Batch:
    """Keep what belongs to the item."""
    return replace(
        rows,
        ids=rows.ids[:, columns],
        values=None if rows.values is None else rows.values[:, columns],
        history={group: events for group, events in rows.history.items() if group in fields},
        label={},
    )


def _renumbered(parts: Sequence[Numbers], size: int, number: Numbers, items: int) -> Numbers:
    """Turn user·size + id into user·items + number, ascending; pairs with an unknown item are left out."""
    users, ids = np.divmod(np.unique(np.concatenate([np.empty(0, np.int64), *parts])), size)
    inside = number[ids] >= 0
    return np.asarray(users[inside] * items + number[ids[inside]], np.int64)


def _among(pairs: Numbers, wanted: Numbers) -> npt.NDArray[np.bool_]:
    """Whether each wanted number is among `pairs`, which ascend."""
    if not len(pairs):
        return np.zeros(wanted.shape, np.bool_)
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    found: npt.NDArray[np.bool_] = pairs[at] == wanted
    return found
