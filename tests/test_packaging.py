"""The wheel holds what it should, its metadata says what is true, and light commands stay light."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recsys

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("torch", "lightning", "torchmetrics", "pluggy", "safetensors")
"""The modules of the extra `train`."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    (found,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(found).decode()


def sources(folder: str) -> set[str]:
    """Return the files of the checkout below a folder that belong into the wheel."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_package_plugins_and_recipes_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = sources("recsys")
    expected |= {f"recsys/{name}" for name in sources("recipes")}
    expected |= {name.removeprefix("plugins/") for name in sources("plugins")}
    assert names == expected
    assert {"recsys/py.typed", "recsys/recipes/quickstart.yaml", "recsys_autoint.py"} <= names
    assert metadata_file(wheel, "licenses/LICENSE").lstrip().startswith("Apache License")


def test_the_wheel_registers_every_plugin_and_the_command(wheel: zipfile.ZipFile) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(metadata_file(wheel, "entry_points.txt"))
    modules = sorted(path.stem for path in (ROOT / "plugins").glob("*.py"))
    assert sorted(entry_points["recsys.v1"].values()) == modules
    assert dict(entry_points["console_scripts"]) == {"recsys": "recsys.cli:main"}
    assert set(entry_points["recsys.v1"]) == {module.removeprefix("recsys_") for module in modules}


def test_the_version_is_said_once(wheel: zipfile.ZipFile) -> None:
    assert f"\nVersion: {recsys.__version__}\n" in metadata_file(wheel, "METADATA")
    assert importlib.metadata.version("recsys") == recsys.__version__


def test_the_base_install_is_light_and_bad_releases_are_pinned_away() -> None:
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not base & {*HEAVY, "scipy", "scikit-learn", "pandas"}
    extra = {(r := Requirement(text)).name: r.specifier for text in PROJECT["optional-dependencies"]["train"]}
    assert set(extra) == set(HEAVY)
    assert [v for v in ("2.6.1", "2.6.2", "2.6.3", "2.6.4") if extra["lightning"].contains(v)] == ["2.6.1", "2.6.4"]


def test_constraints_pin_every_direct_dependency_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name((r := Requirement(line)).name): r.specifier for line in lines if line and line[0] != "#"}
    extras = PROJECT["optional-dependencies"]
    needed = [
        *PROJECT["dependencies"],
        *(text for name in ("train", "export", "serve", "test", "dev") for text in extras[name]),
    ]
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        if name == "recsys":
            continue
        assert name in pins, f"constraints.txt does not pin {name}"
        (pin,) = pins[name]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{name}: {pin.version} is not in {requirement.specifier}"


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = (*HEAVY, "polars", "numpy", "scipy", "sklearn")
    code = f"""
import sys
from recsys.cli import main
sys.argv = ["recsys", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert "train" in done.stdout


def bare(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `recsys COMMAND` as if the extra `train` were not installed."""
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # importing it raises, finding it finds nothing
from recsys.cli import main
sys.argv = ["recsys", *{command!r}]
main()
"""
    return python(code, folder)


@pytest.mark.parametrize(
    "command",
    [["train", "quickstart"], ["check", "quickstart"], ["list"], ["plugins"], ["show", "fm"], ["evaluate", "runs/x"]],
    ids=" ".join,
)
def test_without_the_extra_a_command_names_it(command: list[str], tmp_path: Path) -> None:
    done = bare(command, tmp_path)
    assert done.returncode == 1
    assert "pip install 'recsys[train]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_logs_are_simulated_and_looked_at(tmp_path: Path) -> None:
    done = bare(["simulate", "--rows", "2000"], tmp_path)
    assert done.returncode == 0, done.stderr
    done = bare(["schema", "infer", "simulated/log/*.parquet"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "label:" in done.stdout
