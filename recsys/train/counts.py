"""How many training rows use each id: counted once, and told to the parts of the model that want to know."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from recsys.contracts import NULL_ID, Batch, EncodedSchema
from recsys.data.shards import Shards
from recsys.errors import RecipeError
from recsys.nn.layout import Layout
from recsys.nn.table import Reader
from recsys.train.distributed import World, gather_rows
from recsys.train.progress import bar
from recsys.train.run import Run

MOST_ROWS = 1 << 15
MOST_IDS = 1 << 22
"""Rows and ids of the log that are counted at once."""


class CountRows:
    """Count how many training rows use each id, for the parts of the model that want to know.

    It comes before the first stage that needs the counts, and reads the train split only.
    """

    name = "count_rows"

    def run(self, run: Run) -> None:
        """Count, and hand the counts to the model.

        Raises:
            RecipeError: no part of the model takes counts.
        """
        parts = run.model.counting()
        if not parts:
            raise RecipeError(f"{run.stage}: no part of the model takes counts; leave this stage out")
        shards = run.split("train")
        with bar(run.console, disable=not run.world.leads) as progress:
            task = progress.add_task(f"{run.stage} · counting train", total=len(shards))
            counts = count_rows(shards, run.world, run.device, functools.partial(progress.advance, task))
        for part in parts:
            part.take_counts(counts)
        run.keep_weights()


def count_rows(
    shards: Shards, world: World, device: torch.device, advance: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """Return column → how many rows use each id, int64 `[rows]`; every process reads its part of the rows.

    Args:
        shards: the encoded rows.
        world: this process among those that count together.
        device: through which the processes speak to each other.
        advance: called with the number of rows counted.
    """
    counts = RowCounts(shards.schema)
    size = max(1, min(MOST_ROWS, MOST_IDS // max(1, counts.width)))
    for low in range(world.rank * size, len(shards), world.size * size):
        high = min(low + size, len(shards))
        counts.add(shards.read(low, high))
        if advance is not None:
            advance(min((high - low) * world.size, len(shards) - low))
    counts.total = gather_rows(counts.total[None].to(device)).sum(0).cpu()
    return counts.by_column()


class RowCounts:
    """Counts of the log's rows that use each row of a fused table, once per row of the log.

    Args:
        schema: of the batches.
    """

    def __init__(self, schema: EncodedSchema) -> None:
        self.layout = Layout.of(schema)
        offsets, histories = self.layout.offsets, self.layout.histories
        self.total = torch.zeros(sum(self.layout.rows), dtype=torch.int64)
        self.width = len(schema.fields) + sum(h.max_length * len(h.columns) for h in schema.histories)
        self._fields = Reader(self.layout.fields, offsets)
        self._events = {group: Reader(columns, offsets) for group, columns in histories.items()}
        readers = Counter(c.vocabulary for c in self.layout.columns)
        # A field that shares its rows with no other column uses one of them: nothing to look for.
        self._alone = torch.tensor([readers[c.vocabulary] == 1 for c in self.layout.fields], dtype=torch.bool)

    def add(self, batch: Batch) -> None:
        """Count the rows of a batch."""
        rows = self._fields(batch.ids)[0]  # [B, F]
        self._tally(rows[:, self._alone])
        several = [] if bool(self._alone.all()) else [rows[:, ~self._alone]]
        for group, (ids, _) in batch.history.items():
            used = self._events[group](ids)[0]  # [B, L, K]
            several.append(torch.where(ids == NULL_ID, -1, used).flatten(1))
        if several:
            ordered = torch.cat(several, 1).sort(1).values
            first = torch.ones_like(ordered, dtype=torch.bool)
            first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
            self._tally(ordered[first & (ordered >= 0)])

    def by_column(self) -> dict[str, Tensor]:
        """Column → int64 `[rows]`."""
        offsets = self.layout.offsets
        return {c.name: self.total[offsets[c.vocabulary] :][: c.rows].clone() for c in self.layout.columns}

    def _tally(self, rows: Tensor) -> None:
        found = rows.flatten()
        if len(found) < len(self.total):  # a batch costs what it holds, whatever the size of the table
            self.total.index_add_(0, found, torch.ones_like(found))
        else:
            self.total += torch.bincount(found, minlength=len(self.total))
