"""The folder of a bundle: which files it has, and the proof that they are those that were written.

    SIGNATURE          of the manifest by a key, where there is one
    manifest.json      schema version, bundle id, sha256 and size of every other file, versions, metrics
    model.onnx         ids, numbers and lists to logits and probabilities; holds all of its numbers itself
    model.safetensors  the same weights by name, to train on from them
    encoder.json       how raw columns become the graph's inputs; vocabulary/*.json the values in the order of their ids
    schema.json        the columns of a row, their limits, and what they looked like in training
    calibration.json   how logits become probabilities
    golden/            rows, and the scores that they must get
    warmup.jsonl       rows to run before the first request
    model_card.json, model_card.md, recipe.json, SBOM.cdx.json
    aot/model.pt2      only where it was asked for: the graph as native code

Everything is JSON, text, ONNX or safetensors; nothing in it is code, and no file is read before its hash is known. The
one exception is marked as executable in the manifest, and is loaded by nobody but `recsys.deploy.aot`, if told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.deploy.graph_check import check_graph
from recsys.deploy.signature import SIGNATURE, check_signature
from recsys.errors import BundleError, did_you_mean, if_file, listing

SCHEMA = 1
"""Version of the layout."""
MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"
ENCODER = "encoder.json"
COLUMNS = "schema.json"
CALIBRATION = "calibration.json"
REQUESTS, RESPONSES = "golden/requests.jsonl", "golden/responses.jsonl"
WARMUP = "warmup.jsonl"
COMPILED = "aot/model.pt2"
"""The one file that may hold code, where the manifest marks it as executable."""
NEEDED = (GRAPH, WEIGHTS, ENCODER, COLUMNS, CALIBRATION, REQUESTS, RESPONSES, WARMUP)
"""What every bundle has."""

_PROGRAMS = (".bat", ".dll", ".dylib", ".exe", ".py", ".pyc", ".pyd", ".sh", ".so")
_PICKLES = (".bin", ".ckpt", ".joblib", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".gz", ".tar", ".zip")
_CODE = frozenset((*_PROGRAMS, *_PICKLES))
"""Endings of files that hold code, or may."""
_STARTS: Mapping[str, Callable[[bytes], bool]] = {
    ".json": lambda start: start[:1] in b"{[" and bool(start),
    ".jsonl": lambda start: start[:1] == b"{",
    ".md": lambda start: b"\0" not in start and start[:1].isascii() and start[:2] not in (b"MZ", b"#!"),
    ".onnx": lambda start: start[:1] == b"\x08",
    ".safetensors": lambda start: start[8:9] == b"{",
}
"""Ending → whether a file that begins so can be what it says; other endings are refused."""
_MAGIC = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "an archive",
    b"\x7fELF": "a program library",
    b"MZ": "a program library",
    b"#!": "a script",
}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its manifest says.

    Args:
        folder: where it is.
        manifest: the content of `manifest.json`.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The bundle's id: a hash over all that is in it."""
        return str(self.manifest["bundle"])

    def read(self, name: str) -> bytes:
        """Return the content of a file, checked against the manifest.

        Raises:
            BundleError: it is missing, or not what was written.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BundleError(f"{self.folder / MANIFEST}: does not list {name}")
        content = _content(self.folder / name)
        _compare(self.folder / name, entry, len(content), hashlib.sha256(content).hexdigest())
        return content

    def json(self, name: str) -> Any:
        """Return the content of a JSON file.

        Raises:
            BundleError: as `read`, or it is no JSON.
        """
        return parse(self.read(name), self.folder / name)

    def lines(self, name: str) -> list[Any]:
        """Return the values of a file with one JSON value in each line.

        Raises:
            BundleError: as `json`.
        """
        return [parse(line, self.folder / name) for line in self.read(name).splitlines() if line.strip()]


def open_bundle(folder: Path, *, trust_code: bool = False, key: bytes | None = None) -> Bundle:
    """Compare every file of a bundle with its manifest; nothing of it is used before.

    Args:
        folder: of the bundle.
        trust_code: allow files that hold code, listed in the manifest; nothing of this package runs them.
        key: that must have signed the bundle; None asks for no signature.

    Raises:
        BundleError: a file is missing, not listed, altered, a link or of a forbidden kind; or the manifest is wrong, or
            not signed by the key.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder.{if_file(folder) or _near(folder.absolute())}")
    found = _regular_files(folder)
    if MANIFEST not in found:
        raise BundleError(f"{path}: missing; this is no bundle")
    if key is not None:
        check_signature(folder / SIGNATURE, _content(path), key)
    manifest = _manifest(path)
    files: Mapping[str, Any] = manifest["files"]
    for name in sorted({*files, *NEEDED} - found):
        raise BundleError(f"{folder / name}: missing; a bundle is the whole folder that the stage `export` wrote")
    for name in sorted(found - {*files, MANIFEST, SIGNATURE}):
        raise BundleError(f"{folder / name}: not listed in {MANIFEST}; it was put there after the bundle was written")
    for name in sorted(NEEDED):
        if name not in files:
            raise BundleError(f"{path}: does not list {name}")
    marked = manifest["executable"] or {}
    for name in sorted(set(marked) - set(files)):
        raise BundleError(f"{path}: marks {name} as executable, but does not list it")
    for name in sorted(files):
        _check_kind(folder / name, trust_code or name in marked)
        size, digest = _digest(folder / name)
        _compare(folder / name, files[name], size, digest)
    bundle = Bundle(folder, manifest)
    check_graph(bundle.read(GRAPH), str(folder / GRAPH))
    return bundle


def _near(folder: Path) -> str:
    """Say what the folder may have been meant to be, or the first of those above it that does not exist."""
    if folder.parent.is_dir():
        return did_you_mean(folder.name, [path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")])
    missing = folder.parent
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        known = [path.name for path in missing.parent.iterdir() if path.is_dir()]
    except OSError:  # it may not be looked into
        known = []
    return f" There is no folder '{missing.name}' in {missing.parent}.{did_you_mean(missing.name, known)}"


def seal(body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest, with the id that is a hash over the hashes of the files and all else in it."""
    rest = {key: value for key, value in body.items() if key != "bundle"}
    digest = hashlib.sha256(_canonical(rest)).hexdigest()
    return _canonical({**rest, "bundle": digest})


def parse(content: bytes, path: Path) -> Any:
    """Return a JSON value.

    Raises:
        BundleError: it is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error})") from None


def _canonical(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _manifest(path: Path) -> Mapping[str, Any]:
    content = _content(path)
    body = parse(content, path)
    if not isinstance(body, dict) or not isinstance(body.get("files"), dict):
        raise BundleError(f"{path}: not a bundle's manifest")
    if body.get("schema") != SCHEMA:
        raise BundleError(f"{path}: schema version {body.get('schema')!r}; this version of recsys reads {SCHEMA}")
    marked = body.get("executable")
    if marked is not False and not (isinstance(marked, dict) and set(marked) == {COMPILED}):
        raise BundleError(f"{path}: says that the bundle holds code (`executable`) other than {COMPILED}")
    wanted = seal(body)
    if content != wanted:
        stated, real = str(body.get("bundle")), json.loads(wanted)["bundle"]
        raise BundleError(f"{path}: altered after it was written (id {stated[:64]}, but its content gives {real})")
    return body


def _regular_files(folder: Path) -> set[str]:
    """Names of the files below a folder; each must be a plain file that has no other name."""
    found: set[str] = set()
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise BundleError(f"{os.path.join(parent, name)}: a symbolic link; a bundle holds its own files only")
        for name in files:
            path = os.path.join(parent, name)
            facts = os.lstat(path)
            if stat.S_ISLNK(facts.st_mode):
                raise BundleError(f"{path}: a symbolic link; a bundle holds its own files only")
            if not stat.S_ISREG(facts.st_mode):
                raise BundleError(f"{path}: no regular file (a pipe, socket or device)")
            if facts.st_nlink > 1:
                raise BundleError(f"{path}: has {facts.st_nlink} names (hard links); copy the bundle, do not link it")
            if not os.path.realpath(path).startswith(root + os.sep):
                raise BundleError(f"{path}: lies outside of the bundle")
            found.add(os.path.relpath(path, folder).replace(os.sep, "/"))
    return found


def _check_kind(path: Path, trust_code: bool) -> None:
    """Refuse what is, or may be, code; a file must begin as its ending says."""
    if trust_code and path.suffix in _CODE:
        return
    begins = _STARTS.get(path.suffix)
    if begins is None:
        what = "holds code" if path.suffix in _CODE else "is of a kind that no bundle has"
        raise BundleError(f"{path}: a file `{path.suffix}` {what}; known: {listing(_STARTS)}")
    with path.open("rb") as file:
        start = file.read(64)
    if not begins(start):
        what = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "something else")
        raise BundleError(f"{path}: is {what}, not what its ending says")


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None


def _compare(path: Path, entry: Any, size: int, digest: str) -> None:
    if not isinstance(entry, dict) or {"bytes", "sha256"} - set(entry):
        raise BundleError(f"{path.parent / MANIFEST}: the entry of {path.name} has no `bytes` or no `sha256`")
    if digest != entry["sha256"] or size != entry["bytes"]:
        raise BundleError(
            f"{path}: altered after the bundle was written ({size:,} bytes with sha256 {digest}, "
            f"written were {entry['bytes']:,} with {entry['sha256']})"
        )
