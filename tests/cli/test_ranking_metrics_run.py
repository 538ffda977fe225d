"""Ranking metrics in recipes, tables and `recsys evaluate`: one name for each, everywhere."""

import json

import pytest

SMALL = (
    "data.source.rows=4000",
    "train.epochs=1",
    "train.batch_size=512",
    "data.context={group: user}",
)
NAMED = "{use: ndcg, k: 5, discount: rank, name: ndcg_rank@5}"


def test_every_k_has_its_own_column_and_can_be_monitored(recsys, tmp_path, capsys):
    out = tmp_path / "run"
    told = json.loads(
        recsys(
            "train",
            "quickstart",
            *SMALL,
            f"stages.1.metrics=[auc, ndcg@5, ndcg@2, {{use: ndcg, k: 10}}, {NAMED}, recall@3, map]",
            "train.monitor=ndcg@5",
            "--out",
            out,
            "--json",
        ).splitlines()[-1]
    )
    test = told["metrics"]["test"]
    assert list(test) == ["auc", "ndcg@5", "ndcg@2", "ndcg@10", "ndcg_rank@5", "recall@3", "map"]
    assert 0 < test["ndcg@2"] < test["ndcg@10"] < 1
    assert test["ndcg_rank@5"] != test["ndcg@5"]
    epoch = json.loads((out / "1-fit" / "history.json").read_text())["epochs"][0]
    assert epoch["valid/ndcg@5"] == told["metrics"]["valid"]["ndcg@5"]

    again = json.loads(recsys("evaluate", out, "--split", "test", "--metric", "ndcg@10", "--json"))
    assert again["metrics"] == {"test": {"ndcg@10": test["ndcg@10"]}}
    named = json.loads(recsys("evaluate", out, "--split", "test", "--metric", "ndcg_rank@5", "--json"))
    assert named["metrics"] == {"test": {"ndcg_rank@5": test["ndcg_rank@5"]}}

    table = tmp_path / "table.yaml"
    overrides = [*SMALL, f"stages.1.metrics=[ndcg@5, {NAMED}]"]
    rows = [{"recipe": "quickstart", "published": {"ndcg@5": 0.5}}]
    metrics = ["ndcg@5", "ndcg_rank@5"]
    table.write_text(json.dumps({"rows": rows, "metrics": metrics, "seeds": 1, "overrides": overrides}))
    shown = recsys("bench", table, "--out", tmp_path / "bench")
    assert "test ndcg@5" in shown
    assert "test ndcg_rank@5" in shown


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ("[auc@5]", "'auc' has no option 'k'"),
        ("[ndcg@five]", r"unknown metric 'ndcg@five'"),
        ("[ndcg@0]", r"metrics\[0\]\.k"),
        ("[ndcg@5, {use: ndcg, k: 5, gain: exponential}]", "two metrics are called 'ndcg@5'"),
        ("[{use: ndcg, discount: wsdm}]", "discount"),
        ("[{k: 5}]", "expected the name of a metric"),
    ],
)
def test_mistakes_are_told_before_training(recsys, tmp_path, metrics, told):
    with pytest.raises(SystemExit, match=told):
        recsys("train", "quickstart", *SMALL, f"stages.1.metrics={metrics}", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "1-fit").exists()


def test_without_groups_the_remedy_is_told(recsys, tmp_path):
    with pytest.raises(SystemExit, match=r"'ndcg@5' needs the context column 'group'; name one under data.context"):
        recsys("train", "quickstart", *SMALL[:3], "stages.1.metrics=[ndcg@5]", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "1-fit").exists()
    with pytest.raises(SystemExit, match=r"train.monitor: 'ndcg@5' needs the context column 'group'"):
        recsys("train", "quickstart", *SMALL[:3], "train.monitor=ndcg@5", "--out", tmp_path / "run2")
