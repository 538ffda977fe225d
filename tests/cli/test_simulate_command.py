"""`recsys simulate` on the command line."""

import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from recsys.cli.simulate import command, parse_rows
from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot
from recsys.errors import DataError, RecipeError


@pytest.fixture
def call():
    app = typer.Typer()
    app.command()(command)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_it_writes_the_log_that_the_source_reads(call, tmp_path):
    """Catches a command whose world, seed or row count differ from those of `use: simulated`."""
    result = call("--rows", 6000, "--seed", 9, "--out", tmp_path / "sim", "--users", 50, "--items", 40)
    assert result.exit_code == 0, result.output
    log = pl.read_parquet(tmp_path / "sim" / "log" / "*.parquet")
    truth = pl.read_parquet(tmp_path / "sim" / "truth" / "*.parquet")
    source = Simulated(DataRoot(()), rows=6000, seed=9, users=50, items=40)
    assert pl.concat([source.scan(s).collect() for s in ("train", "valid", "test")]).equals(log)
    assert set(log.columns) & set(truth.columns) == {"row_id"}
    told = dict(re.findall(r"^(.+?)  +([\d.,]+)", result.output, flags=re.MULTILINE))
    assert told["rows"] == "6,000"
    assert float(told["rate of y"]) == pytest.approx(log["y"].mean(), abs=5e-5)
    wins = log.with_columns(truth["gamma"])
    ones, zeros = (wins.filter(pl.col("y") == v).select("gamma").to_numpy() for v in (1, 0))
    assert float(told["best possible AUC"]) == pytest.approx((ones > zeros.T).mean(), abs=6e-5)


def test_a_range_needs_the_length_of_the_whole_log(call, tmp_path):
    """Catches parts whose clock is their own."""
    assert call("--rows", "2000:3000", "--total", 6000, "--seed", 9, "--out", tmp_path).exit_code == 0
    part = pl.read_parquet(tmp_path / "log" / "*.parquet")
    source = Simulated(DataRoot(()), rows=6000, seed=9)
    assert source.scan("train").collect()[2000:3000].equals(part)
    result = call("--rows", "3000:4000", "--out", tmp_path)
    assert isinstance(result.exception, DataError)
    assert "--total" in str(result.exception)


@pytest.mark.parametrize(
    ("rows", "total", "expected"),
    [("10", None, (0, 10)), ("1_000", 5000, (0, 1000)), ("3:9", 9, (3, 9))],
)
def test_rows_are_a_number_or_a_range(rows, total, expected):
    assert parse_rows(rows, total) == expected


@pytest.mark.parametrize(
    ("rows", "total", "text"),
    [
        ("many", None, "expected a number"),
        ("1:2:3", 9, "expected a number"),
        ("0", None, "no rows"),
        ("9:3", 9, "no rows"),
        ("-5", None, "no rows"),
        ("3:9", 8, "has 8 rows"),
    ],
)
def test_rows_that_make_no_sense_are_refused(rows, total, text):
    with pytest.raises(DataError, match=text):
        parse_rows(rows, total)


def test_an_unknown_world_is_answered_with_the_nearest(call, tmp_path):
    result = call("--preset", "mnarr", "--out", tmp_path / "sim")
    assert isinstance(result.exception, RecipeError)
    assert "Did you mean 'mnar'" in str(result.exception)
    assert not (tmp_path / "sim").exists()


def test_predictions_and_fields_are_told_against_the_truth(call, tmp_path):
    """Catches a comparison with the log's own rows, and values in another unit."""
    done = call("--preset", "mnar", "--rows", 20_000, "--users", 300, "--items", 100, "--out", tmp_path, "--values")
    assert done.exit_code == 0, done.output
    assert "2,000 rows" in done.output
    worth = {c[0]: c for c in (re.findall(r"[\w.-]+", line) for line in done.output.splitlines()) if len(c) == 9}
    assert worth["proxy"][1:3] == ["proxy", "0.00"]
    assert float(worth["proxy"][8]) > 5 * float(worth["proxy"][7])
    assert float(worth["item_0"][2]) > 1.0
    truth = pl.read_parquet(tmp_path / "uniform_truth" / "*.parquet")
    truth.select("row_id", score=pl.lit(0.5)).write_parquet(tmp_path / "scores.parquet")
    done = call("--score", tmp_path / "scores.parquet", "--out", tmp_path)
    told = dict(re.findall(r"^(.+?)  +([\d.,]+)", done.output, flags=re.MULTILINE))
    gamma = truth["gamma"].to_numpy()
    expected = (gamma * np.log(2 * gamma) + (1 - gamma) * np.log(2 - 2 * gamma)).mean()
    assert float(told["excess log loss"]) == pytest.approx(expected, abs=1e-5)
    assert told["expected AUC"] == "0.5000"
    done = call("--score", tmp_path / "scores.parquet", "--out", tmp_path, "--against", "unifrom")
    assert "Did you mean 'uniform'" in str(done.exception)


def test_it_needs_no_torch(tmp_path):
    """Catches an import that would make simulated logs need the training packages."""
    program = (
        "import sys; from pathlib import Path; from recsys.cli.simulate import command; "
        f"command(rows='1000', out=Path({str(tmp_path)!r})); "
        "assert not {'torch', 'lightning', 'pluggy'} & set(sys.modules), 'too much was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
