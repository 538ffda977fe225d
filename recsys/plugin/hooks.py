"""What a plugin can hook into, and the one value it yields.

A complete plugin is one module, one distribution and one line of packaging:

    # recsys_mixer.py
    from recsys.api import Component, hookimpl

    @hookimpl
    def recsys_components():
        return [Component("interaction", "mixer", Mixer)]

    # pyproject.toml
    [project.entry-points."recsys.v1"]
    mixer = "recsys_mixer"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

if TYPE_CHECKING:
    from recsys.train.run import Run

PROJECT = "recsys"
ENTRY_POINT_GROUP = "recsys.v1"
"""The number is the major version of the plugin API."""

Kind = Literal[
    "source",
    "embedding",
    "selector",
    "sequence",
    "interaction",
    "loss",
    "sampler",
    "propensity",
    "metric",
    "stage",
    "exporter",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Component:
    """One named thing that a recipe can use.

    Args:
        kind: what it is; the contract of each kind is in `recsys.contracts`.
        name: how recipes call it, in lower case with underscores.
        factory: the class. Its positional parameters are what the builder hands it (see the kind's
            protocol), its keyword-only parameters are its recipe options.
        stages: the stages of a recipe that uses it and lists none, each as a recipe would write it.
    """

    kind: Kind
    name: str
    factory: Callable[..., Any]
    stages: tuple[Mapping[str, Any], ...] = ()


@hookspec
def recsys_components() -> Iterable[Component]:
    """Return the components of this plugin. Fires once, when the registry is built."""
    raise NotImplementedError


@hookspec
def recsys_before_stage(run: Run, stage: str) -> None:
    """Observe that `stage` is about to start. Fires on every rank; must not change the run."""


@hookspec
def recsys_after_stage(run: Run, stage: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Observe that `stage` has ended, with its metrics by split. Fires on every rank; must not change the run."""


@hookspec
def recsys_report_sections(run: Run) -> Iterable[tuple[str, str]]:
    """Return (title, Markdown) sections to add to the run's report."""
    raise NotImplementedError
