"""What a model's interactions looked at, averaged over rows and named by fields; any interaction, through its contract.

An interaction explains itself by tensors with names (`recsys.contracts.Interaction.explain`); nothing is known of them
but their shapes. A first dimension that follows the number of rows is averaged; trailing dimensions, two at most, that
are as long as there are fields stand for the fields; booleans that are not of rows are sets of fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys.contracts import Batch
from recsys.nn.model import Model


@dataclass(frozen=True)
class Shown:
    """One tensor of an explanation, without rows.

    Args:
        part: which interaction: its position in the model and its class, `0.AutoInt`.
        name: as the interaction calls it.
        shape: as the interaction gave it.
        axes: `rows`, `fields` or an empty name for each dimension of `shape`.
        mean: over the rows, float64; as it was given where no dimension is rows.
        size: the same of the absolute values.
        is_sets: `mean [T, F]` holds sets of fields, 1 for a member.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    mean: Tensor
    size: Tensor
    is_sets: bool

    @property
    def over_fields(self) -> int:
        """How many dimensions stand for the fields: 0, 1 or 2."""
        return self.axes.count("fields")

    @property
    def signed(self) -> bool:
        """Whether anything negative went into the mean."""
        return not torch.equal(self.mean, self.size)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return `mean` and `size` averaged over heads, neurons and the like too: `[F]` or `[F, F]`."""
        extra = tuple(range(self.mean.dim() - self.over_fields))
        return (self.mean.mean(extra), self.size.mean(extra)) if extra else (self.mean, self.size)

    def plain(self) -> dict[str, Any]:
        """Return it for JSON."""
        told: dict[str, Any] = {"shape": list(self.shape), "axes": list(self.axes), "mean": self.mean.tolist()}
        return told | ({"mean_absolute": self.size.tolist()} if self.signed else {})


def explain(model: Model, rows: Batch, fewer: Batch) -> list[Shown]:
    """Ask every interaction of a model what it looked at.

    Args:
        model: trained.
        rows: to explain.
        fewer: another number of rows, to see which tensors follow the number of rows.

    Raises:
        ValueError: both have as many rows.
    """
    if len(rows) == len(fewer):
        raise ValueError("two batches of different lengths are needed, to tell rows from other dimensions")
    model.eval()
    fields = len(Model.consumer_fields(model.schema, model.embedding))
    whole, part = model.explain(rows), model.explain(fewer)
    shown = []
    for key, value in whole.items():
        ends = (value.shape[:1], part[key].shape[:1]) if key in part else ()
        shown.append(_shown(key, value, ends == ((len(rows),), (len(fewer),)), fields))
    return shown


def _shown(key: str, value: Tensor, by_row: bool, fields: int) -> Shown:
    axes = [""] * value.dim()
    for d in range(value.dim() - 1, max(value.dim() - 3, -1), -1):
        if value.shape[d] != fields or (by_row and d == 0):
            break
        axes[d] = "fields"
    is_sets = value.dtype == torch.bool and axes == ["", "fields"] and not by_row
    number = value if by_row and value.dtype != torch.bool else value.double()  # means are taken in float64 anyway
    mean, size = number, number.abs()
    if by_row:
        axes[0] = "rows"
        mean, size = mean.mean(0, dtype=torch.float64), size.mean(0, dtype=torch.float64)
    position, part, name = key.split(".", 2)
    return Shown(f"{position}.{part}", name, tuple(value.shape), tuple(axes), mean.cpu(), size.cpu(), is_sets)


def names_of_sets(shown: Shown, fields: Sequence[str]) -> list[list[str]]:
    """Return the members of each set, `[T][…]`."""
    return [[name for name, member in zip(fields, row, strict=True) if member] for row in shown.mean.tolist()]
