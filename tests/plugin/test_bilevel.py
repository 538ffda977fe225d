"""`recsys.api` is enough for a procedure with two optimizers: the sketch beside this file trains from a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.plugin.registry import load_registry
from recsys.recipe.check import load_recipe
from recsys.recipe.execute import Session
from recsys.testing import contract

SKETCH = Path(__file__).with_name("bilevel_sketch.py")
RECIPE = """
data:
  source: {use: simulated, rows: 20_000, seed: 7}
  label: y
  categorical: [user, item, age, city, category, brand, hour, device]
model:
  embedding: {use: table, dim: 4}
  selector: {use: gates_sketch, keep: 5}
  interaction: fm
train: {epochs: 3, batch_size: 256, learning_rate: 2e-2}
"""


def test_a_bilevel_stage_on_the_api_alone_searches_prunes_and_retrains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    assert "from recsys.api import" in SKETCH.read_text()
    assert SKETCH.read_text().count("recsys.") == SKETCH.read_text().count("recsys.api")
    registry = load_registry(files=[SKETCH], environ={})
    contract(registry.get("selector", "gates_sketch").component)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", registry)
    assert [stage.name for stage in recipe.stages] == ["bilevel_sketch", "prune", "fit", "evaluate"]
    session = Session(recipe, registry, tmp_path / "run")
    result = session.run()
    assert result is not None
    assert result["metrics"]["test"]["auc"] > 0.6
    assert (tmp_path / "run" / "2-prune" / "selection.safetensors").is_file()
