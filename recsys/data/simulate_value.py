"""What each field of a simulated world is worth: what a selector should find, and what it is led to believe."""

from __future__ import annotations

import numpy as np
import polars as pl

from recsys.data.simulate_config import SimulatedField
from recsys.data.simulate_entities import Values, frequencies, pick, segment_effect
from recsys.data.simulate_exposure import sigmoid
from recsys.data.simulate_random import Draws, Floats, Longs, Region, Stream
from recsys.data.simulate_tables import MOVING, Tables
from recsys.data.simulate_world import World

_DRAWS = 32
_TINY = 1e-12


def field_values(world: World, rows: int = 1 << 16) -> pl.DataFrame:
    """Return what each field is worth, in nats of log loss, dearest first.

    `value` is what the best predictor of relevance loses when the field alone is hidden, on uniform traffic:
    V_f = E KL(γ ‖ E_f' γ), f' being drawn 32 times from how often its values occur; `segment_g` is the same among the
    users of a segment. Noise, copies and proxies have none. `uniform` and `log` are what the field tells by itself,
    H(Ep) - E H(E[p | f]), about relevance on uniform traffic and about the label of the log, with what it would seem to
    tell by the luck of its values taken off. A field that tells much in the log and nothing on uniform traffic is one
    to be left out.

    Args:
        world: whose fields.
        rows: of the uniform slice, and of the log, that are looked at.
    """
    rows = min(rows, world.config.rows)
    free, truth = world.rows(0, rows, Region.UNIFORM)
    log, log_truth = world.rows(0, rows)
    segment = world.tables.users.segment[free["user"].to_numpy()]
    found = []
    for position, spec in enumerate(world.config.fields):
        lost = np.zeros(len(free))
        if spec.kind in MOVING:
            lost = _lost(world, position, free, truth["rho"].to_numpy(), segment)
        found.append(
            {
                "field": spec.name,
                "kind": spec.kind,
                "value": float(lost.mean()),
                **{f"segment_{g}": float(lost[segment == g].mean()) for g in range(world.config.segments)},
                "uniform": told(free[spec.name].to_numpy(), truth["gamma"].to_numpy()),
                "log": told(log[spec.name].to_numpy(), log_truth["chance"].to_numpy()),
            }
        )
    return pl.DataFrame(found).sort("value", descending=True, maintain_order=True)


def _lost(world: World, position: int, free: pl.DataFrame, rho: Floats, segment: Longs) -> Floats:
    """Return KL(γ ‖ γ without the field) `[n]`."""
    spec = world.config.fields[position]
    table = world.tables.fields[spec.name]
    cdf = np.cumsum(frequencies(table.cdf, table.entity))
    rest = rho - _part(world.tables, spec, free[spec.name].to_numpy(), free, segment)
    number = free["row_id"].to_numpy() * _DRAWS + int(Region.UNIFORM)
    without = np.zeros(len(rho))
    for k in range(_DRAWS):
        other = pick(cdf, Draws(world.config.seed, number + k).uniform(Stream.VALUE + position))
        without += sigmoid(rest + _part(world.tables, spec, other, free, segment))
    return divergence(sigmoid(rho), without / _DRAWS)


def _part(tables: Tables, spec: SimulatedField, value: Values, free: pl.DataFrame, segment: Longs) -> Floats:
    """Return what a field's values `[n]` add to ρ, by themselves and with others."""
    effect = tables.fields[spec.name].effect
    part = np.zeros(len(value)) if effect is None else segment_effect(effect, segment, value, spec.cardinality)
    for pair, (a, b) in tables.pairs:
        if spec.name == pair.left:
            part = part + np.einsum("nr,nr->n", a[value], b[free[pair.right].to_numpy()])
        elif spec.name == pair.right:
            part = part + np.einsum("nr,nr->n", a[free[pair.left].to_numpy()], b[value])
    return part


def divergence(p: Floats, q: Floats) -> Floats:
    """Return p ln(p/q) + (1 - p) ln((1 - p)/(1 - q)) `[n]`, what a prediction q loses where p is true."""
    p, q = (np.clip(x, _TINY, 1.0 - _TINY) for x in (p, q))
    return np.asarray(p * np.log(p / q) + (1.0 - p) * np.log((1.0 - p) / (1.0 - q)))


def told(value: Values, chance: Floats) -> float:
    """Return what values `[n]` tell about labels of probability `chance` `[n]`, in nats, less what luck would tell."""
    return _information(value, chance) - _information(np.roll(value, len(value) // 2), chance)


def _information(value: Values, chance: Floats) -> float:
    count = np.bincount(value)
    mean = np.bincount(value, weights=chance) / np.maximum(count, 1)
    return float((divergence(mean, np.full(len(mean), chance.mean())) * count).sum() / len(value))
