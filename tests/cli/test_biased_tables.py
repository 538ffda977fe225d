"""What losses gain on simulated logs whose fault they know, seed by seed, by the tables that come with the package."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import recsys

TABLES = Path(recsys.__file__).parent.parent / "recipes" / "tables"
SEEDS = (2021, 2022, 2023)


def gaps(table: str, better: str, plain: str, metric: str, out: Path) -> tuple[float, float]:
    """Train both rows of a table with three seeds; the mean gap on the test split and its standard error."""
    command = [sys.executable, "-m", "recsys.cli", "bench", TABLES / f"{table}.yaml", "--out", out, "--seeds", "3"]
    command += ["--only", better, "--only", plain]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=3000)

    def values(row: str) -> list[float]:
        runs = [json.loads((out / row / f"seed-{seed}" / "metrics.json").read_text()) for seed in SEEDS]
        found = [run["metrics"]["test"] for run in runs]
        return [scores.get(metric, scores.get(metric.split("/")[-1])) for scores in found]

    found = [a - b for a, b in zip(values(better), values(plain), strict=True)]
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "better", "plain", "metric", "sign"),
    [
        ("simulated_conversion", "escm2_dr", "alone", "conversion/auc", 1),
        ("simulated_conversion", "escm2_dr", "alone", "conversion/logloss", -1),
        ("simulated_delayed", "dfm", "bce", "logloss", -1),
        ("simulated_delayed", "dfm", "bce", "ece", -1),
    ],
)
def test_a_loss_that_knows_the_fault_gains(
    table: str, better: str, plain: str, metric: str, sign: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.getbasetemp() / table  # rows that were trained for another metric are not trained again
    mean, error = gaps(table, better, plain, metric, out)
    assert sign * mean > 3 * error


@pytest.mark.slow
def test_a_model_of_delays_gains_nothing_where_nothing_is_late(tmp_path: Path) -> None:
    mean, error = gaps("simulated_delayed", "dfm_final", "final", "logloss", tmp_path / "out")
    assert abs(mean) < max(3 * error, 5e-4)
