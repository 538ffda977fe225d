"""`train.shuffle_memory`: training on rows that are read from disk window by window, from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recsys.train.checkpoint import sha256

Command = Callable[..., str]
RECIPE = ("quickstart", "data.source.rows=20000", "train.batch_size=128", "train.epochs=2", "train.patience=0")
WINDOWS = "train.shuffle_memory=0.1"
"""MiB: some windows of the encoded rows, which take several times as much."""


def test_streamed_training_resumes_in_the_midst_of_an_epoch_to_the_same_bits(recsys: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "recsys.cli", "train", *RECIPE, WINDOWS, "train.save_every=20", "--out", str(run)],
        stdout=subprocess.DEVNULL,
    )
    while not (run / "1-fit" / "checkpoints" / "step-0000000060").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    recsys("train", "--resume", run)
    recsys("train", *RECIPE, WINDOWS, "--out", tmp_path / "whole")
    for name in ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json"):
        assert sha256(run / name) == sha256(tmp_path / "whole" / name), name
    # In one order over all rows the rows come in other batches; the result is as good.
    recsys("train", *RECIPE, "--out", tmp_path / "default")
    assert sha256(run / "1-fit/model.safetensors") != sha256(tmp_path / "default/1-fit/model.safetensors")
    auc = {name: valid_auc(tmp_path / name) for name in ("whole", "default")}
    assert auc["whole"] == pytest.approx(auc["default"], abs=0.02)


def valid_auc(run: Path) -> float:
    return float(json.loads((run / "1-fit/history.json").read_text())["epochs"][-1]["valid/auc"])


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_stream_and_train_as_one(tmp_path: Path) -> None:
    common = ["train", "quickstart", "data.source.rows=6125", "train.epochs=2", "train.batch_size=451"]
    common += ["train.optimizer=sgd", "train.learning_rate=0.5", "train.shuffle_memory=0.03", "train.accumulate=2"]
    common += ["model.interaction[1].dropout=0", "train.accelerator=cpu", "train.threads=1", "train.patience=0"]
    for devices in (1, 2):
        command = [sys.executable, "-m", "recsys.cli", *common, f"train.devices={devices}"]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / str(devices))], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "1-fit" / "model.safetensors") for name in ("1", "2"))
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) <= 1e-6, name


def test_a_negative_memory_is_refused(recsys: Command) -> None:
    with pytest.raises(SystemExit, match=r"train\.shuffle_memory"):
        recsys("train", "quickstart", "train.shuffle_memory=-1")
