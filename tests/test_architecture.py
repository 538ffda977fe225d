"""Layers, boundaries and tables that keep the package open for plugins."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.data.schema import CONTEXT
from recsys.plugin.registry import load_registry

ROOT = Path(__file__).parent.parent
LAYERS = (
    "errors",
    "contracts",
    "abilities",
    "data",
    "nn",
    "train",
    "deploy",
    "report",
    "plugin",
    "recipe",
    "bench",
    "api",
    "testing",
    "cli",
)
"""A module imports from its own layer and from those before it."""
TEMPLATE = ROOT / "recsys" / "plugin" / "template"
SOURCES = sorted(path for path in (ROOT / "recsys").rglob("*.py") if TEMPLATE not in path.parents)
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Yield the modules that are imported when the code runs; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), package)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, package)


def layer(module: str) -> str | None:
    """Return the layer of `recsys.x.y`; None for other packages and for the bare `recsys`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "recsys" and len(parts) > 1 and parts[1] in LAYERS else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_belongs_to_a_layer() -> None:
    names = {module_name(path) for path in SOURCES} - {"recsys"}
    assert {name for name in names if layer(name) is None} == set()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_up(path: Path) -> None:
    own = layer(module_name(path))
    if own is None:
        return
    for name in imports(ast.parse(path.read_text()), module_name(path)):
        other = layer(name)
        assert other is None or LAYERS.index(other) <= LAYERS.index(own), f"{module_name(path)} imports {name}"


def test_a_wrong_direction_would_be_seen() -> None:
    code = "from recsys.contracts import Fields\ndef f():\n    from recsys.cli import train\n"
    assert list(imports(ast.parse(code))) == ["recsys.contracts.Fields", "recsys.cli.train"]
    hidden = "if TYPE_CHECKING:\n    import recsys.cli\nelse:\n    import recsys.api\n"
    assert list(imports(ast.parse(hidden))) == ["recsys.api"]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_the_core_imports_no_plugin(path: Path) -> None:
    plugins = {plugin.stem for plugin in PLUGINS}
    assert not {name.split(".")[0] for name in imports(ast.parse(path.read_text()))} & plugins


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_import_the_api_only(path: Path) -> None:
    for name in imports(ast.parse(path.read_text())):
        if name.split(".")[0].startswith("recsys"):
            assert name.startswith("recsys.api."), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted(TEMPLATE.glob("*.py.txt")), ids=lambda path: path.stem)
def test_templates_import_the_api_only(path: Path) -> None:
    if path.name == "test.py.txt":
        return
    code = path.read_text().replace("$", "")
    for name in imports(ast.parse(code)):
        if name.split(".")[0].startswith("recsys"):
            assert name.startswith("recsys.api."), f"{path.name} imports {name}"


def test_the_entry_points_are_the_plugin_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = project["entry-points"]["recsys.v1"]
    assert table == {path.stem.removeprefix("recsys_"): path.stem for path in PLUGINS}


def method_names() -> set[str]:
    """Return the names of the components that the plugins in this repository bring."""
    found: set[str] = set()
    for path in PLUGINS:
        module = importlib.import_module(path.stem)
        found |= {component.name for component in module.recsys_components()}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_the_core_knows_no_method_by_name(path: Path) -> None:
    """A method's name as a value (not in prose) would be a branch that only this method takes."""
    literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)} - {None}
    # A context column may have the name of a method that estimates something from it.
    assert not {value for value in literals if isinstance(value, str)} & (method_names() - set(CONTEXT))


def test_every_component_of_the_core_and_its_plugins_loads() -> None:
    registry = load_registry(environ={})
    ours = [plugin for plugin in registry.broken if plugin.distribution == "recsys"]
    assert not ours, ours
    assert method_names() <= {entry.component.name for entry in registry.all()}


# Calls that can run what they read, or write where it says; and the one module that looks into archives, without
# unpacking them, to tell whether a file is a pickle.
REVIEWED = {"recsys/testing/exporters.py": ["import zipfile"]}
SINKS = {
    "torch.load", "torch.jit.load", "torch.export.load", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "joblib.load", "dill.loads", "cloudpickle.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "os.system", "os.popen", "shutil.unpack_archive",
}  # fmt: skip
METHODS = {"extractall", "unsafe_load", "full_load"}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile", "zipfile"}


def sinks(source: str) -> list[str]:
    """What of a module's source can run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        found += [name] if name in SINKS or name.split(".")[-1] in METHODS else []
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            if (keyword.arg, value) in (("shell", True), ("weights_only", False), ("allow_pickle", True)):
                found.append(f"{name}({keyword.arg}={value})")
    return found


def test_a17_nothing_runs_what_it_reads() -> None:
    """Any such call, or import of what makes it, in the package, its plugins and its scripts."""
    files = [*(ROOT / "recsys").rglob("*.py"), *(ROOT / "plugins").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): sinks(path.read_text(encoding="utf-8")) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == REVIEWED


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import pickle",
        "from pickle import loads",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(path)",
        "numpy.load(path, allow_pickle=True)",
        "torch_load(path, weights_only=False)",
    ],
)
def test_a17_would_be_seen(source: str) -> None:
    assert sinks(source)


def test_a17_what_is_alike_is_no_sink() -> None:
    assert sinks("model.eval()\nyaml.safe_load(text)\ncolumn.list.eval(x)\nsubprocess.run(text, shell=False)") == []
