"""What a simulated world is made of, and the named worlds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from recsys.data.simulate_random import FIELDS
from recsys.errors import RecipeError, did_you_mean, listing

FieldKind = Literal["user", "item", "context", "noise", "copy", "proxy", "leak"]
Logged = Literal["observed", "propensity", "popularity", "uniform", "attribute"]
LOGGED: tuple[Logged, ...] = get_args(Logged)

VERSION = 2
"""Of the simulator: raised when any log of an equal config would come out different."""

UNIFORM_FROM = 0.9
"""Share of the log's time after which the uniform slice begins."""
MOST_CANDIDATES = 1024
RESERVED = {"row_id", "ts", "user", "item", "y", "request", "position", "click", "conversion", "delay", "elapsed"} | {
    *LOGGED
}
"""Names of columns that are no fields."""


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
class Slate:
    """Rows that come in lists: a request shows `length` items, one below the other, and clicks depend on the place.

    A request draws distinct candidates by popularity, and a Plackett-Luce policy puts the best of ŝ/T + Gumbel noise
    on display, with ŝ = relevance·(ρ + N(0, noise²)) + popularity·ln pop. The place k = 0, 1, … is then examined

        pbm:      with probability e_k = (k + 1)^-decay, whatever else happens
        cascade:  until a click, after which the user leaves with probability `stop`

    and what is examined is clicked when it is relevant, or by trust with probability ε⁺_k = trust / (k + 1).

    Args:
        click: how lists are looked through.
        length: places of a list, K.
        candidates: items that the policy chooses from.
        relevance: weight of what the policy knows of the relevance.
        popularity: weight of ln pop.
        noise: standard deviation of the policy's error about ρ.
        temperature: T of the policy; the higher, the more it explores.
        decay: η of the examination; one number, or one for each value of `device`.
        device: name of a context field that the examination depends on.
        stop: probability that a click ends a cascade.
        trust: false clicks at the first place.
        blind: share of examined relevant items that get no click.
    """

    click: Literal["pbm", "cascade"] = "pbm"
    length: int = 10
    candidates: int = 40
    relevance: float = 1.0
    popularity: float = 0.3
    noise: float = 0.5
    temperature: float = 1.0
    decay: tuple[float, ...] = (1.0,)
    device: str = ""
    stop: float = 0.7
    trust: float = 0.1
    blind: float = 0.0


@dataclass(frozen=True)
class Flip:
    """Labels that are wrong: a click is recorded as none with probability φ, and none as a click with ε.

    Args:
        rate: mean of φ over the clicks.
        model: `lowrank` has φ = σ(c + spread·√d·A_u·C_i), normal vectors of user and item; `uniform` φ = rate.
        spread: standard deviation of the logit of φ.
        dim: d of the vectors.
        false_positive: ε.
    """

    rate: float = 0.2
    model: Literal["uniform", "lowrank"] = "lowrank"
    spread: float = 2.0
    dim: int = 4
    false_positive: float = 0.0


@dataclass(frozen=True)
class Pooling:
    """Only what an old retriever ranks high is judged: label = click and judged, λ = σ(offset + slope·ρ_old).

    ρ_old is the standardised score with an error of standard deviation `noise`.
    """

    offset: float = -0.5
    slope: float = 1.5
    noise: float = 0.5


@dataclass(frozen=True)
class Conversion:
    """What follows a click: P(conversion | click) = σ(ζ), ζ = ζ0 + strength·(corr·ρ' + √(1 - corr²)·own effects).

    ρ' is the standardised score; the own effects are those of the world's user, item and context fields, drawn anew.
    A conversion comes after a Weibull delay with scale exp(-(log_rate + log_rate_by_segment·segment)) days and counts
    within the attribution window. Rows before the snapshot know what had happened by then: a late conversion is
    still a 0. Rows after it are the future, and know all that happens within their window.

    Args:
        rate: share of the clicks that convert in the end; ζ0 is set to meet it.
        strength: standard deviation of ζ.
        correlation: of ζ with the score of the click.
        log_rate: of the delay in the first segment, per day.
        log_rate_by_segment: by how much it changes from one segment to the next.
        shape: of the Weibull distribution; 1 is exponential.
        window: days in which a conversion counts.
        now: the snapshot, as a share of the log's time.
    """

    rate: float = 0.3
    strength: float = 1.0
    correlation: float = 0.5
    log_rate: float = -2.7
    log_rate_by_segment: float = 0.5
    shape: float = 1.0
    window: float = 30.0
    now: float = 0.8


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
        attribute_known: share of users whose attribute is logged; -1 stands for the others.
        fields: columns besides `user` and `item`.
        pairs: planted interactions of those columns.
        item: popularity and drift.
        exposure: None shows every row to the user, so that the label is the click itself.
        slate: rows come in lists; None draws each row's user and item on its own.
        flip: errors of the label.
        pooling: only what an old retriever likes is judged.
        conversion: what follows a click; the label is then the conversion, as far as it is known.
        clicks_only: leave out the rows without a click, as logs of conversions do.
        randomised: share of the rows (of the requests, in slates) that no policy had a hand in: shown whatever they
            are worth, in slates chosen and ordered by chance; the column `uniform` tells them.
        log: further columns: `observed` (was it shown), `propensity` (with what probability, as far as the one who
            shows can know it), `popularity` (of the item on that day, 1 for the most popular one), `uniform`,
            `attribute`. Slates have `request` and `position` besides, conversions `click`, `conversion`, `delay`
            (days, 0 when there is none yet) and `elapsed` (days since the click that the label had to come).
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
    attribute_known: float = 1.0
    fields: tuple[SimulatedField, ...] = ()
    pairs: tuple[Pair, ...] = ()
    item: Items = field(default_factory=Items)
    exposure: Exposure | None = None
    slate: Slate | None = None
    flip: Flip | None = None
    pooling: Pooling | None = None
    conversion: Conversion | None = None
    clicks_only: bool = False
    randomised: float = 0.0
    log: tuple[Logged, ...] = ()
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
        self._check_slate()

    @property
    def selective(self) -> bool:
        """Whether the log is not what its users think of its items: the uniform slice then tells something else."""
        return any(part is not None for part in (self.exposure, self.slate, self.flip, self.pooling, self.conversion))

    def _check_slate(self) -> None:
        slate = self.slate
        if not 0.0 <= self.randomised <= 1.0:
            raise RecipeError(f"simulated logs: randomised is {self.randomised}, must be a share")
        if self.clicks_only and self.conversion is None:
            raise RecipeError("simulated logs: with clicks alone every label is 1, unless the world has conversions")
        if slate is None:
            return
        if self.exposure is not None or self.flip is not None or self.pooling is not None:
            raise RecipeError("simulated logs: a slate shows its items itself; leave out exposure, flip and pooling")
        if not 1 <= slate.length <= slate.candidates <= min(self.items, MOST_CANDIDATES):
            raise RecipeError(
                f"simulated logs: {slate.length} places for {slate.candidates} candidates of {self.items} items; "
                f"places must not be more than candidates, nor these than items or {MOST_CANDIDATES}"
            )
        sizes = {f.name: f.cardinality for f in self.fields if f.kind == "context"}
        if slate.device:
            self._check_name("slate: device", slate.device, list(sizes))
        if len(slate.decay) not in (1, sizes.get(slate.device, 1)):
            raise RecipeError(f"simulated logs: slate.decay has {len(slate.decay)} numbers, not one per device")

    def _check_fields(self) -> None:
        names = [f.name for f in self.fields]
        twice = {n for n in names if names.count(n) > 1} | (RESERVED & set(names))
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


def config_digest(config: WorldConfig) -> str:
    """Return the SHA-256 of a config, in hexadecimal."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
