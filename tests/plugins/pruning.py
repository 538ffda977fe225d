"""What every embedding must give after pruning, on one schema with everything in it; selections drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim, export

from recsys.api import EncodedSchema, Field, History, Selection

SCHEMA = EncodedSchema(
    fields=(Field("u", 9), Field("x", 2, numeric=True), Field("i", 12), Field("j", 12, shares="i"), Field("one", 3)),
    histories=(History("h", (Field("i", 12, shares="i"), Field("s", 6)), 5),),
)
COLUMNS = {"u": 9, "x": 2, "i": 12, "j": 12, "one": 3, "h.i": 12, "h.s": 6}
SCALARS = ("u", "x", "i", "j", "one")


def every_id() -> tuple[Tensor, Tensor, Tensor]:
    """All ids of all columns, some out of range, numeric values, and events `[1, L, 2]`."""
    ids = torch.arange(-2, 16).unsqueeze(1).expand(-1, len(SCALARS)).contiguous()
    values = torch.ones(ids.shape)
    values[:, 1] = torch.linspace(-2, 2, len(ids))
    return ids, values, ids[:, :2].unsqueeze(0)


def as_read(name: str, ids: Tensor) -> Tensor:
    """The ids that stand in for those out of range."""
    return torch.where((ids < 0) | (ids >= COLUMNS[name]), 0 if name == "x" else 1, ids)


def selections(dim: int) -> st.SearchStrategy[Selection]:
    """Any fields, rows, dimensions and single numbers."""

    def mask(*shape: int) -> st.SearchStrategy[Tensor]:
        count = torch.Size(shape).numel()
        return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda b: torch.tensor(b).view(shape))

    @st.composite
    def draw_one(draw: Callable[..., Any]) -> Selection:
        some = st.sampled_from([False, False, True])
        return Selection(
            fields=tuple(f for f in SCALARS if not draw(some)),
            rows={c: draw(mask(n)) for c, n in COLUMNS.items() if draw(some)},
            dims={c: draw(mask(dim)) for c in COLUMNS if draw(some)},
            elements={c: draw(mask(n, dim)) for c, n in COLUMNS.items() if draw(some)} if draw(some) else {},
        )

    return draw_one()


def mask(selection: Selection, name: str, ids: Tensor, dim: int) -> Tensor:
    """`[..., D]`: whether the selection keeps this id's number."""
    ids, size = as_read(name, ids), COLUMNS[name]
    keep = selection.rows.get(name, torch.ones(size, dtype=torch.bool))[ids].unsqueeze(-1)
    keep = keep & selection.dims.get(name, torch.ones(dim, dtype=torch.bool))
    keep = keep & selection.elements.get(name, torch.ones(size, dim, dtype=torch.bool))[ids]
    return keep & (name in selection.fields or name not in SCALARS)


def outputs(embedding: Any) -> tuple[Tensor, Tensor]:
    """Vectors of every id, in every field and event."""
    ids, values, events = every_id()
    return embedding(ids, values), embedding.history("h", events)


def masked(embedding: Any, selection: Selection) -> tuple[Tensor, Tensor]:
    """What the pruned embedding must give."""
    ids, _, events = every_id()
    dim = embedding.fields.dim
    scalar, past = outputs(embedding)
    scalar = scalar * torch.stack([mask(selection, n, ids[:, k], dim) for k, n in enumerate(SCALARS)], 1)
    return scalar, past * torch.stack(
        [mask(selection, n, events[..., k], dim) for k, n in enumerate(("h.i", "h.s"))], 2
    )


def size(embedding: Any) -> int:
    """Bytes of what a serving process holds."""
    tables: Mapping[str, Tensor] = embedding.export_tables()
    return sum(t.nbytes for t in tables.values())


def held(embedding: torch.nn.Module) -> int:
    """Bytes of all that the module holds."""
    return sum(t.nbytes for t in (*embedding.parameters(), *embedding.buffers()))


def check_pruned(build: Callable[[], Any], selection: Selection, then: Selection) -> None:
    """Prune, and prune again: bit for bit what masking gives; no larger than held; a state that can be loaded."""
    whole = build().eval()
    before = [t.clone() for t in outputs(whole)]
    smaller = whole.prune(selection)
    for got, want in zip(outputs(smaller), masked(whole, selection), strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(outputs(whole), before, strict=True)), "prune changes its source"
    assert size(smaller) == held(smaller)

    again = smaller.prune(then)
    for got, want in zip(outputs(again), masked(smaller, then), strict=True):
        assert torch.equal(got, want)
    assert size(again) <= size(smaller) + 1024  # bits may come, rows only go

    for module, chain in ((smaller, (selection,)), (again, (selection, then))):
        fresh = build()
        with torch.no_grad():
            for p in fresh.parameters():
                p.add_(1.0)
        for step in chain:
            fresh = fresh.prune(step)
        fresh.load_state_dict(module.state_dict())
        for got, want in zip(outputs(fresh.eval()), outputs(module.eval()), strict=True):
            assert torch.equal(got, want)


def check_export(module: Any) -> None:
    """A graph of the module gives the same for batches of any size."""
    ids, values, _ = every_id()
    module = module.eval()
    graph = export(module, (ids[:4], values[:4]), dynamic_shapes=({0: Dim("b", min=1)},) * 2, strict=False).module()
    for rows in (1, 3, len(ids)):
        assert torch.equal(graph(ids[:rows], values[:rows]), module(ids[:rows], values[:rows]))


def check_gradient_stays_inside(module: Any, selection: Selection) -> None:
    """What is dropped has no gradient: a loss on dropped numbers alone moves nothing."""
    smaller = module.prune(selection).train()
    ids, _, events = every_id()
    dim = smaller.fields.dim
    scalar, past = outputs(smaller)
    gone = [~mask(selection, n, ids[:, k], dim) for k, n in enumerate(SCALARS)]
    loss = (scalar * torch.stack(gone, 1)).sum()
    gone = [~mask(selection, n, events[..., k], dim) for k, n in enumerate(("h.i", "h.s"))]
    (loss + (past * torch.stack(gone, 2)).sum()).backward()
    for p in smaller.parameters():
        assert p.grad is None or not bool(p.grad.any())
