"""DNIS: which coordinates a value needs depends on how frequent it is; found on validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Component,
    EncodedSchema,
    RecipeError,
    Selection,
    Stored,
    Table,
    hookimpl,
    keep_most,
    pruned_table,
    require_room,
)

Space = Literal["free", "prefix", "block"]
"""Gates of their own for every coordinate of every block; as many first coordinates as each block chooses; as many
frequent blocks as each coordinate chooses."""
TINY = 1e-8
"""Added to the size of a block's gradient: a block that no row of the batch belongs to does not move."""


class DNIS(Table):
    """A table whose rows, sorted into blocks by frequency, pass gates that validation rows choose.

    x_bf = α_l ∘ e, with e the row of b's value in field f, l the block that it is in, α_l in [0, 1]^D. Blocks are
    joint over all fields and hold about the same number of rows each, the most frequent rows in block 0; rows that are
    used equally often are never divided. The stage `count_rows` counts them. The stage `bilevel_fit` then moves α by
    α_l ← clip(α_l − r · g_l / mean_k |g_lk|, 0, 1) with g the gradient of the loss of a validation batch plus that of
    `l1` · Σ α; everywhere else α stays as it is, one at first. `prune` keeps the largest |α_lk e_k| of the whole table
    that fit into the budget, or the rows with the most of them where these are more for the same bytes; α is part of
    what it stores.

    How α is moved says that a gate can walk from one to zero in 1/r steps of one mind, whatever the loss gains: it is
    no measure of importance by itself. Compare with `magnitude` and `frequency` at the same budget, and judge by the
    test split, for the validation split has chosen.

    Cheng et al., "Differentiable Neural Input Search for Recommender Systems", arXiv 2006.04466; its journal version is
    AutoSrh: Kong et al., "AutoSrh: An Embedding Dimensionality Search Framework for Tabular Data Prediction", 2022.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation.
        blocks: number of blocks, at most 255; fewer where too many rows are used equally often.
        space: free: a gate for each block and coordinate. prefix: each block chooses how many of its first coordinates
            count, at least one. block: each coordinate chooses for how many of the most frequent blocks it counts, at
            least one.
        l1: weight of the sum of the gates in what the search makes small.
        budget: bytes of the pruned table, as a share of those of the whole one in float32; with the stage `quantize`,
            numbers count as they are stored in the end.
    """

    needs_counts = True

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-4,
        blocks: Annotated[int, pydantic.Field(ge=1, le=255)] = 10,
        space: Space = "free",
        l1: NonNegativeFloat = 1e-5,
        budget: PositiveFloat = 0.25,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.stored: Stored = "float32"
        self.blocks, self.space, self.l1, self.budget = blocks, space, l1, budget
        shape = {"free": (blocks, dim), "prefix": (blocks, 1), "block": (1, dim)}[space]
        self.top = {"free": 1.0, "prefix": float(dim), "block": float(blocks)}[space]
        self.alpha = nn.Parameter(torch.full(shape, self.top))
        self.block: Tensor
        self.counted: Tensor
        self.register_buffer("block", torch.zeros(self.weight.shape[0], dtype=torch.uint8))
        self.register_buffer("counted", torch.zeros((), dtype=torch.bool))

    def gates(self) -> Tensor:
        """α `[L, D]`."""
        if self.space == "free":
            return self.alpha
        length = self.fields.dim if self.space == "prefix" else self.blocks
        place = torch.arange(length, device=self.alpha.device)
        place = place.unsqueeze(0) if self.space == "prefix" else place.unsqueeze(1)
        return (self.alpha - place).clamp(0, 1)

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`."""
        flat = rows.flatten()
        block = self.block.index_select(0, flat).int()
        gate = self.gates().index_select(0, block).view(*rows.shape, -1)
        return super()._look_up(rows) * gate

    def take_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Sort the rows into blocks by how many training rows use them."""
        total = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        for c in self.layout.columns:
            first = self.layout.offsets[c.vocabulary]
            # Columns that share a vocabulary say the same of it.
            total[first : first + c.rows] = torch.maximum(total[first : first + c.rows], counts[c.name].cpu())
        self.block.copy_(blocks_of(total, self.blocks))
        self.counted.fill_(True)

    def architecture(self) -> tuple[nn.Parameter, ...]:
        """α, or what it is computed from."""
        return (self.alpha,)

    @torch.no_grad()
    def search_step(self, rate: float) -> None:
        """Move α against its gradient, as far in every block, and keep it within its limits.

        Raises:
            RecipeError: the rows are in no blocks yet.
        """
        self._expect_blocks()
        if self.alpha.grad is None:
            return
        g = self.alpha.grad + self.l1 * (self.alpha.grad != 0).any(1, keepdim=True)
        size = g.abs().mean(1, keepdim=True)
        self.alpha.sub_(rate * g / (size + TINY)).clamp_(0.0 if self.space == "free" else 1.0, self.top)

    def read(self, vocabulary: int, rows: Tensor) -> Tensor:
        """Rows of one vocabulary block as they are looked up, `[n] -> [n, D]`, detached."""
        block = self.block[rows + self.layout.offsets[vocabulary]].int()
        return super().read(vocabulary, rows) * self.gates().detach().index_select(0, block)

    def check_budget(self, stored: Stored) -> None:
        """Count numbers as they are stored in the end; refuse what even an empty table does not fit into."""
        self.stored = stored
        require_room(self.schema, self.fields.dim, self.budget, stored)

    def kept(self) -> Selection:
        """What keeps the most of Σ (α e)² within the budget: the largest numbers, or whole rows.

        What a gate shuts off is zero in them.

        Raises:
            RecipeError: the rows are in no blocks yet.
        """
        self._expect_blocks()
        with torch.no_grad():
            gate = self.gates().index_select(0, self.block.int())
            size = torch.where(gate > 0, (self.weight * gate).abs(), -torch.inf)
        return keep_most(self.schema, self.fields.dim, size, self.budget, self.stored)

    def prune(self, selection: Selection) -> Any:
        """Return the smaller table, of vectors that have passed the gates."""
        return pruned_table(self.schema, self, selection)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The whole table, the gates and the blocks."""
        return {"weight": self.weight.detach(), "alpha": self.alpha.detach(), "block": self.block}

    def _expect_blocks(self) -> None:
        if not bool(self.counted):
            raise RecipeError("embedding dnis: put {use: count_rows} before bilevel_fit and prune")


def blocks_of(counts: Tensor, blocks: int) -> Tensor:
    """The block of every row, the most frequent in block 0, `[N] int64 -> [N]` uint8.

    Cut where the rows in order of their counts are divided into equal parts; a cut inside a run of equal counts moves
    to the end of the run, so that blocks can be larger, and fewer.
    """
    rows = len(counts)
    falling = counts.sort(descending=True).values
    cuts = torch.arange(1, blocks) * rows // blocks  # first row of each further block
    least = torch.unique(falling[(cuts - 1).clamp(min=0)])  # the smallest count before each cut
    # A row is in the block after all cuts whose smallest count is larger than its own.
    return torch.searchsorted(-least.flip(0), -counts).to(torch.uint8)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding, with its stages."""
    stages = (
        {"use": "count_rows"},
        {"use": "fit", "name": "warm"},
        {"use": "bilevel_fit", "weights": "tables"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("embedding", "dnis", DNIS, stages)]
