"""Low-precision training: numbers of eight bits times a step, which is fixed (LPT) or learned for each row (ALPT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, EncodedSchema, Fields, Layout, Selection, Table, compact, hookimpl, scale

LOWEST, HIGHEST = -128, 127
BLOCK = 1 << 15
"""Numbers that are rounded at once on a CPU: few enough to stay in its caches."""
Place = slice | Tensor
"""Rows of a table: some that follow each other, or any, `[n]` int64."""
MEAN, SQUARE, NOTHING = 0.9, 0.999, 1e-12
"""β₁, β₂ and ε of the Adam that moves the steps of rows."""
LEAST = 1e-7
"""No step of a row becomes smaller."""


class LPT(Table):
    """A table whose numbers are eight-bit integers times one step, while it is trained and afterwards.

    w = Δ · q with q in −128 … 127. After every step of the optimizer, w ← Δ · clip(⌊w/Δ⌋ + b, −128, 127), where b is 1
    with probability w/Δ − ⌊w/Δ⌋, drawn for each number by itself: right on average, so that changes smaller than Δ are
    not lost. Numbers that the optimizer left where they were stay there.

    Training holds these numbers, gradients and the optimizer's moments in float32, and so needs the memory of a whole
    table; `prune` stores the integers, a quarter of its bytes, gives the same vectors bit for bit, and ends their
    training. Something smaller still comes only from leaving rows or dimensions out.

    Xu et al., "Agile and Accurate CTR Prediction Model Training for Massive-Scale Online Advertising Systems",
    SIGMOD 2021; called LPT in Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate
    Prediction", AAAI 2023, arXiv 2212.05735.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation, before it is rounded.
        step: Δ; vectors reach from −128 Δ to 127 Δ.
        stochastic: round by chance; else to the nearest, to see what that loses.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-2,
        step: PositiveFloat = 1e-2,
        stochastic: bool = True,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.stochastic = stochastic
        self.step: Tensor
        self.register_buffer("step", torch.tensor(step), persistent=False)
        with torch.no_grad():
            self.weight.copy_(rounded(self.weight, self.step) if stochastic else on_grid(self.weight, self.step))
        self.chance = Chance()

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`; training leaves all numbers on the grid, others may not."""
        e = super()._look_up(rows)
        return e if self.training else on_grid(e, self.step)

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """None: the optimizer moves them all."""
        return ()

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring what has moved back onto the grid."""
        generator = self.chance.next(self.weight.device)
        for place in moved(self.weight, self.step):
            w = take(self.weight, place)
            w = rounded(w, self.step, generator) if self.stochastic else on_grid(w, self.step)
            put(self.weight, place, w)

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block as evaluation shows them, `[n] -> [n, D]`, detached."""
        return on_grid(super().read(vocabulary, rows), self.step)

    def prune(self, selection: Selection) -> Any:
        """Return the integers of what is kept."""
        return Quantised(self.schema, compact(self.schema, Codes(self, self.step), selection), self.step.clone())

    def get_extra_state(self) -> Tensor:
        """Where all chance comes from."""
        return self.chance.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self.chance.take_up(state)


class ALPT(Table):
    """A table whose numbers are eight-bit integers times a step that is learned for each row.

    w_i = Δ_i · q_i with q in −128 … 127. Each training step (a) lets the optimizer move w to w′; (b) moves Δ_i by Adam
    with rate `rate` along ∂L/∂Δ_i = Σ_k g_ik · c_ik, where y = w′/Δ and c = round(y) − y within −128 < y < 127, else
    −128 or 127; (c) rounds w′/Δ_i, with the new Δ_i, up or down by chance as LPT does.

    The paper takes g = ∂L/∂w for (b) from a second pass over the batch, at the point of the grid next to w′, with the
    rest of the model moved already. Here g is that of the first pass, so that a step takes one: the same number where w
    moved by less than Δ/2 (under Adam: a learning rate below that) and the rest of the model is as it was, else nearly
    so. LSQ's constant factor 1/√(B · D · 127) is left out: Adam, with an ε of 1e-12, does not depend on it. Rows that
    the optimizer did not move keep their Δ.

    Memory in training and after `prune` as of LPT, and four bytes for the step of each row: 5/16 of a table of 16
    dimensions; training holds two more numbers for each row.

    Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023,
    arXiv 2212.05735; Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153 (the gradient).

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation, before it is rounded.
        step: Δ of all rows at the start.
        rate: learning rate of the steps.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-2,
        step: PositiveFloat = 1e-2,
        rate: NonNegativeFloat = 2e-5,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.rate = rate
        n = self.weight.shape[0]
        # Parameters without a gradient: buffers are averaged over processes, and copied before steps.
        self.step = nn.Parameter(torch.full((n, 1), step), requires_grad=False)
        self.moments = nn.Parameter(torch.zeros(n, 2), requires_grad=False)
        with torch.no_grad():
            self.weight.copy_(rounded(self.weight, self.step))
        self.chance = Chance()

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`; training leaves all numbers on the grid, others may not."""
        e = super()._look_up(rows)
        if self.training:
            return e
        return on_grid(e, self.step.index_select(0, rows.flatten()).view(*rows.shape, 1))

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """None: the optimizer moves the numbers, and needs not know of their steps."""
        return ()

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the steps of the rows that have moved, and bring these back onto the grid.

        A step of training that is skipped moves no row.
        """
        generator, slopes = self.chance.next(self.weight.device), self.weight.grad
        for place in moved(self.weight, self.step):
            w, step = take(self.weight, place), take(self.step, place)
            if slopes is not None:
                away = (on_grid(w, step) != w).any(1, keepdim=True)
                moments = take(self.moments, place)
                after, change = adam(moments, step_gradient(w, step, take(slopes, place)), self.chance.steps)
                put(self.moments, place, torch.where(away, after, moments))
                step = torch.where(away, (step - self.rate * change).clamp_(min=LEAST), step)
                put(self.step, place, step)
            put(self.weight, place, rounded(w, step, generator))

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block as evaluation shows them, `[n] -> [n, D]`, detached."""
        step = self.step.detach().index_select(0, rows + self.layout.offsets[vocabulary])
        return on_grid(super().read(vocabulary, rows), step)

    def prune(self, selection: Selection) -> Any:
        """Return the integers of what is kept, and a step for each kept row."""
        kept = compact(self.schema, Codes(self, self.step), selection)
        return Quantised(self.schema, kept, compact(self.schema, Steps(self), rows_of(kept)))

    def export_tables(self) -> Mapping[str, Tensor]:
        """The numbers and the steps of their rows."""
        return {"weight": self.weight.detach(), "step": self.step.detach()}

    def get_extra_state(self) -> Tensor:
        """Where all chance comes from."""
        return self.chance.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self.chance.take_up(state)


class Chance:
    """The random numbers of a table: a seed, and how many steps were made."""

    def __init__(self) -> None:
        self.seed, self.steps = int(torch.randint(0, 2**62, (), device="cpu")), 0

    def next(self, device: torch.device) -> torch.Generator:
        """Those of the next step."""
        self.steps += 1
        return torch.Generator(device).manual_seed((self.seed + self.steps) % 2**62)

    def state(self) -> Tensor:
        """`[2]` int64."""
        return torch.tensor([self.seed, self.steps])

    def take_up(self, state: Tensor) -> None:
        """Go on from a state."""
        self.seed, self.steps = (int(x) for x in state)


class Codes:
    """The integers of a table as a source of rows."""

    def __init__(self, table: Table, step: Tensor) -> None:
        self.layout: Layout = table.layout
        self.fields = table.fields
        self._table, self._step = table, step.detach()

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, D]` int8."""
        place = rows + self.layout.offsets[vocabulary]
        step = self._step.index_select(0, place) if self._step.dim() else self._step
        return codes(self._table.weight.detach().index_select(0, place), step).to(torch.int8)


class Steps:
    """The steps of a table's rows as a source of rows of one number."""

    def __init__(self, table: ALPT) -> None:
        self.layout: Layout = table.layout
        self.fields = Fields(table.fields.names, table.fields.rows, 1)
        self._step = table.step.detach()

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block, `[n] -> [n, 1]`."""
        return self._step.index_select(0, rows + self.layout.offsets[vocabulary])


class Quantised(nn.Module):
    """Kept integers of eight bits and their steps; it gives vectors, and does not learn.

    Args:
        schema: of the inputs.
        codes: the integers, as `compact` stores them.
        step: one for all, `[]`; or those of the kept rows, as `compact` stores them.
    """

    def __init__(self, schema: EncodedSchema, codes: Any, step: Any) -> None:
        super().__init__()
        self.schema, self.codes, self.fields = schema, codes, codes.fields
        self.steps: Any = None if isinstance(step, Tensor) else step.requires_grad_(False)
        self.step: Tensor | None
        self.register_buffer("step", step if self.steps is None else None)
        if self.steps is not None and torch.equal(self.steps.slots, codes.slots):
            self.steps.slots = codes.slots  # the same ids are gone: one map for both

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        e, safe = self._vectors(ids)
        return scale(e, safe, values, self.schema)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self._vectors(ids, group)[0]

    def _vectors(self, ids: Tensor, group: str | None = None) -> tuple[Tensor, Tensor]:
        """`[..., C] -> e [..., C, D], guarded ids [..., C]`."""
        q, safe = self.codes.look_up(ids, group)
        return (self.step if self.steps is None else self.steps.look_up(ids, group)[0]) * q, safe

    def prune(self, selection: Selection) -> Quantised:
        """Return fewer of them; what is gone stays gone."""
        codes = compact(self.schema, self.codes, selection)
        if self.step is not None:
            return Quantised(self.schema, codes, self.step.clone())
        return Quantised(self.schema, codes, compact(self.schema, self.steps, rows_of(codes)))

    def export_tables(self) -> Mapping[str, Tensor]:
        """The integers, the steps, and every constant that finds them."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


def rows_of(table: Any) -> Selection:
    """The rows of which a compact table keeps anything."""
    return Selection(table.fields.names, rows=table.kept_rows())


def codes(w: Tensor, step: Tensor) -> Tensor:
    """The whole numbers next to w/Δ, within eight bits, in the type of `w`."""
    return (w / step).round_().clamp_(LOWEST, HIGHEST)


def on_grid(w: Tensor, step: Tensor) -> Tensor:
    """Δ · clip(round(w/Δ), −128, 127)."""
    return step * codes(w, step)


def rounded(w: Tensor, step: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Δ · clip(⌊w/Δ⌋ + b, −128, 127), b = 1 with probability w/Δ − ⌊w/Δ⌋, drawn for each number of `w [n, D]`.

    As n + ⌊r + u⌋, n the nearest whole number, r = (w − Δ n) / Δ, u uniform in [0, 1). On the grid r is zero and the
    number stays; w/Δ itself may miss a whole number by its last bit, and chance would then move it.
    """
    near = (w / step).round_()
    rest = near * step  # a product of its own: fused with the difference it would not be rounded as w is
    torch.sub(w, rest, out=rest)
    rest.div_(step).add_(torch.rand(w.shape, generator=generator, dtype=w.dtype, device=w.device)).floor_()
    return near.add_(rest).clamp_(LOWEST, HIGHEST).mul_(step)


def moved(weight: Tensor, step: Tensor) -> Iterator[Place]:
    """The rows with a number that is not on the grid, in blocks, perhaps among others; on a GPU all rows, unseen.

    Looking takes less than half the time of rounding, and without decay most rows of a large table lie still.
    """
    if weight.device.type != "cpu":
        yield slice(None)  # nobody waits for what it would find
        return
    size = max(1, BLOCK // weight.shape[1])
    for first in range(0, len(weight), size):
        block = slice(first, first + size)
        part = weight[block]
        rows = (part != on_grid(part, step[block] if step.dim() else step)).any(1).nonzero().squeeze(1)
        if 2 * len(rows) > len(part):
            yield block
        elif len(rows):
            yield rows + first


def take(x: Tensor, place: Place) -> Tensor:
    """Some rows."""
    return x[place] if isinstance(place, slice) else x.index_select(0, place)


def put(x: Tensor, place: Place, rows: Tensor) -> None:
    """Write some rows."""
    if isinstance(place, slice):
        x[place] = rows
    else:
        x.index_copy_(0, place, rows)


def step_gradient(w: Tensor, step: Tensor, slope: Tensor) -> Tensor:
    """∂L/∂Δ of each row, Σ_k g_k · c_k, with c as LSQ has it: `[n, D], [n, 1], [n, D] -> [n, 1]`.

    Args:
        w: the numbers, not rounded.
        step: Δ.
        slope: g, the gradient of what they are rounded to.
    """
    y = w / step
    c = torch.where((y > LOWEST) & (y < HIGHEST), y.round() - y, y.clamp(LOWEST, HIGHEST))
    return (slope * c).sum(1, keepdim=True)


def adam(moments: Tensor, slope: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The moments after a step and what Adam then moves by, for a rate of one: `[n, 2], [n, 1] -> [n, 2], [n, 1]`."""
    mean = MEAN * moments[:, :1] + (1 - MEAN) * slope
    square = SQUARE * moments[:, 1:] + (1 - SQUARE) * slope * slope
    change = mean / (1 - MEAN**steps) / ((square / (1 - SQUARE**steps)).sqrt() + NOTHING)
    return torch.cat([mean, square], 1), change


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embeddings, with their stages."""
    stages = tuple({"use": name} for name in ("fit", "prune", "evaluate", "export"))
    return [Component("embedding", "lpt", LPT, stages), Component("embedding", "alpt", ALPT, stages)]
