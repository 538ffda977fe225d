"""`recsys bench` on a selection table: rankings, trainings that rows share, a table; nothing is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., str]

PLUGIN = '''
from recsys.api import Component, Fields, RankedFields, Ranking, hookimpl


def listed(fields: Fields, *, first: tuple[str, ...], keep: float = 0.5) -> RankedFields:
    """Ranks the fields that are listed before the others."""
    def rank(run):
        run.model.eval()
        return Ranking({n: float(len(first) - first.index(n) if n in first else 0) for n in fields.names}, 5000)
    return RankedFields(fields, rank, keep)


@hookimpl
def recsys_components():
    return [Component("selector", "listed", listed, ({"use": "rank_fields"}, {"use": "prune"}, {"use": "fit"}))]
'''
TABLE = """
seeds: 1
overrides: [train.threads=1, data.source.rows=6000, train.epochs=2, train.batch_size=256]
selection:
  base: quickstart.yaml
  overrides: [model.head.wide=false, model.interaction=fm]
  shares: [0.2, 1.0]
  planted: [noise_row, noise_user]
rows:
  - {name: good, selector: {use: listed, first: [user, item]}}
  - {name: alike, selector: {use: listed, first: [item, user], keep: 0.1}}
  - {name: leap, selector: leap, overrides: ['stages=[{use: bilevel_fit, epochs: 1}, {use: reset}, {use: prune}]']}
"""


def changed(out: Path) -> dict[str, int]:
    """Run → when it ended."""
    return {str(p.parent.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("seed-*/metrics.json")}


def test_rankings_are_found_judged_and_not_again(recsys: Command, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    table = tmp_path / "select.yaml"
    table.write_text(TABLE)
    out = tmp_path / "out"
    command = ("bench", table, "--out", out, "--plugin", tmp_path / "plugin.py")
    told = recsys(*command, "--only", "good")
    assert "select, seed 2021, searches: 1 runs, 0 finished before" in told
    assert "select, seed 2021, 2 choices of fields: 2 runs, 0 finished before" in told
    before = changed(out)
    assert len(before) == 3
    told = recsys(*command, "--only", "good", "--only", "alike", "--json")
    after = changed(out)
    assert {name for name in after if name not in before} == {"search/alike/seed-2021"}
    assert {name: after[name] for name in before} == before
    rows = json.loads(told.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["good", "alike", "leap"]
    good, alike = (row["seeds"][0] for row in rows[:2])
    assert set(good["curve"][0]["fields"]) == {"user", "item"}
    assert good["search"]["order"][:2] == ["user", "item"]
    assert alike["search"]["order"][:2] == ["item", "user"]
    assert good["curve"][0]["auc"] == alike["curve"][0]["auc"]
    for point in good["curve"]:
        folder = next((out / "retrain").glob(f"{point['count']:03d}-*")) / "seed-2021"
        result = json.loads((folder / "metrics.json").read_text())
        assert point["metrics"] == result["metrics"]
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe["model"]["selector"] == {"use": "fixed", "fields": sorted(point["fields"])}
        assert recipe["train"]["seed"] == 2021
    few, every = good["curve"]
    assert good["aukc"] == pytest.approx(few["auc"] + every["auc"] - 1)
    assert good["search"]["passes"] == 5000
    rows_trained = json.loads((out / "search/good/seed-2021/data.json").read_text())["splits"]["train"]["rows"]
    assert good["training"] == 3 * 2 * rows_trained
    assert rows[0]["relative"]["mean"] == pytest.approx(5000 / (6 * rows_trained))
    assert good["rank_auc"] == (2 + 6 * 0.5) / 8
    stages = sorted(path.name for path in (out / "search/good/seed-2021").iterdir() if path.name[0].isdigit())
    assert stages == ["1-rank_fields", "2-prune"]


def test_left_out_fields_do_not_reach_the_model(recsys: Command, tmp_path: Path) -> None:
    small = ("data.source.rows=4000", "train.epochs=1", "train.threads=1")
    stages = "stages=[{use: prune}, {use: fit}, {use: evaluate}]"
    sizes = {}
    for wide in ("true", "false"):
        told = recsys(
            *("train", "quickstart", *small, "model.selector={use: fixed, fields: [device, age]}", stages),
            *(f"model.head.wide={wide}", "--out", tmp_path / wide),
        )
        assert ("removes user, item, city, category, brand, hour, noise_row, noise_user from the" in told) == (
            wide == "true"
        )
        sizes[wide] = json.loads((tmp_path / wide / "metrics.json").read_text())["embedding_bytes"]
    assert sizes["true"] == sizes["false"] < 4 * 8 * 60
    with pytest.raises(SystemExit, match=r"no field 'devise'\. Did you mean 'device'"):
        recsys("train", "quickstart", *small, "model.selector={use: fixed, fields: [devise]}", "--out", tmp_path / "x")
