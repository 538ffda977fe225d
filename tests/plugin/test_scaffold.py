"""`recsys new-plugin`: every kind yields a package that loads, keeps its contract, and trains."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import PluginError
from recsys.plugin.hooks import KINDS, Component
from recsys.plugin.registry import Registry, load_registry
from recsys.plugin.scaffold import write
from recsys.recipe.check import load_recipe
from recsys.recipe.execute import Session
from recsys.testing import contract


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(environ={})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_its_contract_and_has_a_valid_recipe(kind: Any, registry: Registry, tmp_path: Path) -> None:
    folder = write("my_thing", kind, tmp_path, registry)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["README.md", "example.yaml", "pyproject.toml", "recsys_my_thing.py", "tests/test_my_thing.py"]

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "recsys-my-thing"
    assert project["entry-points"]["recsys.v1"] == {"my_thing": "recsys_my_thing"}

    loaded = load_registry(files=[folder / "recsys_my_thing.py"], environ={})
    entry = loaded.get(kind, "my_thing")
    assert entry.component.factory.__name__ == "MyThing"
    assert all(option.description for option in entry.options)
    contract(entry.component)

    recipe = load_recipe(folder / "example.yaml", loaded)
    used = {
        recipe.data.source["use"],
        recipe.loss.name,
        *(part.name for part in (*recipe.parts.values(), *recipe.interactions, *recipe.stages)),
        *(name for stage in recipe.stages for name in stage.options.get("metrics", ())),
        *(spec["use"] for stage in recipe.stages for spec in stage.options.get("exporters", ())),
    }
    used |= set() if recipe.sampling is None else {recipe.sampling.sampler.name}
    used |= set() if recipe.propensity is None else {recipe.propensity.name}
    assert "my_thing" in used


@pytest.mark.parametrize(
    ("kind", "results"),
    [
        ("selector", ["2-prune/selection.safetensors", "export/model.safetensors"]),
        ("exporter", ["export/my_thing/weights.safetensors", "export/my_thing/weights.json"]),
        ("stage", ["metrics.json"]),
        ("propensity", ["propensity.safetensors"]),
    ],
)
def test_the_example_recipe_trains(
    kind: Any, results: list[str], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    folder = write("my_thing", kind, tmp_path, registry)
    loaded = load_registry(files=[folder / "recsys_my_thing.py"], environ={})
    tiny = ["data.source.rows=2000", "train.epochs=1"]
    recipe = load_recipe(folder / "example.yaml", loaded, tiny)
    result = Session(recipe, loaded, tmp_path / "run").run()
    assert result is not None
    for split in result["metrics"]:
        assert 0 < result["metrics"][split]["auc"] < 1
    for name in results:
        assert (tmp_path / "run" / name).stat().st_size > 0, name


def test_the_generated_files_hold_no_placeholder(registry: Registry, tmp_path: Path) -> None:
    for kind in KINDS:
        for file in write(f"a_{kind}", kind, tmp_path, registry).rglob("*.*"):
            text = file.read_text() if file.is_file() else ""
            assert "$" not in text, file
            assert "NAME" not in text, file


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Mixer", "interaction", "'Mixer' cannot be a name: use lower case letters"),
        ("my-mixer", "interaction", "'my-mixer' cannot be a name"),
        ("2fast", "interaction", "'2fast' cannot be a name"),
        ("../up", "interaction", "'../up' cannot be a name"),
        ("class", "interaction", "'class' cannot be a name"),
        ("recsys_mixer", "interaction", "leave the prefix out"),
        ("mixer", "interactions", "unknown kind 'interactions'. Did you mean 'interaction'?"),
        ("fm", "interaction", "the interaction 'fm' exists already, in recsys"),
        ("autoint", "selector", "a plugin 'autoint' is installed already, by recsys"),
    ],
)
def test_names_are_checked(name: str, kind: str, message: str, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        write(name, kind, tmp_path, registry)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(registry: Registry, tmp_path: Path) -> None:
    folder = write("mixer", "interaction", tmp_path, registry)
    (folder / "recsys_mixer.py").write_text("mine")
    with pytest.raises(PluginError, match="recsys-mixer exists already"):
        write("mixer", "interaction", tmp_path, registry)
    assert (folder / "recsys_mixer.py").read_text() == "mine"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """The interpreter of a fresh environment that sees the packages of this one, so that nothing is downloaded."""
    has_pip = importlib.util.find_spec("pip") is not None
    venv.create(tmp_path / "venv", with_pip=not has_pip, symlinks=os.name != "nt")
    python = next(path for path in (tmp_path / "venv").glob("*/python*") if path.stem == "python")
    where = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=where))
    here = sysconfig.get_path("purelib")
    # `addsitedir` and not a plain path, so that editable installs of this environment are seen as well.
    (site / "parent.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return str(python)


def test_a_generated_package_installs_tests_and_trains(python: str, registry: Registry, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="an editable install without build isolation needs hatchling")
    folder = write("blender", "interaction", tmp_path, registry)
    environment = {**os.environ, "RECSYS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*args: str) -> str:
        done = subprocess.run(
            [python, "-m", *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")
    assert "1 passed" in run("pytest", "-q", "-p", "no:cacheprovider")
    result = json.loads(run("recsys.cli", "train", "example.yaml", "--out", "run", "--json").splitlines()[-1])
    assert result["metrics"]["test"]["auc"] > 0.6
    assert json.loads((folder / "run" / "run.json").read_text())["plugins"]["blender"] == "recsys-blender 0.1.0"


def test_the_contract_of_the_template_can_fail(registry: Registry, tmp_path: Path) -> None:
    """The three-line test is no formality: a fault in the generated class makes it fail."""
    folder = write("mixer", "interaction", tmp_path, registry)
    module = folder / "recsys_mixer.py"
    module.write_text(module.read_text().replace("return h.flatten(1)", "return (h - h.mean(0)).flatten(1)"))
    component = load_registry(files=[module], environ={}).get("interaction", "mixer").component
    assert isinstance(component, Component)
    with pytest.raises(AssertionError, match="rows_independent"):
        contract(component)


def test_templates_are_those_of_the_kinds() -> None:
    template = Path(sys.modules[write.__module__].__file__ or "").parent / "template"
    components = {path.name.removesuffix(".py.txt") for path in template.glob("*.py.txt")} - {"test"}
    assert components == set(KINDS)
