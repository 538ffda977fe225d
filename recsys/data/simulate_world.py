"""A simulated world: who meets what, when, and how likely a click is.

    ρ = b0 + b_u + b_i + c·√d·p_u·q_i(t) + Σ_f field effects + Σ_E pair effects + c_h·h,   γ = σ(ρ)
    R ~ Bernoulli(γ)  the user would click,   O ~ Bernoulli(θ)  the user is shown it,   y = O·R

Rows draw user and item uniformly, so the population that an estimate refers to is unambiguous. Truth about a
row is returned beside its log columns and never among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from recsys.data.simulate_config import Exposure, SimulatedField, WorldConfig
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
from recsys.data.simulate_random import CHUNK, Draws, Floats, Longs, Region, Stream
from recsys.errors import RecipeError

START = 1_704_067_200
"""2024-01-01T00:00:00Z, when every log begins."""
_DAY = 86_400.0


@dataclass(frozen=True)
class Scene:
    """Rows before anything is shown: draws, time in days, ids, field values, and the parts of the logits.

    `score` is ρ - b0. All are `[n]`; `values` holds one `[n]` per field, None for a leak.
    """

    draws: Draws
    row: Longs
    time: Floats
    user: Longs
    item: Longs
    values: list[Values | None]
    score: Floats
    log_popularity: Floats
    confounder: Floats


@dataclass(frozen=True)
class Calibration:
    """What the pilot rows set: the intercept, and centre and scale of what exposure looks at."""

    intercept: float
    log_popularity_mean: float
    score_mean: float
    score_sd: float


class World:
    """Tables of a config, and any range of its rows.

    Args:
        config: of the world.

    Raises:
        RecipeError: no intercept gives the click rate asked for.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.users: Users = make_users(config)
        self.items: ItemTable = make_items(config)
        self.tables: dict[str, FieldTable] = {}
        for position, spec in enumerate(config.fields):
            self.tables[spec.name] = make_field(config, position, self.users, self.tables)
        self._pairs = [
            (pair, pair_factors(config, number, self.tables[pair.left], self.tables[pair.right]))
            for number, pair in enumerate(config.pairs)
        ]
        self._position = {spec.name: n for n, spec in enumerate(config.fields)}
        self._user_offset, self._item_offset = self._offsets()
        self.calibration = self._calibrate()

    def rows(self, start: int, stop: int, region: Region = Region.LOG) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return log and truth of the rows `start … stop-1`; in the uniform region every row is shown."""
        parts = [self._chunk(a, min(a + CHUNK, stop), region) for a in range(start, stop, CHUNK)]
        if not parts:
            parts = [self._chunk(start, start, region)]
        return pl.concat([log for log, _ in parts]), pl.concat([truth for _, truth in parts])

    def _chunk(self, start: int, stop: int, region: Region) -> tuple[pl.DataFrame, pl.DataFrame]:
        scene = self._scene(start, stop, region, self.config.rows)
        rho = scene.score + self.calibration.intercept
        gamma = _sigmoid(rho)
        shown_to_all = self.config.exposure is None or region is Region.UNIFORM
        theta = np.ones_like(gamma) if shown_to_all else self._theta(scene, self.calibration)
        relevant = scene.draws.uniform(Stream.RELEVANCE) < gamma
        shown = scene.draws.uniform(Stream.EXPOSURE) < theta
        return self._log(scene, relevant & shown, shown), self._truth(scene, rho, gamma, theta, relevant, shown)

    def _log(self, scene: Scene, clicked: np.ndarray, shown: np.ndarray) -> pl.DataFrame:
        columns: dict[str, np.ndarray] = {
            "row_id": scene.row,
            "ts": START + np.rint(scene.time * _DAY).astype(np.int64),
            "user": scene.user,
            "item": scene.item,
        }
        label = clicked.astype(np.int8)
        for position, (spec, value) in enumerate(zip(self.config.fields, scene.values, strict=True)):
            if value is None:
                wrong = scene.draws.uniform(Stream.FIELD_VALUE + position) < spec.error
                value = (label ^ wrong).astype(np.int32)
            columns[spec.name] = value
        columns["y"] = label
        if self.config.log_exposure:
            columns["o"] = shown.astype(np.int8)
        return pl.DataFrame(columns)

    def _truth(
        self, scene: Scene, rho: Floats, gamma: Floats, theta: Floats, relevant: np.ndarray, shown: np.ndarray
    ) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "row_id": scene.row,
                "rho": rho,
                "gamma": gamma,
                "R": relevant.astype(np.int8),
                "theta": theta,
                "O": shown.astype(np.int8),
                "pop": np.exp(scene.log_popularity),
                "attr": self.users.attribute[scene.user],
                "h": scene.confounder,
            }
        )

    def _scene(self, start: int, stop: int, region: Region, total: int) -> Scene:
        """Draw rows up to their score; `total` rows fill the log's time."""
        row = np.arange(start, stop, dtype=np.int64)
        draws = Draws(self.config.seed, row + int(region))
        time = row.astype(np.float64) * (self.config.days / total)
        user = draws.below(Stream.USER, self.config.users)
        item = draws.below(Stream.ITEM, self.config.items)
        segment = self.users.segment[user]
        values = self._values(draws, user, item)
        confounder = self._confounder(user, item)
        score = self._user_offset[user] + self._item_offset[item]
        score += self.config.taste * np.sqrt(self.config.dim) * self._taste(user, item, time)
        for spec, value in zip(self.config.fields, values, strict=True):
            effect = self.tables[spec.name].effect
            if effect is not None and value is not None and not self._is_folded(spec):
                score += segment_effect(effect, segment, value, spec.cardinality)
        for pair, (a, b) in self._pairs:
            left, right = values[self._position[pair.left]], values[self._position[pair.right]]
            score += np.einsum("nr,nr->n", a[left], b[right])
        score += self.config.confounder * confounder
        return Scene(draws, row, time, user, item, values, score, self._log_popularity(item, time), confounder)

    def _values(self, draws: Draws, user: Longs, item: Longs) -> list[Values | None]:
        values: list[Values | None] = []
        for position, spec in enumerate(self.config.fields):
            stream = Stream.FIELD_VALUE + position
            table = self.tables[spec.name]
            if spec.kind == "leak":
                values.append(None)  # the label is not drawn yet
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
                values.append(pick(table.cdf, draws.uniform(stream)))
        return values

    def _taste(self, user: Longs, item: Longs, time: Floats) -> Floats:
        """Return p_u·q_i(t) `[n]`."""
        p = self.users.taste[user]  # [n, d]
        now = np.einsum("nd,nd->n", p, self.items.taste[item])
        if self.config.item.drift == 0.0:
            return np.asarray(now)
        angle = self.items.speed[item] * time
        later = np.einsum("nd,nd->n", p, self.items.taste_later[item])
        return np.asarray(np.cos(angle) * now + np.sin(angle) * later)

    def _log_popularity(self, item: Longs, time: Floats) -> Floats:
        style = self.config.item
        level = self.items.log_popularity[item]
        if style.season:
            level = level + style.season * np.sin(2.0 * np.pi * (time / 7.0 + self.items.phase[item]))
        if style.jump:
            level = level + style.jump * (time >= style.jump_at * self.config.days) * self.items.jump[item]
        return np.asarray(level)

    def _confounder(self, user: Longs, item: Longs) -> Floats:
        """Return the trait h `[n]` of user and item together, the same whenever the two meet."""
        if self.config.confounder == 0.0 and (self.config.exposure is None or self.config.exposure.confounder == 0.0):
            return np.zeros(len(user))
        return Draws(self.config.seed, user * self.config.items + item).normal(Stream.CONFOUNDER)

    @staticmethod
    def _is_folded(spec: SimulatedField) -> bool:
        """Whether an effect is part of its user's or item's offset: it is then no work per row."""
        return spec.kind == "user" or (spec.kind == "item" and not spec.gate)

    def _offsets(self) -> tuple[Floats, Floats]:
        users, items = self.users.bias.copy(), self.items.bias.copy()
        nobody = np.zeros(self.config.items, dtype=np.int64)
        for spec in self.config.fields:
            table = self.tables[spec.name]
            if table.effect is None or table.entity is None or not self._is_folded(spec):
                continue
            if spec.kind == "user":
                users += segment_effect(table.effect, self.users.segment, table.entity, spec.cardinality)
            else:
                items += segment_effect(table.effect, nobody, table.entity, spec.cardinality)
        return users, items

    def _theta(self, scene: Scene, centre: Calibration) -> Floats:
        exposure = self.config.exposure or Exposure()
        logit = exposure.bias + exposure.popularity * (scene.log_popularity - centre.log_popularity_mean)
        logit += exposure.relevance * (scene.score - centre.score_mean) / centre.score_sd
        logit += exposure.confounder * scene.confounder
        logit += exposure.attribute * (self.users.attribute[scene.user] == 1)
        return np.clip(_sigmoid(logit), exposure.least, exposure.most)

    def _calibrate(self) -> Calibration:
        """Set b0 by bisection so that the pilot's mean of γ·θ is the click rate asked for."""
        total = self.config.pilot_rows
        # Field values are most of a scene, and have done their work in the score.
        scenes = [
            replace(self._scene(a, min(a + CHUNK, total), Region.PILOT, total), values=[])
            for a in range(0, total, CHUNK)
        ]
        score = np.concatenate([scene.score for scene in scenes])
        popularity = float(np.concatenate([scene.log_popularity for scene in scenes]).mean())
        centre = Calibration(0.0, popularity, float(score.mean()), float(score.std()) or 1.0)
        shown = self.config.exposure is None
        theta = np.ones(1) if shown else np.concatenate([self._theta(scene, centre) for scene in scenes])
        if theta.mean() <= self.config.target_ctr:
            raise RecipeError(
                f"simulated logs: a click rate of {self.config.target_ctr} cannot be reached when only "
                f"{theta.mean():.4f} of the rows are shown; lower target_ctr or raise the exposure bias"
            )
        low, high = -40.0, 40.0
        for _ in range(52):  # 80·2^-52: as close as float64 tells apart
            middle = 0.5 * (low + high)
            if float((_sigmoid(score + middle) * theta).mean()) < self.config.target_ctr:
                low = middle
            else:
                high = middle
        return Calibration(0.5 * (low + high), centre.log_popularity_mean, centre.score_mean, centre.score_sd)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
