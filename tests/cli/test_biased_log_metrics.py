"""Metrics for biased logs, classes, bounds and policies in a run: the same from two processes as from one."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

RECIPE = """
data:
  source: {use: files, path: logs.csv}
  split: {by: column, column: part, test: test}
  label: y
  categorical: [user, item]
  context: {group: user, propensity: theta, observed: o, attribute: kind}
model: {embedding: {use: table, dim: 4}, interaction: fm}
train: {epochs: 1, batch_size: 100, eval_batch_size: 97, accelerator: cpu, threads: 1}
stages:
  - {use: fit}
  - use: evaluate
    metrics: [auc, snips_auc, snips_ndcg@3, snips_recall@3, dr_auc, dr_ndcg@3, dr_recall@3, ndcg@3, hit@1, mrr, map]
    splits: [test]
    by: {attribute: values, item: {train_positives: [4]}}
    intervals: 0.9
    draws: 30
  - {use: policy_value, action: item, least_ess: 0.001}
"""


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(2)
    n = 3000
    user, item = generator.integers(0, 40, n), generator.integers(0, 25, n)
    theta = np.clip(0.9 - item / 30, 0.05, 0.9).round(3)
    shown = generator.random(n) < theta
    relevant = generator.random(n) < 0.15 + 0.5 * (item > 15)
    columns = {
        "part": np.where(np.arange(n) < 1700, "train", "test"),
        "user": user,
        "item": item,
        "theta": theta,
        "o": shown * 1,
        "kind": user % 3 - 1,
        "y": (shown & relevant) * 1,
    }
    pl.DataFrame(columns).write_csv(tmp_path / "logs.csv")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def recsys(folder, *arguments):
    command = [sys.executable, "-m", "recsys.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_and_one_tell_the_same(folder):
    done = recsys(folder, "train", "recipe.yaml", "train.devices=2", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])["metrics"]
    again = recsys(folder, "evaluate", "run", "--split", "test", "--json")
    assert again.returncode == 0, again.stderr
    measured = json.loads(again.stdout)["metrics"]
    assert {label: told[label] for label in measured} == measured
    assert {label.removeprefix("test").strip("[]") for label in told} == {
        "",
        *("attribute=unknown", "attribute=0", "attribute=1", "attribute gap"),
        *("item train_positives ≤4", "item train_positives >4", "item train_positives gap"),
        *(f"policy={name}" for name in ("greedy", "softmax", "uniform", "logged")),
    }

    # Against the log: counts, the naive AUC, and one that weighs clicks and what is left of the others.
    test = pl.read_csv(folder / "logs.csv").filter(pl.col("part") == "test")
    done = recsys(folder, "predict", "run", "--data", "logs.csv", "--out", "scores.csv")
    assert done.returncode == 0, done.stderr
    score = pl.read_csv(folder / "scores.csv")["score"].to_numpy()[-len(test) :]
    y, theta = test["y"].to_numpy(), test["theta"].to_numpy()
    assert told["test[attribute=unknown]"]["rows"] == (test["kind"] == -1).sum()
    assert told["test"]["auc"] == pytest.approx(roc_auc_score(y, score), abs=1e-5)
    relevant = y / theta
    won = (score[:, None] > score).astype(float) + 0.5 * (score[:, None] == score)
    pairs = relevant[:, None] * (1 - relevant)
    np.fill_diagonal(pairs, 0)
    assert told["test"]["snips_auc"] == pytest.approx((pairs * won).sum() / pairs.sum(), abs=1e-5)
    values = [told[f"test[attribute={kind}]"]["auc"] for kind in (0, 1)]
    assert told["test[attribute gap]"]["auc"] == pytest.approx(abs(values[0] - values[1]))
    assert told["test[policy=logged]"]["ips"] == pytest.approx(y.mean())


def test_what_is_missing_is_told_before_training(folder):
    done = recsys(folder, "train", "recipe.yaml", "data.context={group: user, attribute: kind}", "--out", "run")
    assert done.returncode == 1
    assert "the metric 'snips_auc' needs the context column 'propensity'" in " ".join(done.stderr.split())
    assert not (folder / "run" / "1-fit").exists()
    metrics = "stages.1.metrics=[{use: snips_auc, floor: 0.95}]"
    done = recsys(folder, "train", "recipe.yaml", metrics, "--out", "run2")
    assert done.returncode == 1
    assert "propensities of weighted rows lie below `floor` 0.95 (the largest is 0.9)" in " ".join(done.stderr.split())
