"""Loading plugins: order, permission, breakage, clashes; names looked up and built."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.errors import PluginError, RecipeError
from recsys.plugin.registry import Registry, load_registry

GOOD = """
from recsys.plugin.hooks import Component, hookimpl
print("imported {module}")
class Thing:
    '''A thing.'''
    def __init__(self, fields, *, layers: int = 3, heads: int = 2) -> None:
        self.fields, self.layers, self.heads = fields, layers, heads
        self.width, self.is_logit = 1, True
    def __call__(self, e): return e
    def explain(self, e): return {}
@hookimpl
def recsys_components():
    yield Component("interaction", "{name}", Thing)
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Write an installed distribution with one plugin, without a package manager."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, code: str = GOOD, *, version: str = "1.2", module: str = "", component: str = "") -> None:
        module = module or f"fake_recsys_{name}"
        text = code.replace("{module}", module).replace("{name}", component or name)
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"recsys_{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: recsys-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[recsys.v1]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def ours(registry: Registry) -> list[str]:
    return [p.name for p in registry.plugins if p.distribution != "recsys"]


def test_installed_plugins_load_in_name_order_with_provenance(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("zeta")
    install("alpha")
    registry = load_registry(environ={})
    assert ours(registry) == ["alpha", "zeta"]
    entry = registry.get("interaction", "zeta")
    assert (entry.distribution, entry.version, entry.module) == ("recsys-zeta", "1.2", "fake_recsys_zeta")
    assert entry.doc.summary == "A thing."
    assert all(plugin.seconds > 0 for plugin in registry.plugins)
    printed = capsys.readouterr()
    assert "imported fake_recsys_alpha" in printed.err
    assert "imported" not in printed.out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' (fake_recsys_bad"),
        ("import sys; sys.exit(3)", "SystemExit: 3 (fake_recsys_bad.py:1)"),
        ("def broken(:\n", "SyntaxError: invalid syntax"),
        ("x = 1", "fake_recsys_bad has no hook; decorate recsys_components with @hookimpl"),
        (GOOD.replace("recsys_components", "recsys_component"), "unknown hook 'recsys_component'. Did you mean"),
        (GOOD.replace("def recsys_components()", "def recsys_components(x)"), "PluginValidationError"),
        (GOOD.replace('yield Component("interaction", "{name}", Thing)', "return 3"), "returned int, expected a list"),
        (
            GOOD.replace('yield Component("interaction", "{name}", Thing)', "yield Thing"),
            "yielded type, expected a Com",
        ),
        (GOOD.replace("interaction", "interactoin"), "unknown kind 'interactoin'. Did you mean 'interaction'?"),
        (GOOD.replace("{name}", "Bad Name"), "'Bad Name': use lower case letters, digits and '_'"),
        (GOOD.replace(", Thing)", ", 3)"), "the factory is not callable"),
        (GOOD + GOOD.splitlines()[-1], "registers the interaction 'bad' twice"),
        (GOOD.replace("*, layers: int = 3, heads: int = 2", "**options"), "Thing takes **options"),
        (GOOD.replace("self, fields,", "self,"), "the factory must be callable as (fields, *, …)"),
        (GOOD.replace("self, fields,", "self, fields, width,"), "it takes 2 positional parameters"),
        (GOOD.replace("*, layers", "layers"), "options are keyword-only, after `*`; it takes 3 positional parameters"),
        (GOOD.replace("yield", "1 / 0; yield"), "ZeroDivisionError: division by zero (fake_recsys_bad.py:13)"),
    ],
)
def test_a_broken_plugin_is_a_remark_and_the_others_work(install: Install, code: str, reason: str) -> None:
    install("bad", code)
    install("good")
    registry = load_registry(environ={})
    broken = next(b for b in registry.broken if b.name == "bad")
    assert (broken.distribution, broken.version) == ("recsys-bad", "1.2")
    assert reason in broken.reason
    assert "\n" not in broken.reason
    assert "good" in registry.names("interaction")
    with pytest.raises(PluginError) as caught:
        registry.get("interaction", "bad")
    assert "unknown interaction 'bad'." in str(caught.value)
    assert f"broken plugin 'bad' (recsys-bad 1.2): {broken.reason}" in str(caught.value)


def test_a_broken_plugin_leaves_no_hook_behind(install: Install) -> None:
    observer = "\n@hookimpl\ndef recsys_before_stage(run, stage):\n    raise RuntimeError\n"
    install("good", GOOD + observer)
    install("bad", GOOD.replace("yield", "1 / 0; yield") + observer)
    left = load_registry(environ={}).hooks.recsys_before_stage.get_hookimpls()
    fakes = [i.function.__module__ for i in left if i.function.__module__.startswith("fake_recsys_")]
    assert fakes == ["fake_recsys_good"]


def test_observers_are_called(install: Install) -> None:
    install(
        "watch", "from recsys.plugin.hooks import hookimpl\n@hookimpl\ndef recsys_report_sections(run): return [run]"
    )
    assert load_registry(environ={}).hooks.recsys_report_sections(run=7) == [[7]]


@pytest.mark.parametrize("name", ["alpha", "recsys-alpha", "recsys_alpha", "alpha==1.2"])
def test_without_and_disable_act_before_import(install: Install, name: str) -> None:
    install("alpha", "raise SystemError")
    install("beta")
    for registry in (
        load_registry(without=[name], environ={}),
        load_registry(environ={"RECSYS_DISABLE": f" {name} ,"}),
    ):
        assert [d.name for d in registry.disabled] == ["alpha"]
        assert "fake_recsys_alpha" not in sys.modules
        assert not [b for b in registry.broken if b.name == "alpha"]
        assert ours(registry) == ["beta"]


def test_a_misspelt_without_is_an_error_but_a_disabled_name_need_not_be_installed(install: Install) -> None:
    install("alpha")
    with pytest.raises(PluginError, match=r"--without alhpa: no such plugin. Did you mean 'alpha'\?"):
        load_registry(without=["alhpa"], environ={})
    assert ours(load_registry(environ={"RECSYS_DISABLE": "elsewhere"})) == ["alpha"]


@pytest.mark.parametrize(
    ("allowed", "loaded"),
    [
        ("", []),
        ("beta", ["beta"]),
        ("recsys-beta, alpha", ["alpha", "beta"]),
        ("beta==1.2", ["beta"]),
        ("beta==1.3", []),
        ("*", ["alpha", "beta"]),
    ],
)
def test_the_list_of_allowed_plugins(install: Install, allowed: str, loaded: list[str]) -> None:
    install("alpha")
    install("beta")
    registry = load_registry(environ={"RECSYS_PLUGINS_ALLOW": allowed})
    assert ours(registry) == loaded
    assert {d.name for d in registry.disabled} == {"alpha", "beta"} - set(loaded)
    assert not [d for d in registry.disabled if d.distribution == "recsys"]
    by_argument = load_registry(allow=[part.strip() for part in allowed.split(",")], environ={})
    assert ours(by_argument) == loaded


def test_an_argument_cannot_loosen_the_list_of_the_environment(install: Install) -> None:
    install("alpha")
    install("beta")
    assert ours(load_registry(allow=["alpha", "beta"], environ={"RECSYS_PLUGINS_ALLOW": "beta"})) == ["beta"]


def test_a_clash_names_both_distributions(install: Install) -> None:
    install("alpha", component="mixer")
    install("beta", component="mixer", version="2.0")
    with pytest.raises(PluginError) as caught:
        load_registry(environ={})
    assert str(caught.value).startswith(
        "two plugins bring the interaction 'mixer': 'alpha' of recsys-alpha 1.2 and 'beta' of recsys-beta 2.0."
    )
    assert ours(load_registry(without=["alpha"], environ={})) == ["beta"]


def test_two_distributions_with_one_module_are_told_apart(install: Install) -> None:
    install("alpha", module="fake_recsys_same", component="mixer")
    install("beta", module="fake_recsys_same", component="mixer")
    registry = load_registry(environ={})
    assert registry.get("interaction", "mixer").distribution == "recsys-alpha"
    assert [b.reason for b in registry.broken if b.name == "beta"] == [
        "the module fake_recsys_same is registered already, as 'alpha' of recsys-alpha 1.2"
    ]


def test_a_file_registers_and_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "my plugin.py"
    file.write_text(GOOD.replace("{name}", "mixer"))
    registry = load_registry(files=[file], environ={})
    assert registry.get("interaction", "mixer").distribution == str(file)
    file.write_text(GOOD.replace("{name}", "mixer2"))
    assert "mixer2" in load_registry(files=[file], environ={}).names("interaction")


def test_a_file_that_is_missing_broken_or_clashes_is_an_error(install: Install, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"--plugin .*absent.py: no such file"):
        load_registry(files=[tmp_path / "absent.py"], environ={})
    file = tmp_path / "mine.py"
    file.write_text("\n\n1 / 0")
    with pytest.raises(PluginError, match=r"mine.py: ZeroDivisionError: division by zero \(mine.py:3\)"):
        load_registry(files=[file], environ={})
    install("alpha", component="mixer")
    file.write_text(GOOD.replace("{name}", "mixer"))
    with pytest.raises(PluginError, match=r"'alpha' of recsys-alpha 1.2 and 'mine.py' of .*mine.py"):
        load_registry(files=[file], environ={})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    file = tmp_path / "mine.py"
    file.write_text(GOOD.replace("{name}", "autoint_x"))
    return load_registry(files=[file], environ={"RECSYS_DISABLE": "*"})


def test_build_checks_and_hands_over(registry: Registry) -> None:
    built = registry.build("interaction", {"use": "autoint_x", "heads": 5}, "FIELDS", where="model.interaction")
    assert (built.fields, built.layers, built.heads) == ("FIELDS", 3, 5)
    assert registry.build("interaction", "autoint_x", "FIELDS", where="model.interaction").heads == 2
    checked = registry.check("interaction", {"use": "autoint_x", "heads": 5}, "model.interaction")
    assert (checked.name, checked.options, checked.given) == ("autoint_x", {"layers": 3, "heads": 5}, {"heads"})


@pytest.mark.parametrize(
    ("spec", "where", "message", "path"),
    [
        (
            {"use": "autoit_x"},
            "model.interaction",
            "unknown interaction 'autoit_x'. Did you mean 'autoint_x'?",
            ("use",),
        ),
        ("autoit_x", "model.interaction", "unknown interaction 'autoit_x'. Did you mean 'autoint_x'?", ()),
        ({"layers": 3}, "stages[2]", "expected the name of an interaction (`{use: NAME, …}`), got nothing.", ()),
        (3, "stages[2]", "expected the name of an interaction (`{use: NAME, …}`), got 3.", ()),
        ({"use": "autoint_x", 3: 4}, "stages[2]", "an option's name must be text, got 3", ()),
    ],
)
def test_wrong_specs(registry: Registry, spec: object, where: str, message: str, path: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        registry.check("interaction", spec, where)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{where}: {message}")
    assert caught.value.path == (*{"stages[2]": ("stages", 2)}.get(where, ("model", "interaction")), *path)


def test_a_name_of_another_kind_is_pointed_out(registry: Registry) -> None:
    with pytest.raises(PluginError, match=r"unknown stage 'autoint_x'.*'autoint_x' is an interaction"):
        registry.get("stage", "autoint_x")


@pytest.mark.parametrize("group", ["recsys.v2", "recsys_v1", "Recsys.V1", "recsys.plugins", "recys.v1"])
def test_a_misspelt_entry_point_group_is_a_remark(install: Install, tmp_path: Path, group: str) -> None:
    install("stray")
    entry_points = tmp_path / "recsys_stray-1.2.dist-info" / "entry_points.txt"
    entry_points.write_text(entry_points.read_text().replace("recsys.v1", group))
    with pytest.raises(PluginError) as caught:
        load_registry(environ={}).get("interaction", "stray")
    wanted = f"broken plugin 'stray' (recsys-stray 1.2): its entry-point group is '{group}', and this version reads"
    assert wanted in str(caught.value)


def test_other_groups_of_a_plugin_and_other_packages_are_left_alone(install: Install, tmp_path: Path) -> None:
    install("both")
    with (tmp_path / "recsys_both-1.2.dist-info" / "entry_points.txt").open("a") as file:
        file.write("[recsys.v2]\nboth = fake_recsys_both\n[console_scripts]\nboth = fake_recsys_both:main\n")
    assert not load_registry(environ={}).broken


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            GOOD.replace("self.width, self.is_logit = 1, True", "raise ValueError('4 heads for 3')"),
            "the interaction 'part' of recsys-part 1.2 cannot be built: ValueError: 4 heads for 3 (fake_recsys_part",
        ),
        (
            GOOD.replace("self.width, self.is_logit = 1, True", "self.is_logit = True"),
            "the interaction 'part' of recsys-part 1.2 lacks `width`, which recsys.contracts.Interaction describes",
        ),
        (GOOD.replace("def explain", "def explian"), "recsys-part 1.2 lacks `explain()`"),
        (GOOD.replace("def __call__", "def call"), "lacks `forward()` of a `torch.nn.Module`"),
    ],
)
def test_a_part_that_cannot_be_built_is_named_with_its_place(install: Install, code: str, message: str) -> None:
    install("part", code)
    with pytest.raises(RecipeError) as caught:
        load_registry(environ={}).build("interaction", "part", None, where="model.interaction[1]")
    assert str(caught.value).startswith("model.interaction[1]: ")
    assert message in str(caught.value)
    assert caught.value.path == ("model", "interaction", 1)
