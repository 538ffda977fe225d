"""Runs that are killed, stopped by hand, or stopped between two stages go on to the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recsys.recipe import build
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


KILL = Path(__file__).parent.parent / "benchmarks" / "kill.py"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kills"), [("fit", 15), ("checkpoint", 1), ("files", 1), ("encode", 5)])
def test_killed_again_and_again_it_ends_with_the_same_bits(what: str, kills: int) -> None:
    """At random times in any stage; at every call that saving makes; at every renaming; while encoding."""
    command = [sys.executable, str(KILL), "--what", what, "--kills", str(kills), "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["SIGKILLs"] >= (kills if what in ("fit", "encode") else 20)
    assert told["lost checkpoints"] == 0


def test_a_run_killed_while_encoding_leaves_nothing_behind(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("RECSYS_CACHE", str(cache))
    arguments = ("train", "quickstart", "data.source.rows=300000", "train.epochs=1", "--out", str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-m", "recsys.cli", *arguments], stdout=subprocess.DEVNULL)
    while not list(cache.glob(".partial-*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert all(path.name.startswith(".") for path in cache.iterdir()), "it was caught in the midst"
    recsys(*arguments)
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


SMALL = ("train", "quickstart", "data.source.rows=4000", "train.batch_size=256", "train.epochs=3", "train.save_every=5")
PARTS = ("1-fit/model.safetensors", "1-fit/history.json", "2-evaluate/metrics.json", "export/manifest.json")


def same(one: Path, other: Path) -> None:
    for name in PARTS:
        assert sha256(one / name) == sha256(other / name), name


@pytest.mark.parametrize("left", ["nothing", "temporary", "encoder", "recipe"])
def test_a_start_that_was_killed_before_there_was_anything_to_resume_can_be_made_again(
    recsys: Command, tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    recsys(*SMALL, "--out", tmp_path / "whole")
    real, calls = checkpoint.write_json, 0

    def stop(path: Path, value: object) -> None:
        nonlocal calls
        calls += 1
        if left != "recipe" or calls == 2:
            raise KeyboardInterrupt
        real(path, value)

    run.mkdir()
    if left == "temporary":
        (run / ".encoder.1.tmp" / "vocabulary").mkdir(parents=True)
    elif left != "nothing":
        with monkeypatch.context() as patch:
            patch.setattr(build, "write_json", stop)
            with pytest.raises(SystemExit):
                recsys(*SMALL, "--out", run)
        assert (run / "encoder").is_dir()
        assert (run / "recipe.json").exists() == (left == "recipe")
    recsys(*SMALL, "--out", run)
    same(run, tmp_path / "whole")
    assert not list(run.glob(".*"))
    (run / "run.json").unlink()
    with pytest.raises(SystemExit, match="is not empty"):
        recsys(*SMALL, "--out", run)


def test_a_run_that_meets_a_full_disk_goes_on_to_the_same_bits_when_there_is_room(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    recsys(*SMALL, "--out", whole)
    real, free = shutil.disk_usage, [10**12]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=free[0]))

    def fill(folder: Path, step: int, *given: Any) -> Path:
        if step >= 20:
            free[0] = 1000
        return checkpoint.save_checkpoint(folder, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", fill)
        message = r"run/1-fit/checkpoints/step-0000000023: [\d,]+ bytes are needed, 1,000 are free there"
        with pytest.raises(SystemExit, match=message) as stopped:
            recsys(*SMALL, "--out", run)
        assert "Traceback" not in str(stopped.value)
    with pytest.raises(SystemExit, match="bytes are needed, 1,000 are free"):
        recsys("train", "--resume", run)
    monkeypatch.setattr(shutil, "disk_usage", real)
    assert "epoch 1:" not in recsys("train", "--resume", run)
    same(run, whole)


def test_a_run_whose_checkpoints_are_all_broken_says_so_and_begins_the_stage_again(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    recsys(*SMALL, "--out", whole)

    def stop(*given: Any) -> Path:
        path = checkpoint.save_checkpoint(*given)
        if given[1] >= 20:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(SystemExit):
            recsys(*SMALL, "--out", run)
    for path in run.glob("1-fit/checkpoints/*/tensors.safetensors"):
        os.truncate(path, 100)
    told = recsys("train", "--resume", run)
    assert told.count("skipped the checkpoint step-") == 2
    assert "no whole checkpoint is left; the stage begins again" in told
    same(run, whole)


def test_a_checkpoint_that_does_not_fit_the_model_is_an_error(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def stop(folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> Path:
        checkpoint.save_checkpoint(folder, step, {"other": tensors["loss_sum"]}, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(SystemExit):
            recsys(*SMALL, "--out", run)
    with pytest.raises(SystemExit, match=r"error: .*checkpoints: the checkpoint does not fit this run"):
        recsys("train", "--resume", run)


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": 1, "weights": null, "selections": [], "snapshots": {}}'])
def test_a_state_of_another_kind_is_an_error(recsys: Command, tmp_path: Path, text: str) -> None:
    run = tmp_path / "run"
    recsys(*SMALL, "--out", run)
    (run / "state.json").write_text(text)
    with pytest.raises(SystemExit, match=r"error: .*state\.json: (not the state|'stages' is missing or of another)"):
        recsys("train", "--resume", run)


def test_nothing_in_a_run_folder_is_a_pickle(recsys: Command, tmp_path: Path) -> None:
    stages = (
        "stages=[{use: fit, name: search, epochs: 1, snapshot_epoch: 1}, {use: rewind, to: search}, {use: reset}, "
        "{use: fit, name: again, epochs: 1}, {use: prune}, {use: evaluate}, {use: export}]"
    )
    recsys(*SMALL, stages, "train.logger=tensorboard", "--out", tmp_path / "stages")
    recsys(*SMALL, "model.interaction=autoint", "train.optimizer=adagrad", "--out", tmp_path / "autoint")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        head = path.read_bytes()[:8]
        assert not head.startswith((b"PK", b"\x80", b"\x1f\x8b")), f"{path}: a pickle or an archive"
        assert path.suffix in (".json", ".safetensors", ".parquet", ".csv", ".yaml") or "tfevents" in path.name, path


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and they in turn."""
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    found = [int(word) for word in told.stdout.split()]
    return found + [other for child in found for other in descendants(child)]


def running(pids: list[int]) -> list[int]:
    """Return those that are no zombies."""
    return [pid for pid in pids if (s := Path(f"/proc/{pid}/stat")).exists() and ") Z" not in s.read_text()]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGTERM twice"])
def test_two_processes_that_are_stopped_leave_none_behind_and_go_on_to_the_same_bits(tmp_path: Path, how: str) -> None:
    """SIGTERM goes to the process that the user started, Ctrl-C to its whole group as a terminal sends it."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    recipe = (*RECIPE, "train.devices=2", "train.accelerator=cpu", "train.save_every=20")
    command, run, whole = [sys.executable, "-m", "recsys.cli", "train"], tmp_path / "run", tmp_path / "whole"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*command, *recipe, "--out", str(run)], stdout=log, stderr=log, start_new_session=True)
    while not (run / "1-fit" / "checkpoints" / f"step-{40:010d}").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    family = descendants(process.pid)
    assert len(family) >= 2
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    if how == "SIGTERM twice":
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=60)
    assert status == (130 if how == "SIGINT" else 143)
    until = time.monotonic() + 30
    while running(family) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(family), (tmp_path / "log").read_text()
    log.close()
    assert not (run / "metrics.json").exists()
    subprocess.run([*command, "--resume", str(run)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, *recipe, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
    for name in PARTS:
        assert sha256(run / name) == sha256(whole / name), name
