"""What a pruned table will take, and how much of it fits into so many bytes: known before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import torch
from torch import Tensor

from recsys.contracts import EncodedSchema, Selection
from recsys.errors import RecipeError
from recsys.nn.compact import compact_bytes, drops_nothing, element_masks, keep_masks
from recsys.nn.layout import Layout
from recsys.nn.quantize import NUMBER_BYTES, Stored, step_bytes
from recsys.nn.sparse import element_bytes, rows_times_dims


def pruned_bytes(schema: EncodedSchema, dim: int, selection: Selection, stored: Stored = "float32") -> int:
    """Return the bytes of all tensors that `Table(schema, dim=dim).prune(selection)` exports.

    Args:
        schema: of the inputs.
        dim: embedding dimension D.
        selection: what is kept.
        stored: how the stage `quantize` stores numbers afterwards; without one, float32.
    """
    layout, number = Layout.of(schema), NUMBER_BYTES[stored]
    steps = step_bytes(layout, stored)
    if stored == "float32" and drops_nothing(layout, dim, selection):
        return 4 * sum(layout.rows) * dim
    if not selection.elements or drops_nothing(layout, dim, selection):
        return steps + compact_bytes(layout, dim, keep_masks(layout, dim, selection), number)
    masks = element_masks(layout, dim, selection)
    around = rows_times_dims(layout, masks)
    if around is None:
        return steps + element_bytes(layout, masks, number)
    return steps + compact_bytes(layout, dim, around, number)


def require_room(schema: EncodedSchema, dim: int, budget: float, stored: Stored = "float32") -> None:
    """Refuse a budget into which not even an empty pruned table fits; for `abilities.Budgeted`.

    Args:
        schema: of the inputs.
        dim: embedding dimension D.
        budget: share of the bytes of the whole table.
        stored: how numbers are stored in the end.

    Raises:
        RecipeError: what says where each column finds its part takes more by itself.
    """
    whole = 4 * sum(Layout.of(schema).rows) * dim
    least = pruned_bytes(schema, dim, Selection(()), stored)
    if least > budget * whole:
        raise RecipeError(
            f"model.embedding.budget: {budget:g} is {floor(budget * whole):,} bytes of the full table's {whole:,}; "
            f"constants alone take {least:,}: the least possible budget is {least / whole:.3g}",
            path=("model", "embedding", "budget"),
        )


def keep_within(
    schema: EncodedSchema, dim: int, scores: Tensor, budget: float, stored: Stored = "float32"
) -> Selection:
    """Return the selection of the highest scores whose pruned table takes at most `budget` · 4·N·D bytes.

    With the next highest score it would take more. The scores are those of the rows of the fused table, a block for
    every vocabulary, as in `Table.weight`; of equal ones the first are kept. What has the score -inf is never kept.

    Args:
        schema: of the inputs.
        dim: embedding dimension D.
        scores: `[N]` to keep whole rows, or `[N, D]` to keep single numbers.
        budget: share of the bytes of the whole table of float32.
        stored: how the stage `quantize` stores numbers afterwards; without one, float32.

    Raises:
        RecipeError: not even an empty table takes so little, or a score is NaN.
    """
    layout = Layout.of(schema)
    scores = scores.detach().cpu()
    if bool(scores.isnan().any()):
        raise RecipeError("what to keep within a budget cannot be chosen: a score is NaN")
    keys = _as_integers(scores)
    most = budget * 4 * sum(layout.rows) * dim

    def fits(mask: Tensor) -> bool:
        return pruned_bytes(schema, dim, _selection(layout, mask), stored) <= most

    dropped = scores == -torch.inf
    if fits(~dropped):
        return _selection(layout, ~dropped)
    if not fits(torch.zeros_like(dropped)):
        whole = 4 * sum(layout.rows) * dim
        raise RecipeError(f"a budget of {budget:g} of the table's {whole:,} bytes is less than an empty one takes")
    least = int(keys.min())
    above = 1 + least + _last(int(keys.max()) - least, lambda n: not fits((keys > least + n) & ~dropped))
    kept = (keys > above) & ~dropped
    equal = (keys == above) & ~dropped
    place = equal.flatten().cumsum(0).view(equal.shape)
    count = _last(int(equal.sum()), lambda n: fits(kept | (equal & (place <= n))))
    return _selection(layout, kept | (equal & (place <= count)))


def keep_most(schema: EncodedSchema, dim: int, sizes: Tensor, budget: float, stored: Stored = "float32") -> Selection:
    """Return what keeps the most of Σ size² within a budget: the largest single numbers, or the rows with the most.

    Single numbers need bits that say which, rows do not: with few bits a number, or hardly any to leave out, rows win.

    Args:
        schema: of the inputs.
        dim: embedding dimension D.
        sizes: `[N, D]`, not negative; what has the size -inf is zero in a kept row, and never kept by itself.
        budget: share of the bytes of the whole table of float32.
        stored: how the stage `quantize` stores numbers afterwards; without one, float32.

    Raises:
        RecipeError: as of `keep_within`.
    """
    layout, squares = Layout.of(schema), sizes.detach().cpu().clamp(min=0.0).double().square()
    numbers = keep_within(schema, dim, sizes, budget, stored)
    rows = keep_within(schema, dim, squares.sum(1), budget, stored)

    def kept(selection: Selection) -> float:
        total = 0.0
        for v, first in enumerate(layout.offsets):
            name = layout.owners[v]
            mask = selection.elements[name] if selection.elements else selection.rows[name].unsqueeze(1)
            total += float((squares[first : first + len(mask)] * mask).sum())
        return total

    return rows if kept(rows) > kept(numbers) else numbers


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """The greatest n in `[-1, most]` that bisection finds with `holds(n)`, taken for granted at -1."""
    low, high = -1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _as_integers(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: the bits of a float, which for negative ones count backwards."""
    if not scores.is_floating_point():
        return scores.long()
    kind = torch.int64 if scores.dtype == torch.float64 else torch.int32
    floats = (scores if kind == torch.int64 else scores.float()) + 0.0  # -0 becomes 0
    bits = floats.contiguous().view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)


def _selection(layout: Layout, mask: Tensor) -> Selection:
    """What the blocks keep, `[N]` or `[N, D]`, for every column."""
    offsets = layout.offsets
    parts = {c.name: mask[offsets[c.vocabulary] :][: c.rows] for c in layout.columns}
    names = tuple(c.name for c in layout.fields)
    return Selection(names, rows=parts) if mask.dim() == 1 else Selection(names, elements=parts)
