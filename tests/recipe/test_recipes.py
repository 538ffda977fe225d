"""Every recipe that comes with the package: its text, its data, and a first epoch on the real logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import recsys
from recsys.bench.table import read_table
from recsys.data.encode import Encoder
from recsys.data.simulate import Simulated
from recsys.errors import DataError, RecsysError
from recsys.plugin.registry import Registry, load_registry
from recsys.recipe.build import build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.describe import dry_run

FOLDER = Path(recsys.__file__).parent.parent / "recipes"
RECIPES = sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.yaml") if p.parent.name != "tables")
TABLES = sorted((FOLDER / "tables").glob("*.yaml"))
ON_DATA = [name for name in RECIPES if name != "quickstart.yaml" and not name.startswith("simulated/")]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.mark.parametrize("name", RECIPES)
def test_its_first_lines_say_what_it_is_and_how_to_run_it(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    head = "\n".join(line for line in lines[:8] if line.startswith("#"))
    assert head.startswith("# ")
    if not name.endswith("base.yaml"):
        assert f"recsys train {'quickstart' if name == 'quickstart.yaml' else f'recipes/{name}'}" in head


@pytest.mark.parametrize("name", ON_DATA)
def test_without_its_data_it_says_where_to_get_it(
    name: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECSYS_DATA", raising=False)
    recipe = load_recipe(FOLDER / name, registry)
    assert recipe.data.dataset is not None
    with pytest.raises(DataError) as raised:
        dry_run(recipe, registry, tmp_path, 100)
    text = str(raised.value)
    assert str(tmp_path) in text, "every place that was looked at"
    assert recipe.data.dataset.where in text
    for column in recipe.data.dataset.columns:
        assert column in text


@pytest.mark.parametrize("name", ON_DATA)
def test_it_is_sound_on_its_data(name: str, registry: Registry, recsys_data: Path) -> None:
    recipe = load_recipe(FOLDER / name, registry)
    dry = dry_run(recipe, registry, recsys_data, 2000)
    assert "test" in dry.splits
    assert "valid" in dry.splits, "early stopping needs a validation split"
    assert dry.flops > 0 or {part.name for part in recipe.interactions} <= {"fm", "logistic_regression"}


SIMULATED = sorted((FOLDER / "simulated").glob("*.yaml"))


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_it_is_sound_on_its_simulated_world(path: Path, registry: Registry, tmp_path: Path) -> None:
    """Catches a field or a context column that the world does not have, and a model that reads the truth."""
    changes = ["data.source.rows=3000", "data.source.users=200", "data.source.items=100"]
    recipe = load_recipe(path, registry, changes)
    dry = dry_run(recipe, registry, tmp_path, 500)
    assert {"train", "valid", "test"} <= set(dry.splits)
    source = build_source(recipe, registry, data_root(recipe, tmp_path))
    assert isinstance(source, Simulated)
    true = set(source.truth("test").collect_schema()) - {"row_id"}
    assert not true & set(recipe.data.columns())
    if path.stem != "base" and "delayed" not in (recipe.data.source["preset"],):
        assert source.scan("test").collect()["uniform" if "uniform" in source.config.log else "y"].max() == 1
        assert source.reference("test") == source.reference("uniform")


def test_frappe_ids_are_those_of_its_feature_map(registry: Registry, recsys_data: Path) -> None:
    """Field sizes from the data set's own map: each field has its values, one id for missing and one for unknown."""
    recipe = load_recipe(find_recipe("frappe/fm"), registry)
    source = build_source(recipe, registry, data_root(recipe, recsys_data))
    encoder = Encoder.fit(source.scan("train"), recipe.data)
    seen = source.scan("train").select(pl.all().n_unique()).collect().row(0, named=True)
    for field in encoder.schema.fields:
        assert field.rows == seen[field.name] + 2, field.name


@pytest.mark.parametrize(
    ("name", "least"), [("frappe/fm", 0.85), ("adult/dcnv2", 0.88), ("movielens_100k/autoint", 0.62)]
)
def test_a_first_epoch_on_real_logs_learns(name: str, least: float, recsys_data: Path, tmp_path: Path) -> None:
    """`least` lies well below what one epoch reaches, and far above a model that learned nothing."""
    command = [sys.executable, "-m", "recsys.cli", "train", name, "train.epochs=1", "train.batch_size=256"]
    done = subprocess.run(
        [*command, "--data-root", str(recsys_data), "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["metrics"]["test"]["auc"] > least


def test_a_wrong_root_is_not_a_crash(registry: Registry, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("adult/dcnv2"), registry)
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "train.parquet").write_bytes(b"PAR1 but no parquet")
    with pytest.raises(RecsysError, match=r"train\.parquet"):
        dry_run(recipe, registry, tmp_path, 100)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_name_recipes_that_are_sound_and_say_where_published_values_are_from(path: Path) -> None:
    bench = read_table(path, load_registry())
    assert len({entry.name for entry in bench.entries}) == len(bench.entries) > 1
    assert all(entry.source for entry in bench.entries if entry.published)
