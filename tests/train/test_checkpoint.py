"""Checkpoints: whole or not at all, and the newest whole one is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recsys.errors import RunError
from recsys.train import checkpoint


def save(folder: Path, step: int) -> Path:
    return checkpoint.save_checkpoint(folder, step, {"w": torch.full((3,), float(step))}, {"epoch": step})


def test_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    found = checkpoint.load_checkpoint(tmp_path)
    assert found is not None
    tensors, state, skipped = found
    assert tensors["w"].tolist() == [3.0, 3.0, 3.0]
    assert state == {"epoch": 3}
    assert skipped == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000002", "step-0000000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_one_is_skipped_and_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / "tensors.safetensors"
    raw = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        case "cut":
            file.write_bytes(raw[:-5])
        case "remove":
            (newest / "state.json").unlink()
        case "manifest":
            (newest / "manifest.json").write_text("{")
    found = checkpoint.load_checkpoint(tmp_path)
    assert found is not None
    tensors, state, skipped = found
    assert state == {"epoch": 1}
    assert tensors["w"].tolist() == [1.0, 1.0, 1.0]
    assert len(skipped) == 1
    assert newest.name in skipped[0]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    checkpoint.write_json(path, {"a": 1})

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_json(path, {"a": 2})
    assert checkpoint.read_json(path) == {"a": 1}


def test_a_broken_off_save_is_never_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def stop(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = checkpoint.load_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"epoch": 1}


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
