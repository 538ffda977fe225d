"""Who gets to see what, and what of it gets a click: single rows, and lists that are looked through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.data.simulate_config import Exposure, Slate, WorldConfig
from recsys.data.simulate_random import Floats, Region, Stream
from recsys.data.simulate_scene import Flags, Scene
from recsys.data.simulate_tables import Tables

_NODES = 15


@dataclass(frozen=True)
class Calibration:
    """What the pilot rows set: intercepts, and centre and scale of what exposure looks at."""

    intercept: float
    log_popularity_mean: float
    score_mean: float
    score_sd: float
    flip: float = 0.0
    conversion: float = 0.0

    def standard(self, score: Floats) -> Floats:
        """Return ρ' of ρ - b0."""
        return (score - self.score_mean) / self.score_sd


@dataclass(frozen=True)
class Seen:
    """What became of rows: probability of being seen, whether they were, probability of a click, and the click."""

    theta: Floats
    seen: Flags
    chance: Floats
    clicked: Flags


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def exposure(tables: Tables, scene: Scene, calibration: Calibration) -> Floats:
    """Return θ `[n]` of rows that are shown one by one; 1 where nobody chose."""
    config = tables.config
    if config.exposure is None or scene.region is Region.UNIFORM:
        return np.ones(len(scene.row))
    x = config.exposure
    theta = np.clip(sigmoid(_exposure_logit(tables, x, scene, calibration)), x.least, x.most)
    return np.where(scene.randomised, 1.0, theta) if config.randomised else theta


def _exposure_logit(tables: Tables, x: Exposure, scene: Scene, calibration: Calibration) -> Floats:
    logit = x.bias + x.popularity * (scene.log_popularity - calibration.log_popularity_mean)
    logit += x.relevance * (scene.score - calibration.score_mean) / calibration.score_sd
    logit += x.confounder * scene.confounder
    logit += x.attribute * (tables.users.attribute[scene.user] == 1)
    return np.asarray(logit)


def known_exposure(tables: Tables, scene: Scene, calibration: Calibration, theta: Floats) -> Floats:
    """Return θ `[n]` as the log can tell it: its mean over the trait h, which is not logged."""
    config, x = tables.config, tables.config.exposure
    if x is None or scene.region is Region.UNIFORM:
        return theta
    slope = x.confounder + x.relevance * config.confounder / calibration.score_sd
    if slope == 0.0:
        return theta
    logit = _exposure_logit(tables, x, scene, calibration) - slope * scene.confounder
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    known = np.zeros(len(logit))
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        known += weight * np.clip(sigmoid(logit + slope * node), x.least, x.most)
    return np.where(scene.randomised, 1.0, known) if config.randomised else known


def see_row(tables: Tables, scene: Scene, calibration: Calibration, gamma: Floats, relevant: Flags) -> Seen:
    """Show rows one by one: a click is what is shown and relevant."""
    theta = exposure(tables, scene, calibration)
    shown = scene.draws.uniform(Stream.EXPOSURE) < theta
    return Seen(theta, shown, gamma * theta, relevant & shown)


def see_slate(tables: Tables, slate: Slate, scene: Scene, gamma: Floats, relevant: Flags) -> Seen:
    """Look through lists; in the uniform region every place is examined, and clicks are relevance."""
    if scene.region is Region.UNIFORM:
        whole = np.ones(len(gamma))
        return Seen(whole, whole > 0, gamma, relevant)
    attracts = attraction(slate, gamma)
    attracted = np.where(
        relevant,
        scene.draws.uniform(Stream.FLIP_PLUS) >= slate.blind,
        scene.draws.uniform(Stream.FLIP_MINUS) < _trust(slate, len(gamma)),
    )
    u = scene.draws.uniform(Stream.EXAMINE)
    if slate.click == "pbm":
        theta = pbm(tables, slate, scene)
        examined = u < theta
    else:
        theta = cascade(slate, attracts)
        examined = _alive(slate, attracted, u < slate.stop)
    return Seen(theta, examined, theta * attracts, attracted & examined)


def attraction(slate: Slate, gamma: Floats) -> Floats:
    """Return the probability `[n]` that what is examined gets a click."""
    return gamma * (1.0 - slate.blind) + (1.0 - gamma) * _trust(slate, len(gamma))


def _trust(slate: Slate, rows: int) -> Floats:
    return np.asarray(slate.trust / (np.arange(rows) % slate.length + 1.0))


def pbm(tables: Tables, slate: Slate, scene: Scene) -> Floats:
    """Return the probability of examination `[n]`: a matter of place and device."""
    decay = np.asarray(slate.decay)
    power = decay[scene.values[device_position(tables.config, slate)]] if len(decay) > 1 else decay[0]
    return np.asarray((np.arange(len(scene.row)) % slate.length + 1.0) ** -power)


def device_position(config: WorldConfig, slate: Slate) -> int:
    """Return where among the fields the device is."""
    return [f.name for f in config.fields].index(slate.device)


def cascade(slate: Slate, attracts: Floats) -> Floats:
    """Return the probability of examination `[n]`: nothing above it has ended the search."""
    goes_on = np.cumprod(1.0 - slate.stop * attracts.reshape(-1, slate.length), axis=1)  # [R, K]
    return np.concatenate([np.ones((len(goes_on), 1)), goes_on[:, :-1]], axis=1).reshape(-1)


def _alive(slate: Slate, attracted: Flags, would_stop: Flags) -> Flags:
    ends = (attracted & would_stop).reshape(-1, slate.length)
    before = np.logical_or.accumulate(ends, axis=1)[:, :-1]
    return ~np.concatenate([np.zeros((len(ends), 1), dtype=bool), before], axis=1).reshape(-1)
