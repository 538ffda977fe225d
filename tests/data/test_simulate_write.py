"""Simulated logs as files: the same rows however they are divided, and nothing half-written or mixed up."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recsys.data import simulate_write
from recsys.data.simulate_presets import make_config
from recsys.data.simulate_random import Region
from recsys.data.simulate_world import World
from recsys.data.simulate_write import part_name, write
from recsys.errors import DataError


@pytest.fixture(scope="module")
def world():
    return World(make_config("quickstart", rows=9_000, seed=3))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(simulate_write, "PART", 4_000)
    monkeypatch.setattr(simulate_write, "_BLOCK", 1_500)


def test_files_hold_the_rows_in_order(world, tmp_path):
    """S2, S9: catches lost or repeated rows at part borders, and truth among the log's columns or files."""
    drawn = []
    written = write(world, tmp_path, 0, 9_000, drawn.append)
    log, truth = world.rows(0, 9_000)
    assert_frame_equal(pl.read_parquet(tmp_path / "log" / "*.parquet"), log, check_exact=True)
    assert_frame_equal(pl.read_parquet(tmp_path / "truth" / "*.parquet"), truth, check_exact=True)
    names = [part_name(first) for first in (0, 4_000, 8_000)]
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == names
    assert sorted(p.name for p in (tmp_path / "truth").iterdir()) == names
    assert [len(pl.read_parquet(tmp_path / "log" / name)) for name in names] == [4_000, 4_000, 1_000]
    assert sum(drawn) == written.rows == 9_000
    assert written.click_rate == log["y"].mean()
    y, p = log["y"].to_numpy(), truth["gamma"].to_numpy()
    pairs = (p[y == 1][:, None] > p[y == 0][None, :]).mean()
    assert written.best_auc == pytest.approx(pairs, abs=1e-6)


def test_ranges_written_apart_are_the_same_files(world, tmp_path):
    """Catches time or calibration that depends on the range that is written."""
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    write(world, whole, 0, 9_000)
    write(World(world.config), apart, 4_000, 9_000)
    write(World(world.config), apart, 0, 4_000)
    for path in whole.glob("*/part-*.parquet"):
        assert (apart / path.parent.name / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in apart.glob("*.json")) == ["manifest-000000004000.json", "manifest.json"]


@pytest.mark.parametrize("name", ["slate-cascade", "delayed"])
def test_the_uniform_slice_is_written_in_parts_too(name, tmp_path):
    """S2: catches a slice that depends on the range, requests cut by it, and rows of it that are missing or twice."""
    config = make_config(name, rows=9_000, seed=3, users=300, items=100, clicks_only=name == "delayed")
    config = replace(config, pilot_rows=1 << 12)
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    told = []
    write(World(config), whole, 0, 9_000, told.append, uniform=True)
    assert sum(told) == 9_900
    for start, stop in ((4_003, 8_555), (8_555, 9_000), (0, 4_003)):
        write(World(config), apart, start, stop, uniform=True)
    for table in ("log", "truth", "uniform", "uniform_truth"):
        together, parts = (pl.read_parquet(sorted((f / table).glob("*.parquet"))) for f in (whole, apart))
        assert_frame_equal(parts, together, check_exact=True)
    assert_frame_equal(
        pl.read_parquet(whole / "uniform" / "*.parquet"),
        World(config).rows(8_100, 9_000, Region.UNIFORM)[0],
        check_exact=True,
    )


def test_manifest_describes_the_log(world, tmp_path):
    """Catches digests over too many or too few rows, or over one part's rows twice."""
    write(world, tmp_path, 0, 9_000)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["b0"] == world.calibration.intercept
    assert manifest["config"]["seed"] == 3
    assert manifest["rows"] == [0, 9_000]
    for side, table in enumerate(("log", "truth")):
        frame = world.rows(0, 4_000)[side]
        expected = {c: hashlib.sha256(np.ascontiguousarray(frame[c].to_numpy())).hexdigest() for c in frame.columns}
        assert manifest["column_sha256"][table] == expected


def test_worlds_and_rows_are_never_mixed(world, tmp_path):
    """Catches a second run that leaves parts of two logs side by side."""
    write(world, tmp_path, 2_000, 5_000)
    with pytest.raises(DataError, match="rows 2000:5000 are there already"):
        write(world, tmp_path, 4_999, 6_000)
    other = World(make_config("quickstart", rows=9_000, seed=4))
    with pytest.raises(DataError, match="another simulated world"):
        write(other, tmp_path, 6_000, 7_000)
    (tmp_path / "manifest-000000002000.json").unlink()
    with pytest.raises(DataError, match="did not finish"):
        write(world, tmp_path, 2_000, 5_000)
    for start, stop in ((0, 9_001), (5, 5), (-1, 5)):
        with pytest.raises(DataError, match="not within the log's 0:9000"):
            write(world, tmp_path, start, stop)


def test_an_interrupted_part_is_not_a_part(world, tmp_path, monkeypatch):
    """Catches a half-written Parquet file under a name that readers take."""

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(simulate_write.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(world, tmp_path, 0, 1_000)
    assert not list(tmp_path.rglob("*.parquet"))
    assert not (tmp_path / "manifest.json").exists()
