"""What a run exports: the same scores from raw values, kept values first, and nothing that was altered."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from recsys.data.encode import Encoder
from recsys.errors import RunError
from recsys.plugin.registry import load_registry
from recsys.recipe.build import load_trained

SMALL = ("data.source.rows=4000", "train.threads=1", "train.epochs=1", "model.embedding.dim=4")
MANY = ("data.source={use: simulated, rows: 20000, users: 20000, seed: 7}", *SMALL[1:3])
"""Ids enough for a map of them to cost more than a few rows of zeros."""
PRUNED = {
    "frequency": "stages=[{use: count_rows}, {use: fit}, {use: prune}, {use: export}]",
    "magnitude": "stages=[{use: fit}, {use: prune}, {use: export}]",
}


def logs(folder: Path, rows: int = 300) -> Path:
    """Raw rows to score, a few with values that training never saw or without any."""
    from recsys.data.simulate import Simulated
    from recsys.data.sources import DataRoot

    frame = Simulated(DataRoot((folder,)), rows=4000, seed=7).scan("test").head(rows).collect()
    names = [name for name, kind in frame.schema.items() if kind == pl.String][:2]
    odd = pl.int_range(pl.len()) % 5
    changed = [
        pl.when(odd == 0).then(pl.lit("never seen")).when(odd == 1).then(None).otherwise(pl.col(n)).alias(n)
        for n in names
    ]
    path = folder / "rows.parquet"
    frame.with_columns(changed).write_parquet(path)
    return path


@pytest.mark.parametrize("embedding", PRUNED)
def test_an_export_scores_raw_rows_as_its_run_does_and_maps_no_ids(recsys, tmp_path, embedding):
    run, rows = tmp_path / "run", logs(tmp_path)
    options = (f"model.embedding={{use: {embedding}, dim: 4, budget: 0.3}}", PRUNED[embedding])
    recsys("train", "quickstart", *MANY, *options, "--out", run)
    for folder in (run, run / "export"):
        recsys("predict", folder, "--data", rows, "--out", tmp_path / f"{folder.name}.parquet")
    scores = [pl.read_parquet(tmp_path / f"{name}.parquet")["score"] for name in ("run", "export")]
    assert scores[0].n_unique() > 100
    assert scores[0].equals(scores[1])
    before, after = Encoder.load(run / "encoder"), Encoder.load(run / "export" / "encoder")
    moved = 0
    for name, lookup in before.lookups.items():
        other = after.lookups[name]
        assert lookup.values.sort().equals(other.values.sort()), "the same values"
        moved += not lookup.values.equals(other.values)
    assert (moved > 0) == (embedding == "magnitude"), "by frequency they are in that order from the first"
    maps = [
        len(load_trained(folder, load_registry(), Console(quiet=True))[1].model.embedding.slots)
        for folder in (run, run / "export")
    ]
    assert maps[0] > 1 or embedding == "frequency"
    assert maps[1] == 1
    fit = "2-fit" if embedding == "frequency" else "1-fit"
    whole = sum(t.nbytes for n, t in load_file(run / fit / "model.safetensors").items() if n.startswith("embedding"))
    tables = load_file(run / "export" / "model.safetensors")
    assert sum(t.nbytes for name, t in tables.items() if name.startswith("embedding")) <= 0.3 * whole * (1 + 1e-3)


@pytest.mark.parametrize("to", ["float16", "int8"])
@pytest.mark.parametrize("embedding", ["frequency", "magnitude", "table"])
def test_numbers_in_fewer_bits_fill_the_same_budget_and_score_alike(recsys, tmp_path, embedding, to):
    run, rows = tmp_path / "run", logs(tmp_path)
    budget = "" if embedding == "table" else ", budget: 0.2"
    stages = "{use: count_rows}, " if embedding == "frequency" else ""
    prune = "" if embedding == "table" else "{use: prune}, "
    recsys(
        *("train", "quickstart", *SMALL[:3], f"model.embedding={{use: {embedding}, dim: 16{budget}}}"),
        f"stages=[{stages}{{use: fit}}, {prune}{{use: quantize, to: {to}}}, {{use: evaluate}}, {{use: export}}]",
        *("--out", run),
    )
    before = (run / "metrics.json").read_text()
    for folder in (run, run / "export"):
        recsys("predict", folder, "--data", rows, "--out", tmp_path / f"{folder.name}.parquet")
    scores = [pl.read_parquet(tmp_path / f"{name}.parquet")["score"] for name in ("run", "export")]
    assert scores[0].n_unique() > 100
    assert scores[0].equals(scores[1])
    whole = sum(
        t.nbytes
        for path in run.glob("*-fit/model.safetensors")
        for n, t in load_file(path).items()
        if n == "embedding.weight"
    )
    model = load_trained(run, load_registry(), Console(quiet=True))[1].model
    small = sum(t.nbytes for t in model.embedding.export_tables().values())
    assert model.embedding.table.flat.dtype == getattr(torch, to)
    if embedding == "table":
        assert small < {"float16": 0.5, "int8": 0.25}[to] * whole + 1000
    else:
        assert 0.17 * whole < small <= 0.2 * whole
    told = json.loads(recsys("evaluate", run, "--json").strip().splitlines()[-1])["metrics"]
    assert told == json.loads(before)["metrics"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{use: fit}, {use: quantize}, {use: prune}", "3-prune: prune after quantize; put it before"),
        ("{use: fit}, {use: quantize}, {use: quantize}", "3-quantize: the numbers are stored in fewer bits already"),
        ("{use: fit}, {use: quantize}, {use: reset}", "3-reset: reset after quantize would undo the rounding"),
    ],
)
def test_stages_that_undo_the_rounding_are_refused(recsys, tmp_path, stages, message):
    with pytest.raises(SystemExit, match=message):
        recsys("train", "quickstart", SMALL[0], f"stages=[{stages}]", "--out", tmp_path / "run")


def test_an_embedding_without_numbers_of_its_own_says_so(recsys, tmp_path):
    options = ("model.embedding={use: qr, dim: 4, collisions: 4}", "stages=[{use: quantize}]")
    with pytest.raises(SystemExit, match=r"1-quantize: the embedding .* has no numbers that could be stored as int8"):
        recsys("train", "quickstart", SMALL[0], *options, "--out", tmp_path / "run")


PLUGIN = """
from recsys.api import Component, EncodedSchema, Table, hookimpl

class Curious(Table):
    '''A table that looks at its weights when it is pruned.'''

    def __init__(self, schema: EncodedSchema, *, dim: int = 4) -> None:
        super().__init__(schema, dim=dim)

    def prune(self, selection):
        assert float(self.weight.abs().max()) > 0
        return super().prune(selection)

@hookimpl
def recsys_components():
    return [Component("embedding", "curious", Curious)]
"""


def test_a_plugin_that_looks_at_its_weights_gets_some(recsys, tmp_path):
    (tmp_path / "curious.py").write_text(PLUGIN)
    run, rows, plugin = tmp_path / "run", logs(tmp_path), ("--plugin", tmp_path / "curious.py")
    stages = "stages=[{use: fit}, {use: prune}, {use: export}]"
    recsys("train", "quickstart", *SMALL[:3], "model.embedding={use: curious}", stages, "--out", run, *plugin)
    for folder in (run, run / "export"):
        recsys("predict", folder, "--data", rows, "--out", tmp_path / f"{folder.name}.parquet", *plugin)
    scores = [pl.read_parquet(tmp_path / f"{name}.parquet")["score"] for name in ("run", "export")]
    assert scores[0].n_unique() > 100
    assert scores[0].equals(scores[1])


def test_an_export_is_never_larger_than_its_run(recsys, tmp_path):
    """Only the missing value of each small field is gone: in first place it would need a row of zeros."""
    run, rows = tmp_path / "run", logs(tmp_path)
    fields = "data.categorical=[age, city, brand, hour]"
    options = (fields, "model.embedding={use: frequency, dim: 64, budget: 0.9}")
    recsys("train", "quickstart", *SMALL[:3], *options, PRUNED["frequency"], "--out", run)
    models = [load_trained(f, load_registry(), Console(quiet=True))[1].model for f in (run, run / "export")]
    assert models[1].bytes() <= models[0].bytes()
    for folder in (run, run / "export"):
        recsys("predict", folder, "--data", rows, "--out", tmp_path / f"{folder.name}.parquet")
    scores = [pl.read_parquet(tmp_path / f"{name}.parquet")["score"] for name in ("run", "export")]
    assert scores[0].equals(scores[1])


def test_what_was_altered_is_refused(recsys, tmp_path, capsys):
    run = tmp_path / "run"
    recsys("train", "quickstart", *SMALL, "--out", run)
    rows = logs(tmp_path)

    def refused(alter) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run / "export", copy)
        alter(copy)
        with pytest.raises((RunError, SystemExit)) as error:
            recsys("predict", copy, "--data", rows, "--out", tmp_path / "scores.parquet")
        return str(error.value)

    def other_vocabulary(copy: Path) -> None:
        path = next(iter(sorted((copy / "encoder" / "vocabulary").glob("*.parquet"))))
        pl.read_parquet(path).reverse().write_parquet(path)

    assert "altered after the model was exported" in refused(other_vocabulary)
    assert "missing; it was there when the model was exported" in refused(lambda c: (c / "metrics.json").unlink())
    assert "not what the stage `export` writes" in refused(lambda c: (c / "manifest.json").write_text("[]"))
    assert "does not list model.json" in refused(lambda c: (c / "manifest.json").write_text("{}"))


@pytest.mark.parametrize("embedding", ["frequency", "magnitude", "dnis", "pep"])
def test_a_budget_that_cannot_be_met_is_refused_before_training(recsys, tmp_path, embedding):
    option = f"model.embedding={{use: {embedding}, dim: 4, budget: 0.0001}}"
    with pytest.raises(
        SystemExit, match=r"model.embedding.budget: 0.0001 is 0 bytes .* least possible budget is 0.0\d+"
    ):
        recsys("train", "quickstart", SMALL[0], option, PRUNED["frequency"], "--out", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*-fit")), "nothing was trained"


@pytest.mark.parametrize("embedding", ["frequency", "dnis", "mba_table", "mgqe, frequent_share: 0.5, parts: 2"])
def test_a_recipe_in_which_nobody_counts_is_refused_before_training(recsys, tmp_path, embedding):
    stages = "stages=[{use: fit}, {use: prune}, {use: evaluate}]"
    with pytest.raises(SystemExit, match=r"must know how often values are used; put \{use: count_rows\} first"):
        recsys(
            "train",
            "quickstart",
            SMALL[0],
            f"model.embedding={{use: {embedding}, dim: 4}}",
            stages,
            "--out",
            tmp_path / "run",
        )
    assert not list((tmp_path / "run").glob("*-fit")), "nothing was trained"


def test_a_choice_that_nothing_removes_is_told(recsys, tmp_path):
    told = recsys(
        "train", "quickstart", SMALL[0], "model.embedding={use: magnitude, dim: 4}", "--out", tmp_path / "run"
    )
    assert "no stage `prune` removes it" in told


PEAK = """
import sys
from pathlib import Path
from recsys import cli
sys.argv = ["recsys", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_scoring_takes_less_memory_by_what_was_pruned(recsys, tmp_path):
    """The whole table is never there: neither built to be pruned, nor read."""
    rows = logs(tmp_path)
    fields = "{user: {hash_buckets: 400000}, item: {hash_buckets: 400000}, hour: {}}"
    peaks, tables = [], []
    for name, stages in (("whole", "{use: fit}"), ("pruned", "{use: count_rows}, {use: fit}, {use: prune}")):
        run = tmp_path / name
        embedding = "table, dim: 64" if name == "whole" else "frequency, dim: 64, budget: 0.05"
        recsys(
            *("train", "quickstart", *SMALL[:3], f"data.categorical={fields}", f"model.embedding={{use: {embedding}}}"),
            *("train.optimizer=sgd", f"stages=[{stages}, {{use: export}}]", "--out", run),
        )
        tables.append(sum(t.nbytes for t in load_file(run / "export" / "model.safetensors").values()))
        command = [
            sys.executable,
            "-c",
            PEAK,
            "predict",
            run / "export",
            "--data",
            rows,
            "--out",
            tmp_path / "s.parquet",
        ]
        told = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks.append(int(told.stdout.split()[-1]))
    saved = tables[0] - tables[1]
    assert saved > 180e6
    assert peaks[0] - peaks[1] > 0.8 * saved


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_run_exports_native_code_which_gives_the_scores_of_its_bundle(recsys, tmp_path):
    from recsys.deploy import aot, predictor

    run = tmp_path / "run"
    recsys("train", "quickstart", *SMALL, "stages=[{use: fit}, {use: export, aot: true}]", "--out", run)
    plain, fast = predictor.load(run / "bundle"), aot.load(run / "bundle", allow_executable=True)
    rows = pl.read_parquet(logs(tmp_path))
    wanted, found = plain.predict(rows).probability, fast.predict(rows).probability
    assert wanted
    for task, p in wanted.items():
        assert abs(p - found[task]).max() <= 1e-6
        assert p.max() - p.min() > 0.01
    out = recsys("verify", run)
    assert "aot/model.pt2 is a program" in out
