"""OptEmbed: rows that fall below learned thresholds go, and every field keeps the first few of its dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, EncodedSchema, Run, Selection, Stored, Table, hookimpl, pruned_table

SAMPLE = 128
"""Rows of each vocabulary that the guard looks at after a step."""
MOST = 0.99
"""Share of a vocabulary's rows that a threshold may reach at most."""


class LongTail(torch.autograd.Function):
    """The unit step 1[u > 0], whose gradient is taken to be h(u).

    h(u) = 2 − 4|u| for |u| ≤ 0.4, 0.4 for 0.4 < |u| ≤ 1, and 0 beyond.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        """`[...] -> [...]` of zeros and ones."""
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """`[...] -> [...]`."""
        size = ctx.saved_tensors[0].abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, torch.full_like(size, 0.4), 0.0))
        return gradient * slope


class OptEmbed(Table):
    """A table that learns which rows to keep and, field by field, how many dimensions.

    In training, x_bf = 1[‖e‖₁ > t_f] · (e_1, …, e_d, 0, …, 0), where e is the row of b's value in field f, t_f a
    learned threshold, and d drawn uniformly from 1 … D for every b and f. The step has the gradient of `LongTail`. The
    loss has the further term a · Σ_f exp(−t_f), and t_f follows its gradient with a step size of its own,
    t ← t − r ∂L/∂t. In evaluation d = D. The stage `evolve` then chooses d_f for every field on validation rows;
    `reset`, `prune` and a second fit train what is left, in a smaller table, from its first weights. Columns that share
    a vocabulary share threshold and width, and in a row of the log, events included, also the drawn d.

    What prunes: a row goes when its norm is at most t_f. With a = r = 1e-4 as published, t moves by about a · r in a
    step, so in 10⁴ to 10⁵ steps it passes only rows whose norm has collapsed; and norms collapse because of
    `train.embedding_l2`: decay as part of the gradient, in an Adam that updates every row, moves a weight without
    other gradient by about the learning rate towards zero in every step, however small the decay. So rare values go.
    With `embedding_l2: 0`, or an optimizer other than `adam`, nothing collapses and rarity no longer counts: a value
    that was seen once stays more often than a frequent one. A warning says so. Short runs (some hundred steps) prune
    with `pressure: 1e-2` and `threshold_rate: 1e-1`, where thresholds reach the norms of trained rows. A threshold
    never rises beyond the norms of 99 % of its vocabulary's rows (of 128 of them, evenly spaced): no row comes back
    from there.

    Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction", CIKM 2022,
    arXiv 2208.04482.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation; by default Xavier-uniform over `[N, D]`.
        threshold_rate: step size r of the thresholds.
        pressure: a, the weight of the term that raises the thresholds.
        rows: learn which rows to keep.
        dims: train with random widths, so that `evolve` can choose among them.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: PositiveFloat | None = None,
        threshold_rate: NonNegativeFloat = 1e-4,
        pressure: NonNegativeFloat = 1e-5,
        rows: bool = True,
        dims: bool = True,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std or 0.0)
        if init_std is None:
            nn.init.xavier_uniform_(self.weight)
        self.threshold_rate, self.pressure, self.dims = threshold_rate, pressure, dims
        self.threshold = nn.Parameter(torch.zeros(len(self.layout.rows))) if rows else None  # [V]
        self.border: Tensor
        self.sampled: Tensor
        first = torch.tensor(self.layout.offsets, dtype=torch.int64)  # [V]
        self.register_buffer("border", first[1:].clone(), persistent=False)
        spaced = torch.arange(SAMPLE) * torch.tensor(self.layout.rows).unsqueeze(1) // SAMPLE
        self.register_buffer("sampled", first.unsqueeze(1) + spaced, persistent=False)  # [V, SAMPLE]
        self.row_kept: Tensor | None
        self.widths: Tensor | None
        self.register_buffer("row_kept", None, persistent=False)  # [N] bool, once it is decided
        self.register_buffer("widths", None, persistent=False)  # [V] int64
        self.trial: Tensor | None = None
        self.stored: Stored = "float32"
        """How numbers are stored in the end, for the budget of `evolve`."""
        self._seen: dict[str, Tensor] = {}
        self._drawn: Tensor | None = None

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`; under a trial `[C·B, F] -> [C·B, F, D]`."""
        self._drawn = None
        if self.trial is None:
            return super().forward(ids, values)
        if "" not in self._seen:
            alone = len(ids) // len(self.trial)
            self._seen[""] = super().forward(ids[:alone], None if values is None else values[:alone])
        return _under(self.trial[:, [c.vocabulary for c in self.layout.fields]], self._seen[""])

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`; under a trial `[C·B, L, K] -> [C·B, L, K, D]`."""
        if self.trial is None:
            return super().history(group, ids)
        if group not in self._seen:
            self._seen[group] = super().history(group, ids[: len(ids) // len(self.trial)])
        return _under(self.trial[:, [c.vocabulary for c in self.layout.histories[group]]], self._seen[group])

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[B, ..., C] -> [B, ..., C, D]`, with zeros for what is left out."""
        e = super()._look_up(rows)
        block = torch.bucketize(rows, self.border, right=True)  # [B, ..., C]
        if self.row_kept is not None and self.widths is not None:
            return _first(e * self.row_kept[rows].unsqueeze(-1), self.widths[block])
        x = _first(e, self._draw(rows, block)) if self.training and self.dims else e
        if self.threshold is None:
            return x
        above = e.abs().sum(-1) - self.threshold[block]  # [B, ..., C]
        gate = _step(above) if self.training else (above > 0).to(e.dtype)
        return x * gate.unsqueeze(-1)

    def _draw(self, rows: Tensor, block: Tensor) -> Tensor:
        """A width for every row of the batch and vocabulary, `[B, ..., C]`; the same in all parts of a batch."""
        if self._drawn is None or len(self._drawn) != len(rows):
            shape = (len(rows), len(self.layout.rows))
            self._drawn = torch.randint(1, self.fields.dim + 1, shape, device=rows.device)
        return self._drawn.gather(1, block.flatten(1)).view(block.shape)

    def penalty(self) -> Tensor:
        """Return a · Σ_f exp(−t_f), `[]`."""
        if self.threshold is None or self.row_kept is not None:
            return self.weight.new_zeros(())
        return self.pressure * (-self.threshold).exp().sum()

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """The thresholds."""
        return () if self.threshold is None else (self.threshold,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the thresholds by their gradient, but not beyond (nearly) all rows."""
        if self.threshold is None or self.threshold.grad is None:
            return
        moved = self.threshold - self.threshold_rate * self.threshold.grad
        norms = self.weight[self.sampled].abs().sum(2)  # [V, SAMPLE]
        limit = norms.quantile(MOST, 1) * (1 - 1e-4)  # below the norm itself, should all rows have the same
        self.threshold.copy_(torch.minimum(moved, limit))

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block as evaluation shows them, `[n] -> [n, D]`, detached."""
        e = super().read(vocabulary, rows)
        if self.row_kept is not None and self.widths is not None:
            kept = self.row_kept[rows + self.layout.offsets[vocabulary]]
            return _first(e * kept.unsqueeze(1), self.widths[vocabulary].expand(len(rows)))
        if self.threshold is None:
            return e
        return e * (e.abs().sum(1, keepdim=True) > self.threshold[vocabulary].detach())

    @torch.no_grad()
    def rows_kept(self) -> Tensor:
        """`[N]` bool over the rows of all vocabularies; a pass over the table, unless it is decided."""
        if self.row_kept is not None:
            return self.row_kept
        if self.threshold is None:
            return torch.ones(len(self.weight), dtype=torch.bool, device=self.weight.device)
        sizes = torch.tensor(self.layout.rows, device=self.weight.device)
        return self.weight.abs().sum(1) > self.threshold.repeat_interleave(sizes)

    def sizes(self) -> dict[str, int]:
        """Vocabulary, by its first column, → number of kept rows, in the order of a candidate's widths."""
        names = {c.vocabulary: c.name for c in reversed(self.layout.columns)}
        parts = torch.split(self.rows_kept().cpu(), list(self.layout.rows))
        return {names[v]: int(part.sum()) for v, part in enumerate(parts)}

    def try_out(self, masks: Tensor | None, *, same_rows: bool = False) -> None:
        """Answer for candidates, `[C, V, D]`, to batches that hold their rows C times, until None is given.

        Args:
            masks: one candidate after the other, 1 for a kept dimension, else 0.
            same_rows: the rows are those of the trial before, which need not be looked up again.
        """
        self.trial = masks
        if not same_rows:
            self._seen = {}

    def check_budget(self, stored: Stored) -> None:
        """Take note of how numbers are stored in the end; there is no budget here to refuse."""
        self.stored = stored

    def decide(self, widths: Sequence[int]) -> None:
        """Keep the rows that are kept now, and these widths; thresholds no longer move."""
        device = self.weight.device
        self.row_kept = self.rows_kept().clone()
        self.widths = torch.tensor(widths, dtype=torch.int64, device=device)
        if self.threshold is not None:
            self.threshold.requires_grad_(False)

    def decision(self) -> Mapping[str, Tensor]:
        """Kept rows and widths, as an entry of the state."""
        full = torch.full((len(self.layout.rows),), self.fields.dim)
        widths = full if self.widths is None else self.widths.cpu()
        return {"_extra_state": torch.cat([widths.to(torch.int32).view(torch.uint8), self.rows_kept().cpu().byte()])}

    def get_extra_state(self) -> Tensor:
        """The decision, empty while there is none: the widths as int32, then a byte for each row."""
        return torch.zeros(0, dtype=torch.uint8) if self.row_kept is None else self.decision()["_extra_state"]

    def set_extra_state(self, state: Tensor) -> None:
        """Take up a decision, or that there is none."""
        device, start = self.weight.device, 4 * len(self.layout.rows)
        undecided = not len(state)
        self.row_kept = None if undecided else state[start:].bool().to(device)
        self.widths = None if undecided else state[:start].clone().view(torch.int32).long().to(device)
        if self.threshold is not None:
            self.threshold.requires_grad_(undecided)

    def kept(self) -> Selection:
        """Kept rows and dimensions of every column."""
        kept = self.rows_kept().cpu()
        widths = [self.fields.dim] * len(self.layout.rows) if self.widths is None else self.widths.tolist()
        places = {c.name: (self.layout.offsets[c.vocabulary], c) for c in self.layout.columns}
        return Selection(
            self.fields.names,
            {name: kept[first : first + c.rows].clone() for name, (first, c) in places.items()},
            {name: torch.arange(self.fields.dim) < widths[c.vocabulary] for name, (_, c) in places.items()},
        )

    def prune(self, selection: Selection) -> Any:
        """Return the smaller table, which learns like any other; rows below their threshold are zeros in it."""
        return pruned_table(self.schema, self, selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The whole table, and what says which part of it counts."""
        tables = {"weight": self.weight.detach()}
        if self.row_kept is not None and self.widths is not None:
            return tables | {"row_kept": self.row_kept, "widths": self.widths}
        return tables if self.threshold is None else tables | {"threshold": self.threshold.detach()}


def _step(u: Tensor) -> Tensor:
    gate: Tensor = LongTail.apply(u)  # type: ignore[no-untyped-call]
    return gate


def _first(e: Tensor, width: Tensor) -> Tensor:
    """The first dimensions of each vector, zeros after them, `[..., D], [...] -> [..., D]`."""
    inside = torch.arange(e.shape[-1], device=e.device) < width.unsqueeze(-1)
    return torch.where(inside, e, 0.0)


def _under(masks: Tensor, e: Tensor) -> Tensor:
    """One candidate's vectors after the other's, `[C, columns, D], [B, ..., columns, D] -> [C·B, ..., columns, D]`."""
    between = (1,) * (e.dim() - 2)
    return (e.unsqueeze(0) * masks.view(len(masks), *between, *masks.shape[1:])).flatten(0, 1)


@hookimpl
def recsys_before_stage(run: Run, stage: str) -> None:
    """Warn once, before anything is trained, where rows will not go because they are rare."""
    table = run.model.embedding
    if not isinstance(table, OptEmbed) or table.threshold is None or run.state["stages"]:
        return
    if run.train.optimizer != "adam" or not run.train.embedding_l2:
        run.say(
            "[yellow]warning: optembed drops rare values through `train.embedding_l2` with `train.optimizer: adam`; "
            "as it is, rows are dropped by the loss alone, frequent ones sooner than rare ones[/yellow]"
        )


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding, with its stages."""
    stages = (
        {"use": "fit", "name": "supernet"},
        {"use": "evolve"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("embedding", "optembed", OptEmbed, stages)]
