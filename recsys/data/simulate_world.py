"""A simulated world: who meets what, when, and how likely a click is.

    ρ = b0 + b_u + b_i + c·√d·p_u·q_i(t) + Σ_f field effects + Σ_E pair effects + c_h·h,   γ = σ(ρ)
    R ~ Bernoulli(γ)  the user would click,   O ~ Bernoulli(θ)  the user sees it,   click = O·R

Without slates, rows draw user and item uniformly, so the population that an estimate refers to is unambiguous. The
label y is the click, or what was recorded, judged or came of it. Truth about a row is returned beside its log columns
and never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import polars as pl

from recsys.data.simulate_after import Afterwards, Columns, Fate
from recsys.data.simulate_config import WorldConfig
from recsys.data.simulate_exposure import (
    Calibration,
    Seen,
    attraction,
    cascade,
    exposure,
    known_exposure,
    pbm,
    see_row,
    see_slate,
    sigmoid,
)
from recsys.data.simulate_random import CHUNK, Floats, Region, Stream
from recsys.data.simulate_scene import Flags, Scene, draw_pairs
from recsys.data.simulate_slates import draw_slates
from recsys.data.simulate_tables import Tables
from recsys.errors import RecipeError

START = 1_704_067_200
"""2024-01-01T00:00:00Z, when every log begins."""
_DAY = 86_400.0


class World:
    """Tables of a config, and any range of its rows.

    Args:
        config: of the world.

    Raises:
        RecipeError: no intercept gives the click rate asked for.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.tables = Tables(config)
        self.afterwards = Afterwards(self.tables)
        self.calibration = self._calibrate()

    def rows(self, start: int, stop: int, region: Region = Region.LOG) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return log and truth of the rows `start … stop-1`; in the uniform region every row is shown.

        Where the world keeps its clicks only, the others are left out.
        """
        length = 1 if self.config.slate is None else self.config.slate.length
        scenes = self._scenes(start // length, -(-stop // length), region, self.config.rows)
        parts = [self._frames(scene) for scene in scenes]
        if not parts:
            parts = [self._frames(scene) for scene in self._scenes(0, 1, region, self.config.rows)]
            return parts[0][0].clear(), parts[0][1].clear()
        first = start // length * length
        log, truth = (pl.concat([p[side] for p in parts])[start - first : stop - first] for side in (0, 1))
        if self.config.clicks_only:
            clicked = log["click"] == 1
            log, truth = log.filter(clicked), truth.filter(clicked)
        return log, truth

    def _scenes(self, first: int, last: int, region: Region, total: int) -> Iterator[Scene]:
        """Draw the rows, or the requests, `first … last-1` piece by piece; `total` rows fill the log's time."""
        slate = self.config.slate
        # Candidates are what is many in a slate.
        step = CHUNK if slate is None else max(1, CHUNK // slate.candidates)
        for a in range(first, last, step):
            b = min(a + step, last)
            if slate is None:
                yield draw_pairs(self.tables, a, b, region, total)
            else:
                yield draw_slates(self.tables, slate, a, b, region, total)

    def _frames(self, scene: Scene) -> tuple[pl.DataFrame, pl.DataFrame]:
        rho = scene.score + self.calibration.intercept
        gamma = sigmoid(rho)
        relevant = scene.draws.uniform(Stream.RELEVANCE) < gamma
        seen = self._see(scene, gamma, relevant)
        fate = Fate(seen.clicked, seen.chance, {}, {})
        for then in (self.afterwards.record, self.afterwards.judge, self.afterwards.follow):
            after = then(scene, self.calibration, fate.label, fate.chance)
            fate = Fate(after.label, after.chance, fate.log | after.log, fate.truth | after.truth)
        return self._log(scene, seen, fate), self._truth(scene, rho, gamma, relevant, seen, fate)

    def _see(self, scene: Scene, gamma: Floats, relevant: Flags) -> Seen:
        if self.config.slate is not None:
            return see_slate(self.tables, self.config.slate, scene, gamma, relevant)
        return see_row(self.tables, scene, self.calibration, gamma, relevant)

    def _log(self, scene: Scene, seen: Seen, fate: Fate) -> pl.DataFrame:
        columns: Columns = {"row_id": scene.row, "ts": START + np.rint(scene.time * _DAY).astype(np.int64)}
        if self.config.slate is not None:
            columns["request"] = scene.row // self.config.slate.length
            columns["position"] = (scene.row % self.config.slate.length).astype(np.int32)
        columns |= {"user": scene.user, "item": scene.item}
        label = fate.label.astype(np.int8)
        for position, (spec, value) in enumerate(zip(self.config.fields, scene.values, strict=True)):
            if value is None:
                wrong = scene.draws.uniform(Stream.FIELD_VALUE + position) < spec.error
                value = (label ^ wrong).astype(np.int32)
            columns[spec.name] = value
        columns["y"] = label
        columns |= {name: self._logged(name, scene, seen) for name in self.config.log}
        return pl.DataFrame(columns | fate.log)

    def _logged(self, name: str, scene: Scene, seen: Seen) -> np.ndarray:
        if name == "observed":
            return seen.seen.astype(np.int8)
        if name == "uniform":
            return scene.randomised.astype(np.int8)
        if name == "attribute":
            return self.tables.users.told_attribute[scene.user]
        if name == "popularity":
            return self.tables.popularity(scene.item, scene.time).astype(np.float32)
        known = known_exposure(self.tables, scene, self.calibration, seen.theta)
        return (known if scene.choice is None else scene.choice).astype(np.float32)

    def _truth(self, scene: Scene, rho: Floats, gamma: Floats, relevant: Flags, seen: Seen, fate: Fate) -> pl.DataFrame:
        columns: Columns = {
            "row_id": scene.row,
            "rho": rho,
            "gamma": gamma,
            "R": relevant.astype(np.int8),
            "theta": seen.theta,
            "O": seen.seen.astype(np.int8),
            "pop": np.exp(scene.log_popularity),
            "attr": self.tables.users.attribute[scene.user],
            "h": scene.confounder,
            "chance": fate.chance,
        }
        if scene.choice is not None:
            columns["pi_k"] = scene.choice
        return pl.DataFrame(columns | fate.truth)

    def _calibrate(self) -> Calibration:
        """Set the intercepts by bisection, so that the pilot rows have the rates asked for."""
        pilot = self._pilot()
        score = np.concatenate([scene.score for scene in pilot])
        popularity = float(np.concatenate([scene.log_popularity for scene in pilot]).mean())
        centre = Calibration(0.0, popularity, float(score.mean()), float(score.std()) or 1.0)
        click = self._click_chance(pilot, score, centre)
        most = float(click(40.0).mean())
        if most <= self.config.target_ctr:
            raise RecipeError(
                f"simulated logs: a click rate of {self.config.target_ctr} cannot be reached when only "
                f"{most:.4f} of the rows are shown; lower target_ctr or raise the exposure bias"
            )
        centre = replace(centre, intercept=_solve(lambda b: float(click(b).mean()), self.config.target_ctr))
        return self._calibrate_afterwards(pilot, centre, click(centre.intercept))

    def _pilot(self) -> list[Scene]:
        slate = self.config.slate
        total = self.config.pilot_rows
        length = 1 if slate is None else slate.length
        keep = self.config.conversion is not None or (slate is not None and len(slate.decay) > 1)
        # Field values are most of a scene, and have mostly done their work in the score.
        return [
            scene if keep else replace(scene, values=[])
            for scene in self._scenes(0, -(-total // length), Region.PILOT, total)
        ]

    def _click_chance(self, pilot: list[Scene], score: Floats, centre: Calibration) -> Callable[[float], Floats]:
        """Return the function from intercept to the click probabilities of the pilot rows."""
        slate = self.config.slate
        if slate is not None:
            places = np.concatenate([pbm(self.tables, slate, s) for s in pilot]) if slate.click == "pbm" else None

            def click(intercept: float) -> Floats:
                attracts = attraction(slate, sigmoid(score + intercept))
                return attracts * (cascade(slate, attracts) if places is None else places)

            return click
        shown = self.config.exposure is None
        theta = np.ones(1) if shown else np.concatenate([exposure(self.tables, s, centre) for s in pilot])
        return lambda intercept: sigmoid(score + intercept) * theta

    def _calibrate_afterwards(self, pilot: list[Scene], centre: Calibration, click: Floats) -> Calibration:
        flip, conversion = self.config.flip, self.config.conversion
        if flip is not None:
            wrong = np.concatenate([self.afterwards.flip_logit(flip, s) for s in pilot])
            centre = replace(centre, flip=_solve_mean(wrong, click, flip.rate))
        if conversion is not None:
            own = np.concatenate([self.afterwards.conversion_logit(conversion, s, centre) for s in pilot])
            centre = replace(centre, conversion=_solve_mean(own, click, conversion.rate))
        return centre


def _solve_mean(logit: Floats, weight: Floats, target: float) -> float:
    """Return the constant that makes the weighted mean of σ(logit + constant) the target."""
    return _solve(lambda c: float((sigmoid(logit + c) * weight).sum() / weight.sum()), target)


def _solve(rate: Callable[[float], float], target: float) -> float:
    """Return where an increasing function meets the target."""
    low, high = -40.0, 40.0
    for _ in range(52):  # 80·2^-52: as close as float64 tells apart
        middle = 0.5 * (low + high)
        if rate(middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
