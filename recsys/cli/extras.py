"""What the commands share about optional packages and plugins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.errors import RecsysError

if TYPE_CHECKING:
    from rich.console import Console

    from recsys.plugin.registry import Registry

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "lightning", "torchmetrics", "pluggy", "safetensors"),
    "graph": ("onnx", "onnxruntime"),
    "serve": ("onnxruntime", "fastapi", "uvicorn", "httptools", "prometheus_client"),
    "grpc": ("grpc", "google.protobuf"),
    "index": ("onnx", "onnxscript", "onnxruntime", "usearch"),
    "report": ("matplotlib",),
}
"""Extra → the top-level modules that it installs."""

_UNBROKEN = 10_000

PluginFiles = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Also use the components of this Python file; can be repeated."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="NAME", help="Do not import this installed plugin (`*`: any); can be repeated."),
]


def make_console(*, stderr: bool = False) -> Console:
    """Return where messages go: as wide as the terminal, and without line breaks into a file or a pipe."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_UNBROKEN)


def require(extra: str, modules: Sequence[str] | None = None) -> None:
    """Say which extra to install when a command needs one that is absent.

    Args:
        extra: by its name.
        modules: of the extra that the command needs; all by default.

    Raises:
        RecsysError: a module is not installed.
    """
    missing = [module for module in modules or EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise RecsysError(f"this command needs {', '.join(missing)}: pip install 'recsys[{extra}]'")


def open_registry(plugin: Sequence[Path] | None = None, without: Sequence[str] | None = None) -> Registry:
    """Load the registry as the command line asks."""
    require("train")
    from recsys.plugin.registry import load_registry

    return load_registry(files=plugin or (), without=without or ())
