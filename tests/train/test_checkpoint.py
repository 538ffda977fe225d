"""Checkpoints: whole or not at all, and the newest whole one is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recsys.errors import RunError
from recsys.train import checkpoint


def save(folder: Path, step: int) -> Path:
    return checkpoint.save_checkpoint(folder, step, {"w": torch.full((3,), float(step))}, {"epoch": step})


def load(folder: Path) -> tuple[int | None, list[str]]:
    """Return the step of the checkpoint that is found, its parts being of one step, and what was said."""
    told: list[str] = []
    found = checkpoint.load_checkpoint(folder, told.append)
    if found is None:
        return None, told
    tensors, state = found
    assert tensors["w"].tolist() == [float(state["epoch"])] * 3
    return state["epoch"], told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert load(tmp_path) == (3, [])
    assert names(tmp_path) == ["step-0000000002", "step-0000000003"]


def test_newest_means_the_highest_step_and_nothing_else_is_taken_for_one(tmp_path: Path) -> None:
    for step in (9_999_999_999, 10_000_000_000):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step-9999999999", tmp_path / "step-99999999999 (copy)")
    shutil.copytree(tmp_path / "step-9999999999", tmp_path / ".step-99999999999.1.tmp")
    (tmp_path / "step-99999999999").write_text("a file")
    assert load(tmp_path) == (10_000_000_000, [])


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def names_a_file_outside(newest: Path) -> None:
    """Give the manifest a file outside the folder whose size and hash are right."""
    outside = newest.parent / "outside"
    outside.write_text("x")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": checkpoint.sha256(outside)}
    (newest / "manifest.json").write_text(json.dumps(manifest))


def state_is_a_list(newest: Path) -> None:
    """Exchange the state, with a manifest that agrees."""
    (newest / "state.json").write_text("[]")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": 2, "sha256": checkpoint.sha256(newest / "state.json")}
    (newest / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of the tensors": (lambda c: flip(c / "tensors.safetensors"), "bytes are not those that were"),
    "a flipped bit of the state": (lambda c: flip(c / "state.json"), "bytes are not those that were"),
    "a longer state": (lambda c: (c / "state.json").write_text("{}" * 99), "size is not what was written"),
    "tensors cut short": (lambda c: os.truncate(c / "tensors.safetensors", 5), "size is not what was written"),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json"),
    "no tensors": (lambda c: (c / "tensors.safetensors").unlink(), "tensors.safetensors"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"manifest.json: no such file"),
    "half a manifest": (lambda c: os.truncate(c / "manifest.json", 40), "manifest.json: not valid JSON"),
    "an empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "not a checkpoint's manifest"),
    "a list as manifest": (lambda c: (c / "manifest.json").write_text("[]"), "not a checkpoint's manifest"),
    "a manifest of bytes": (lambda c: (c / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json: not valid JSON"),
    "a deep manifest": (lambda c: (c / "manifest.json").write_text("[" * 10**5), "manifest.json: not valid JSON"),
    "a manifest without files": (lambda c: edited(c / "manifest.json", files={}), "'state.json' is wrong or missing"),
    "a manifest of odd files": (lambda c: edited(c / "manifest.json", files=[]), "not a checkpoint's manifest"),
    "a file outside": (names_a_file_outside, "'../outside' is wrong or missing"),
    "a state that is none": (state_is_a_list, "not a checkpoint's state"),
    "a folder instead of a file": (lambda c: ((c / "state.json").unlink(), (c / "state.json").mkdir()), "state.json"),
    "an empty folder": (lambda c: [path.unlink() for path in c.iterdir()], "no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_skipped_and_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    do, message = DAMAGES[damage]
    do(newest)
    step, told = load(tmp_path)
    assert step == 1
    assert len(told) == 1
    assert told[0].startswith(f"skipped the checkpoint {newest.name}: ")
    assert message in told[0]


def test_files_beside_the_known_ones_do_not_matter(tmp_path: Path) -> None:
    (save(tmp_path, 1) / ".DS_Store").write_text("x")
    assert load(tmp_path) == (1, [])


def test_when_all_are_broken_that_is_said(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "tensors.safetensors")
    step, told = load(tmp_path)
    assert step is None
    assert len(told) == 3
    assert "no whole checkpoint is left" in told[-1]
    assert load(tmp_path / "nowhere") == (None, [])


def test_another_layout_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    edited(save(tmp_path, 2) / "manifest.json", layout=checkpoint.LAYOUT + 1)
    with pytest.raises(RunError, match=r"step-0000000002: written in layout 2, this version of recsys reads layout 1"):
        load(tmp_path)


def test_one_that_rotted_does_not_push_a_good_one_out(tmp_path: Path) -> None:
    """Whichever of those on disk rot, those that are read again and found whole stay: two with the one just saved."""
    save(tmp_path, 40)
    flip(save(tmp_path, 60) / "tensors.safetensors")
    flip(save(tmp_path, 80) / "state.json")
    assert load(tmp_path)[0] == 40
    save(tmp_path, 45)  # resumed from 40 and stopped soon
    assert load(tmp_path)[0] == 45
    assert names(tmp_path) == ["step-0000000040", "step-0000000045"]
    flip(tmp_path / "step-0000000045" / "state.json")
    save(tmp_path, 50)
    flip(tmp_path / "step-0000000050" / "state.json")
    assert load(tmp_path)[0] == 40, "it was the last whole one all the time"


def test_where_nothing_can_be_verified_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", unreadable)
        for step in (3, 4, 5):
            save(tmp_path, step)
    assert len(names(tmp_path)) == 5
    assert load(tmp_path) == (5, [])


def test_saving_over_a_broken_one_of_the_same_step_heals_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "state.json")
    save(tmp_path, 2)
    assert load(tmp_path) == (2, [])
    assert names(tmp_path) == ["step-0000000001", "step-0000000002"]


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**6, free=4321))
    message = r"step-0000000002: 4,\d{3},\d{3} bytes are needed, 4,321 are free there; .* goes on when there is room"
    with pytest.raises(RunError, match=message):
        checkpoint.save_checkpoint(tmp_path, 2, {"w": torch.zeros(10**6)}, {"epoch": 2})
    with pytest.raises(RunError, match=r"model\.safetensors: 4,\d{3},\d{3} bytes are needed, 4,321 are free"):
        checkpoint.save_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(10**6)})
    assert names(tmp_path) == ["step-0000000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    save(tmp_path, 2)  # a file system that does not tell


class FailAt:
    """Lets the file system fail at the n-th call that a write makes of it."""

    def __init__(self, n: int, number: int, patch: pytest.MonkeyPatch) -> None:
        self.calls, self.n, self.number = 0, n, number
        for module, name in (
            (os, "fsync"),
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (checkpoint, "save_file"),
        ):
            patch.setattr(module, name, self._failing(getattr(module, name), name))

    def _failing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls != self.n:
                return real(*given, **more)
            if name == "write_bytes":
                real(given[0], given[1][: len(given[1]) // 2])  # a full disk takes a part
            raise OSError(self.number, os.strerror(self.number))

        return call


def faults(number: int, patch: pytest.MonkeyPatch) -> Iterator[tuple[int, FailAt]]:
    """Yield with the fault at the first call, the second, and so on."""
    for n in range(1, 100):
        with patch.context() as inner:
            fault = FailAt(n, number, inner)
            yield n, fault
        if fault.calls < n:
            assert n > 5
            return


def told_by(write: Callable[[], object]) -> str | None:
    """Return what the user is told if the write fails."""
    try:
        write()
    except RunError as error:
        return str(error)
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_fault_at_any_call_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for n, fault in faults(number, monkeypatch):
        folder = tmp_path / str(n)
        fault.n = 0
        for step in (1, 2):
            save(folder, step)
        fault.calls, fault.n = 0, n
        told = told_by(lambda folder=folder: save(folder, 3))
        assert told is None or str(folder / "step-0000000003") in told
        assert told is None or os.strerror(number) in told
        assert told is None or "bytes are needed" in told
        fault.n = 0
        assert load(folder)[0] in (2, 3), n
        assert load(folder)[1] == [], n
        assert not list(folder.glob(".*")), "nothing half written takes up room"
        save(folder, 3)
        assert load(folder) == (3, [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_is_the_old_or_the_new_one_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "value.json"
    for n, fault in faults(number, monkeypatch):
        fault.n = 0
        checkpoint.write_json(path, {"a": 1})
        fault.calls, fault.n = 0, n
        told = told_by(lambda: checkpoint.write_json(path, {"a": 2}))
        assert told is None or str(path) in told
        assert checkpoint.read_json(path)["a"] in ((2,) if told is None else (1, 2))
        assert names(tmp_path) == ["value.json"]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from recsys.train import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.save_checkpoint(Path(sys.argv[1]), 2, {"w": torch.zeros(100_000)}, {"epoch": 2})
"""


def test_a_limit_of_the_system_is_met_as_a_full_disk_is(tmp_path: Path) -> None:
    """No patch at all: the system refuses to let the file grow."""
    pytest.importorskip("resource")
    save(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RunError" in done.stderr
    assert "File too large" in done.stderr
    assert names(tmp_path) == ["step-0000000001"]
    assert load(tmp_path) == (1, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "recsys-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no `mount` here: {error}")
    if done.returncode:
        pytest.skip(f"this user may not mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asked", [True, False], ids=["asked before", "found out while writing"])
def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    save(small_disk, 1)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 600_000)
    if not asked:
        monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)
    with pytest.raises(RunError, match=r"step-0000000002.*bytes are needed" if asked else r"No space left.*are needed"):
        checkpoint.save_checkpoint(small_disk, 2, {"w": torch.zeros(200_000)}, {"epoch": 2})
    assert load(small_disk) == (1, [])
    filler.unlink()
    checkpoint.save_checkpoint(small_disk, 2, {"w": torch.full((200_000,), 2.0)}, {"epoch": 2})
    found = checkpoint.load_checkpoint(small_disk)
    assert found is not None
    assert found[1] == {"epoch": 2}


def test_a_broken_off_save_is_never_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", stop)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-0000000001"]


def test_a_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def write(value: str, *, stop: bool = False) -> None:
        with checkpoint.replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / value).write_text(value)
            if stop:
                raise KeyboardInterrupt

    write("a")
    with pytest.raises(KeyboardInterrupt):
        write("b", stop=True)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["a"]
    write("b")
    assert names(tmp_path / "folder") == ["b"], "nothing of the old one is left in it"


def test_what_killed_processes_leave_is_swept_and_nothing_else(tmp_path: Path) -> None:
    keep = [tmp_path / "a.tmp", tmp_path / "sub" / ".hidden", tmp_path / "sub" / "x.json"]
    gone = [tmp_path / ".state.json.12.tmp", tmp_path / "sub" / ".x.json.7.tmp"]
    (tmp_path / "sub" / ".folder.9.old.tmp" / ".inner.9.tmp").mkdir(parents=True)
    for path in (*keep, *gone):
        path.write_text("x")
    checkpoint.sweep(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(keep)
    assert not list(tmp_path.rglob(".folder*"))


HOLD = """
import sys, time
from pathlib import Path
from recsys.train import checkpoint
with checkpoint.alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_for_one_process_until_that_ends_in_any_way(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another process is training in this folder"), checkpoint.alone_in(tmp_path):
        raise AssertionError("unreachable")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with checkpoint.alone_in(tmp_path):
        pass
    with checkpoint.alone_in(tmp_path):
        pass
    assert names(tmp_path) == []


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    checkpoint.save_tensors(tmp_path / "t.safetensors", {"a": whole, "b": whole[2:4]})
    back = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert back["a"].tolist() == whole.tolist()
    assert back["b"].tolist() == [2.0, 3.0]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(RunError, match=r"t\.safetensors: not a readable safetensors file"):
        checkpoint.load_tensors(path)
