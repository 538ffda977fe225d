"""Runs that are killed, stopped by hand, or stopped between two stages go on to the very same weights."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.train import checkpoint, epochs
from recsys.train.checkpoint import sha256

Command = Callable[..., str]
RECIPE = ("quickstart", "data.source.rows=20000", "train.batch_size=128", "train.epochs=4", "train.patience=0")


STEPS = 125
"""Of an epoch of `RECIPE`."""


def stopped_after(step: int, run: Path, how: signal.Signals, *arguments: object) -> tuple[int, str]:
    """Start `recsys train`, send it a signal as soon as that step's checkpoint is there; return status and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "recsys.cli", "train", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "1-fit" / "checkpoints" / f"step-{step:010d}").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(timeout=60), process.communicate()[1]


def test_a_run_that_is_killed_and_then_stopped_by_hand_resumes_to_the_same_bits(
    recsys: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert stopped_after(STEPS, run, signal.SIGKILL, *RECIPE, "--out", run)[0] == -signal.SIGKILL
    status, told = stopped_after(2 * STEPS, run, signal.SIGINT, "--resume", run)
    assert status == 130
    assert "Traceback" not in told
    assert f"stopped; `recsys train --resume {run}` continues" in told
    assert not (run / "metrics.json").exists()
    told = recsys("train", "--resume", run)
    assert "epoch 2" not in told
    assert "epoch 4" in told
    recsys("train", *RECIPE, "--out", tmp_path / "whole")
    for name in ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json"):
        assert sha256(run / name) == sha256(tmp_path / "whole" / name), name
    assert not list(run.rglob(".*.tmp")), "what the killed process left half written is gone"


def test_a_run_resumes_in_the_midst_of_an_epoch_to_the_same_bits(recsys: Command, tmp_path: Path) -> None:
    """Killed, then told to stop by SIGTERM: the rows, the dropout and the mean loss go on where they were."""
    recipe = (*RECIPE, "train.save_every=20")
    run = tmp_path / "run"
    assert stopped_after(40, run, signal.SIGKILL, *recipe, "--out", run)[0] == -signal.SIGKILL
    status, told = stopped_after(STEPS + 60, run, signal.SIGTERM, "--resume", run)
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in told
    newest = max(run.glob("1-fit/checkpoints/step-*"))
    assert int(newest.name.removeprefix("step-")) >= STEPS + 60
    assert not (run / "metrics.json").exists()
    recsys("train", "--resume", run)
    recsys("train", *RECIPE, "--out", tmp_path / "whole")
    for name in ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json"):
        assert sha256(run / name) == sha256(tmp_path / "whole" / name), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_again_and_again_at_random_it_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    """Up to five SIGKILLs each, at times drawn at random from the length of a run, import and encoding included."""
    times = random.Random(seed)
    command = [sys.executable, "-m", "recsys.cli", "train"]
    recipe = [*RECIPE, "train.save_every=7", "model.interaction[1].batch_norm=true"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    started = time.monotonic()
    subprocess.run([*command, *recipe, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - started
    kills = 0
    while kills < 5:
        begun = (run / "run.json").exists()
        arguments = ["--resume", str(run)] if begun else [*recipe, "--out", str(run)]
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        time.sleep(times.uniform(0.3, 1) * length)
        process.kill()
        if process.wait() == 0:
            if kills:
                break
            shutil.rmtree(run)  # it was faster than the first one, and nothing has been killed yet
        else:
            kills += 1
    if not (run / "metrics.json").exists():
        subprocess.run([*command, "--resume", str(run)], check=True, stdout=subprocess.DEVNULL)
    for name in ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json"):
        assert sha256(run / name) == sha256(whole / name), name


def test_a_run_killed_while_encoding_leaves_nothing_behind(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("RECSYS_CACHE", str(cache))
    arguments = ("train", "quickstart", "data.source.rows=300000", "train.epochs=1", "--out", str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-m", "recsys.cli", *arguments], stdout=subprocess.DEVNULL)
    while not list(cache.glob(".*/.train-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(cache.iterdir())) == 1, "it was caught in the midst"
    small = ("data.source.rows=2000", *arguments[3:])
    recsys(*arguments[:2], *small)
    (entry,) = cache.iterdir()
    assert not entry.name.startswith(".")


def test_a_snapshot_from_before_the_stop_is_found(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (
        "stages=[{use: fit, name: search, epochs: 3, snapshot_epoch: 1}, {use: rewind, to: search}, "
        "{use: fit, name: again, epochs: 1}]"
    )
    arguments = ("train", "quickstart", "data.source.rows=4000", "train.batch_size=512", stages)
    recsys(*arguments, "--out", tmp_path / "whole")

    def stop(folder: Path, step: int, *given: Any) -> Path:
        path = checkpoint.save_checkpoint(folder, step, *given)
        if step == 2 * 7:  # two epochs of 3,200 rows
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(SystemExit, match="stopped; `recsys train --resume"):
            recsys(*arguments, "--out", tmp_path / "run")
    recsys("train", "--resume", tmp_path / "run")
    for name in ("1-search/snapshot.safetensors", "2-rewind/model.safetensors", "3-again/model.safetensors"):
        assert sha256(tmp_path / "run" / name) == sha256(tmp_path / "whole" / name), name


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{use: fit, epochs: 2, snapshot_epoch: 3}]", "1-fit: snapshot_epoch is 3, but epochs is 2"),
        ("[{use: fit}, {use: rewind, to: fit}]", "2-rewind: no snapshot 'fit'. Snapshots: none"),
        ("[{use: fit, name: a, snapshot_epoch: 1}, {use: rewind, to: b}]", "2-rewind: no snapshot 'b'.*Snapshots: a."),
        ("[{use: fit}, {use: prune}, {use: reset}]", "3-reset: reset after prune would undo the pruning"),
        ("[{use: fit, name: ../../x}]", r"stages\[0\]\.name: '\.\./\.\./x' is no name"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused_before_training(
    recsys: Command, tmp_path: Path, stages: str, message: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        recsys("train", "quickstart", "data.source.rows=4000", f"stages={stages}", "--out", run)
    assert not list(run.glob("1-*"))


def test_an_early_stop_waits_for_the_snapshot(recsys: Command, tmp_path: Path) -> None:
    stages = "stages=[{use: fit, epochs: 6, patience: 1, snapshot_epoch: 4}, {use: rewind, to: fit}]"
    never_better = "train.min_delta=1"
    recsys("train", "quickstart", "data.source.rows=4000", never_better, stages, "--out", tmp_path / "run")
    history = json.loads((tmp_path / "run" / "1-fit" / "history.json").read_text())
    assert len(history["epochs"]) == 4
    assert history["best_epoch"] == 1
