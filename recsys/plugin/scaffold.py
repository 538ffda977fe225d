"""`recsys new-plugin`: a working package around a small, real component of each kind."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from recsys import __version__
from recsys.errors import PluginError, did_you_mean, listing
from recsys.plugin.hooks import KINDS, Kind
from recsys.plugin.registry import Registry

TEMPLATE = Path(__file__).parent / "template"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class _Example:
    """The parts of the example recipe that depend on the kind; `NAME` stands for the component."""

    use: str
    source: str = "{use: simulated, rows: 10_000, seed: 7}"
    label: str = "y"
    categorical: str = "[user, item, age, city, category, brand, hour, device]"
    sequences: str = ""
    embedding: str = "{use: table, dim: 8}"
    parts: str = ""
    interaction: str = "{use: mlp, hidden: [32]}"
    block: str = ""
    stages: tuple[str, ...] = ("{use: fit}", "{use: evaluate, metrics: [auc, logloss]}", "{use: export}")


EXAMPLES: dict[Kind, _Example] = {
    "source": _Example(
        "A recipe uses it under `data.source`.", "{use: NAME, rows: 8000}", "label", categorical="[user, item]"
    ),
    "embedding": _Example("A recipe uses it under `model.embedding`.", embedding="{use: NAME, dim: 8}"),
    "selector": _Example(
        "A recipe uses it under `model.selector`; without `stages:` of its own, it runs those of the component.",
        parts="  selector: {use: NAME}\n",
        stages=(
            "{use: fit, name: search}",
            "{use: prune}",
            "{use: fit, name: retrain}",
            "{use: evaluate, metrics: [auc, logloss]}",
            "{use: export}",
        ),
    ),
    "sequence": _Example(
        "A recipe uses it under `model.sequence`, for histories that have a target.",
        "{use: NAME_logs}",
        "label",
        categorical="[item]",
        sequences="  sequences:\n    clicks: {columns: {item: past}}\n",
        parts="  sequence: {use: NAME}\n",
    ),
    "interaction": _Example("A recipe uses it under `model.interaction`.", interaction="{use: NAME, layers: 2}"),
    "loss": _Example("A recipe uses it under `loss`.", block="loss: {use: NAME}\n"),
    "sampler": _Example(
        "A recipe uses it under `sampling.sampler`: it adds unlabelled rows to the training batches.",
        block="sampling:\n  item: item\n  fields: [category, brand]\n  rows: positives\n  sampler: {use: NAME}\n",
    ),
    "propensity": _Example(
        "A recipe uses it under `propensity`, for losses and metrics that need that context column.",
        block="propensity: {use: NAME}\n",
    ),
    "metric": _Example(
        "A recipe uses it in the `metrics` of an evaluate stage.",
        stages=("{use: fit}", "{use: evaluate, metrics: [auc, NAME]}", "{use: export}"),
    ),
    "stage": _Example(
        "A recipe uses it in its list of stages.",
        stages=("{use: fit}", "{use: NAME, bits: 10}", "{use: evaluate, metrics: [auc, logloss]}"),
    ),
    "exporter": _Example(
        "A recipe uses it in the `exporters` of an export stage, which gives it a folder of its own below `export/`.",
        stages=(
            "{use: fit}",
            "{use: evaluate, metrics: [auc, logloss]}",
            "{use: export, exporters: [{use: NAME, half: true}]}",
        ),
    ),
}


def write(name: str, kind: str, out: Path, registry: Registry) -> Path:
    """Write the package `recsys-NAME` below `out` and return its folder.

    Args:
        name: of the component, as recipes will call it.
        kind: what it is.
        out: folder in which the package's folder is made.
        registry: what is installed, which the name must not clash with.

    Raises:
        PluginError: the name cannot be used, the kind is unknown, or the folder exists and is not empty.
    """
    if kind not in KINDS:
        raise PluginError(f"unknown kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {listing(KINDS)}")
    _check_name(name, kind, registry)
    distribution = f"recsys-{name.replace('_', '-')}"
    folder = out / distribution
    if folder.exists() and any(folder.iterdir()):
        raise PluginError(f"{folder} exists already; choose another name or --out")
    example = EXAMPLES[kind]
    values = {
        "name": name,
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind,
        "module": f"recsys_{name}",
        "distribution": distribution,
        "version": __version__,
        "use": example.use,
        **_recipe(name, example),
    }
    for template, target in {
        f"{kind}.py.txt": f"recsys_{name}.py",
        "pyproject.toml.txt": "pyproject.toml",
        "test.py.txt": f"tests/test_{name}.py",
        "README.md.txt": "README.md",
        "recipe.yaml.txt": "example.yaml",
    }.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATE / template).read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(values), encoding="utf-8")
    return folder


def _check_name(name: str, kind: Kind, registry: Registry) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name.endswith("_"):
        raise PluginError(f"'{name}' cannot be a name: use lower case letters, digits and '_', starting with a letter")
    if name.startswith("recsys"):
        raise PluginError(f"'{name}': leave the prefix out; the package will be called recsys-NAME")
    if (kind, name) in registry.entries:
        origin = registry.get(kind, name).origin
        raise PluginError(f"the {kind} '{name}' exists already, in {origin}; choose another name")
    plugins = [*registry.plugins, *registry.broken, *registry.disabled]
    for plugin in plugins:
        if plugin.name == name or plugin.target == f"recsys_{name}":
            raise PluginError(f"a plugin '{name}' is installed already, by {plugin.origin}; choose another name")


def _recipe(name: str, example: _Example) -> dict[str, str]:
    data = f"  source: {example.source}\n  label: {example.label}\n  categorical: {example.categorical}\n"
    model = f"  embedding: {example.embedding}\n{example.parts}  interaction: {example.interaction}"
    values = {
        "data": (data + example.sequences).rstrip("\n"),
        "model": model,
        "block": example.block,
        "stages": "\n".join(f"  - {stage}" for stage in example.stages),
    }
    return {key: text.replace("NAME", name) for key, text in values.items()}
