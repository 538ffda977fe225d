"""What a simulated world is made of, and the named worlds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

from recsys.data.simulate_random import FIELDS
from recsys.errors import RecipeError, did_you_mean, listing

FieldKind = Literal["user", "item", "context", "noise", "copy", "proxy", "leak"]
Preset = Literal["quickstart", "easy", "mnar", "confounded", "drift", "fair", "leaky"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

VERSION = 1
"""Of the simulator: raised when any log of an equal config would come out different."""


@dataclass(frozen=True)
class SimulatedField:
    """One column of the log, and what its values are worth.

    Args:
        name: of the column.
        kind: `user` and `item` values belong to the entity and `context` values to the row; all three move the
            click. `noise` moves nothing. `copy` repeats another field under other numbers. `proxy` is the
            item's popularity decile: it tells of exposure, not of relevance. `leak` is the label itself.
        cardinality: number of values, V.
        zipf: values are drawn with probability ∝ (v + 1)^-zipf.
        strength: standard deviation of what a value adds to the logit, σ.
        gate: one factor per user segment on the strength; empty is 1 for all.
        per: who a `noise` value belongs to.
        of: the field that a `copy` copies.
        error: probability that a value of `copy`, `proxy` or `leak` is replaced by chance.
    """

    name: str
    kind: FieldKind
    cardinality: int = 2
    zipf: float = 0.8
    strength: float = 0.0
    gate: tuple[float, ...] = ()
    per: Literal["row", "user", "item"] = "row"
    of: str = ""
    error: float = 0.1


@dataclass(frozen=True)
class Pair:
    """Two fields whose values together move the click, beyond what each does alone.

    Args:
        left: name of a field.
        right: name of another one.
        strength: standard deviation of the effect over pairs of values, σ.
        rank: of the matrix of effects.
    """

    left: str
    right: str
    strength: float
    rank: int = 2


@dataclass(frozen=True)
class Exposure:
    """Who gets to see what: θ = clip(σ(bias + popularity·Δln pop + relevance·ρ' + confounder·h + attribute·a)).

    Δln pop is centred and ρ' standardised, both over the calibration rows.
    """

    bias: float = -0.5
    popularity: float = 0.5
    relevance: float = 0.3
    confounder: float = 0.0
    attribute: float = 0.0
    least: float = 0.01
    most: float = 0.95


@dataclass(frozen=True)
class Items:
    """How items differ in popularity, and how they change with time.

    Args:
        skew: exponent s of the base popularity, (rank + 1)^-s.
        season: amplitude A of a weekly season with a phase per item.
        jump: size J of a change of all popularities at once.
        jump_at: when it happens, as a share of the log's time.
        drift: fastest turn ν of an item's taste vector, in turns per day.
    """

    skew: float = 0.8
    season: float = 0.0
    jump: float = 0.0
    jump_at: float = 0.5
    drift: float = 0.0


@dataclass(frozen=True)
class WorldConfig:
    """A whole world: equal configs give equal logs, to the last bit.

    Args:
        rows: of the log; time runs over them from 0 to `days`.
        seed: of everything.
        users: number of users, U.
        items: number of items, I.
        dim: length of the taste vectors, d.
        days: that the log spans.
        segments: number of user segments, G.
        target_ctr: share of rows with a click; the intercept is set to meet it.
        bias: standard deviation of the users' and of the items' own intercepts.
        taste: weight of the taste product √d·p·q, whose standard deviation is 1.
        confounder: weight of the unlogged user-item trait h in the logit.
        attribute: shares of the classes of the sensitive user attribute.
        attribute_leak: part κ of a user's taste that the attribute decides.
        fields: columns besides `user` and `item`.
        pairs: planted interactions of those columns.
        item: popularity and drift.
        exposure: None shows every row to the user, so that the label is the click itself.
        log_exposure: write the column `o`.
        pilot_rows: rows on which the intercept is set.
    """

    rows: int = 1_000_000
    seed: int = 7
    users: int = 200_000
    items: int = 50_000
    dim: int = 16
    days: float = 60.0
    segments: int = 4
    target_ctr: float = 0.05
    bias: float = 0.3
    taste: float = 0.5
    confounder: float = 0.0
    attribute: tuple[float, ...] = (0.7, 0.3)
    attribute_leak: float = 0.0
    fields: tuple[SimulatedField, ...] = ()
    pairs: tuple[Pair, ...] = ()
    item: Items = field(default_factory=Items)
    exposure: Exposure | None = None
    log_exposure: bool = False
    pilot_rows: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("rows", "users", "items", "dim", "segments", "pilot_rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"simulated logs: {name} is {getattr(self, name)}, must be at least 1")
        if self.seed < 0:
            raise RecipeError(f"simulated logs: seed is {self.seed}, must not be negative")
        if not 0.0 < self.target_ctr < 1.0:
            raise RecipeError(f"simulated logs: target_ctr is {self.target_ctr}, must be between 0 and 1")
        if len(self.attribute) > self.dim:
            raise RecipeError("simulated logs: more attribute classes than taste dimensions")
        self._check_fields()

    def _check_fields(self) -> None:
        names = [f.name for f in self.fields]
        twice = {n for n in names if names.count(n) > 1} | ({"user", "item", "row_id", "ts", "y", "o"} & set(names))
        if twice:
            raise RecipeError(f"simulated logs: column names used twice: {listing(sorted(twice))}")
        if len(names) > FIELDS:
            raise RecipeError(f"simulated logs: {len(names)} fields, at most {FIELDS} are possible")
        for f in self.fields:
            if f.gate and len(f.gate) != self.segments:
                raise RecipeError(f"field '{f.name}': gate has {len(f.gate)} factors for {self.segments} segments")
            if f.kind == "copy":
                earlier = [other.name for other in self.fields[: names.index(f.name)] if other.kind != "leak"]
                self._check_name(f"field '{f.name}': of", f.of, earlier)
        informative = [f.name for f in self.fields if f.kind in ("user", "item", "context")]
        for pair in self.pairs:
            for side in (pair.left, pair.right):
                self._check_name(f"pair {pair.left}×{pair.right}", side, informative)

    @staticmethod
    def _check_name(where: str, name: str, known: list[str]) -> None:
        if name not in known:
            raise RecipeError(f"{where}: no such field '{name}'.{did_you_mean(name, known)}")


QUICKSTART_FIELDS = (
    SimulatedField("age", "user", 8, zipf=0.3, strength=0.4),
    SimulatedField("city", "user", 30, strength=0.3),
    SimulatedField("category", "item", 12, zipf=0.5, strength=0.4),
    SimulatedField("brand", "item", 40, strength=0.3),
    SimulatedField("hour", "context", 24, zipf=0.2, strength=0.3),
    SimulatedField("device", "context", 4, zipf=0.5, strength=0.2),
    SimulatedField("noise_row", "noise", 24, zipf=0.2),
    SimulatedField("noise_user", "noise", 30, per="user"),
)
QUICKSTART_PAIRS = (
    Pair("age", "category", 0.8),
    Pair("device", "hour", 0.6),
    Pair("hour", "category", 0.4),
)

_LADDER = (8, 30, 100, 12, 300, 4, 1000, 24)


def plain_fields(count: int, strength: float = 0.3) -> tuple[SimulatedField, ...]:
    """Return `count` fields: user, item, context and noise in turn, a noise field as large as the ones before it."""
    kinds: tuple[FieldKind, ...] = ("user", "item", "context", "noise")
    return tuple(
        SimulatedField(
            f"{kinds[n % 4]}_{n // 4}",
            kinds[n % 4],
            _LADDER[n // 4 % len(_LADDER)],
            strength=0.0 if kinds[n % 4] == "noise" else strength,
        )
        for n in range(count)
    )


def plain_pairs(fields: tuple[SimulatedField, ...], strength: float = 0.5) -> tuple[Pair, ...]:
    """Return one interaction of each user field with the item field after it, at most eight."""
    couples = [(a, b) for a, b in pairwise(fields) if (a.kind, b.kind) == ("user", "item")]
    return tuple(Pair(a.name, b.name, strength) for a, b in couples[:8])


def _biased(exposure: Exposure) -> WorldConfig:
    """A world of moderate size in which exposure is selective: a proxy and a copy lie among its fields."""
    fields = (
        *plain_fields(8),
        SimulatedField("gated", "context", 30, strength=0.5, gate=(1.0, 1.0, 0.0, 0.0)),
        SimulatedField("copied", "copy", 30, of="gated", error=0.1),
        SimulatedField("popularity", "proxy", 10, error=0.1),
    )
    return WorldConfig(
        users=20_000,
        items=5_000,
        fields=fields,
        pairs=plain_pairs(fields),
        exposure=exposure,
        log_exposure=True,
    )


def preset(name: str) -> WorldConfig:
    """Return a named world.

    `quickstart`: everything is shown, small cardinalities, interactions matter. `easy`: exposure does not depend
    on relevance. `mnar`: it does, and strongly on popularity. `confounded`: exposure and click share a trait that
    is not logged. `drift`: tastes turn and popularity jumps at half time. `fair`: a sensitive attribute leaks into
    tastes and exposure. `leaky`: one field is the label with a few errors.

    Raises:
        RecipeError: no such world.
    """
    if name == "quickstart":
        return WorldConfig(
            rows=50_000,
            users=200,
            items=100,
            dim=2,
            target_ctr=0.25,
            fields=QUICKSTART_FIELDS,
            pairs=QUICKSTART_PAIRS,
            pilot_rows=1 << 17,
        )
    if name == "easy":
        return _biased(Exposure(relevance=0.0, least=0.1))
    if name == "mnar":
        return _biased(Exposure(popularity=1.2, relevance=0.5))
    if name == "confounded":
        return replace(_biased(Exposure(confounder=0.8)), confounder=0.8)
    if name == "drift":
        return replace(_biased(Exposure()), item=Items(drift=1 / 30, jump=1.0))
    if name == "fair":
        return replace(_biased(Exposure(attribute=0.7)), attribute_leak=0.4)
    if name == "leaky":
        world = _biased(Exposure())
        return replace(world, fields=(*world.fields, SimulatedField("leak", "leak", error=0.05)))
    raise RecipeError(f"no simulated world '{name}'.{did_you_mean(name, PRESETS)} There are: {listing(PRESETS)}")


def make_config(
    name: str,
    *,
    rows: int,
    seed: int,
    users: int | None = None,
    items: int | None = None,
    fields: int | None = None,
) -> WorldConfig:
    """Return a named world at a chosen size; `fields` puts that many plain fields in place of its own."""
    world = replace(preset(name), rows=rows, seed=seed)
    if users is not None:
        world = replace(world, users=users)
    if items is not None:
        world = replace(world, items=items)
    if fields is not None:
        own = plain_fields(fields)
        world = replace(world, fields=own, pairs=plain_pairs(own))
    return world


def config_digest(config: WorldConfig) -> str:
    """Return the SHA-256 of a config, in hexadecimal."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
