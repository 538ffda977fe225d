"""A1 and A2: pickles and checkpoints of others are refused before anything in them is run or imported."""

import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.errors import BundleError, RunError

COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": (),
    "predict": ("--data", "rows.parquet", "--out", "scores.parquet"),
    "export": ("--onnx", "mine.onnx"),
    "verify": (),
    "explain": (),
}


class Payload:
    """Leaves a marker where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def evil(kind: str, path: Path, marker: Path) -> None:
    """Write a checkpoint that runs code, or names code to import, when it is read as its kind is."""
    foreign: dict[str, Any] = {
        "instantiator": {"_instantiator": "evil_module.make"},
        "class path": {"_class_path": "evil_module.Model"},
        "list": {"_class_path": ["evil_module", "Model"]},
    }
    if kind in foreign:
        torch.save({"state_dict": {}, "hyper_parameters": foreign[kind]}, path)
    elif kind == "zip":
        torch.save({"state_dict": {"w": Payload(marker)}}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Payload(marker)}, protocol=int(kind)))


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that could be imported, and would say so."""
    (tmp_path / "evil_module.py").write_text("make = Model = dict\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("kind", ["0", "2", "5", "zip", "instantiator", "class path", "list"])
@pytest.mark.usefixtures("evil_module")
def test_a1_a2_a_checkpoint_instead_of_a_run(recsys: Callable[..., str], tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    evil(kind, path, marker)
    for command, more in COMMANDS.items():
        if kind != "zip" and command not in ("evaluate", "verify"):
            continue  # once is enough for what all of them share
        with pytest.raises(SystemExit) as refused:
            recsys(command, path, *more)
        assert str(path) in str(refused.value), command
        assert "weights only" in str(refused.value), command
        assert "Traceback" not in str(refused.value)
    for command in ("train", "check") if kind == "zip" else ():
        with pytest.raises(SystemExit, match=r"evil.ckpt"):
            recsys(command, path)
    assert not marker.exists()
    assert "evil_module" not in sys.modules
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload does nothing, so that this test shows nothing"


@pytest.mark.parametrize("kind", ["2", "zip", "instantiator"])
@pytest.mark.usefixtures("evil_module")
def test_a1_a2_a_checkpoint_in_the_place_of_weights(tmp_path: Path, kind: str) -> None:
    """Under the name of safetensors, in all that reads weights."""
    from recsys.train.checkpoint import load_checkpoint, load_tensors, save_checkpoint, sha256

    path, marker = tmp_path / "model.safetensors", tmp_path / "marker"
    evil(kind, path, marker)
    with pytest.raises(RunError, match=r"model.safetensors: not a readable safetensors file"):
        load_tensors(path)
    folder = save_checkpoint(tmp_path / "checkpoints", 3, {"w": torch.ones(2)}, {"epoch": 1})
    shutil.copy(path, folder / "tensors.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told: list[str] = []
    assert load_checkpoint(tmp_path / "checkpoints", told.append) is None
    assert "tensors.safetensors: not a readable safetensors file" in told[0]
    assert not marker.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_a6_archives_are_not_opened(recsys: Callable[..., str], tmp_path: Path, archive: str) -> None:
    """Nothing of recsys unpacks an archive: one that would write elsewhere, or burst, is refused as what it is."""
    import tarfile

    from recsys.deploy.bundle import open_bundle

    path = tmp_path / f"bundle.{archive}"
    if archive == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("../outside", "x")
            made.writestr("manifest.json", b"0" * 10_000_000)
            made.writestr("/absolute", "x")
    else:
        (tmp_path / "x").write_text("x")
        with tarfile.open(path, "w:gz") as made_tar:
            for name in ("../outside", "/absolute", "manifest.json", "manifest.json"):
                made_tar.add(tmp_path / "x", arcname=name)
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc"
            made_tar.addfile(link)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(BundleError, match="expected the folder"):
        open_bundle(path)
    with pytest.raises(SystemExit, match="expected the folder"):
        recsys("verify", path)
    inside = tmp_path / "bundle"
    inside.mkdir()
    shutil.copy(path, inside / "model.onnx")
    with pytest.raises(BundleError, match=r"manifest.json: missing"):
        open_bundle(inside)
    shutil.rmtree(inside)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert not (tmp_path.parent / "outside").exists()
