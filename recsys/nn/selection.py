"""What to keep: the identity selector, and selections as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recsys.contracts import Fields, Selection
from recsys.errors import RunError

FORMAT = "recsys-selection-2"


class KeepAll(nn.Module):
    """The selector that keeps everything.

    Passes `e` on as it is, or times a number; no parameters, no penalty.

    Args:
        scale: the number. In the place of a selector that was pruned away: what that one gave to all that it kept.
    """

    def __init__(self, fields: Fields, *, scale: float = 1.0) -> None:
        super().__init__()
        self.fields = fields
        self.scale = scale
        self.none: Tensor
        self.register_buffer("none", torch.zeros(()), persistent=False)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        return e if self.scale == 1.0 else e * self.scale

    def factor(self) -> float:
        """The scale."""
        return self.scale

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
    masks = (*selection.rows.values(), *selection.dims.values(), *selection.elements.values())
    return set(selection.fields) >= set(fields.names) and all(bool(m.all()) for m in masks)


def is_nothing(selection: Selection, fields: Fields) -> bool:
    """Whether `selection` keeps no number of any of `fields`."""

    def any_of(name: str) -> bool:
        masks = [m[name] for m in (selection.rows, selection.dims, selection.elements) if name in m]
        return all(bool(m.any()) for m in masks)

    return not any(name in fields.names and any_of(name) for name in selection.fields)


def both(one: Selection, other: Selection) -> Selection:
    """The selection that keeps what both keep.

    A history column that only one of them names is as that one says.
    """

    def masks(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {**b, **a}
        return {n: a[n].cpu().bool() & b[n].cpu().bool() if n in a and n in b else given[n] for n in given}

    fields = tuple(name for name in one.fields if name in other.fields)
    parts = ((one.rows, other.rows), (one.dims, other.dims), (one.elements, other.elements))
    return Selection(fields, *(masks(a, b) for a, b in parts), vocabulary=one.vocabulary or other.vocabulary)


def save_selection(selection: Selection, path: Path) -> None:
    """Write a selection as safetensors: the masks, eight numbers in a byte; shapes and kept fields as metadata."""
    masks = {"rows": selection.rows, "dims": selection.dims, "elements": selection.elements}
    tensors = {f"{kind}/{k}": _packed(v) for kind, given in masks.items() for k, v in given.items()}
    shapes = {f"{kind}/{k}": list(v.shape) for kind, given in masks.items() for k, v in given.items()}
    meta = {"format": FORMAT, "fields": selection.fields, "shapes": shapes, "vocabulary": selection.vocabulary}
    # One entry: safetensors writes several in an order that differs from process to process.
    save_file(tensors, path, metadata={"selection": json.dumps(meta)})


def load_selection(path: Path) -> Selection:
    """Read what `save_selection` wrote.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("selection", "{}"))
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, ValueError, SafetensorError) as e:
        raise RunError(f"{path}: cannot be read as a selection: {e}") from e
    if meta.get("format") != FORMAT:
        raise RunError(f"{path}: not a selection file (format {meta.get('format')!r}, expected {FORMAT!r})")
    masks = {name: _unpacked(bits, meta["shapes"][name]) for name, bits in packed.items()}
    parts = (_masks(masks, kind) for kind in ("rows/", "dims/", "elements/"))
    return Selection(tuple(meta["fields"]), *parts, vocabulary=meta.get("vocabulary", ""))


def _packed(mask: Tensor) -> Tensor:
    """Eight bits in a byte, `[…] -> [⌈n / 8⌉]` uint8."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().bool().numpy().ravel()))


def _unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(bool)).view(*shape)


def _masks(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
