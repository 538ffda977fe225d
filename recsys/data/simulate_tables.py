"""What users, items and field values of a world add to the logit of a click."""

from __future__ import annotations

import numpy as np

from recsys.data.simulate_config import SimulatedField, WorldConfig
from recsys.data.simulate_entities import (
    FieldTable,
    ItemTable,
    Users,
    Values,
    make_field,
    make_items,
    make_users,
    owner_of,
    pair_factors,
    pick,
    scatter_error,
    segment_effect,
)
from recsys.data.simulate_random import Draws, Floats, Longs, Stream

MOVING = ("user", "item", "context")
"""Kinds of field that move the click."""


class Tables:
    """The tables of a config: made once, read for every row.

    Args:
        config: of the world.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.users: Users = make_users(config)
        self.items: ItemTable = make_items(config)
        self.fields: dict[str, FieldTable] = {}
        for position, spec in enumerate(config.fields):
            self.fields[spec.name] = make_field(config, position, self.users, self.fields)
        self.pairs = [
            (pair, pair_factors(config, number, self.fields[pair.left], self.fields[pair.right]))
            for number, pair in enumerate(config.pairs)
        ]
        self._position = {spec.name: n for n, spec in enumerate(config.fields)}
        self.user_offset, self.item_offset = self._offsets()
        self._changing = bool(config.item.season or config.item.jump)
        self._levels: dict[int, Floats] = {}

    def values(
        self, draws: Draws, context: Draws, user: Longs, item: Longs, only: tuple[str, ...] | None = None
    ) -> list[Values | None]:
        """Return each field's values `[n]`; None for a leak, whose label is not drawn yet, and for kinds not asked for.

        Args:
            draws: of the rows.
            context: of what the rows' context belongs to: the rows themselves, or their requests.
            user: `[n]`.
            item: `[n]`.
            only: kinds of field that are wanted; None for all.
        """
        values: list[Values | None] = []
        for position, spec in enumerate(self.config.fields):
            stream = Stream.FIELD_VALUE + position
            table = self.fields[spec.name]
            if spec.kind == "leak" or (only is not None and spec.kind not in only):
                values.append(None)
            elif spec.kind == "copy":
                source = values[self._position[spec.of]]
                assert table.order is not None
                values.append(scatter_error(table.order[source], draws.uniform(stream), spec.error, len(table.cdf)))
            elif spec.kind == "proxy":
                decile = (self.items.rank[item] * spec.cardinality // self.config.items).astype(np.int32)
                values.append(scatter_error(decile, draws.uniform(stream), spec.error, spec.cardinality))
            elif table.entity is not None:
                values.append(table.entity[user if owner_of(spec) == "user" else item])
            else:
                values.append(pick(table.cdf, (context if spec.kind == "context" else draws).uniform(stream)))
        return values

    def score(self, user: Longs, item: Longs, taste: Floats, values: list[Values | None], confounder: Floats) -> Floats:
        """Return ρ - b0 `[n]`.

        Args:
            user: `[n]`.
            item: `[n]`.
            taste: p_u·q_i(t) `[n]`.
            values: `[n]` of each field.
            confounder: `[n]`.
        """
        score = self.user_offset[user] + self.item_offset[item]
        score += self.config.taste * np.sqrt(self.config.dim) * taste
        segment: Longs | None = None
        for spec, value in zip(self.config.fields, values, strict=True):
            effect = self.fields[spec.name].effect
            if effect is not None and value is not None and not is_folded(spec):
                segment = self.users.segment[user] if segment is None else segment
                score += segment_effect(effect, segment, value, spec.cardinality)
        for pair, (a, b) in self.pairs:
            left, right = values[self._position[pair.left]], values[self._position[pair.right]]
            score += np.einsum("nr,nr->n", a[left], b[right])
        score += self.config.confounder * confounder
        return score

    def taste(self, user: Longs, item: Longs, time: Floats) -> Floats:
        """Return p_u·q_i(t) `[n]`."""
        p = self.users.taste[user]  # [n, d]
        now = np.einsum("nd,nd->n", p, self.items.taste[item])
        if self.config.item.drift == 0.0:
            return np.asarray(now)
        angle = self.items.speed[item] * time
        later = np.einsum("nd,nd->n", p, self.items.taste_later[item])
        return np.asarray(np.cos(angle) * now + np.sin(angle) * later)

    def log_popularity(self, item: Longs | slice, time: Floats | np.float64) -> Floats:
        """Return ln pop_i(t) `[n]`: base, weekly season, and a jump of all at once."""
        style = self.config.item
        level = self.items.log_popularity[item]
        if style.season:
            level = level + style.season * np.sin(2.0 * np.pi * (time / 7.0 + self.items.phase[item]))
        if style.jump:
            level = level + style.jump * (time >= style.jump_at * self.config.days) * self.items.jump[item]
        return np.asarray(level)

    def levels(self, day: int) -> Floats:
        """Return ln pop `[I]` as a day begins."""
        key = day if self._changing else 0
        if key not in self._levels:
            self._levels[key] = self.log_popularity(slice(None), np.float64(key))
        return self._levels[key]

    def popularity(self, item: Longs, time: Floats) -> Floats:
        """Return the popularity `[n]` as a log tells it: that of the day's most popular item is 1."""
        if not self._changing:
            return np.asarray(np.exp(self.levels(0)[item] - self.levels(0).max()))
        level, day = np.empty(len(item)), time.astype(np.int64)
        for d in np.unique(day):
            levels = self.levels(int(d))
            level[day == d] = levels[item[day == d]] - levels.max()
        return np.asarray(np.exp(level))

    def confounder(self, user: Longs, item: Longs) -> Floats:
        """Return the trait h `[n]` of user and item together, the same whenever the two meet."""
        if self.config.confounder == 0.0 and (self.config.exposure is None or self.config.exposure.confounder == 0.0):
            return np.zeros(len(user))
        return Draws(self.config.seed, user * self.config.items + item).normal(Stream.CONFOUNDER)

    def _offsets(self) -> tuple[Floats, Floats]:
        users, items = self.users.bias.copy(), self.items.bias.copy()
        nobody = np.zeros(self.config.items, dtype=np.int64)
        for spec in self.config.fields:
            table = self.fields[spec.name]
            if table.effect is None or table.entity is None or not is_folded(spec):
                continue
            if spec.kind == "user":
                users += segment_effect(table.effect, self.users.segment, table.entity, spec.cardinality)
            else:
                items += segment_effect(table.effect, nobody, table.entity, spec.cardinality)
        return users, items


def is_folded(spec: SimulatedField) -> bool:
    """Whether an effect is part of its user's or item's offset: it is then no work per row."""
    return spec.kind == "user" or (spec.kind == "item" and not spec.gate)
