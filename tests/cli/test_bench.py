"""`recsys bench`: what it trains, what it sums up, and that it repeats nothing."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.bench.execute import jobs
from recsys.bench.plots import draw, points
from recsys.bench.report import summarise
from recsys.bench.table import read_table
from recsys.plugin.registry import load_registry

Command = Callable[..., str]


def bench(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recsys.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def table(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(
        """
data:
  source: {use: files, path: logs.csv}
  split: {by: hash, valid: 0.2, test: 0.2}
  label: y
  categorical: [c, d]
model: {embedding: {use: table}, interaction: {use: mlp, hidden: [4]}}
train: {epochs: 2, batch_size: 64}
stages: [{use: fit}, {use: evaluate}, {use: export, bundle: false}]
"""
    )
    rows = [f"{i % 7},{i % 5},{int((i % 7 + i * i % 5) % 3 == 0)}" for i in range(600)]
    (folder / "logs.csv").write_text("\n".join(["c,d,y", *rows, ""]))
    path = folder / "compare.yaml"
    path.write_text(text)
    return path


TABLE = """
seeds: 2
overrides: [train.threads=1]
rows:
  - {recipe: recipe.yaml, name: mlp, published: {auc: 0.75}, source: nowhere}
  - {recipe: recipe.yaml, name: fm, overrides: [model.interaction=fm]}
"""


def test_a_table_is_run_summed_up_and_not_run_again(tmp_path: Path) -> None:
    path = table(tmp_path, TABLE)
    done = bench(path, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seeds"] == [2021, 2022]
    assert [row["name"] for row in found["rows"]] == ["mlp", "fm"]
    for row in found["rows"]:
        runs = [
            json.loads((tmp_path / "out" / row["name"] / f"seed-{s}" / "metrics.json").read_text())
            for s in (2021, 2022)
        ]
        a, b = (run["metrics"]["test"]["auc"] for run in runs)
        assert row["metrics"]["auc"]["mean"] == pytest.approx((a + b) / 2)
        assert row["metrics"]["auc"]["sd"] == pytest.approx(abs(a - b) / math.sqrt(2))
        assert row["parameters"] == runs[0]["parameters"]
        assert row["runs"] == 2
    assert found["rows"][0]["published"] == {"auc": 0.75}
    written = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert written[0].startswith("| recipe | runs | test auc | published | test logloss")
    assert "| 0.75 |" in written[2]
    before = (tmp_path / "out" / "fm" / "seed-2022" / "metrics.json").stat().st_mtime_ns
    again = bench(path, "--out", "out", "--seeds", "3", "--only", "fm", cwd=tmp_path)
    assert "3 runs, 2 finished before" in again.stdout
    assert (tmp_path / "out" / "fm" / "seed-2022" / "metrics.json").stat().st_mtime_ns == before
    assert not (tmp_path / "out" / "mlp" / "seed-2023").exists()


TWO = "['data.label={first: y, second: {column: y, positive: [0]}}']"
TOLD = """
from recsys.api import Component, hookimpl

class Told:
    name = "told"
    def run(self, run):
        scores = run.scores["test"]
        scores["twice"] = 2 * scores.get("second/gauc", scores.get("gauc"))
    def results(self):
        return ("twice",)

@hookimpl
def recsys_components():
    return [Component("stage", "told", Told)]
"""


def test_a_column_may_be_of_one_task_or_what_another_stage_measures(tmp_path: Path) -> None:
    """Catches a table whose column is empty because a result bears the name of its task."""
    (tmp_path / "told.py").write_text(TOLD)
    overrides = [
        "data.label={first: y, second: {column: y, positive: [0]}}",
        "data.context={group: d}",
        "stages=[{use: fit}, {use: evaluate, metrics: [gauc]}, {use: told}]",
        "train.epochs=1",
    ]
    alone = ["data.label={second: {column: y, positive: [0]}}", "data.context={group: d}", "train.epochs=1"]
    alone.append("stages=[{use: fit}, {use: evaluate, metrics: [gauc]}, {use: told}]")
    rows = (
        f"[{{recipe: recipe.yaml, overrides: {overrides}}}, {{recipe: recipe.yaml, name: alone, overrides: {alone}}}]"
    )
    path = table(tmp_path, f"metrics: [second/gauc, twice]\nrows: {rows}")
    done = bench(path, "--out", "out", "--seeds", 1, "--json", "--plugin", tmp_path / "told.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    both, one = json.loads(done.stdout.splitlines()[-1])["rows"]
    for row in (both, one):
        found = {name: spread["mean"] for name, spread in row["metrics"].items()}
        assert 0 < found["second/gauc"] < 1
        assert found["twice"] == 2 * found["second/gauc"]
    assert both["metrics"] != one["metrics"]


VARIED = """
seeds: 2
metrics: [auc]
overrides: [train.threads=1, train.epochs=1]
rows:
  - {recipe: recipe.yaml, name: wide, vary: {option: model.embedding.dim, values: [8, 2, 4]}}
  - {recipe: recipe.yaml, name: fm, overrides: [model.interaction=fm]}
plot: {x: embedding_bytes, y: auc}
"""


def test_a_varied_option_gives_a_row_for_each_value_and_a_picture(tmp_path: Path) -> None:
    done = bench(table(tmp_path, VARIED), "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["wide@8", "wide@2", "wide@4", "fm"]
    ids = (7 + 2) + (5 + 2)
    assert [row["embedding_bytes"] for row in rows] == [4 * ids * dim for dim in (8, 2, 4, 16)]
    picture = (tmp_path / "out" / "plot.svg").read_text()
    assert picture.startswith("<?xml")
    checked = read_table(tmp_path / "compare.yaml", load_registry())
    lines = summarise(checked, jobs(checked, tmp_path / "out"))
    drawn = points(checked, lines)
    assert set(drawn) == {"wide", "fm"}
    assert [p.x for p in drawn["wide"]] == [4 * ids * dim for dim in (2, 4, 8)]
    by_name = {row["name"]: row for row in rows}
    assert [p.y for p in drawn["wide"]] == [by_name[f"wide@{d}"]["metrics"]["auc"]["mean"] for d in (2, 4, 8)]
    again = tmp_path / "again.svg"
    assert draw(checked, lines, again)
    assert strip(again.read_text()) == strip(picture)


def strip(svg: str) -> str:
    """A picture without the names that matplotlib makes up."""
    return re.sub(r'(id="|#|url\(#)[a-z]?[0-9a-f]{8,}', "", svg)


def test_a_failed_run_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    path = table(tmp_path, TABLE.replace("=fm]", "=fm, train.learning_rate=1e38]").replace("seeds: 2", "seeds: 1"))
    done = bench(path, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "fm, seed 2021: exit status 1" in done.stderr
    assert "not finite" in done.stderr
    assert (tmp_path / "out" / "mlp" / "seed-2021" / "metrics.json").is_file()
    assert "| mlp | 1/1 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_was_stopped_goes_on(sign: signal.Signals, tmp_path: Path) -> None:
    path = table(tmp_path, TABLE.replace("seeds: 2", "seeds: 1"))
    options = [sys.executable, "-m", "recsys.cli", "bench", str(path), "--only", "mlp", "--out", "out"]
    whole = bench(path, "--only", "mlp", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(options, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = tmp_path / "out" / "mlp" / "seed-2021"
    while not (run / "run.json").is_file():
        time.sleep(0.02)
    os.kill(process.pid, sign)
    process.communicate(timeout=120)
    assert process.returncode == (128 + signal.SIGTERM if sign == signal.SIGTERM else 130)
    again = bench(path, "--only", "mlp", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    def weights(folder: str) -> dict[str, bytes]:
        run = tmp_path / folder / "mlp" / "seed-2021"
        return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("*-*/*.safetensors"))}

    assert weights("out") == weights("whole") != {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{recipe: recpe.yaml}]", "recpe.yaml: no such recipe"),
        (
            "rows: [{recipe: recipe.yaml, nam: x}]",
            "compare.yaml:1: rows[0].nam: 'the row' has no option 'nam'. Did you mean 'name'",
        ),
        ("rows: [{recipe: recipe.yaml}, {recipe: recipe.yaml}]", "'recipe' is in the table already"),
        ("rows: [{recipe: recipe.yaml}]\nmetrics: [aux]", "Did you mean 'auc'"),
        ("rows: [{recipe: recipe.yaml}]\nmetrics: [labels/auc]", "no task 'labels'. Did you mean 'label'"),
        (f"rows: [{{recipe: recipe.yaml, overrides: {TWO}}}]\nmetrics: [seconds/auc]", "Did you mean 'second'"),
        (f"rows: [{{recipe: recipe.yaml, overrides: {TWO}}}]\nmetrics: [second/aux]", "Did you mean 'auc'"),
        ("rows: [{recipe: recipe.yaml, overrides: [train.epoch=3]}]", "Did you mean 'epochs'"),
        ("seeds: 2", "rows"),
        ("rows: [{recipe: recipe.yaml, vary: {option: model.embedding.dims, values: [2]}}]", "Did you mean 'dim'"),
        ("rows: [{recipe: recipe.yaml, vary: {values: [2]}}]", "option"),
        ("rows: [{recipe: recipe.yaml}]\nplot: {y: gauc}", "none of the table's metrics"),
        ("rows: [{recipe: recipe.yaml}]\nplot: {z: auc}", "'plot' has no option 'z'"),
    ],
)
def test_a_table_that_cannot_be_run_says_why(recsys: Command, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        recsys("bench", table(tmp_path, text), "--out", tmp_path / "out")
    assert message in str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_not_there(recsys: Command, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no row 'recip'\. Did you mean 'recipe'"):
        recsys("bench", table(tmp_path, "rows: [{recipe: recipe.yaml}]"), "--out", tmp_path / "o", "--only", "recip")
