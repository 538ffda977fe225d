"""What an exporter promises; see `recsys.contracts.Exporter`."""

from __future__ import annotations

import hashlib
import pickletools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from recsys import contracts
from recsys.contracts import EncodedSchema, Field
from recsys.nn.head import Head
from recsys.nn.interaction import MLP
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.nn.table import Table
from recsys.testing import samples
from recsys.testing.kit import Check, expect


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of an exporter."""
    return [
        Check("writes_files", "write below the given folder, which exists", lambda: _writes(build)),
        Check(
            "no_pickle",
            "write safetensors, ONNX, JSON: formats that run no code when they are read",
            lambda: _safe(build),
        ),
        Check("model_unchanged", "export a copy, and leave mode and weights as they were", lambda: _pure(build)),
        Check("repeatable", "write no time, no random name and no absolute path", lambda: _again(build)),
    ]


def model() -> Model:
    """Return a small model of three fields."""
    torch.manual_seed(1)
    of = schema()
    table = Table(of, dim=4, init_std=1.0)
    interaction = MLP(Model.consumer_fields(of, table), hidden=(8,))
    head = Head(of, [interaction])
    return Model(of, table, cast("contracts.Selector", KeepAll(table.fields)), {}, [interaction], head)


def schema() -> EncodedSchema:
    """Return the schema of `model`."""
    return EncodedSchema(tuple(Field(f"f{i}", 5 + i) for i in range(3)))


def _export(build: Callable[..., Any], of: Model) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        build().export(of, samples.batch(6, of.schema), Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _writes(build: Callable[..., Any]) -> None:
    written = _export(build, model())
    expect(written, "it writes no file into the folder")
    empty = [name for name, content in written.items() if not content]
    expect(not empty, f"{', '.join(empty)} is empty")


def _safe(build: Callable[..., Any]) -> None:
    for name, content in _export(build, model()).items():
        expect(not _is_pickle(content), f"{name} is a pickle")


def _is_pickle(content: bytes) -> bool:
    """Whether the content is a pickle, or an archive with one in it (as `torch.save` writes)."""
    if content[:4] == b"PK\x03\x04":
        with tempfile.TemporaryFile() as file:
            file.write(content)
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
    if content[:1] != b"\x80":
        return False
    try:
        opcodes = list(pickletools.genops(content))
    except ValueError:
        return False
    return bool(opcodes)


def _pure(build: Callable[..., Any]) -> None:
    of = model().train()
    before = _digest(of)
    _export(build, of)
    expect(of.training, "it leaves the model in eval mode")
    expect(_digest(of) == before, "it changes the model's weights")


def _again(build: Callable[..., Any]) -> None:
    first, second = _export(build, model()), _export(build, model())
    different = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    expect(not different, f"two exports of the same model differ in {', '.join(sorted(different))}")


def _digest(of: Model) -> str:
    digest = hashlib.sha256()
    for name, value in of.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()
