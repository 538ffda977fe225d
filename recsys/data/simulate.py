"""Simulated logs as a data source: clicks whose true probability is known.

A model's metric can be read beside the best possible one, because the probability that drew each label is kept.
Worlds are described in `simulate_config`, named in `simulate_presets`, drawn in `simulate_world`, and written to files
by `simulate_write`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from recsys.data.simulate_config import UNIFORM_FROM, VERSION, WorldConfig, config_digest
from recsys.data.simulate_presets import Preset, make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_truth import auc
from recsys.data.simulate_world import World
from recsys.data.sources import DataRoot, MissingSplit
from recsys.errors import RecipeError, did_you_mean, listing

SPLITS = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0), "uniform": (UNIFORM_FROM, 1.0)}
"""Split → share of the log's rows, in time order; `uniform` draws the test rows again and shows all of them."""

DAY = 86_400.0
Form = Literal["snapshot", "stream", "final"]
"""What train rows know of conversions."""

BLOCK = 1 << 18
"""Rows per frame of a log that is too large to be held, and the largest one that is."""


class Simulated:
    """A click log with planted structure and known click probabilities, drawn when it is read.

    The rows are those of `recsys simulate` with the same options. Columns: `row_id`, `ts` (seconds), `user`,
    `item`, the fields of the world, the label `y`; and, where the world has them, for `data.context`:
    `observed` (was the item shown), `propensity` (with what probability), `popularity`, `uniform` (no policy had a
    hand in the row), `attribute`, `request`, `position`, `click`, `conversion`, `delay` and `elapsed` (days). The first
    80 % of the rows are `train`, then 10 % `valid` and 10 % `test`; `uniform` are rows in the place of `test` on which
    everything was shown, examined, judged, recorded rightly and waited for.

    Args:
        rows: of all splits together.
        seed: of the world and of every draw.
        preset: which world. `quickstart` shows everything and hides much of its signal in interactions; `easy`,
            `mnar`, `popular`, `confounded`, `drift` and `fair` show items selectively; `slate-plain`, `slate-pbm` and
            `slate-cascade` show lists; in `delayed` clicks are followed by conversions, some not known yet, in
            `conversion` they are those of rows that convert more easily; in `flip20` clicks get lost, in `pooled` they
            are judged only where an old retriever looked; `leaky` has the label among its fields.
        users: number of users, in place of the world's own.
        items: number of items, in place of the world's own.
        fields: put so many plain fields (user, item, context, noise in turn) in place of the world's own.
        uniform: splits, `valid` or `test`, that are drawn like `uniform` in place of the log's own rows.
        randomised: share of the rows (requests, in lists) of the log that no policy had a hand in.
        clicks_only: leave out the rows without a click; for worlds with conversions.
        true_propensity: put the very chance of being seen, θ, into the column `propensity`, as no log can know it: in
            lists the chance of a look at the row's place, elsewhere also of what follows a trait that is not logged.
            To compare estimates with; what uses it proves nothing about a real log.
        form: what the train rows know of conversions, in worlds that have them. snapshot: what had come at the end of
            the train split. stream: every row with label 0, as it stood at once, and again with label 1 for each
            conversion that had come, at that time; in order of time, long logs in pieces. final: all that comes in the
            end, which no training could know.
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
        uniform: tuple[Literal["valid", "test"], ...] = (),
        randomised: float | None = None,
        clicks_only: bool = False,
        true_propensity: bool = False,
        form: Form = "snapshot",
    ) -> None:
        del root  # nothing is read from disk
        if rows < 10:
            raise RecipeError(f"simulated logs: rows is {rows}, must be at least 10 so that every split has one")
        self.config: WorldConfig = make_config(
            preset,
            rows=rows,
            seed=seed,
            users=users,
            items=items,
            fields=fields,
            randomised=randomised,
            clicks_only=clicks_only,
        )
        self._uniform = ("uniform", *uniform)
        self._form, self._true = form, true_propensity
        if form != "snapshot" and self.config.conversion is None:
            raise RecipeError(f"simulated logs: form {form}: no conversion comes late in the world '{preset}'")
        if form == "final" and self.config.conversion is not None:
            self.config = replace(self.config, conversion=replace(self.config.conversion, now=0.0))

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
        """Return what is known about the rows of `scan(split)`.

        `rho` and `gamma`, logit and probability of the relevance `R`; `theta` that of being seen, `O`; `pop`, `attr`,
        `h`; `chance`, the probability that drew `y`; and, where the world has them, `pi_k` of the policy, `phi` of a
        lost click, `lambda_sel` of being judged, the logit `zeta` and the outcome `Z` of a conversion, `true_delay`.

        Raises:
            DataError: no such split.
        """
        return self._frame(split, truth=True)

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        parts = [f"simulated-{VERSION}-{config_digest(self.config)}", *sorted(self._uniform)]
        parts += ["stream"] * (self._form == "stream") + ["true"] * self._true
        return "-".join(parts)

    def reference(self, split: str) -> dict[str, float]:
        """Return metric → its value for the probability that drew `y`, which no model can beat but by luck.

        NaN means undefined: every label of the split is the same.
        """
        start, stop, region = self._span(split)
        chance, label = [], []
        for a, b in _blocks(start, stop):
            log, truth = self.world.rows(a, b, region)
            chance.append(truth["chance"].to_numpy())
            label.append(log["y"].to_numpy())
        p, y = np.concatenate(chance), np.concatenate(label)
        with np.errstate(divide="ignore"):  # a label may be certain; its own logarithm is then 0
            loss = -np.where(y == 1, np.log(p), np.log1p(-p))
        return {"auc": auc(p, y), "logloss": float(loss.mean())}

    def best_auc(self, split: str) -> float:
        """Return the AUC of the true click probability against the labels of a split, ties counted half."""
        return self.reference(split)["auc"]

    def _span(self, split: str) -> tuple[int, int, Region]:
        if split not in SPLITS:
            raise MissingSplit(
                f"simulated logs: no split '{split}'.{did_you_mean(split, SPLITS)} There are: {listing(SPLITS)}"
            )
        first, last = SPLITS[split]
        region = Region.UNIFORM if split in self._uniform else Region.LOG
        return round(first * self.config.rows), round(last * self.config.rows), region

    def _frame(self, split: str, truth: bool) -> pl.LazyFrame:
        start, stop, region = self._span(split)
        doubled = self._form == "stream" and split == "train"

        def rows(a: int, b: int) -> pl.DataFrame:
            log, told = self.world.rows(a, b, region)
            if self._true:
                log = log.with_columns(told["theta"].cast(pl.Float32).alias("propensity"))
            return (_streamed(log, told) if doubled else (log, told))[truth]

        if stop - start <= BLOCK:
            return rows(start, stop).lazy()
        empty = rows(start, start)
        whole = doubled or self.config.clicks_only  # a block's first rows are not those of its beginning

        def blocks(
            columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, batch: int | None
        ) -> Iterator[pl.DataFrame]:
            left = 2 * (stop - start) if limit is None else limit  # no row comes more than twice
            for a, b in _blocks(start, stop):
                if left <= 0:
                    return
                frame = rows(a, b if whole else min(b, a + left)).head(left)
                left -= len(frame)
                if predicate is not None:
                    frame = frame.filter(predicate)
                yield frame if columns is None else frame.select(columns)

        return register_io_source(blocks, schema=empty.schema, is_pure=True)


def _streamed(log: pl.DataFrame, truth: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return log and truth, by time, of every row as it stood before its conversion and, where it has one, after it."""
    came = log["conversion"] == 1
    later = (pl.col("ts") + (pl.col("delay").cast(pl.Float64) * DAY).round().cast(pl.Int64)).alias("ts")
    never = [pl.lit(0).cast(log.schema[name]).alias(name) for name in ("y", "conversion", "delay")]
    both = pl.concat([log.with_columns(never), log.filter(came).with_columns(later)])
    order = both.select(pl.arg_sort_by("ts", "y", maintain_order=True)).to_series()
    return both[order], pl.concat([truth, truth.filter(came)])[order]


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, BLOCK):
        yield a, min(a + BLOCK, stop)
