"""The registry: every component that recipes can use, who brought it, and what could not be loaded.

Nothing here is global. Entry points are loaded one by one, so that one broken plugin is a remark and not the end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
import pydantic

from recsys.contracts import metric_spec
from recsys.errors import PluginError, RecipeError, RecsysError, did_you_mean, listing
from recsys.plugin import docstrings, loading, options, protocols
from recsys.plugin.hooks import KINDS, PROJECT, Component, Kind

if TYPE_CHECKING:
    from recsys.plugin.loading import Broken, Disabled, Loaded


@dataclass(frozen=True)
class Registered:
    """A component and its provenance.

    Args:
        component: what the plugin yielded.
        plugin: entry-point name, or the path of a file given on the command line.
        distribution: the installed distribution, or the path of the file.
        version: of the distribution; empty for a file.
        module: the module that registered it.
    """

    component: Component
    plugin: str
    distribution: str
    version: str
    module: str

    @cached_property
    def model(self) -> type[pydantic.BaseModel]:
        """The strict model of its recipe options."""
        return options.options_model(self.component.factory)

    @cached_property
    def options(self) -> tuple[options.Option, ...]:
        """Its recipe options, described."""
        return options.describe(self.component.factory)

    @cached_property
    def doc(self) -> docstrings.Doc:
        """Its docstring, in parts."""
        return docstrings.read(self.component.factory)

    @property
    def origin(self) -> str:
        """`recsys-mixer 1.2`, or the file."""
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class Checked:
    """A component of a recipe after checking.

    Args:
        name: of the component.
        options: every option: those given, and the defaults of the others.
        given: names of the options that the recipe wrote itself.
    """

    name: str
    options: dict[str, Any]
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Registry:
    """What is installed; build one with `load_registry`.

    Args:
        entries: (kind, name) → component with provenance.
        plugins: loaded plugins, in load order.
        broken: plugins that could not be loaded, with the reason.
        disabled: plugins that were found and, as asked, not imported.
        manager: relays the observer hooks.
    """

    entries: Mapping[tuple[Kind, str], Registered]
    plugins: tuple[Loaded, ...] = ()
    broken: tuple[Broken, ...] = ()
    disabled: tuple[Disabled, ...] = ()
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(PROJECT))

    @property
    def hooks(self) -> pluggy.HookRelay:
        """Call observers: `registry.hooks.recsys_before_stage(run=run, stage="fit")`."""
        return self.manager.hook

    def all(self) -> tuple[Registered, ...]:
        """Return everything, by kind and name."""
        return tuple(self.entries[key] for key in sorted(self.entries, key=lambda k: (KINDS.index(k[0]), k[1])))

    def names(self, kind: Kind) -> tuple[str, ...]:
        """Return the names of one kind, sorted."""
        return tuple(sorted(name for k, name in self.entries if k == kind))

    def get(self, kind: Kind, name: str) -> Registered:
        """Return a component.

        Raises:
            PluginError: there is none of that name; the message lists the nearest, the installed, and the
                plugins that might have brought it but are broken or disabled.
        """
        if (kind, name) in self.entries:
            return self.entries[kind, name]
        known = self.names(kind)
        other = [f"{_article(k)} {k}" for k, n in self.entries if n == name]
        elsewhere = f". '{name}' is {' and '.join(other)}" if other else ""
        raise PluginError(
            f"unknown {kind} '{name}'.{did_you_mean(name, known)} Installed: {listing(known)}"
            f"{elsewhere}{self.remarks()}"
        )

    def find(self, name: str) -> tuple[Registered, ...]:
        """Return the components of that name, of any kind.

        Raises:
            PluginError: there is none.
        """
        found = tuple(entry for entry in self.all() if entry.component.name == name)
        if found:
            return found
        known = sorted({name for _, name in self.entries})
        raise PluginError(
            f"unknown component '{name}'.{did_you_mean(name, known)} Installed: {listing(known)}{self.remarks()}"
        )

    def remarks(self) -> str:
        """Return one line per plugin that is broken or disabled, for messages about missing names."""
        lines = [f"\nbroken plugin '{b.name}' ({b.origin}): {b.reason}" for b in self.broken]
        lines += [f"\ndisabled plugin '{d.name}' ({d.origin}): {d.reason}" for d in self.disabled]
        return "".join(lines)

    def check(self, kind: Kind, spec: Mapping[str, Any] | str, where: str) -> Checked:
        """Check `{use: NAME, **options}`, or just a name, against what the component takes.

        Args:
            kind: what the place in the recipe takes.
            spec: as the recipe holds it.
            where: path in the recipe, such as `model.interaction` or `stages[2]`.

        Raises:
            RecipeError: with the path, the nearest valid name, and all valid ones.
        """
        at = options.split(where)
        if kind == "metric" and isinstance(spec, str | Mapping):
            # `name` says what the metric is called in results; it is not for the metric.
            spec = {key: value for key, value in metric_spec(spec).items() if key != "name"}
        name = spec.get("use") if isinstance(spec, Mapping) else spec
        if not isinstance(name, str):
            got = "nothing" if name is None else repr(name)
            raise RecipeError(
                f"{where}: expected the name of {_article(kind)} {kind} (`{{use: NAME, …}}`), got {got}. "
                f"Installed: {listing(self.names(kind))}",
                path=at,
            )
        given = {k: v for k, v in spec.items() if k != "use"} if isinstance(spec, Mapping) else {}
        try:
            entry = self.get(kind, name)
        except PluginError as error:
            raise RecipeError(f"{where}: {error}", path=(*at, "use") if isinstance(spec, Mapping) else at) from None
        if odd := [key for key in given if not isinstance(key, str)]:
            raise RecipeError(f"{where}: an option's name must be text, got {odd[0]!r}", path=at)
        return Checked(name, options.check(entry.model, name, given, where, at), frozenset(given))

    def build(self, kind: Kind, spec: Mapping[str, Any] | str, *positional: Any, where: str) -> Any:
        """Check the spec and call the factory with what the builder hands it.

        Raises:
            RecipeError: as `check` and `make`.
        """
        return self.make(kind, self.check(kind, spec, where), *positional, where=where)

    def make(self, kind: Kind, checked: Checked, *positional: Any, where: str) -> Any:
        """Call the factory of a checked component with what the builder hands it.

        Raises:
            RecipeError: the factory raises, or what it gives lacks a part of its protocol; with the path in the
                recipe, the component, who brought it, and the place in its code.
        """
        entry = self.get(kind, checked.name)
        at = options.split(where)
        who = f"the {kind} '{checked.name}' of {entry.origin}"
        try:
            given = options.accepted(entry.component.factory, positional)
            part = entry.component.factory(*given, **options.arguments(checked.options))
        except RecipeError as error:
            raise RecipeError(f"{where}: '{checked.name}': {error}", path=error.path or at) from error
        except RecsysError:
            raise
        except Exception as error:
            raise RecipeError(f"{where}: {who} cannot be built: {loading.reason(error)}", path=at) from error
        if lacking := protocols.lacking(kind, part):
            protocol = f"recsys.contracts.{kind.capitalize()}"
            raise RecipeError(f"{where}: {who} lacks {listing(lacking)}, which {protocol} describes", path=at)
        return part


def load_registry(
    *,
    without: Collection[str] = (),
    files: Sequence[Path] = (),
    allow: Collection[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Registry:
    """Load the core components, the installed plugins and the given files.

    Args:
        without: entry-point or distribution names not to import.
        files: plugin files, as the user gave them on the command line.
        allow: entry-point or distribution names (optionally `name==version`); others are not imported.
            The plugins that come with recsys are always allowed. None allows all.
        environ: `RECSYS_DISABLE` and `RECSYS_PLUGINS_ALLOW` (comma-separated) add to `without` and to `allow`;
            where both lists of allowed names exist, a plugin must be in both.

    Raises:
        PluginError: two plugins bring the same (kind, name); a given file is broken; `without` names nothing.
    """
    manager = pluggy.PluginManager(PROJECT)
    found = loading.load_all(manager, without=without, files=files, allow=allow, environ=environ)
    entries: dict[tuple[Kind, str], Registered] = {}
    for plugin in found.loaded:
        for component in plugin.components:
            entry = Registered(component, plugin.name, plugin.distribution, plugin.version, plugin.module)
            earlier = entries.setdefault((component.kind, component.name), entry)
            if earlier is not entry:
                raise PluginError(
                    f"two plugins bring the {component.kind} '{component.name}': '{earlier.plugin}' of "
                    f"{earlier.origin} and '{entry.plugin}' of {entry.origin}. Uninstall one, or leave it out with "
                    f"--without NAME or RECSYS_DISABLE=NAME"
                )
    return Registry(entries, found.loaded, found.broken, found.disabled, manager)


def _article(kind: Kind) -> str:
    return "an" if kind[0] in "aeiou" else "a"
