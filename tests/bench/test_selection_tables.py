"""Selection tables without training: what is run, what is shared, and what is summed up from the runs' files."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from recsys.bench.execute import Job
from recsys.bench.study import Study, study
from recsys.bench.table import Bench, read_table
from recsys.errors import RecipeError, RunError
from recsys.plugin.registry import load_registry

ROOT = Path(__file__).parent.parent.parent
FIELDS = ("a", "b", "c", "d", "e", "noise_random_a")
RECIPE = """
data:
  source: {use: files, path: logs.csv}
  split: {by: hash, valid: 0.2, test: 0.2}
  label: y
  categorical: [a, b, c, d]
  numeric: [e]
  noise: {random: [a]}
model: {embedding: {use: table}, interaction: {use: mlp, hidden: [4]}}
train: {epochs: 2}
stages: [{use: fit, epochs: 7}, {use: evaluate}, {use: export}]
"""
TABLE = """
seeds: 2
overrides: [train.threads=1]
selection: {base: recipe.yaml, overrides: [train.batch_size=64], shares: [0.2, 0.5, 1.0], reference: one}
rows:
  - {name: one, selector: {use: leap, strength: 0.03}}
  - {name: two, selector: optfs, overrides: ['stages=[{use: fit, epochs: 3}, {use: prune}, {use: fit}]']}
  - {name: three, recipe: other.yaml}
"""
OTHER = """
base: recipe.yaml
model: {selector: leap}
stages:
  - {use: bilevel_fit, epochs: 3}
  - {use: prune}
  - {use: fit, name: retrain}
"""
Scores = Mapping[str, float]


def written(folder: Path, table: str = TABLE) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "other.yaml").write_text(OTHER)
    path = folder / "select.yaml"
    path.write_text(table)
    return path


def read(folder: Path, table: str = TABLE) -> Bench:
    return read_table(written(folder, table), load_registry())


def auc_of(fields: set[str], seed: int) -> float:
    """A made-up AUC of a set of fields."""
    return 0.5 + 0.07 * sum(FIELDS.index(name) % 3 for name in fields) / len(fields) + seed % 2 / 50


def option(job: Job, key: str) -> object:
    """The last override of a key, as YAML reads it."""
    values = [text.split("=", 1)[1] for text in job.entry.overrides if text.split("=")[0] == key]
    return yaml.safe_load(values[-1])


def finish(job: Job, scores: Callable[[str, int], Scores], resumed: bool = False) -> None:
    """Write the files of a run as if it had been trained."""
    result = {"stage_seconds": {"1-fit": 2.0 + job.seed % 2, "2-prune": 0.5}, "resumed": resumed}
    selector = option(job, "model.selector") if "retrain" in job.folder.parts else None
    if isinstance(selector, dict):
        auc = auc_of(set(selector["fields"]), job.seed)
        result |= {"metrics": {"test": {"auc": auc, "logloss": 0.5}}, "row_passes": 1000 * len(selector["fields"])}
    else:
        (job.folder / "2-prune").mkdir(parents=True)
        (job.folder / "2-prune" / "scores.json").write_text(json.dumps(scores(job.entry.name, job.seed)))
        result |= {"metrics": {}, "row_passes": 12_000}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "metrics.json").write_text(json.dumps(result))


def run(running: Study, scores: Callable[[str, int], Scores], fail: Callable[[Job], bool] = lambda job: False):
    """Run all waves; returns the jobs that were not finished before, wave by wave."""
    waves = []
    for wave in running.waves():
        todo = [job for job in wave.jobs if not job.done]
        assert len({job.folder for job in wave.jobs}) == len(wave.jobs)
        for job in todo:
            if not fail(job):
                finish(job, scores)
        waves.append(todo)
    return waves


def scores_of(row: str, seed: int) -> Scores:
    """One and two agree; three ranks the other way round, and changes with the seed."""
    values = {name: 6.0 - i for i, name in enumerate(FIELDS)}
    if row == "two":
        return {name: 100 * value for name, value in values.items()}
    if row == "three":
        return {name: -value if i < 3 else (i + seed) % 3 for i, (name, value) in enumerate(values.items())}
    return values


def test_a_search_is_a_recipe_up_to_its_first_prune(tmp_path: Path) -> None:
    bench = read(tmp_path)
    searching = next(iter(study(bench, tmp_path / "out", None).waves())).jobs
    stages = {job.entry.name: option(job, "stages") for job in searching}
    assert stages["two"] == [{"use": "fit", "epochs": 3}, {"use": "prune"}]
    assert stages["three"] == [{"use": "bilevel_fit", "epochs": 3}, {"use": "prune"}]
    assert stages["one"] == [{"use": "bilevel_fit"}, {"use": "reset"}, {"use": "prune"}]
    one = bench.entries[0].recipe
    assert one.parts["selector"].options["strength"] == 0.03
    assert one.train.batch_size == 64, "a row without a recipe is the base, with its overrides"
    assert {job.seed for job in searching} == {2021}
    assert searching[0].folder == tmp_path / "out" / "search" / "one" / "seed-2021"


def test_the_base_is_trained_with_the_best_fields_alone(tmp_path: Path) -> None:
    bench = read(tmp_path)
    searching, training, *_ = run(study(bench, tmp_path / "out", ["one"]), scores_of)
    assert len(searching) == 1
    assert [option(job, "model.selector") for job in training] == [
        {"use": "fixed", "fields": sorted(FIELDS[:n])} for n in (1, 3, 6)
    ]
    for job in training:
        assert option(job, "stages") == [
            {"use": "prune"},
            {"use": "fit", "epochs": 7},
            {"use": "evaluate", "metrics": ["auc", "logloss"]},
        ]
        assert job.entry.overrides[:2] == ("train.threads=1", "train.batch_size=64")
        assert job.entry.path == tmp_path / "recipe.yaml"


def test_a_set_of_fields_is_trained_once_whoever_chose_it(tmp_path: Path) -> None:
    bench = read(tmp_path)
    out = tmp_path / "out"
    waves = run(study(bench, out, None), scores_of)
    assert [len(wave) for wave in waves[::2]] == [3, 3]
    for seed, wave in zip(bench.seeds, waves[1::2], strict=True):
        wanted = set()
        for row in ("one", "two", "three"):
            found = scores_of(row, seed)
            best = sorted(found, key=lambda name: -found[name])
            wanted |= {frozenset(best[:n]) for n in (1, 3, 6)}
        chosen = [frozenset(option(job, "model.selector")["fields"]) for job in wave]  # type: ignore[index]
        assert len(chosen) == len(set(chosen)) == 5, "of nine"
        assert set(chosen) == wanted
        assert all(job.seed == seed for job in wave)
    again = run(study(bench, out, None), scores_of)
    assert again == [[], [], [], []], "nothing that is finished is repeated"
    more = run(study(read_table(tmp_path / "select.yaml", load_registry(), 3), out, ["one", "two"]), scores_of)
    assert [len(wave) for wave in more] == [0, 0, 0, 0, 2, 3], "two equal rankings share their runs"


def test_the_table_is_what_loops_over_the_runs_give(tmp_path: Path) -> None:
    bench = read(tmp_path)
    running = study(bench, tmp_path / "out", None)
    run(running, scores_of)
    running.write()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (table["counts"], table["fields"], table["planted"]) == ([1, 3, 6], list(FIELDS), ["noise_random_a"])
    for row in table["rows"]:
        areas, correlations, halves = [], [], []
        for seed, one in zip(bench.seeds, row["seeds"], strict=True):
            ranking, found = one["search"]["order"], scores_of(row["name"], seed)
            assert [found[name] for name in ranking] == sorted(found.values(), reverse=True)
            auc = [auc_of(set(ranking[:n]), seed) for n in (1, 3, 6)]
            assert [point["auc"] for point in one["curve"]] == pytest.approx(auc)
            assert [point["fields"] for point in one["curve"]] == [ranking[:n] for n in (1, 3, 6)]
            areas.append(((auc[0] + auc[1] - 1) * 2 + (auc[1] + auc[2] - 1) * 3) / 5)
            reference = scores_of("one", seed)
            a, b = ([sum(s[n] > s[m] for m in FIELDS) for n in FIELDS] for s in (found, reference))
            correlations.append(float(np.corrcoef(a, b)[0, 1]))
            halves.append(set(ranking[:3]))
            assert one["rank_auc"] == statistics.fmean(
                (found[n] > found["noise_random_a"]) + (found[n] == found["noise_random_a"]) / 2 for n in FIELDS[:5]
            )
        assert row["aukc"]["mean"] == pytest.approx(statistics.fmean(areas))
        assert row["aukc"]["sd"] == pytest.approx(statistics.stdev(areas))
        assert row["stability"] == pytest.approx(len(halves[0] & halves[1]) / len(halves[0] | halves[1]))
        assert row["seconds"]["mean"] == pytest.approx(3.0)
        assert row["passes"]["mean"] == 12_000
        assert row["relative"]["mean"] == pytest.approx(2.0), "by 6,000 passes of training with all six fields"
        assert row["spearman"]["mean"] == pytest.approx(statistics.fmean(correlations))
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0].startswith(
        "| row | curves | AUKC | search s | row passes | × training | stability | Spearman with one"
    )
    assert any("AUKC = Σ_k (AUC_k + AUC_{k+1} − 1) · (n_{k+1} − n_k) / (n_max − n_min)" in line for line in lines)
    assert "| row | 1 | 3 | 6 |" in lines
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["one", "two", "three"]
    assert rows[0]["AUKC"] == f"{table['rows'][0]['aukc']['mean']:.5f} ± {table['rows'][0]['aukc']['sd']:.5f}"
    assert [path.name for path in running.draw()] == ["curves.svg", "cost.svg"]
    for name in ("curves.svg", "cost.svg"):
        picture = (tmp_path / "out" / name).read_text()
        assert picture.startswith("<?xml")
        assert all(f"<!-- {row} -->" in picture for row in ("one", "two", "three"))


def test_what_is_not_finished_leaves_gaps_and_no_wrong_numbers(tmp_path: Path) -> None:
    bench = read(tmp_path)
    running = study(bench, tmp_path / "out", None)
    run(
        running,
        scores_of,
        fail=lambda job: job.entry.name == "two" or (job.seed == 2022 and job.entry.name[:3] == "003"),
    )
    rows = {row["name"]: row for row in running.to_json()["rows"]}
    assert rows["two"]["seeds"] == []
    assert rows["two"]["aukc"] is None
    whole, gap = rows["one"]["seeds"]
    assert whole["aukc"] is not None
    assert gap["aukc"] is None
    assert [point["count"] for point in gap["curve"]] == [1, 6]
    assert rows["one"]["aukc"]["mean"] == whole["aukc"]
    assert rows["one"]["aukc"]["sd"] is None
    assert [row[:2] for row in running.cells()[0][1]] == [["one", "1/2"], ["three", "1/2"]]


def test_the_time_of_a_search_that_was_stopped_is_not_told(tmp_path: Path) -> None:
    bench = read(tmp_path)
    running = study(bench, tmp_path / "out", ["one"])
    for wave in running.waves():
        for job in wave.jobs:
            finish(job, scores_of, resumed=job.seed == 2022)
    row = running.to_json()["rows"][0]
    assert [one["search"]["seconds"] for one in row["seeds"]] == [3.5, None]
    assert row["seconds"] == {"mean": 3.5, "sd": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_field_without_a_finite_score_is_told_and_stops_no_other_row(tmp_path: Path, value: float | None) -> None:
    bench = read(tmp_path)
    running = study(bench, tmp_path / "out", None)

    def scores(row: str, seed: int) -> Scores:
        found = dict(scores_of(row, seed))
        if row == "two" and value is None:
            del found["c"]
        elif row == "two":
            found["c"] = value  # type: ignore[assignment]
        return found

    run(running, scores)
    assert [str(error).split(" (")[0] for error in running.problems] == [
        f"two, seed {seed}: the search gave 'c' no finite score" for seed in (2021, 2022)
    ]
    assert [row["aukc"] is not None for row in running.to_json()["rows"]] == [True, False, True]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{name: three, recipe: other.yaml}", "{name: three}", "three: the recipe has no selector"),
        (
            "{name: three, recipe: other.yaml}",
            "{recipe: other.yaml, overrides: ['data.categorical=[a, b, c]']}",
            r"other: the row and selection.base have other fields: other has no 'd'",
        ),
        (
            "{name: three, recipe: other.yaml}",
            "{recipe: other.yaml, overrides: ['data.categorical=[a, b, c, d, bb]']}",
            r"recipe has no 'bb'\. Did you mean 'b'",
        ),
        (
            "{name: three, recipe: other.yaml}",
            "{recipe: other.yaml, overrides: ['stages=[{use: fit}]']}",
            "other: none of the recipe's stages is 'prune'",
        ),
        ("[0.2, 0.5, 1.0]", "[0.2, 1.5]", r"select.yaml:\d+: selection.shares\[1\]: expected less than or equal to 1"),
        ("[0.2, 0.5, 1.0]", "[0, 1]", r"selection.shares\[0\]: expected greater than 0"),
        ("[0.2, 0.5, 1.0]", "[0.1, 0.2]", "of 6 fields these shares keep 1; a curve needs two different numbers"),
        ("reference: one", "reference: ones", r"selection.reference: no row 'ones'\. Did you mean 'one'"),
        ("reference: one", "informative: [f]", r"selection.informative: recipe has no field 'f'"),
        ("reference: one", "informative: [noise_random_a]", "selection.informative: 'noise_random_a' is planted"),
        ("reference: one", "planted: [aa]", r"selection.planted: recipe has no field 'aa'\. Did you mean 'a'"),
        ("base: recipe.yaml", "base: other.yaml", "selection.base: other has a selector of its own"),
        ("[train.batch_size=64]", "[model.head.wide=true]", "add the override `model.head.wide=false`"),
        ("[train.batch_size=64]", "['stages=[{use: fit}, {use: fit, name: b}]']", "wanted are one fit, and evaluate"),
        ("[train.batch_size=64]", "['stages=[{use: fit}, {use: reset}]']", "has the stages fit, reset; wanted"),
        ("seeds: 2", "metrics: [logloss]", "metrics: a selection table needs 'auc'"),
        ("seeds: 2", "plot: {y: auc}", "a selection table has pictures of its own"),
        ("selector: optfs", "selector: optf", "unknown selector 'optf'. Did you mean 'optfs'"),
        ("shares:", "share:", r"'selection' has no option 'share'\. Did you mean 'shares'"),
        ("base: recipe.yaml", "base: recip.yaml", "recip.yaml: no such recipe"),
    ],
)
def test_a_table_that_cannot_be_run_says_why(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, TABLE.replace(old, new))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "tables").glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_that_come_with_it_can_be_run(path: Path) -> None:
    bench = read_table(path, load_registry())
    judged = bench.retraining is not None
    assert judged == ("\nselection:" in path.read_text()), "with and without rankings of fields"
    if bench.retraining is not None:
        assert bench.retraining.planted
        assert len(bench.retraining.counts) == 10 or not path.stem.endswith("_selection")


def test_the_table_of_the_readme_can_be_run(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    block = next(text for text in re.findall(r"^```yaml\n(.*?)^```$", readme, re.M | re.S) if "\nselection:" in text)
    bench = read(tmp_path, block)
    assert bench.retraining is not None
    assert bench.retraining.counts == (2, 5, 10, 20)
    assert [entry.recipe.parts["selector"].name for entry in bench.entries] == ["leap", "optfs"]


def test_fields_of_which_nothing_is_known_do_not_count_for_the_rank_auc(tmp_path: Path) -> None:
    bench = read(tmp_path, TABLE.replace("reference: one", "informative: [d, b]"))
    running = study(bench, tmp_path / "out", None)
    run(running, scores_of)
    running.write()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["informative"] == ["b", "d"]
    for row in table["rows"]:
        for one in row["seeds"]:
            found = scores_of(row["name"], one["seed"])
            noise = found["noise_random_a"]
            assert one["rank_auc"] == statistics.fmean((found[n] > noise) + (found[n] == noise) / 2 for n in "bd")
    assert "informative fields (b, d) before planted ones" in (tmp_path / "out" / "table.md").read_text()


def test_a_row_of_a_plain_table_needs_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"select.yaml:1: rows\[0\]: 'the row' needs the option 'recipe'"):
        read(tmp_path, "rows: [{name: one, selector: leap}]")


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no row 'tree'\. Did you mean 'three'"):
        study(read(tmp_path), tmp_path, ["tree"])
