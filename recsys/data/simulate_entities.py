"""The tables of a simulated world: users, items, field values and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.data.simulate_config import SimulatedField, WorldConfig
from recsys.data.simulate_random import Draws, Floats, Longs, Stream, scale

Values = npt.NDArray[np.int32]

_TINY = 1e-12
"""Divides the effects of a field with a single value, which are 0 already."""


@dataclass(frozen=True)
class Users:
    """Per user: attribute class `[U]`, the one that is told (-1: none), segment, intercept and taste `[U, d]`."""

    attribute: Longs
    told_attribute: Longs
    segment: Longs
    bias: Floats
    taste: Floats


@dataclass(frozen=True)
class ItemTable:
    """Per item: rank, base log popularity, season's phase, jump, intercept, turn per day `[I]`; tastes `[I, d]`."""

    rank: Longs
    log_popularity: Floats
    phase: Floats
    jump: Floats
    bias: Floats
    speed: Floats
    taste: Floats
    taste_later: Floats


@dataclass(frozen=True)
class FieldTable:
    """One field: distribution function `[V]`, values of its entities (or None), and the effect of a value.

    `effect` is `[G·V]` when the field is gated by segment and belongs to the row or the item, else `[V]`; None
    when the field moves nothing. `order` is a copy's renumbering of the values.
    """

    cdf: Floats
    entity: Values | None
    effect: Floats | None
    order: Values | None = None


def zipf_cdf(cardinality: int, exponent: float) -> Floats:
    """Return the distribution function `[V]` of P(v) ∝ (v + 1)^-exponent."""
    weight = np.arange(1, cardinality + 1, dtype=np.float64) ** -exponent
    return np.asarray(np.cumsum(weight) / weight.sum())


def pick(cdf: Floats, u: Floats) -> Values:
    """Return the values `[n]` that `u` in (0, 1) stands for under a distribution function `[V]`."""
    # Without the last entry nothing can fall beyond the last value, whatever the rounding of the sum.
    return np.searchsorted(cdf[:-1], u, side="right").astype(np.int32)


def make_users(config: WorldConfig) -> Users:
    """Draw the users: p_u = √(1-κ)·n_u + √κ·m_a with n_u ~ N(0, I/d) and m_a the unit vector of the class."""
    draws = Draws.span(config.seed, 0, config.users)
    shares = np.cumsum(np.asarray(config.attribute, dtype=np.float64))
    attribute = pick(shares / shares[-1], draws.uniform(Stream.USER_ATTRIBUTE)).astype(np.int64)
    taste = latent(config.seed, Stream.USER_LATENT, config.users, config.dim) * np.sqrt(1.0 - config.attribute_leak)
    taste[np.arange(config.users), attribute] += np.sqrt(config.attribute_leak)
    known = draws.uniform(Stream.ATTRIBUTE_KNOWN) < config.attribute_known
    return Users(
        attribute=attribute,
        told_attribute=np.where(known, attribute, -1),
        segment=draws.below(Stream.USER_SEGMENT, config.segments),
        bias=config.bias * draws.normal(Stream.USER_BIAS),
        taste=taste,
    )


def make_items(config: WorldConfig) -> ItemTable:
    """Draw the items; q_i(t) = cos(ω_i t)·taste + sin(ω_i t)·taste_later with ω_i = 2πν·u."""
    draws = Draws.span(config.seed, 0, config.items)
    by_rank = np.argsort(draws.uniform(Stream.POPULARITY_RANK), kind="stable")
    rank = np.empty(config.items, dtype=np.int64)
    rank[by_rank] = np.arange(config.items)
    return ItemTable(
        rank=rank,
        log_popularity=-config.item.skew * np.log(rank + 1.0),
        phase=draws.uniform(Stream.POPULARITY_PHASE),
        jump=draws.normal(Stream.POPULARITY_JUMP),
        bias=config.bias * draws.normal(Stream.ITEM_BIAS),
        speed=2.0 * np.pi * config.item.drift * draws.uniform(Stream.ITEM_SPEED),
        taste=latent(config.seed, Stream.ITEM_LATENT_A, config.items, config.dim),
        taste_later=latent(config.seed, Stream.ITEM_LATENT_B, config.items, config.dim),
    )


def latent(seed: int, stream: Stream, count: int, dim: int) -> Floats:
    """Return N(0, I/d) rows `[count, d]`; the index of an entry is entity·d + k."""
    flat = Draws.span(seed, 0, count * dim).normal(stream)
    return np.asarray(flat.reshape(count, dim) / np.sqrt(dim))


def make_field(config: WorldConfig, position: int, users: Users, earlier: Mapping[str, FieldTable]) -> FieldTable:
    """Draw the tables of the field at `position` of the config."""
    spec = config.fields[position]
    if spec.kind == "copy":
        source = earlier[spec.of]
        size = len(source.cdf)
        order = np.argsort(Draws.span(config.seed, 0, size).uniform(Stream.FIELD_EFFECT + position), kind="stable")
        return FieldTable(source.cdf, None, None, order.astype(np.int32))
    cdf = zipf_cdf(spec.cardinality, spec.zipf)
    entity = _entity_values(config, position, cdf)
    if spec.kind not in ("user", "item", "context"):
        return FieldTable(cdf, entity, None)
    effect = centred_effect(config.seed, Stream.FIELD_EFFECT + position, cdf, entity, spec.strength)
    if spec.gate:
        # [G] x [V] -> [G·V]: one gather at segment·V + value.
        effect = np.outer(np.asarray(spec.gate, dtype=np.float64), effect).reshape(-1)
    return FieldTable(cdf, entity, effect)


def centred_effect(seed: int, stream: int, cdf: Floats, entity: Values | None, strength: float) -> Floats:
    """Return normal effects of values `[V]` with mean 0 and standard deviation `strength` over rows."""
    weight = frequencies(cdf, entity)
    raw = Draws.span(seed, 0, len(cdf)).normal(stream)
    centred = raw - (weight * raw).sum()
    return np.asarray(centred * (strength / max(float(np.sqrt((weight * centred**2).sum())), _TINY)))


def _entity_values(config: WorldConfig, position: int, cdf: Floats) -> Values | None:
    owner = owner_of(config.fields[position])
    if owner == "row":
        return None
    count = config.users if owner == "user" else config.items
    return pick(cdf, Draws.span(config.seed, 0, count).uniform(Stream.FIELD_VALUE + position))


def owner_of(spec: SimulatedField) -> str:
    """Return who a field's value belongs to: `row`, `user` or `item`."""
    if spec.kind == "noise":
        return spec.per
    return spec.kind if spec.kind in ("user", "item") else "row"


def frequencies(cdf: Floats, entity: Values | None) -> Floats:
    """Return how often each value occurs `[V]`; entities are equally frequent, so theirs are counted."""
    if entity is None:
        return np.diff(cdf, prepend=0.0)
    return np.bincount(entity, minlength=len(cdf)) / len(entity)


def pair_factors(config: WorldConfig, number: int, left: FieldTable, right: FieldTable) -> tuple[Floats, Floats]:
    """Return `a [V, r]` and `b [V', r]` with the effect of a pair of values a[v]·b[v'].

    Both have weighted mean 0 over values, so that the pair leaks nothing into either field alone; together they
    are scaled so that the effect has the standard deviation asked for over pairs of independent values.
    """
    pair = config.pairs[number]
    sides: list[Floats] = []
    moments = np.ones((pair.rank, pair.rank))  # E[(a·b)²] = Σ_kl E[a_k a_l]·E[b_k b_l]
    for side, table in enumerate((left, right)):
        size = len(table.cdf)
        flat = Draws.span(config.seed, 0, size * pair.rank).normal(Stream.PAIR_EFFECT + 2 * number + side)
        factor = flat.reshape(size, pair.rank)
        weight = frequencies(table.cdf, table.entity)
        centred = factor - (weight[:, None] * factor).sum(axis=0)
        moments *= centred.T @ (weight[:, None] * centred)  # [r, r]
        sides.append(centred)
    return sides[0] * (pair.strength / max(float(np.sqrt(moments.sum())), _TINY)), sides[1]


def segment_effect(effect: Floats, segment: Longs, value: Values | Longs, cardinality: int) -> Floats:
    """Return what values `[n]` add to the logit, through a `[V]` or a `[G·V]` table."""
    if len(effect) == cardinality:
        return effect[value]
    return np.asarray(effect[segment * cardinality + value])


def scatter_error(value: Values, u: Floats, error: float, cardinality: int) -> Values:
    """Replace values by chance where `u < error`; below the error, u / error is itself uniform."""
    if error <= 0.0:
        return value
    return np.where(u < error, scale(np.minimum(u / error, 1.0), cardinality), value).astype(np.int32)
