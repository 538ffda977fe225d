"""Probes of a sensitive attribute: planted ones are found, drawn ones are not; what users get is what ranks first."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from recsys import cli
from recsys.contracts import FIRST_ID, Batch
from recsys.plugin.registry import load_registry
from recsys.recipe.build import load_trained
from recsys.testing import contract
from recsys_attribute_probe import AttributeProbe, _best, _pooled

ITEMS, USERS = 30, 120
RECIPE = """\
data:
  source:
    use: next_item
    path: log.parquet
    users: {path: users.parquet, on: user, column: kind}
  label: label
  categorical: [item]
  sequences: {past: {columns: {item: history}, max_length: 5}}
  context: {group: user, time: time, attribute: kind_class}
model:
  embedding: {use: table, dim: 8, init_std: 0.1}
  sequence: {use: fairrec, attention: 8}
  interaction: fm
  head: {wide: true}
train: {epochs: 4, batch_size: 128, learning_rate: 0.01, patience: 0}
stages:
  - {use: fit}
  - {use: attribute_probe, top: 3}
"""


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Users of two kinds take items of two kinds; of some users the kind is not known."""
    g = np.random.default_rng(0)
    kind = g.integers(0, 2, USERS)
    item = [g.choice(ITEMS // 2, 6, replace=False) + (ITEMS // 2) * k for k in kind]
    log = pl.DataFrame(
        {"user": np.repeat(np.arange(USERS), 6), "item": np.concatenate(item), "time": np.tile(np.arange(6), USERS)}
    )
    log.write_parquet(tmp_path / "log.parquet")
    users = pl.DataFrame({"user": np.arange(USERS), "kind": kind, "drawn": g.integers(0, 2, USERS)})
    users.filter(pl.col("user") >= 10).write_parquet(tmp_path / "users.parquet")
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def train(folder, monkeypatch, *more):
    arguments = ["recsys", "train", folder / "recipe.yaml", "--data-root", folder, "--out", folder / "run", *more]
    monkeypatch.setattr("sys.argv", [str(part) for part in arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None)
    return json.loads((folder / "run" / "2-attribute_probe" / "probe.json").read_text())


def test_a_planted_attribute_is_found_in_users_and_in_what_they_get(logs, monkeypatch):
    plain = ["model.sequence={use: mean_pool}"]
    found = train(logs, monkeypatch, *plain)
    assert found["users"]["auc"] > 0.95
    assert found["top_3"]["auc"] > 0.8
    assert found["users"]["largest_class"] == pytest.approx(0.5, abs=0.1)
    written = json.loads((logs / "run" / "metrics.json").read_text())["metrics"]["test"]
    assert {name for name in written if name.startswith("probe")} == set(AttributeProbe(top=3).results())
    assert written["probe_top_3_auc"] == found["top_3"]["auc"]
    _, run, _ = load_trained(logs / "run", load_registry(), Console())
    run.model.eval()
    schema, history = run.schema, run.schema.histories[0]
    ids = torch.tensor([[5], [9], [12], [2]])
    past = torch.randint(
        FIRST_ID, schema.fields[0].rows, (4, history.max_length, 1), generator=torch.Generator().manual_seed(0)
    )
    length = torch.tensor([5, 3, 1, 0])
    batch = Batch(ids, history={history.name: (past * (torch.arange(5) < length[:, None])[..., None], length)})
    with torch.inference_mode():
        got = _best(run, batch, _pooled(run.model, batch), 3)
        for row in range(4):
            score = {}
            for item in range(FIRST_ID, schema.fields[0].rows):
                if item in past[row, : length[row], 0].tolist():
                    continue
                one = Batch(
                    torch.tensor([[item]]), history={history.name: (past[row : row + 1], length[row : row + 1])}
                )
                score[item] = run.model(one)["label"].item()
            best = sorted(score, key=score.__getitem__)[-3:]
            assert sorted((got[row].nonzero()[:, 0] + FIRST_ID).tolist()) == sorted(best)


def test_an_attribute_that_means_nothing_is_not_found(logs, monkeypatch):
    drawn = ["data.source.users.column=drawn", "data.context.attribute=drawn_class", "stages.1.top=0"]
    found = train(logs, monkeypatch, "model.sequence={use: mean_pool}", *drawn)
    assert abs(found["users"]["auc"] - 0.5) < 0.2
    assert "top_3" not in found


def test_the_probe_is_judged_on_users_it_has_not_seen():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(200, 40)), g.integers(0, 2, 200)
    says = AttributeProbe()._probe(x, y)
    scores = np.zeros(200)
    for train_rows, test_rows in StratifiedKFold(5, shuffle=True, random_state=0).split(x, y):
        scale = StandardScaler().fit(x[train_rows])
        model = LogisticRegression(max_iter=1000, class_weight="balanced", C=0.1)
        model.fit(scale.transform(x[train_rows]), y[train_rows])
        scores[test_rows] = model.predict_proba(scale.transform(x[test_rows]))[:, 1]
    assert says["auc"] == pytest.approx(roc_auc_score(y, scores))
    assert says["accuracy"] == pytest.approx(((scores > 0.5) == y).mean())
    fooled = LogisticRegression(max_iter=1000).fit(x, y)
    assert roc_auc_score(y, fooled.predict_proba(x)[:, 1]) > says["auc"] + 0.1


def test_contract():
    contract("stage", AttributeProbe)
