"""Rows of a simulated log before anybody sees them: who meets what, when, and how well the two fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.data.simulate_entities import Values
from recsys.data.simulate_random import Draws, Floats, Longs, Region, Stream
from recsys.data.simulate_tables import Tables

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """Rows before anything is shown: draws, time in days, ids, field values, and the parts of the logits.

    `score` is ρ - b0; `randomised` tells the rows that no policy had a hand in; `choice` is the probability with
    which a slate's policy put the item there, None without slates. All are `[n]`; `values` holds one `[n]` per field,
    None for a leak.
    """

    region: Region
    draws: Draws
    row: Longs
    time: Floats
    user: Longs
    item: Longs
    values: list[Values | None]
    score: Floats
    log_popularity: Floats
    confounder: Floats
    randomised: Flags
    choice: Floats | None = None


def draw_pairs(tables: Tables, start: int, stop: int, region: Region, total: int) -> Scene:
    """Draw rows of independent user and item, both uniform; `total` rows fill the log's time."""
    config = tables.config
    row = np.arange(start, stop, dtype=np.int64)
    draws = Draws(config.seed, row + int(region))
    time = row.astype(np.float64) * (config.days / total)
    user = draws.below(Stream.USER, config.users)
    item = draws.below(Stream.ITEM, config.items)
    return make_scene(tables, region, draws, draws, row, time, user, item, randomised(tables, region, draws))


def make_scene(
    tables: Tables,
    region: Region,
    draws: Draws,
    context: Draws,
    row: Longs,
    time: Floats,
    user: Longs,
    item: Longs,
    randomised: Flags,
    choice: Floats | None = None,
) -> Scene:
    """Return rows whose user and item are known, with all that follows from these."""
    values = tables.values(draws, context, user, item)
    confounder = tables.confounder(user, item)
    score = tables.score(user, item, tables.taste(user, item, time), values, confounder)
    level = tables.log_popularity(item, time)
    return Scene(region, draws, row, time, user, item, values, score, level, confounder, randomised, choice)


def randomised(tables: Tables, region: Region, draws: Draws) -> Flags:
    """Return which rows, or requests, no policy had a hand in."""
    if region is Region.UNIFORM:
        return np.ones(len(draws), dtype=bool)
    if tables.config.randomised == 0.0:
        return np.zeros(len(draws), dtype=bool)
    return draws.uniform(Stream.RANDOMISED) < tables.config.randomised
