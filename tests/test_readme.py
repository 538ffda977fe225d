"""README: its commands parse and the main ones run, its recipes and its plugin work, its links and tables are true."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

from recsys.cli import app
from recsys.plugin.registry import Registry, load_registry
from recsys.recipe.check import BLOCKS, find_recipe, load_recipe
from recsys.testing import contract

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = [(match[1], match[2]) for match in FENCE.finditer(README)]
FILES = {  # a snippet whose first line is a comment with a file name is that file
    match[1]: text for _, text in BLOCK if (match := re.match(r"# (\S+\.(?:yaml|py))\n", text))
}


def command_lines() -> Iterator[list[str]]:
    """Yield the words of every shell command of the README, `&&` and line ends apart."""
    for language, text in BLOCK:
        if language != "bash":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


LINES = list(command_lines())
COMMANDS = [words[1:] for words in LINES if words[0] == "recsys"]


def without_redirect(words: list[str]) -> tuple[list[str], str | None]:
    """Split `words > FILE` into both."""
    if ">" not in words:
        return words, None
    at = words.index(">")
    return words[:at], words[at + 1]


def parse(words: list[str]) -> tuple[str, Mapping[str, Any]]:
    """Return (command, parameters) as typer reads them; typer raises on what it does not know."""
    words, _ = without_redirect(words)
    command: Any = typer.main.get_command(app)
    context = command.make_context("recsys", list(words))
    path = []
    while hasattr(command, "commands"):
        name, rest = words[0], words[1:]
        assert name in command.commands, f"recsys {' '.join([*path, name])}: no such command"
        command = command.commands[name]
        path.append(name)
        words = rest
        context = command.make_context(name, list(rest), parent=context)
    return " ".join(path), context.params


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the files that the README shows, as the working directory."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> str:
    """Run `recsys WORDS` in this process; return what it wrote to stdout, or to the file it is redirected to."""
    words, target = without_redirect(words)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app(words, standalone_mode=False)
    if target is not None:
        Path(target).write_text(out.getvalue(), encoding="utf-8")
    return out.getvalue()


def section(title: str) -> str:
    """Return the text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_first_two_commands_install_then_train_and_test() -> None:
    first, second = (text for _, text in BLOCK[:2])
    assert first.rstrip().endswith('pip install -c constraints.txt -e ".[train]" && recsys train quickstart')
    assert re.search(r'pip install -c constraints\.txt -e "\.\[test\]" && pytest -n \d+$', second.rstrip())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(
    "words",
    [w for w in COMMANDS if w[0] in ("train", "check") and "--resume" not in w and w[1] not in ("clicks.yaml",)],
    ids=" ".join,
)
def test_every_recipe_exists_and_takes_its_overrides(words: list[str], folder: Path) -> None:
    _, given = parse(words)
    registry = load_registry(files=given["plugin"] or ())
    recipe = load_recipe(find_recipe(given["recipe"]), registry, given["overrides"] or ())
    for override in given["overrides"] or ():
        key, value = override.split("=", 1)
        at: Any = recipe.document.value
        for part in key.split("."):
            at = at[int(part)] if isinstance(at, list) else at[part]
        assert str(at["use"] if isinstance(at, dict) else at).lower() == value.lower()


def test_the_recipe_written_out_says_what_it_seems_to(folder: Path, registry: Registry) -> None:
    recipe = load_recipe(folder / "mine.yaml", registry)
    assert set(recipe.document.value) < set(BLOCKS)
    assert [checked.name for checked in recipe.interactions] == ["cross", "mlp"]
    assert recipe.train.learning_rate == 2e-3
    assert list(recipe.data.numeric) == ["age", "hour"]


@pytest.mark.bundle
def test_own_logs_from_simulation_to_scores(folder: Path) -> None:
    """The commands of "Train on your own logs", to the letter, in one folder; then the recipe written out."""
    block = FENCE.search(section("Train on your own logs"))
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block[2].splitlines()]
    assert [words[0] for words in lines].count("echo") == 1
    for words in lines:
        if words[0] == "echo":
            with Path(words[words.index(">>") + 1]).open("a") as file:
                file.write(f"{words[1]}\n")
        else:
            run(words[1:])
    result = json.loads(Path("runs/clicks/metrics.json").read_text())
    # Far from chance, and below the best that any model can reach on these logs.
    assert 0.6 < result["metrics"]["test"]["auc"] < 0.8127
    scores = pl.read_parquet("scores.parquet")
    logs = pl.read_parquet("simulated/log/*.parquet")
    assert scores.columns == ["user", "item", "score"]
    assert scores.select("user", "item").equals(logs.select("user", "item"))
    assert 0.2 < scores["score"].mean() < 0.3  # the click rate is .25

    out = run(["train", "mine.yaml", "train.epochs=1", "--out", "runs/mine", "--json"])
    result = json.loads(out.splitlines()[-1])
    known = {"run", "metrics", "seconds", "stage_seconds", "resumed", "rows_per_second", "row_passes", "parameters"}
    known |= {"bytes", "embedding_bytes"}
    assert set(result) == known
    assert set(result["metrics"]["test"]) == {"auc", "logloss", "gauc", "ece"}
    described = re.findall(r"^\| `([^`]+)` \|", section("Train on your own logs"), re.MULTILINE)
    assert len(described) > 5
    assert [name for name in described if not Path("runs/mine", name).exists()] == []
    assert {path.name for path in Path("runs/mine").iterdir()} - {"3-export"} == {n.split("/")[0] for n in described}


def test_the_plugin_keeps_its_contract_and_trains(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme_mixer", folder / "mixer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    contract("interaction", module.Mixer)
    train = next(words for words in COMMANDS if "mixer.py" in words and words[0] == "train")
    overrides = ["train.epochs=1", "data.source.rows=4000"]
    out = run(["train", "quickstart", *overrides, *train[2:], "--json"])
    assert json.loads(out.splitlines()[-1])["metrics"]["test"]["auc"] is not None


def test_the_table_of_components_is_that_of_the_command() -> None:
    rows = json.loads(run(["list", "--json"]))
    own = [row for row in rows if row["distribution"] == "recsys"]
    table = "\n".join(f"| {row['kind']} | `{row['name']}` | {row['summary']} |" for row in own)
    written = "\n".join(line for line in section("What there is").splitlines() if "`" in line and line[0] == "|")
    assert written == table, f"the table in README.md under 'What there is' should be:\n{table}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page}: no heading {target}"
        elif "://" not in target:
            assert (ROOT / target).exists(), f"{page}: no file {target}"


def test_scripts_that_are_named_exist() -> None:
    scripts = [words[words.index("python") + 1] for words in LINES if "python" in words]
    assert scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
