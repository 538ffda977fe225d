"""Files that survive: written beside their final place, flushed to disk, then renamed; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys.errors import RunError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: temporary file in the same folder, flush, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, keys in their order: that of a recipe's fields means something."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, naming the file when that fails.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error})") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all; tensors that share memory are written out each.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, temporary)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error})") from None
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: the file is missing, cut short or not safetensors.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise RunError(f"{path}: not a readable safetensors file ({error})") from None


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `folder/step-N` with the tensors, the rest of the state as JSON and a manifest of hashes.

    The folder appears under its name only when it is complete and on disk. The one before it is kept,
    older ones are removed afterwards, so that there is always one that was complete before this call.
    """
    final = folder / f"step-{step:010d}"
    for left in folder.glob(".step-*.tmp"):  # by a process that was killed in the midst of this
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    save_tensors(temporary / "tensors.safetensors", tensors)
    write_json(temporary / "state.json", state)
    files = ("tensors.safetensors", "state.json")
    write_json(temporary / MANIFEST, {name: sha256(temporary / name) for name in files})
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    flush(folder)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Read the newest complete checkpoint.

    Returns:
        (tensors, state, one sentence for each newer one that was skipped as broken), or None if there is none.
    """
    skipped: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = read_json(candidate / MANIFEST)
            for name, expected in manifest.items():
                if sha256(candidate / name) != expected:
                    raise RunError(f"{candidate / name}: its bytes are not those that were written")
            state = read_json(candidate / "state.json")
            return load_tensors(candidate / "tensors.safetensors"), state, skipped
        except (RunError, OSError) as error:
            skipped.append(f"skipped the checkpoint {candidate.name}: {error}")
    return None
