"""Find plugins, decide which may be imported, import them one by one, and keep what went wrong as a value."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from recsys.errors import PluginError, did_you_mean, listing
from recsys.plugin import hooks, options
from recsys.plugin.hooks import ENTRY_POINT_GROUP, KINDS, Component, Kind

FIRST_PARTY = "recsys"
"""The distribution whose plugins need no permission."""
CORE = "core"
"""Name of the plugin that brings the built-in components."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")

TAKES: Mapping[Kind, str] = {
    "source": "root",
    "embedding": "schema",
    "selector": "fields",
    "sequence": "width",
    "interaction": "fields",
    "loss": "tasks",
    "sampler": "items",
    "propensity": "schema",
    "metric": "",
    "stage": "",
    "exporter": "",
}
"""The one positional argument that the builder hands to the factory of each kind; empty for none."""

MAY_TAKE: Mapping[Kind, str] = {"loss": "schema"}
"""A second positional argument, for factories that have a parameter for it."""


@dataclass(frozen=True)
class Candidate:
    """A plugin that could be imported: an entry point, or a file from the command line."""

    name: str
    distribution: str
    version: str
    target: str

    @property
    def origin(self) -> str:
        """`recsys-mixer 1.2`, or the file."""
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class Loaded(Candidate):
    """A plugin that works, with its components and how long its import took."""

    module: str
    components: tuple[Component, ...]
    seconds: float


@dataclass(frozen=True)
class Broken(Candidate):
    """A plugin that could not be imported or registered nonsense, and why, in one line."""

    reason: str
    seconds: float


@dataclass(frozen=True)
class Disabled(Candidate):
    """A plugin that was found and not imported, and by whose wish."""

    reason: str


@dataclass(frozen=True)
class Found:
    """What loading gave."""

    loaded: tuple[Loaded, ...]
    broken: tuple[Broken, ...]
    disabled: tuple[Disabled, ...]


def load_all(
    manager: pluggy.PluginManager,
    *,
    without: Collection[str],
    files: Sequence[Path],
    allow: Collection[str] | None,
    environ: Mapping[str, str],
) -> Found:
    """Load the core, the permitted entry points by name, then the files.

    Raises:
        PluginError: a given file is broken, or `without` names no installed plugin.
    """
    manager.add_hookspecs(hooks)
    installed = candidates()
    _check_without(without, installed)
    loaded: list[Loaded] = []
    broken: list[Broken] = misfiled(installed)
    disabled: list[Disabled] = []
    refused = set(without) | set(_listed(environ.get("RECSYS_DISABLE", "")))
    allowed = [list(allow)] if allow is not None else []
    if "RECSYS_PLUGINS_ALLOW" in environ:
        allowed.append(_listed(environ["RECSYS_PLUGINS_ALLOW"]))
    core = Candidate(CORE, FIRST_PARTY, _core_version(), "recsys.plugin.builtins")
    for candidate in [core, *installed]:
        if candidate is not core and (why := _refusal(candidate, refused, allowed)):
            disabled.append(Disabled(**vars(candidate), reason=why))
            continue
        result = _load(manager, candidate)
        if isinstance(result, Loaded):
            loaded.append(result)
        else:
            broken.append(result)
    for file in files:
        result = _load(manager, Candidate(file.name, str(file), "", str(file)), file)
        if isinstance(result, Broken):
            raise PluginError(f"--plugin {file}: {result.reason}")
        loaded.append(result)
    return Found(tuple(loaded), tuple(broken), tuple(disabled))


def candidates() -> list[Candidate]:
    """Return the installed plugins, sorted by name, without importing any."""
    found = [
        Candidate(
            point.name, point.dist.name if point.dist else "?", point.dist.version if point.dist else "", point.value
        )
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
    return sorted(set(found), key=lambda c: (c.name, c.distribution))


def misfiled(installed: Collection[Candidate]) -> list[Broken]:
    """Return the entry points whose group is nearly ours, from distributions without any in ours."""
    right = {candidate.distribution for candidate in installed}
    points = metadata.entry_points()
    near = difflib.get_close_matches(ENTRY_POINT_GROUP, points.groups, n=5, cutoff=0.75)
    near += [group for group in points.groups if group.lower().startswith("recsys") and group not in near]
    found = []
    for point in (point for group in near if group != ENTRY_POINT_GROUP for point in points.select(group=group)):
        if point.dist and point.dist.name not in right:
            reason = f"its entry-point group is '{point.group}', and this version reads '{ENTRY_POINT_GROUP}'"
            found.append(Broken(point.name, point.dist.name, point.dist.version, point.value, reason, 0.0))
    return found


def validate(components: Any) -> tuple[Component, ...]:
    """Check what a plugin's `recsys_components` returned.

    Raises:
        PluginError: it is not an iterable of components, or one of them cannot work.
    """
    if not isinstance(components, Iterable) or isinstance(components, str | bytes | Mapping):
        raise PluginError(f"recsys_components returned {type(components).__name__}, expected a list of Component")
    checked: list[Component] = []
    for component in components:
        if not isinstance(component, Component):
            raise PluginError(f"recsys_components yielded {type(component).__name__}, expected a Component")
        if component.kind not in KINDS:
            near = did_you_mean(str(component.kind), KINDS)
            raise PluginError(f"unknown kind '{component.kind}'.{near} Kinds: {listing(KINDS)}")
        if not isinstance(component.name, str) or not _NAME.fullmatch(component.name):
            raise PluginError(f"{component.kind} name {component.name!r}: use lower case letters, digits and '_'")
        if not callable(component.factory):
            raise PluginError(f"{component.kind} '{component.name}': the factory is not callable")
        if any((component.kind, component.name) == (c.kind, c.name) for c in checked):
            raise PluginError(f"registers the {component.kind} '{component.name}' twice")
        _check_signature(component)
        checked.append(component)
    return tuple(checked)


def _check_signature(component: Component) -> None:
    takes, further = TAKES[component.kind], MAY_TAKE.get(component.kind)
    _, most = options.positional(component.factory)
    if most != bool(takes) and not (further and most == 2):
        shape = f"({takes}, *, …)" if takes else "(*, …)"
        shape += f" or ({takes}, {further}, *, …)" if further else ""
        raise PluginError(
            f"{component.kind} '{component.name}': the factory must be callable as {shape}: options are keyword-only, "
            f"after `*`; it takes {most} positional parameters"
        )
    options.options_model(component.factory)


def _load(manager: pluggy.PluginManager, candidate: Candidate, file: Path | None = None) -> Loaded | Broken:
    start = time.perf_counter()
    name = f"'{candidate.name}' of {candidate.origin}"
    try:
        # What a plugin prints while it is imported must not end up in `--json` output.
        with contextlib.redirect_stdout(sys.stderr):
            module = _import_file(file) if file else _import(candidate.target)
            components = _register(manager, module, name)
    except (Exception, SystemExit) as error:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        return Broken(**vars(candidate), reason=reason(error), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Loaded(**vars(candidate), module=module.__name__, components=components, seconds=seconds)


def _register(manager: pluggy.PluginManager, module: ModuleType, name: str) -> tuple[Component, ...]:
    """Register the module's hooks and return its components; only this plugin's implementation is called."""
    if manager.is_registered(module):
        raise PluginError(f"the module {module.__name__} is registered already, as {manager.get_name(module)}")
    manager.register(module, name=name)
    callers = manager.get_hookcallers(module) or []
    known = sorted(name for name in vars(hooks) if name.startswith("recsys_"))
    for caller in callers:
        if caller.name not in known:
            raise PluginError(
                f"unknown hook '{caller.name}'.{did_you_mean(caller.name, known)} Hooks: {listing(known)}"
            )
    if not callers:
        raise PluginError(f"{module.__name__} has no hook; decorate recsys_components with @hookimpl")
    own = [impl for impl in manager.hook.recsys_components.get_hookimpls() if impl.plugin is module]
    if any(impl.hookwrapper or impl.wrapper for impl in own):
        raise PluginError("recsys_components cannot be a wrapper")
    return tuple(component for impl in own for component in validate(impl.function()))


def _import(target: str) -> ModuleType:
    if ":" in target:
        raise PluginError(f"the entry point '{target}' must name a module, without ':'")
    return importlib.import_module(target)


def _import_file(file: Path) -> ModuleType:
    """Execute a plugin file anew, under a name that no installed module can have."""
    if not file.is_file():
        raise PluginError(f"no such file: {file.resolve()}")
    name = f"_recsys_file_{re.sub(r'[^0-9a-zA-Z_]', '_', file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError("not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and string annotations look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def reason(error: BaseException) -> str:
    """Return what went wrong in a plugin: one line, with the place in its code for unexpected errors."""
    text = " ".join(str(error).split())
    if isinstance(error, PluginError):
        return text
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    machinery = (__file__, importlib.__file__, str(Path(__file__).with_name("registry.py")))
    inside = [f for f in frames if f.filename not in machinery and not f.filename.startswith("<frozen")]
    place = f" ({Path(inside[-1].filename).name}:{inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {text}"[:300] + place


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _matches(candidate: Candidate, name: str) -> bool:
    """Whether `name` (`mixer`, `recsys-mixer`, `recsys-mixer==1.2`, `*`) means this plugin."""
    name, _, version = name.partition("==")
    same = name == "*" or _normal(name) in (_normal(candidate.name), _normal(candidate.distribution))
    return same and version in ("", candidate.version)


def _refusal(candidate: Candidate, refused: Collection[str], allowed: Sequence[Collection[str]]) -> str:
    """Return why a plugin must not be imported, or an empty string."""
    if any(_matches(candidate, name) for name in refused):
        return "left out by --without or RECSYS_DISABLE"
    if _normal(candidate.distribution) == FIRST_PARTY:
        return ""
    if all(any(_matches(candidate, name) for name in names) for names in allowed):
        return ""
    return "not in the list of allowed plugins (RECSYS_PLUGINS_ALLOW)"


def _check_without(without: Collection[str], installed: Sequence[Candidate]) -> None:
    for name in without:
        if not any(_matches(candidate, name) for candidate in installed) and name != "*":
            known = [candidate.name for candidate in installed]
            raise PluginError(
                f"--without {name}: no such plugin.{did_you_mean(name, known)} Installed: {listing(known)}"
            )


def _core_version() -> str:
    from recsys import __version__

    return __version__
