"""Simulated logs as a data source: clicks whose true probability is known.

A model's metric can be read beside the best possible one, because the probability that drew each label is kept.
Worlds are described in `simulate_config`, drawn in `simulate_world`, and written to files by `simulate_write`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from recsys.data.simulate_config import VERSION, Preset, WorldConfig, config_digest, make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_truth import auc
from recsys.data.simulate_world import World
from recsys.data.sources import DataRoot, MissingSplit
from recsys.errors import RecipeError, did_you_mean, listing

SPLITS = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0), "uniform": (0.9, 1.0)}
"""Split → share of the log's rows, in time order; `uniform` draws the test rows again and shows all of them."""

BLOCK = 1 << 18
"""Rows per frame of a log that is too large to be held, and the largest one that is."""


class Simulated:
    """A click log with planted structure and known click probabilities, drawn when it is read.

    The rows are those of `recsys simulate` with the same options. Columns: `row_id`, `ts` (seconds), `user`,
    `item`, the fields of the world, the label `y`; and `o`, whether the item was shown, in worlds where that is
    selective. The first 80 % of the rows are `train`, then 10 % `valid` and 10 % `test`; `uniform` is a test
    split on which everything was shown.

    Args:
        rows: of all splits together.
        seed: of the world and of every draw.
        preset: which world. `quickstart` shows everything and hides much of its signal in interactions; `easy`,
            `mnar`, `confounded`, `drift` and `fair` show items selectively, `leaky` has the label among its fields.
        users: number of users, in place of the world's own.
        items: number of items, in place of the world's own.
        fields: put so many plain fields (user, item, context, noise in turn) in place of the world's own.
    """

    def __init__(
        self,
        root: DataRoot,
        *,
        rows: int = 50_000,
        seed: int = 7,
        preset: Preset = "quickstart",
        users: int | None = None,
        items: int | None = None,
        fields: int | None = None,
    ) -> None:
        del root  # nothing is read from disk
        if rows < 10:
            raise RecipeError(f"simulated logs: rows is {rows}, must be at least 10 so that every split has one")
        self.config: WorldConfig = make_config(preset, rows=rows, seed=seed, users=users, items=items, fields=fields)

    @cached_property
    def world(self) -> World:
        """The tables behind the rows; built when first asked for."""
        return World(self.config)

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the log of a split, lazily: never with a column that tells the truth about a row.

        Raises:
            DataError: no such split.
        """
        return self._frame(split, truth=False)

    def truth(self, split: str) -> pl.LazyFrame:
        """Return what is known about the rows of `scan(split)`: `rho`, `gamma`, `R`, `theta`, `O`, `pop`, `attr`, `h`.

        Raises:
            DataError: no such split.
        """
        return self._frame(split, truth=True)

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        return f"simulated-{VERSION}-{config_digest(self.config)}"

    def reference(self, split: str) -> dict[str, float]:
        """Return metric → its value for the true click probability, which no model can beat but by luck.

        NaN means undefined: every label of the split is the same.
        """
        start, stop, region = self._span(split)
        chance, label = [], []
        for a, b in _blocks(start, stop):
            log, truth = self.world.rows(a, b, region)
            chance.append((truth["gamma"] * truth["theta"]).to_numpy())
            label.append(log["y"].to_numpy())
        p, y = np.concatenate(chance), np.concatenate(label)
        return {"auc": auc(p, y), "logloss": float(-np.where(y == 1, np.log(p), np.log1p(-p)).mean())}

    def best_auc(self, split: str) -> float:
        """Return the AUC of the true click probability against the labels of a split, ties counted half."""
        return self.reference(split)["auc"]

    def _span(self, split: str) -> tuple[int, int, Region]:
        if split not in SPLITS:
            raise MissingSplit(
                f"simulated logs: no split '{split}'.{did_you_mean(split, SPLITS)} There are: {listing(SPLITS)}"
            )
        first, last = SPLITS[split]
        region = Region.UNIFORM if split == "uniform" else Region.LOG
        return round(first * self.config.rows), round(last * self.config.rows), region

    def _frame(self, split: str, truth: bool) -> pl.LazyFrame:
        start, stop, region = self._span(split)
        if stop - start <= BLOCK:
            return self.world.rows(start, stop, region)[truth].lazy()
        empty = self.world.rows(start, start, region)[truth]

        def blocks(
            columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, batch: int | None
        ) -> Iterator[pl.DataFrame]:
            end = stop if limit is None else min(stop, start + limit)
            for a, b in _blocks(start, end):
                frame = self.world.rows(a, b, region)[truth]
                if predicate is not None:
                    frame = frame.filter(predicate)
                yield frame if columns is None else frame.select(columns)

        return register_io_source(blocks, schema=empty.schema, is_pure=True)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, BLOCK):
        yield a, min(a + BLOCK, stop)
