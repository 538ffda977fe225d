"""Lists of a simulated log: who asks, what an old policy chooses, and with what probability."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recsys.data.simulate_config import MOST_CANDIDATES, Slate
from recsys.data.simulate_entities import pick
from recsys.data.simulate_random import Draws, Floats, Longs, Region, Stream, scale
from recsys.data.simulate_scene import Flags, Scene, make_scene, randomised
from recsys.data.simulate_tables import MOVING, Tables

_ATTEMPT = 36
"""Bits of a candidate's number; the number of the attempt stands above them, below the region."""
_ATTEMPTS = 15


def draw_slates(tables: Tables, slate: Slate, first: int, last: int, region: Region, total: int) -> Scene:
    """Draw the requests `first … last-1` whole: `length` rows each, in order of place.

    Args:
        tables: of the world.
        slate: how lists are made.
        first: request.
        last: request after the last one.
        region: of the draws.
        total: rows that fill the log's time.
    """
    config = tables.config
    request = np.arange(first, last, dtype=np.int64)
    asked = Draws(config.seed, request + int(region))
    time = (request * slate.length).astype(np.float64) * (config.days / total)
    user = asked.below(Stream.USER, config.users)
    by_chance = randomised(tables, region, asked)
    candidate = _candidates(tables, slate, request, time, by_chance, region)  # [R, J]
    score = _policy(tables, slate, request, user, time, candidate, by_chance, region)
    place, choice = plackett_luce(score, _noise(config.seed, slate, request, region, score.shape), slate.length)
    item = np.take_along_axis(candidate, place, axis=1).reshape(-1)  # [R, J] -> [R·K]
    row = (request[:, None] * slate.length + np.arange(slate.length)).reshape(-1)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, slate.length)

    draws = Draws(config.seed, row + int(region))
    context = Draws(config.seed, spread(request) + int(region))
    return make_scene(
        tables, region, draws, context, row, spread(time), spread(user), item, spread(by_chance), choice.reshape(-1)
    )


def plackett_luce(score: Floats, gumbel: Floats, length: int) -> tuple[Longs, Floats]:
    """Return the places `[R, K]` in the candidates, best first, and the probability of each given those above it.

    Args:
        score: ŝ/T of the candidates `[R, J]`.
        gumbel: noise `[R, J]`.
        length: K.
    """
    order = np.argsort(-(score + gumbel), axis=1, kind="stable")  # [R, J]
    ranked = np.take_along_axis(score, order, axis=1)
    # ln Σ exp of what is left, added from the last one up: an unlikely list has its probabilities too.
    left = np.logaddexp.accumulate(ranked[:, ::-1], axis=1)[:, ::-1]
    return order[:, :length], np.exp(ranked[:, :length] - left[:, :length])


def _numbers(slate: Slate, request: Longs) -> Longs:
    """Number of each candidate `[R, J]`."""
    return request[:, None] * slate.candidates + np.arange(slate.candidates)


def _candidates(tables: Tables, slate: Slate, request: Longs, time: Floats, by_chance: Flags, region: Region) -> Longs:
    """Draw distinct items `[R, J]` by the popularity of the day, or uniformly."""
    config = tables.config
    number = _numbers(slate, request)
    day = np.where(by_chance, -1, time.astype(np.int64))

    def draw(at: Longs, attempt: int, requests: Longs) -> Longs:
        u = Draws(config.seed, at + ((attempt << _ATTEMPT) + int(region))).uniform(Stream.CANDIDATE)
        item = np.empty(len(at), dtype=np.int64)
        on = day[requests]
        for d in np.unique(on):
            chosen = on == d
            item[chosen] = scale(u[chosen], config.items) if d < 0 else pick(_popularity(tables, int(d)), u[chosen])
        return item

    return _distinct(number, draw, config.items)


def _popularity(tables: Tables, day: int) -> Floats:
    """Distribution function `[I]` over items on a day."""
    weight = np.exp(tables.levels(day))
    return np.asarray(np.cumsum(weight) / weight.sum())


def _distinct(number: Longs, draw: Callable[[Longs, int, Longs], Longs], items: int) -> Longs:
    """Draw `[R, J]` items and draw repeated ones again, so that those of a request are distinct."""
    requests, width = number.shape
    who = np.repeat(np.arange(requests), width)
    item = draw(number.reshape(-1), 0, who).reshape(requests, width)
    todo = np.arange(requests)
    for attempt in range(1, _ATTEMPTS + items):
        again = _repeats(item[todo])
        some = again.any(axis=1)
        if not some.any():
            break
        todo, again = todo[some], again[some]
        r, j = np.nonzero(again)
        if attempt < _ATTEMPTS:
            item[todo[r], j] = draw(number[todo[r], j], attempt, todo[r])
        else:  # few items: take the next one that is free
            item[todo[r], j] = (item[todo[r], j] + 1) % items
    return item


def _repeats(item: Longs) -> Flags:
    """Return which items `[R, J]` stand further to the left already."""
    width = np.int64(MOST_CANDIDATES)
    key = np.sort(item * width + np.arange(item.shape[1]), axis=1)
    r, k = np.nonzero(key[:, 1:] // width == key[:, :-1] // width)
    again = np.zeros(item.shape, dtype=bool)
    again[r, key[r, k + 1] % width] = True
    return again


def _policy(
    tables: Tables,
    slate: Slate,
    request: Longs,
    user: Longs,
    time: Floats,
    candidate: Longs,
    by_chance: Flags,
    region: Region,
) -> Floats:
    """Return ŝ/T `[R, J]` of what the policy knows; 0 where it has no say."""
    requests, width = candidate.shape
    item, who = candidate.reshape(-1), np.repeat(user, width)
    when = np.repeat(time, width)
    draws = Draws(tables.config.seed, _numbers(slate, request).reshape(-1) + int(region))
    context = Draws(tables.config.seed, np.repeat(request, width) + int(region))
    values = tables.values(draws, context, who, item, only=MOVING)
    true = tables.score(who, item, tables.taste(who, item, when), values, tables.confounder(who, item))
    known = slate.relevance * (true + slate.noise * draws.normal(Stream.OLD_SCORE))
    known += slate.popularity * tables.log_popularity(item, when)
    known /= slate.temperature
    return np.where(by_chance[:, None], 0.0, known.reshape(requests, width))


def _noise(seed: int, slate: Slate, request: Longs, region: Region, shape: tuple[int, ...]) -> Floats:
    u = Draws(seed, _numbers(slate, request).reshape(-1) + int(region)).uniform(Stream.GUMBEL)
    return np.asarray(-np.log(-np.log(u)).reshape(shape))
