"""Files that survive: written beside their final place, flushed to disk, then renamed; no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys.errors import RunError

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
STATE = "state.json"
LAYOUT = 1
"""Of a checkpoint's folder; raised when its files or the keys of its state change."""
KEEP = 2
"""Whole checkpoints that stay; the older ones are removed."""
SLACK = 2**16
"""Bytes beside the values of a file: its header, the entries of folders."""
NAME = re.compile(r"step-(\d+)")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to disk."""
    for inside in sorted(path.rglob("*")) if path.is_dir() else ():
        _flush_one(inside)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, need: int = 0) -> Iterator[Path]:
    """Write a file or a folder whole or not at all: yield a temporary path beside it, flush, rename.

    What the block leaves at the temporary path takes the place of `path`; if it raises, `path` stays as it was
    and what was half written is removed.

    Args:
        path: of the file or folder.
        need: bytes that will be written, as far as known.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path, need)
        _remove(temporary)
        yield temporary
        flush(temporary)
        if path.is_dir():
            _discard(path)  # a folder cannot be renamed over another one
        temporary.replace(path)
        flush_entries(path.parent)
    except (OSError, SafetensorError) as error:
        asked = f"; {need:,} bytes are needed" if need else ""
        raise RunError(f"{path}: cannot be written ({error}){asked}; {_GO_ON}") from None
    finally:
        _remove(temporary)


_GO_ON = "what was there before is unharmed, and `recsys train --resume` goes on when there is room"


def flush_entries(folder: Path) -> None:
    """Force the names in a folder to disk, not the files."""
    _flush_one(folder)


def require_space(path: Path, need: int) -> None:
    """Refuse to begin what cannot be ended.

    Raises:
        RunError: fewer than `need` bytes (and a little) are free where `path` will be.
    """
    disk = shutil.disk_usage(path.parent)
    if disk.total and disk.free < need + SLACK:  # some network file systems tell nothing: a total of 0
        raise RunError(f"{path}: {need + SLACK:,} bytes are needed, {disk.free:,} are free there; {_GO_ON}")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written anywhere in a run folder; nobody else may be writing there."""
    for left in list(folder.rglob(".*.tmp")):
        _remove(left)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    """Remove a folder whose name must never stand for a part of it."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    _remove(aside)
    folder.rename(aside)
    _remove(aside)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder; the system lifts this when the process ends in any way.

    Raises:
        RunError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RunError(f"{folder}: another process is training in this folder; wait for it or stop it") from None
    except OSError:
        pass  # a file system that knows no locks
    try:
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: temporary file in the same folder, flush, rename.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    raw = text.encode()
    with replacing(path, len(raw)) as temporary:
        temporary.write_bytes(raw)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, keys in their order: that of a recipe's fields means something."""
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON, naming the file when that fails.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not valid JSON ({error})") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all; tensors that share memory are written out each.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    with replacing(path, _size(tensors)) as temporary:
        _write_tensors(temporary, tensors)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in a file, names included."""
    return sum(t.numel() * t.element_size() + len(name) + 100 for name, t in tensors.items())


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
    """Write `folder/step-N` with the tensors, the rest of the state as JSON and a manifest of sizes and hashes.

    The folder appears under its name only when it is complete and on disk. Older ones are removed afterwards, but
    the newest `KEEP` whose bytes are those that were written stay, and with fewer of these nothing is removed.

    Raises:
        RunError: the disk is full or cannot be written to; the checkpoints before this one are unharmed.
    """
    final = folder / f"step-{step:010d}"
    body = _json(state).encode()
    for left in folder.glob(".step-*.tmp"):  # by a process that was killed in the midst of this
        _remove(left)
    with replacing(final, _size(tensors) + len(body)) as temporary:
        temporary.mkdir()
        _write_tensors(temporary / TENSORS, tensors)
        (temporary / STATE).write_bytes(body)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
            for name in (TENSORS, STATE)
        }
        (temporary / MANIFEST).write_text(_json({"layout": LAYOUT, "files": files}))
    _prune(folder)
    return final


def load_checkpoint(
    folder: Path, tell: Callable[[str], None] = lambda sentence: None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest complete checkpoint.

    Args:
        folder: of the checkpoints.
        tell: gets one sentence for each newer one that is skipped as broken.

    Returns:
        (tensors, state), or None if there is none.

    Raises:
        RunError: one was written in another layout, by another version: to begin again would throw its work away.
    """
    broken = 0
    for candidate in _newest_first(folder):
        try:
            verify(candidate)
            state = read_json(candidate / STATE)
            if not isinstance(state, dict):
                raise RunError(f"{candidate / STATE}: not a checkpoint's state")
            return load_tensors(candidate / TENSORS), state
        except OtherLayoutError:
            raise
        except (RunError, OSError) as error:
            broken += 1
            tell(f"skipped the checkpoint {candidate.name}: {error}")
    if broken:
        tell(f"{folder}: no whole checkpoint is left; the stage begins again")
    return None


class OtherLayoutError(RunError):
    """A checkpoint of another version."""


def verify(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its manifest; other files beside them do not matter.

    Raises:
        OtherLayoutError: it was written in another layout.
        RunError: a file is missing, or its bytes are not those that were written.
    """
    path = checkpoint / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise RunError(f"{path}: not a checkpoint's manifest")
    layout, files = manifest.get("layout"), manifest.get("files")
    if isinstance(layout, int) and layout != LAYOUT:
        raise OtherLayoutError(
            f"{checkpoint}: written in layout {layout}, this version of recsys reads layout {LAYOUT}; continue with "
            "the version that wrote it, or remove the checkpoints to begin the stage again"
        )
    if layout != LAYOUT or not isinstance(files, dict):
        raise RunError(f"{path}: not a checkpoint's manifest")
    if set(files) != {TENSORS, STATE}:
        wrong = sorted(set(files) ^ {TENSORS, STATE})
        raise RunError(f"{path}: its files should be {TENSORS} and {STATE}; {wrong[0]!r} is wrong or missing")
    for name, written in files.items():
        file = checkpoint / name
        if not isinstance(written, dict) or file.stat().st_size != written.get("bytes"):
            raise RunError(f"{file}: its size is not what was written")
        if sha256(file) != written.get("sha256"):
            raise RunError(f"{file}: its bytes are not those that were written")


def _newest_first(folder: Path) -> list[Path]:
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def _prune(folder: Path) -> None:
    whole, others = 0, []
    for candidate in _newest_first(folder):
        # A checkpoint whose bytes rotted must not push a good one out: each that counts is read again.
        if whole < KEEP and _is_whole(candidate):
            whole += 1
        else:
            others.append(candidate)
    if whole == KEEP:
        for old in others:
            with contextlib.suppress(OSError):
                _discard(old)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except (RunError, OSError):
        return False
    return True
