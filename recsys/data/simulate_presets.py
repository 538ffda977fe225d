"""The named worlds that logs are simulated from."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

from recsys.data.simulate_config import (
    Conversion,
    Exposure,
    FieldKind,
    Flip,
    Items,
    Logged,
    Pair,
    Pooling,
    SimulatedField,
    Slate,
    WorldConfig,
)
from recsys.errors import RecipeError, did_you_mean, listing

Preset = Literal[
    "quickstart",
    "easy",
    "mnar",
    "popular",
    "confounded",
    "drift",
    "slate-plain",
    "slate-pbm",
    "slate-cascade",
    "delayed",
    "conversion",
    "flip20",
    "pooled",
    "fair",
    "leaky",
]
PRESETS: tuple[Preset, ...] = get_args(Preset)

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


_SHOWN: tuple[Logged, ...] = ("observed", "propensity", "popularity", "uniform")


def _fields() -> tuple[SimulatedField, ...]:
    """Two of each plain kind, a gated field, a copy of it, and a proxy of popularity."""
    return (
        *plain_fields(8),
        SimulatedField("gated", "context", 30, strength=0.5, gate=(1.0, 1.0, 0.0, 0.0)),
        SimulatedField("copied", "copy", 30, of="gated", error=0.1),
        SimulatedField("proxy", "proxy", 10, error=0.1),
    )


def _moderate() -> WorldConfig:
    """A world of moderate size; a proxy and a copy lie among its fields."""
    fields = _fields()
    return WorldConfig(users=20_000, items=5_000, fields=fields, pairs=plain_pairs(fields))


def _biased(exposure: Exposure) -> WorldConfig:
    """Exposure is selective."""
    return replace(_moderate(), exposure=exposure, log=_SHOWN)


def _slates(slate: Slate) -> WorldConfig:
    """Lists of ten, in a world of fewer items, so that items meet several places."""
    fields = (*_fields(), SimulatedField("device", "context", 2, zipf=0.5))
    return replace(
        _moderate(),
        items=2_000,
        fields=fields,
        target_ctr=0.08,
        slate=slate,
        log=("propensity", "popularity", "uniform"),
        pilot_rows=1 << 18,
    )


_AT_ONCE = Conversion(correlation=0.8, log_rate=0.0, log_rate_by_segment=0.0, now=0.0)
"""Conversions whose window has passed for every click, so that none is missing."""


def _world(name: str) -> WorldConfig | None:
    worlds = {
        "easy": lambda: _biased(Exposure(relevance=0.0, least=0.1)),
        "mnar": lambda: _biased(Exposure(popularity=1.2, relevance=0.5)),
        "popular": lambda: WorldConfig(
            users=20_000, items=5_000, bias=0.1, taste=1.0, exposure=Exposure(popularity=1.2, relevance=0.5), log=_SHOWN
        ),
        "confounded": lambda: replace(_biased(Exposure(confounder=0.8)), confounder=0.8),
        "drift": lambda: replace(_biased(Exposure()), item=Items(drift=1 / 30, jump=1.0)),
        "slate-plain": lambda: _slates(Slate("pbm", trust=0.0)),
        "slate-pbm": lambda: _slates(Slate("pbm", device="device", decay=(0.7, 1.3))),
        "slate-cascade": lambda: _slates(Slate("cascade", trust=0.0)),
        "delayed": lambda: replace(_moderate(), target_ctr=0.25, conversion=Conversion(), log=("popularity",)),
        "conversion": lambda: replace(_moderate(), target_ctr=0.1, conversion=_AT_ONCE, log=("popularity",)),
        "flip20": lambda: replace(_moderate(), target_ctr=0.25, flip=Flip(0.2)),
        "pooled": lambda: replace(_moderate(), target_ctr=0.25, pooling=Pooling()),
        "fair": lambda: replace(_biased(Exposure(attribute=0.7)), attribute_leak=0.4, log=(*_SHOWN, "attribute")),
        "leaky": lambda: replace(_biased(Exposure()), fields=(*_fields(), SimulatedField("leak", "leak", error=0.05))),
        "quickstart": lambda: WorldConfig(
            rows=50_000,
            users=200,
            items=100,
            dim=2,
            target_ctr=0.25,
            fields=QUICKSTART_FIELDS,
            pairs=QUICKSTART_PAIRS,
            pilot_rows=1 << 17,
        ),
    }
    return worlds[name]() if name in worlds else None


ABOUT: dict[Preset, str] = {
    "quickstart": "everything is shown, fields have few values, much of the signal is in interactions",
    "easy": "exposure follows popularity, not relevance: inverse propensities work with little noise",
    "mnar": "exposure follows relevance and, strongly, popularity: what is missing is not missing at random",
    "popular": "exposure follows popularity, what is liked is a matter of taste: what is popular is hardly better",
    "confounded": "exposure and click share a trait that is not logged: propensities cannot mend that",
    "drift": "tastes turn and popularity jumps at half time",
    "slate-plain": "lists of ten from a logged policy; the k-th place is looked at with probability 1/k",
    "slate-pbm": "lists of ten from a logged policy, examined by place and device, with clicks out of trust",
    "slate-cascade": "lists of ten from a logged policy, looked through until a click satisfies",
    "delayed": "clicks and conversions; late conversions are not known yet",
    "conversion": "few clicks, of those that convert more easily than other rows would; conversions are known at once",
    "flip20": "a fifth of the clicks is recorded as none, depending on user and item",
    "pooled": "only what an old retriever ranks high is judged; the rest is labelled 0",
    "fair": "a sensitive attribute of the user leaks into tastes and exposure",
    "leaky": "one field is the label with a few errors: a check of the data must find it",
}
"""World → what it is for, in one line."""


def preset(name: str) -> WorldConfig:
    """Return a named world; `ABOUT` says what each is for.

    Raises:
        RecipeError: no such world.
    """
    world = _world(name)
    if world is None:
        raise RecipeError(f"no simulated world '{name}'.{did_you_mean(name, PRESETS)} There are: {listing(PRESETS)}")
    return world


def make_config(
    name: str,
    *,
    rows: int,
    seed: int,
    users: int | None = None,
    items: int | None = None,
    fields: int | None = None,
    randomised: float | None = None,
    clicks_only: bool = False,
) -> WorldConfig:
    """Return a named world at a chosen size.

    Args:
        name: of the world.
        rows: of the log.
        seed: of everything.
        users: number of users, in place of the world's own.
        items: number of items, in place of the world's own.
        fields: put so many plain fields in place of the world's own.
        randomised: share of rows or requests that no policy had a hand in, in place of the world's own.
        clicks_only: leave out the rows without a click.
    """
    world = replace(preset(name), rows=rows, seed=seed, clicks_only=clicks_only)
    if users is not None:
        world = replace(world, users=users)
    if items is not None:
        world = replace(world, items=items)
    if randomised is not None:
        world = replace(world, randomised=randomised)
    if fields is not None:
        own = plain_fields(fields)
        device = () if world.slate is None else tuple(f for f in world.fields if f.name == world.slate.device)
        world = replace(world, fields=(*own, *device), pairs=plain_pairs(own))
    return world
