"""Runs that meet losses which are not finite: how they stop, go on, and skip, in one process and in two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recsys.train import checkpoint, epochs
from recsys.train.checkpoint import sha256

Command = Callable[..., str]

PLUGIN = '''
import torch
from recsys.api import Component, hookimpl
from recsys.train.losses import BCE

class Planted(BCE):
    """Binary cross-entropy that is NaN for one user."""

    def __init__(self, tasks, *, user: int) -> None:
        super().__init__(tasks)
        self.user = user

    def forward(self, logits, batch):
        loss = super().forward(logits, batch)
        z = logits[self.tasks[0]][batch.ids[:, 0] == self.user]
        return loss + (z * torch.nan).sum() if len(z) else loss

@hookimpl
def recsys_components():
    return [Component("loss", "planted", Planted)]
'''

RECIPE = ("quickstart", "data.source.rows=10000", "train.batch_size=128", "train.epochs=2", "train.patience=0")
STEPS = 63


@pytest.fixture
def plugin(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "planted_plugin.py"
    path.write_text(PLUGIN)
    return "--plugin", str(path)


def planted(user: int) -> str:
    return f"loss={{use: planted, user: {user}}}"


def history(run: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run / "1-fit" / "history.json").read_text())
    return told


def test_a_run_that_skipped_steps_resumes_to_the_same_bits(
    recsys: Command, tmp_path: Path, plugin: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*RECIPE, planted(60), "train.non_finite=skip", "train.skip_budget=1000", "train.save_every=20")
    recsys("train", *arguments, *plugin, "--out", tmp_path / "whole")
    stopped_at = STEPS + 20

    def stop(folder: Path, step: int, *given: Any) -> Path:
        path = checkpoint.save_checkpoint(folder, step, *given)
        if step == stopped_at:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(SystemExit, match="stopped; `recsys train --resume"):
            recsys("train", *arguments, *plugin, "--out", tmp_path / "run")
    recsys("train", "--resume", tmp_path / "run", *plugin)
    for name in ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json"):
        assert sha256(tmp_path / "run" / name) == sha256(tmp_path / "whole" / name), name
    skipped = [(place["epoch"] - 1) * STEPS + place["step"] - 1 for place in history(tmp_path / "whole")["skipped"]]
    assert min(skipped) < STEPS < max(step for step in skipped if step < stopped_at)
    assert max(skipped) >= stopped_at
    counts = [epoch["train/skipped_steps"] for epoch in history(tmp_path / "whole")["epochs"]]
    assert sum(counts) == len(skipped)
    recsys("train", *RECIPE, "train.save_every=20", "--out", tmp_path / "clean")
    assert sha256(tmp_path / "clean/1-fit/model.safetensors") != sha256(tmp_path / "whole/1-fit/model.safetensors")


def test_a_run_that_stopped_goes_on_when_it_is_told_to_skip(
    recsys: Command, tmp_path: Path, plugin: tuple[str, str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        recsys("train", *RECIPE, planted(60), *plugin, "--out", run)
    told = str(stopped.value)
    assert told.count("error: ") == 1
    assert "error: 1-fit: epoch 1, step " in told
    assert ": the loss is nan\n" in told
    assert f"recsys train --resume {run} --allow-drift train.learning_rate=0.0002" in told
    assert "Traceback" not in told
    assert not (run / "metrics.json").exists()
    # The data is the same, so the same row is met again.
    with pytest.raises(SystemExit, match="the loss is nan"):
        recsys("train", "--resume", run, *plugin)
    changes = ("train.non_finite=skip", "train.skip_budget=1000")
    with pytest.raises(SystemExit, match="--allow-drift changes them all the same"):
        recsys("train", *changes, "--resume", run, *plugin)
    with pytest.raises(SystemExit, match=r"train\.batch_size=64 cannot change within a run; what can: "):
        recsys("train", "train.batch_size=64", "--resume", run, "--allow-drift", *plugin)
    said = recsys("train", *changes, "--resume", run, "--allow-drift", *plugin)
    assert "changed since the run was started: train.non_finite: None → skip" in said
    assert "the step is skipped (1 of at most 1000)" in said
    recsys("train", *RECIPE, planted(60), *changes, *plugin, "--out", tmp_path / "whole")
    assert sha256(run / "1-fit/model.safetensors") == sha256(tmp_path / "whole/1-fit/model.safetensors")
    assert json.loads((run / "recipe.json").read_text())["train"]["non_finite"] == "skip"


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(recsys: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="1-fit: epoch 1, step ") as stopped:
        recsys("train", *RECIPE, "train.optimizer=sgd", "train.learning_rate=1e30", "--out", run)
    assert "train.learning_rate" in str(stopped.value)
    recsys("train", "train.learning_rate=0.1", "--resume", run, "--allow-drift")
    assert [epoch["learning_rate"] for epoch in history(run)["epochs"]] == [0.1, 0.1]
    assert (run / "metrics.json").exists()


def test_a_changed_learning_rate_holds_from_the_checkpoint_on(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plateau took off the learning rate stays off."""
    run = tmp_path / "run"
    never_better = ("train.min_delta=1", "train.plateau_factor=0.5", "train.epochs=3")

    def stop(folder: Path, step: int, *given: Any) -> Path:
        path = checkpoint.save_checkpoint(folder, step, *given)
        if step == 2 * STEPS:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(SystemExit, match="stopped"):
            recsys("train", *RECIPE, *never_better, "train.learning_rate=0.01", "--out", run)
    recsys("train", "train.learning_rate=0.001", "--resume", run, "--allow-drift")
    rates = [epoch["learning_rate"] for epoch in history(run)["epochs"]]
    assert rates == pytest.approx([0.01, 0.01, 0.001 * 0.5])


def by_two(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = ("train.accelerator=cpu", "train.threads=1", "train.devices=2")
    return subprocess.run(
        [sys.executable, "-m", "recsys.cli", "train", *RECIPE, *fixed, *arguments, "--out", str(run)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.ddp
def test_two_processes_skip_the_same_steps_as_one(recsys: Command, tmp_path: Path, plugin: tuple[str, str]) -> None:
    """A row is in the hands of one process; both leave its step out."""
    update = ("train.optimizer=sgd", "train.learning_rate=0.5", "model.interaction[1].dropout=0")
    arguments = (*update, "train.non_finite=skip", "train.skip_budget=1000", planted(60), *plugin)
    recsys("train", *RECIPE, *arguments, "--out", tmp_path / "1")
    done = by_two(tmp_path / "2", *arguments)
    assert done.returncode == 0, done.stderr
    assert history(tmp_path / "1")["skipped"] == history(tmp_path / "2")["skipped"] != []
    one, two = (load_file(tmp_path / name / "1-fit" / "model.safetensors") for name in ("1", "2"))
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) <= 1e-6, name
    losses = [[epoch["train/loss"] for epoch in history(tmp_path / name)["epochs"]] for name in ("1", "2")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_stop_with_one_message(tmp_path: Path, plugin: tuple[str, str]) -> None:
    run = tmp_path / "run"
    done = by_two(run, planted(60), *plugin)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    report = json.loads((run / "1-fit" / "non_finite.json").read_text())
    assert f"error: 1-fit: epoch {report['epoch']}, step {report['step']} of {STEPS}: the loss is nan" in done.stderr
    first, second = report["ranks"]
    assert len(first["rows"]) + len(second["rows"]) == 128
    guilty = [part for part in (first, second) if part["suspicious_rows"]]
    for part in guilty:
        count = f"{part['suspicious_rows']} of 64 rows of process {part['rank']} have "
        assert count in done.stderr
        assert f"row {part['suspects'][0]['row']:,}: user=" in done.stderr
    assert guilty
