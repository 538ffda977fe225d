"""`recsys list`, `show`, `plugins`, `new-plugin`: what they print and what they refuse."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from recsys.cli.show import snippet
from recsys.errors import PluginError, RecsysError
from recsys.plugin.registry import load_registry
from recsys.recipe.check import load_recipe

PLUGIN = '''
from __future__ import annotations
from typing import Literal
from recsys.plugin.hooks import Component, hookimpl

class Mixer:
    """Mix the fields: `h = W e [x]`.

    Source: A. Author, 2020, equation 3.

    Args:
        layers: how many [layers].
        hidden: their widths.
    """

    def __init__(self, fields, *, dim: int, layers: int = 3, hidden: tuple[int, ...] = (4, 2),
                 act: Literal["relu", "no"] = "no", name: str | None = None, rate: float = 1e-3) -> None: ...

class Walk:
    """Walk about."""

    def __init__(self, *, epochs: int = 3) -> None: ...

@hookimpl
def recsys_components():
    return [
        Component("interaction", "test_mixer", Mixer, stages=({"use": "fit"}, {"use": "evaluate"})),
        Component("stage", "test_mixer", Walk),
    ]
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("RECSYS_DISABLE", "*")
    file = tmp_path / "mixer.py"
    file.write_text(PLUGIN)
    return str(file)


def run(name: str, *args: str) -> str:
    app = typer.Typer()
    app.command()(importlib.import_module(f"recsys.cli.{name}").command)
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, standalone_mode=False)
    return result.stdout


def test_list_prints_name_summary_and_origin(plugin: str) -> None:
    lines = [line.split() for line in run("list", "interaction", "--plugin", plugin).splitlines()]
    assert lines[0] == ["kind", "name", "what", "it", "is", "from"]
    assert ["interaction", "test_mixer", "Mix", "the", "fields:", "`h", "=", "W", "e", "[x]`.", plugin] in lines
    assert not [line for line in lines[1:] if line and line[0] == "stage"]


def test_list_as_json_has_core_and_plugin(plugin: str) -> None:
    rows = {(row["kind"], row["name"]): row for row in json.loads(run("list", "--json", "--plugin", plugin))}
    assert rows["stage", "test_mixer"]["summary"] == "Walk about."
    assert rows["stage", "test_mixer"]["distribution"] == plugin
    assert rows["interaction", "fm"]["distribution"] == "recsys"


def test_list_refuses_an_unknown_kind(plugin: str) -> None:
    with pytest.raises(RecsysError, match=r"unknown kind 'interactions'. Did you mean 'interaction'\?"):
        run("list", "interactions")


def test_show_prints_both_kinds_with_options_and_yaml(plugin: str) -> None:
    text = run("show", "test_mixer", "--plugin", plugin)
    for part in [
        "Mix the fields: `h = W e [x]`.",
        "Source: A. Author, 2020, equation 3.",
        "[B, F, D] -> [B, H]",
        "how many [layers].",
        "tuple[int, ...]",
        "'relu' | 'no'",
        "required",
        "fit → evaluate",
        "Walk about.",
    ]:
        assert part in text, part


def test_what_show_prints_can_be_pasted(plugin: str) -> None:
    both: list[dict[str, Any]] = json.loads(run("show", "test_mixer", "--json", "--plugin", plugin))
    snippets = {entry["kind"]: yaml.safe_load(entry["yaml"].replace("…", "8")) for entry in both}
    assert snippets["interaction"] == {
        "model": {
            "interaction": {
                "use": "test_mixer",
                "dim": 8,
                "layers": 3,
                "hidden": [4, 2],
                "act": "no",
                "name": None,
                "rate": 1e-3,
            }
        }
    }
    assert snippets["stage"] == {"stages": [{"use": "test_mixer", "epochs": 3}]}


def test_show_suggests(plugin: str) -> None:
    with pytest.raises(PluginError, match=r"unknown component 'test_mixr'. Did you mean 'test_mixer'\?"):
        run("show", "test_mixr", "--plugin", plugin)


def test_plugins_tells_loaded_from_disabled_and_broken(
    plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_DISABLE", "fake_off")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("fake_off", "fake_bad"):
        (tmp_path / f"{name}.py").write_text("raise OSError('no [disk]')")
        info = tmp_path / f"{name}-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n")
        (info / "entry_points.txt").write_text(f"[recsys.v1]\n{name} = {name}\n")
    rows = {row["name"]: row for row in json.loads(run("plugins", "--json", "--plugin", plugin))}
    assert rows["mixer.py"]["components"] == ["interaction test_mixer", "stage test_mixer"]
    assert rows["core"]["state"] == "loaded"
    assert rows["core"]["seconds"] >= 0
    assert (rows["fake_off"]["state"], rows["fake_off"]["version"]) == ("disabled", "3.1")
    assert rows["fake_bad"]["state"] == "broken"
    assert rows["fake_bad"]["reason"] == "OSError: no [disk] (fake_bad.py:1)"
    table = run("plugins", "--plugin", plugin)
    assert "fake_bad is broken: OSError: no [disk] (fake_bad.py:1)" in table
    assert "fake_off is disabled: left out by --without or RECSYS_DISABLE" in table


@pytest.mark.parametrize("name", ["list", "show", "plugins"])
def test_importing_a_command_imports_nothing_heavy(name: str) -> None:
    code = f"import sys, recsys.cli.{name}; print([m for m in ('torch', 'pluggy', 'polars') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_training_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pluggy", None)
    with pytest.raises(RecsysError, match=r"needs pluggy: pip install 'recsys\[train\]'"):
        run("list")


def test_new_plugin_writes_a_package_and_says_what_to_do_next(tmp_path: Path) -> None:
    text = run("new_plugin", "my_pool", "--kind", "sequence", "--out", str(tmp_path))
    folder = tmp_path / "recsys-my-pool"
    assert (folder / "recsys_my_pool.py").is_file()
    assert str(folder / "example.yaml") in text
    assert f"cd {folder} && pip install -e '.[test]' && pytest && recsys train example.yaml" in text
    with pytest.raises(PluginError, match=r"unknown kind 'sequnce'. Did you mean 'sequence'\?"):
        run("new_plugin", "other", "--kind", "sequnce", "--out", str(tmp_path))


QUICKSTART = """
data:
  source: {use: simulated, rows: 100}
  label: y
  categorical: [user, item]
model: {interaction: fm}
"""


def test_every_snippet_makes_a_recipe_that_is_accepted_and_means_the_defaults(tmp_path: Path) -> None:
    registry = load_registry(environ={})
    assert registry.all()
    for entry in registry.all():
        kind, name = entry.component.kind, entry.component.name
        pasted = yaml.safe_load(snippet(entry).replace("items: …", "items: ['8']").replace("…", "'8'"))
        whole = yaml.safe_load(QUICKSTART)
        if kind == "sampler":
            whole["sampling"] = {"item": "item", "user": "user"}
        for block, value in pasted.items():
            whole[block] = {**whole.get(block, {}), **value} if isinstance(value, dict) and block != "loss" else value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
        recipe = load_recipe(tmp_path / "recipe.yaml", registry)

        used = [*recipe.parts.values(), *recipe.interactions, recipe.loss, *recipe.stages]
        used += [registry.check("source", recipe.data.source, "data.source")]
        used += [recipe.sampling.sampler] if recipe.sampling else []
        used += [recipe.propensity] if recipe.propensity else []
        for stage in recipe.stages:
            for other in ("metric", "exporter"):
                used += [registry.check(other, spec, "here") for spec in stage.options.get(f"{other}s", ())]
        found = [checked for checked in used if checked.name == name]
        assert found, (kind, name)
        given = {option.name for option in entry.options}
        for option in entry.options:
            value = next(checked for checked in found if set(checked.options) == given).options[option.name]
            assert option.required or value == option.default, (name, option.name)


def test_show_writes_defaults_as_a_recipe_has_them() -> None:
    text = " ".join(run("show", "evaluate").split())
    assert "[auc, logloss]" in text
    assert "null names of splits" in text
    assert "None" not in text.split("splits")[-1]


def test_show_leaves_the_breaking_of_lines_to_the_terminal() -> None:
    text = run("show", "ece")
    assert "rows of one score stay together" in " ".join(text.split())
    lines = [line for line in text.splitlines() if line.strip()]
    assert not any(
        line.strip() == "rows each, and rows of one score stay together (in the bin of their middle" for line in lines
    )
    assert "logit = " in [line[:8] for line in run("show", "autoint").splitlines()]
