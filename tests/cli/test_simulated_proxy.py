"""The worlds' headline: a biased log makes a selector keep a field that is worth nothing, and a loss mends that."""

import json
import subprocess
import sys

import pytest

PLANTED = {"noise_0", "noise_1", "copied", "proxy"}


@pytest.mark.slow
def test_the_proxy_is_first_on_clicks_and_worthless_by_propensity(tmp_path):
    """Catches a world whose proxy fools nobody, and a loss or a ranking that does not undo the bias."""
    scores = {}
    for loss in ("bce", "ips"):
        out = tmp_path / loss
        stages = "stages=[{use: fit}, {use: rank_fields}]"
        changes = ["data.source.rows=200_000", "train.epochs=4", "train.threads=1", f"loss={loss}"]
        command = ["train", "simulated/proxy", *changes, "model.selector=permutation", stages, "--out", str(out)]
        subprocess.run([sys.executable, "-m", "recsys.cli", *command], check=True, capture_output=True)
        scores[loss] = json.loads(next(out.glob("*rank_fields/scores.json")).read_text())
    order = {loss: sorted(found, key=found.get, reverse=True) for loss, found in scores.items()}
    assert order["bce"][0] == "proxy"
    assert set(order["ips"][-4:]) == PLANTED
    assert scores["ips"]["proxy"] < 0.2 * scores["bce"]["proxy"]
