"""What becomes of a click in a simulated log: it is recorded wrongly, never judged, or followed by a conversion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.data.simulate_config import Conversion, Flip, Pooling
from recsys.data.simulate_entities import centred_effect, latent
from recsys.data.simulate_exposure import Calibration, sigmoid
from recsys.data.simulate_random import Floats, Region, Stream
from recsys.data.simulate_scene import Flags, Scene
from recsys.data.simulate_tables import MOVING, Tables

_MOMENT = 1e-9
"""Days."""

Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Fate:
    """Labels `[n]`, the probability of a 1, and columns for the log and for the truth."""

    label: Flags
    chance: Floats
    log: Columns
    truth: Columns


class Afterwards:
    """Vectors behind flips and effects behind conversions.

    Args:
        tables: of the world.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._flip: tuple[Floats, Floats] | None = None
        config = tables.config
        if config.flip is not None and config.flip.model == "lowrank":
            self._flip = (
                latent(config.seed, Stream.FLIP_USER, config.users, config.flip.dim),
                latent(config.seed, Stream.FLIP_ITEM, config.items, config.flip.dim),
            )
        self._effects: dict[int, Floats] = {}
        if config.conversion is not None:
            moving = [n for n, f in enumerate(config.fields) if f.kind in MOVING]
            for n in moving:
                table = tables.fields[config.fields[n].name]
                strength = 1.0 / np.sqrt(len(moving))
                self._effects[n] = centred_effect(
                    config.seed, Stream.CONVERSION_EFFECT + n, table.cdf, table.entity, strength
                )

    def flip_logit(self, flip: Flip, scene: Scene) -> Floats:
        """Return the logit of φ `[n]` without its constant."""
        if self._flip is None:
            return np.zeros(len(scene.row))
        users, items = self._flip
        return np.asarray(flip.spread * np.sqrt(flip.dim) * np.einsum("nd,nd->n", users[scene.user], items[scene.item]))

    def conversion_logit(self, conversion: Conversion, scene: Scene, calibration: Calibration) -> Floats:
        """Return ζ - ζ0 `[n]`."""
        own = np.zeros(len(scene.row))
        for n, effect in self._effects.items():
            value = scene.values[n]
            assert value is not None
            own += effect[value]
        mixed = conversion.correlation * calibration.standard(scene.score)
        mixed += np.sqrt(1.0 - conversion.correlation**2) * own
        return np.asarray(conversion.strength * mixed)

    def record(self, scene: Scene, calibration: Calibration, label: Flags, chance: Floats) -> Fate:
        """Return clicks as they are recorded; in the uniform region they are recorded as they are."""
        flip = self._tables.config.flip
        if flip is None:
            return Fate(label, chance, {}, {})
        phi = sigmoid(self.flip_logit(flip, scene) + calibration.flip)
        truth: Columns = {"phi": phi}
        if scene.region is Region.UNIFORM:
            return Fate(label, chance, {}, truth)
        lost = scene.draws.uniform(Stream.FLIP_PLUS) < phi
        made = scene.draws.uniform(Stream.FLIP_MINUS) < flip.false_positive
        chance = chance * (1.0 - phi) + (1.0 - chance) * flip.false_positive
        return Fate(np.where(label, ~lost, made), chance, {}, truth)

    def judge(self, scene: Scene, calibration: Calibration, label: Flags, chance: Floats) -> Fate:
        """Return clicks that were judged; in the uniform region, and where nobody chose, all are."""
        pooling = self._tables.config.pooling
        if pooling is None:
            return Fate(label, chance, {}, {})
        judged = judgement(pooling, scene, calibration)
        truth: Columns = {"lambda_sel": judged}
        selected = scene.draws.uniform(Stream.SELECT) < judged
        return Fate(label & selected, chance * judged, {}, truth)

    def follow(self, scene: Scene, calibration: Calibration, label: Flags, chance: Floats) -> Fate:
        """Return conversions as far as they are known; in the uniform region of every row, and all of them."""
        config = self._tables.config
        conversion = config.conversion
        if conversion is None:
            return Fate(label, chance, {}, {})
        zeta = calibration.conversion + self.conversion_logit(conversion, scene, calibration)
        converts = scene.draws.uniform(Stream.CONVERSION) < sigmoid(zeta)
        segment = self._tables.users.segment[scene.user]
        pace = np.exp(conversion.log_rate + conversion.log_rate_by_segment * segment)
        delay = (-np.log(scene.draws.uniform(Stream.DELAY))) ** (1.0 / conversion.shape) / pace
        whole = scene.region is Region.UNIFORM
        elapsed = waited(conversion, scene.time, config.days, whole)
        clicked = np.ones_like(label) if whole else label
        known = clicked & converts & (delay <= elapsed)
        come = -np.expm1(-((pace * elapsed) ** conversion.shape))
        before = 1.0 if whole or config.clicks_only else chance
        log: Columns = {
            "click": clicked.astype(np.int8),
            "conversion": known.astype(np.int8),
            "delay": np.where(known, delay, 0.0).astype(np.float32),
            "elapsed": elapsed.astype(np.float32),
        }
        truth: Columns = {"zeta": zeta, "Z": converts.astype(np.int8), "true_delay": delay}
        return Fate(known, before * sigmoid(zeta) * come, log, truth)


def judgement(pooling: Pooling, scene: Scene, calibration: Calibration) -> Floats:
    """Return λ `[n]`, the probability that a row is judged."""
    old = calibration.standard(scene.score) + pooling.noise * scene.draws.normal(Stream.OLD_SCORE)
    return np.where(scene.randomised, 1.0, sigmoid(pooling.offset + pooling.slope * old))


def waited(conversion: Conversion, time: Floats, days: float, whole: bool) -> Floats:
    """Return the days `[n]` that a conversion had to come: until the snapshot, and never more than the window."""
    if whole:
        return np.full(len(time), conversion.window)
    left = conversion.now * days - time
    # The row of the snapshot itself is the future, however its time was rounded.
    return np.where(left > _MOMENT, np.minimum(left, conversion.window), conversion.window)
