"""`recsys train`, `evaluate` and `predict` from the command line: a whole modeller's day on small logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file

from recsys import cli
from recsys.train import checkpoint, epochs
from recsys.train.checkpoint import sha256

Command = Callable[..., str]
RECSYS = (sys.executable, "-m", "recsys.cli")
SMALL = ("data.source.rows=6000", "train.epochs=2", "train.batch_size=512")


@pytest.fixture
def recsys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process and return its stdout; a failed one raises SystemExit."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["recsys", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        if stopped.value.code not in (0, None):
            raise SystemExit(captured.err)
        return captured.out

    return run


def result(stdout: str) -> dict[str, Any]:
    return json.loads(stdout.strip().splitlines()[-1])


def weights(run: Path, stage: str = "1-fit") -> str:
    return sha256(run / stage / "model.safetensors")


def test_quickstart_reports_what_it_saved(recsys: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = result(recsys("train", "quickstart", "data.source.rows=20000", "--out", out, "--json"))
    assert told == json.loads((out / "metrics.json").read_text())
    assert told["run"] == str(out)
    assert set(told["metrics"]) == {"valid", "test"}
    assert 0.6 < told["metrics"]["test"]["auc"] < 0.85, "the planted structure must be learned, and not exceeded"
    assert told["parameters"] == sum(t.numel() for t in load_file(out / "1-fit" / "model.safetensors").values())
    assert told["seconds"] > 0
    assert told["rows_per_second"] > 0
    manifest = json.loads((out / "export" / "manifest.json").read_text())
    assert {"model.safetensors", "recipe.json", "metrics.json", "encoder/encoder.json"} <= set(manifest)
    for name, digest in manifest.items():
        assert sha256(out / "export" / name) == digest
    assert not [path for path in out.rglob("*") if path.suffix in (".pkl", ".pt", ".ckpt", ".pth")]


def test_evaluate_repeats_the_metrics_of_training(recsys: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = result(recsys("train", "quickstart", *SMALL, "--out", out, "--json"))
    again = result(recsys("evaluate", out, "--json"))
    assert again["metrics"] == trained["metrics"]
    chosen = result(recsys("evaluate", out, "--split", "train", "--metric", "pr_auc", "--json"))
    assert set(chosen["metrics"]) == {"train"}
    assert set(chosen["metrics"]["train"]) == {"pr_auc"}


def test_predict_keeps_rows_and_order_and_agrees_with_evaluate(recsys: Command, tmp_path: Path) -> None:
    from recsys.data.simulate import Simulated
    from recsys.data.sources import DataRoot
    from recsys.train.metrics import AUC

    out = tmp_path / "run"
    trained = result(recsys("train", "quickstart", *SMALL, "--out", out, "--json"))
    rows = Simulated(DataRoot(()), rows=6000, seed=7).scan("test").collect()
    rows.drop("y").write_parquet(tmp_path / "new.parquet")
    recsys("predict", out, "--data", tmp_path / "new.parquet", "--out", tmp_path / "s.parquet", "--keep", "row_id")
    scores = pl.read_parquet(tmp_path / "s.parquet")
    assert scores["row_id"].to_list() == rows["row_id"].to_list()
    assert scores.columns == ["row_id", "score"]
    assert scores["score"].is_between(0, 1).all()
    metric = AUC()
    probability = scores["score"].to_torch()
    metric.update((probability / (1 - probability)).log(), rows["y"].cast(pl.Float64).to_torch())
    assert float(metric.compute()) == pytest.approx(trained["metrics"]["test"]["auc"], abs=1e-12)

    # In another order, in other files, with a value that nobody has seen: the same score for the same row.
    shuffled = rows.drop("y").sample(fraction=1, shuffle=True, seed=3)
    shuffled[:100].write_parquet(tmp_path / "part-0.parquet")
    shuffled[100:].write_parquet(tmp_path / "part-1.parquet")
    recsys("predict", out, "--data", tmp_path / "part-*.parquet", "--out", tmp_path / "t.csv", "--keep", "row_id")
    other = pl.read_csv(tmp_path / "t.csv")
    assert other["row_id"].to_list() == shuffled["row_id"].to_list()
    both = scores.join(other, on="row_id")
    assert both.height == rows.height
    assert float((both["score"] - both["score_right"]).abs().max() or 0) < 1e-6  # type: ignore[arg-type]


def test_predict_on_unseen_values_counts_them(recsys: Command, tmp_path: Path) -> None:
    from recsys.data.simulate import Simulated
    from recsys.data.sources import DataRoot

    out = tmp_path / "run"
    recsys("train", "quickstart", *SMALL, "--out", out)
    rows = Simulated(DataRoot(()), rows=6000, seed=7).scan("test").collect().drop("y")
    rows.with_columns(user=pl.lit(10**9)).write_parquet(tmp_path / "new.parquet")
    told = recsys("predict", out, "--data", tmp_path / "new.parquet", "--out", tmp_path / "s.parquet")
    share = float(re.search(r"([0-9.]+)% of their values are unknown", told)[1])  # type: ignore[index]
    assert 10 <= share < 12, "one of ten fields is unknown in every row, and few values of the others"
    assert pl.read_parquet(tmp_path / "s.parquet").height == rows.height


def test_same_recipe_same_bits_in_two_processes(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    processes = [
        subprocess.Popen(
            [*RECSYS, "train", "quickstart", *SMALL, "--out", run],
            stdout=subprocess.DEVNULL,
        )
        for run in runs
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert weights(runs[0]) == weights(runs[1])
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert first["metrics"] == second["metrics"]


def test_another_seed_gives_other_weights_and_another_order(recsys: Command, tmp_path: Path) -> None:
    recsys("train", "quickstart", *SMALL, "--out", tmp_path / "a")
    recsys("train", "quickstart", *SMALL, "train.seed=8", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_run_resumes_to_the_same_bits(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    arguments = ("train", "quickstart", "data.source.rows=6000", "train.batch_size=512", "train.epochs=4")
    whole = result(recsys(*arguments, "--out", tmp_path / "whole", "--json"))
    saved = 0

    def stop(*given: Any) -> Path:
        nonlocal saved
        saved += 1
        path = checkpoint.save_checkpoint(*given)
        if saved == stop_after:
            raise KeyboardInterrupt
        return path

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            recsys(*arguments, "--out", broken)
    assert not (broken / "metrics.json").exists()
    resumed = result(recsys("train", "--resume", broken, "--json"))
    assert resumed["metrics"] == whole["metrics"]
    assert weights(broken) == weights(tmp_path / "whole")
    history = [json.loads((run / "1-fit" / "history.json").read_text()) for run in (broken, tmp_path / "whole")]
    assert history[0] == history[1]


def test_resume_skips_finished_stages_and_refuses_drift(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    recsys("train", "quickstart", *SMALL, "--out", out)
    before = weights(out)
    assert "1-fit: done before" in recsys("train", "--resume", out)
    assert weights(out) == before
    facts = json.loads((out / "run.json").read_text())
    facts["packages"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match=r"packages\.torch: 1\.0 →"):
        recsys("train", "--resume", out)
    assert "packages.torch: 1.0" in recsys("train", "--resume", out, "--allow-drift")


def test_accumulating_gradients_changes_nothing_but_rounding(recsys: Command, tmp_path: Path) -> None:
    common = ("train", "quickstart", "data.source.rows=6000", "train.epochs=1", "train.batch_size=500")
    exact = ("model.interaction[1].dropout=0",)
    recsys(*common, *exact, "--out", tmp_path / "one")
    recsys(*common, *exact, "train.accumulate=3", "--out", tmp_path / "three")
    one, three = (load_file(tmp_path / name / "1-fit" / "model.safetensors") for name in ("one", "three"))
    for name, tensor in one.items():
        assert float((tensor - three[name]).abs().max()) < 1e-5, name


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("rows", "batch_size", "update"),
    [
        # Steps of 451 rows for two ranks, the last of 390; plain gradient descent shows every wrong weight of a row.
        (6125, 451, ["train.optimizer=sgd", "train.learning_rate=0.5"]),
        # Twenty steps of Adam, which would blow up rounding where a gradient is nearly zero: so without a ragged end.
        pytest.param(12800, 1024, ["train.optimizer=adam"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, rows: int, batch_size: int, update: list[str]) -> None:
    common = ["train", "quickstart", f"data.source.rows={rows}", "train.epochs=2", f"train.batch_size={batch_size}"]
    common += update
    common += ["model.interaction[1].dropout=0", "train.accelerator=cpu", "train.threads=1", "train.patience=0"]
    told = {}
    for devices in (1, 2):
        done = subprocess.run(
            [*RECSYS, *common, f"train.devices={devices}", "--out", str(tmp_path / str(devices)), "--json"],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told[devices] = result(done.stdout)
    one, two = (load_file(tmp_path / name / "1-fit" / "model.safetensors") for name in ("1", "2"))
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) <= 1e-6, name
    history = [json.loads((tmp_path / n / "1-fit" / "history.json").read_text())["epochs"] for n in ("1", "2")]
    for alone, together in zip(*history, strict=True):
        assert together["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-6)
        assert together["valid/auc"] == pytest.approx(alone["valid/auc"], abs=1e-5)

    # The very same weights measured by one process and by two: exactly the same numbers.
    again = subprocess.run(
        [*RECSYS, "evaluate", str(tmp_path / "2"), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert result(again.stdout)["metrics"] == told[2]["metrics"]


@pytest.mark.ddp
def test_an_error_in_two_processes_is_one_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RECSYS, "train", "quickstart", "train.devices=2", "train.accelerator=cpu", "data.context={time: tss}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "no column 'tss'. Did you mean 'ts'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], r"quikstart: no such recipe. Did you mean 'quickstart\.yaml'\?"),
        (["quickstart", "train.epoch=2"], r"train\.epoch: 'train' has no option 'epoch'\. Did you mean 'epochs'\?"),
        (["quickstart", "train.epochs=two"], r"train\.epochs: expected int, got 'two'"),
        (["quickstart", "model.interaction=autoit"], r"unknown interaction 'autoit'\. Did you mean 'autoint'\?"),
        (["quickstart", "model.interaktion=fm"], r"unknown part 'interaktion'\. Did you mean 'interaction'\?"),
        (["quickstart", "losses=bce"], r"unknown key 'losses'\. Did you mean 'loss'\?"),
        (["adult/dcnv2", "data.bad_rows.numbr=map"], r"data\.bad_rows\.numbr: unknown key\. Did you mean 'number'\?"),
        (["adult/dcnv2", "data.numeric.age.transfrm=log"], r"age\.transfrm: unknown key\. Did you mean 'transform'\?"),
        (["adult/dcnv2", "data.split.colum=x"], r"split\.colum: unknown key\. Did you mean 'column'\?"),
        (
            ["quickstart", "stages[1].metrics=[auk]"],
            r"stages\[1\]\.metrics\[0\]: unknown metric 'auk'\. Did you mean 'auc'\?",
        ),
        (["quickstart", "train.monitor=auk"], r"train\.monitor: unknown metric 'auk'"),
        (["quickstart", "train.monitor=gauc"], r"'gauc' needs the context column 'group'"),
        (["quickstart", "data.label=clicked"], r"no column 'clicked'"),
        (["quickstart", "data.source.rows=0"], "rows is 0, must be at least 1"),
        (["quickstart", "stages=[{use: rewind, to: nowhere}]"], "no snapshot 'nowhere'"),
        ([], "which recipe"),
    ],
)
def test_a_mistake_is_one_clear_line(recsys: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        recsys("train", *arguments, *(["--out", tmp_path / "run"] if arguments else []))
    assert "Traceback" not in str(stopped.value)


def test_a_used_folder_is_not_overwritten(recsys: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recsys("train", "quickstart", *SMALL, "--out", out)
    with pytest.raises(SystemExit, match="is not empty"):
        recsys("train", "quickstart", *SMALL, "--out", out)


def test_a_folder_without_a_run_says_so(recsys: Command, tmp_path: Path) -> None:
    for command in (["evaluate"], ["predict", "--data", "x.parquet", "--out", "y.parquet"], ["train", "--resume"]):
        with pytest.raises(SystemExit, match="no run folder"):
            recsys(*command, tmp_path)


def test_check_reports_without_training(recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = recsys("check", "quickstart")
    assert "the recipe is sound" in told
    # 200 users and 100 items, each with an id for missing and one for unknown.
    assert "202" in told
    assert "102" in told
    assert list(tmp_path.iterdir()) == []
