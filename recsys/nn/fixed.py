"""The selector that keeps what another run chose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from recsys.contracts import Fields, Selection
from recsys.errors import RecipeError, RunError, did_you_mean, listing
from recsys.nn.layout import Column, Guard
from recsys.nn.selection import both, load_selection


class Fixed(nn.Module):
    """Keeps what another run chose: its fields, rows, dimensions and single numbers; nothing is learned.

    Rows and numbers go by id: the stage `prune` refuses them where the vocabularies are not those of that run.

    Args:
        from_: folder of a run whose stage `prune` chose, or one of its `selection.safetensors`.
    """

    def __init__(self, fields: Fields, *, from_: str) -> None:
        super().__init__()
        self.fields = fields
        self.selection = read_choice(Path(from_))
        _check(self.selection, fields, from_)
        keep = torch.zeros(len(fields), fields.dim, dtype=torch.bool, device="cpu")
        for f, name in enumerate(fields.names):
            keep[f] = self.selection.dims.get(name, True) if name in self.selection.fields else False
        sized = list(zip(fields.names, fields.rows, strict=True))

        def joined(masks: Mapping[str, Tensor], *dims: int) -> Tensor | None:
            """The masks of all fields one after the other; None where there are none."""
            if not masks:
                return None
            return torch.cat([masks.get(n, torch.ones(r, *dims, dtype=torch.bool, device="cpu")) for n, r in sized])

        buffers = {
            "keep": keep,
            "first": torch.tensor([0, *fields.rows[:-1]], device="cpu").cumsum(0),
            "rows": joined(self.selection.rows),
            "numbers": joined(self.selection.elements, fields.dim),
        }
        self.keep: Tensor
        self.first: Tensor
        self.rows: Tensor | None
        self.numbers: Tensor | None
        device = torch.empty(0).device  # that of the model that is being built, "meta" for a dry run
        for name, tensor in buffers.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)
        self.guard = Guard([Column(n, r, numeric=False, vocabulary=i) for i, (n, r) in enumerate(sized)])

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        mask = self.keep  # [F, D], or [B, F, D]
        place = self.guard(ids) + self.first
        if self.rows is not None:
            mask = mask & self.rows[place].unsqueeze(-1)
        if self.numbers is not None:
            mask = mask & self.numbers[place]
        return torch.where(mask, e, 0.0)

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return torch.zeros((), device=self.keep.device)

    def anneal(self, progress: float) -> None:
        """Nothing to anneal."""

    def kept(self) -> Selection:
        """What that run chose."""
        return self.selection

    def scores(self) -> Mapping[str, Tensor]:
        """Share of a field's numbers that is kept, `[]`."""
        shares = {}
        for f, (name, rows) in enumerate(zip(self.fields.names, self.fields.rows, strict=True)):
            mask = self.keep[f].expand(rows, -1)
            first = int(self.first[f])
            if self.rows is not None:
                mask = mask & self.rows[first : first + rows].unsqueeze(-1)
            if self.numbers is not None:
                mask = mask & self.numbers[first : first + rows]
            shares[name] = mask.float().mean()
        return shares


def read_choice(path: Path) -> Selection:
    """Return what a run's stages `prune` chose together, or the selection of a file.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    if path.is_file():
        return load_selection(path)
    files = sorted(path.glob("*/selection.safetensors"))
    if not files:
        why = "no stage of this run has pruned anything" if path.is_dir() else "no such folder or file"
        raise RunError(f"model.selector.from: {path}: {why}")
    chosen = load_selection(files[0])
    for file in files[1:]:
        chosen = both(chosen, load_selection(file))
    return chosen


def _check(selection: Selection, fields: Fields, path: str) -> None:
    """Refuse a choice of other fields or sizes."""
    sizes = dict(zip(fields.names, fields.rows, strict=True))
    for name in selection.fields:
        if name not in sizes:
            raise RecipeError(
                f"model.selector.from: {path} keeps the field '{name}', which this recipe does not have."
                f"{did_you_mean(name, sizes)} Fields: {listing(sizes)}"
            )
    for masks, wanted in ((selection.rows, None), (selection.dims, fields.dim), (selection.elements, None)):
        for name, mask in masks.items():
            expected = wanted or sizes.get(name, len(mask))
            if len(mask) != expected:
                raise RecipeError(
                    f"model.selector.from: {path} chose among {len(mask)} rows or dimensions of '{name}', here it has "
                    f"{expected}"
                )
