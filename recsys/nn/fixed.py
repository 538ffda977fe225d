"""The selector that keeps what it is told: given fields, or what another run chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recsys.contracts import Fields, Selection
from recsys.errors import RecipeError, RunError, did_you_mean, listing
from recsys.nn.layout import Column, Guard
from recsys.nn.selection import both, load_selection


class Fixed(nn.Module):
    """Keeps given fields, or what another run chose: its fields, rows, dimensions and numbers; nothing is learned.

    Rows and numbers go by id: the stage `prune` refuses them where the vocabularies are not those of that run.
    Exactly one of the options is given.

    Args:
        from_: folder of a run whose stage `prune` chose, or one of its `selection.safetensors`.
        fields: names of the fields to keep whole.
    """

    def __init__(self, every: Fields, *, from_: str | None = None, fields: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.fields = every
        self.selection = _told(every, from_, fields)
        keep = torch.zeros(len(every), every.dim, dtype=torch.bool, device="cpu")
        for f, name in enumerate(every.names):
            keep[f] = self.selection.dims.get(name, True) if name in self.selection.fields else False
        sized = list(zip(every.names, every.rows, strict=True))

        def joined(masks: Mapping[str, Tensor], *dims: int) -> Tensor | None:
            """The masks of all fields one after the other; None where there are none."""
            if not masks:
                return None
            return torch.cat([masks.get(n, torch.ones(r, *dims, dtype=torch.bool, device="cpu")) for n, r in sized])

        buffers = {
            "keep": keep,
            "first": torch.tensor([0, *every.rows[:-1]], device="cpu").cumsum(0),
            "rows": joined(self.selection.rows),
            "numbers": joined(self.selection.elements, every.dim),
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
        """What it was told to keep."""
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


def _told(every: Fields, run: str | None, names: Sequence[str] | None) -> Selection:
    """The selection of a run, or that of the named fields in the model's order.

    Raises:
        RecipeError: both or neither is given, no field is named, or one that the model does not have.
    """
    if (run is None) == (names is None):
        raise RecipeError("give either `from`, a run that chose, or `fields`, the names of those to keep")
    if run is not None:
        selection = read_choice(Path(run))
        _check(selection, every, run)
        return selection
    named = names or ()
    for name in named:
        if name not in every.names:
            raise RecipeError(
                f"model.selector.fields: the model has no field '{name}'.{did_you_mean(name, every.names)} "
                f"Fields: {listing(every.names)}",
                path=("model", "selector", "fields"),
            )
    if not named:
        raise RecipeError("model.selector.fields: name at least one field", path=("model", "selector", "fields"))
    return Selection(tuple(name for name in every.names if name in named))


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
