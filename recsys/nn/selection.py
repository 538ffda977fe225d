"""What to keep: the identity selector, and selections as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recsys.contracts import Fields, Selection
from recsys.errors import RunError

FORMAT = "recsys-selection-1"


class KeepAll(nn.Module):
    """The selector that keeps everything.

    Passes `e` on as it is; no parameters, no penalty.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.fields = fields
        self.none: Tensor
        self.register_buffer("none", torch.zeros(()), persistent=False)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        return e

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return self.none

    def anneal(self, progress: float) -> None:
        """Nothing to anneal."""

    def kept(self) -> Selection:
        """Everything."""
        return everything(self.fields)

    def scores(self) -> Mapping[str, Tensor]:
        """One for every field, `[]`."""
        return {name: torch.ones(()) for name in self.fields.names}


def everything(fields: Fields) -> Selection:
    """The selection that keeps all fields, rows and dimensions."""
    return Selection(fields.names)


def is_everything(selection: Selection, fields: Fields) -> bool:
    """Whether `selection` drops nothing of `fields`."""
    masks = (*selection.rows.values(), *selection.dims.values())
    return set(selection.fields) >= set(fields.names) and all(bool(m.all()) for m in masks)


def save_selection(selection: Selection, path: Path) -> None:
    """Write a selection as safetensors: one bool vector per mask, the kept fields in the metadata."""
    tensors = {f"rows/{k}": v.detach().cpu().bool().contiguous() for k, v in selection.rows.items()}
    tensors |= {f"dims/{k}": v.detach().cpu().bool().contiguous() for k, v in selection.dims.items()}
    # One entry: safetensors writes several in an order that differs from process to process.
    save_file(tensors, path, metadata={"selection": json.dumps({"format": FORMAT, "fields": selection.fields})})


def load_selection(path: Path) -> Selection:
    """Read what `save_selection` wrote.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("selection", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, ValueError, SafetensorError) as e:
        raise RunError(f"{path}: cannot be read as a selection: {e}") from e
    if meta.get("format") != FORMAT:
        raise RunError(f"{path}: not a selection file (format {meta.get('format')!r}, expected {FORMAT!r})")
    return Selection(tuple(meta["fields"]), _masks(tensors, "rows/"), _masks(tensors, "dims/"))


def _masks(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
