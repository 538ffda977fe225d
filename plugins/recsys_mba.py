"""Mini-batch-aware regularisation: weight decay for the rows of the table that a batch touches, rare ones most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from recsys.api import NULL_ID, Component, EncodedSchema, RecipeError, Table, hookimpl


class MBATable(Table):
    """The embedding table with mini-batch-aware L2 regularisation.

    penalty = (λ/2) Σ_j α_mj ‖w_j‖² / n_j, where α_mj is 1 for a row j of the table that the batch m uses in any field
    or event, else 0, and n_j is the number of training rows that use it. Nothing is done to the other rows, so a step
    costs what the batch costs, whatever the size of the table. Padding uses no row. When a step is divided over
    devices or micro-batches, each part counts with its share of the step.

    The stage `count_rows` finds n_j, and has to come before the first `fit`.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978, §5.2.

    Args:
        dim: embedding dimension D.
        init_std: standard deviation of the normal initialisation.
        l2: λ.
    """

    needs_counts = True

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        init_std: NonNegativeFloat = 1e-4,
        l2: NonNegativeFloat = 0.01,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        self.l2 = l2
        self.count: Tensor
        self.register_buffer("count", torch.zeros(self.weight.shape[0], dtype=torch.int64))
        self._used: list[Tensor] = []
        self._slot = torch.empty(0, dtype=torch.int64)  # scratch, and so no buffer

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`."""
        if not torch.compiler.is_compiling():
            self._used = [self._rows(ids)] if self.training else []
        return super().forward(ids, values)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        if self.training and not torch.compiler.is_compiling():
            self._used.append(self._event_rows(group, ids))
        return super().history(group, ids)

    def penalty(self) -> Tensor:
        """Return the regularisation of the rows that the last batch used, `[]`.

        Raises:
            RecipeError: the rows were not counted.
        """
        if not self._used:
            return self.weight.new_zeros(())
        if not self._counted:
            raise RecipeError("embedding mba_table: put {use: count_rows} before the first fit stage")
        rows = torch.cat([used.flatten() for used in self._used])
        used = rows >= 0
        rows = rows.clamp(min=0)
        each = self._firsts(rows, used) / self.count[rows].clamp(min=1)  # [n]
        norms = self.weight.index_select(0, rows).square().sum(1)  # [n]
        return 0.5 * self.l2 * (each * norms).sum()

    def take_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Keep n_j; columns that share rows share their counts, so the one with all the rows tells them."""
        self.count.zero_()
        for column in self.layout.columns:
            first = self.layout.offsets[column.vocabulary]
            self.count[first : first + column.rows] = counts[column.name].to(self.count.device)

    @property
    def _counted(self) -> bool:
        """Whether the stage has run; looked up once, as the answer is on the table's device."""
        if not getattr(self, "_known", False):
            self._known = bool(self.count.any())
        return self._known

    def _rows(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.reader(ids)[0]
        return rows

    def _event_rows(self, group: str, ids: Tensor) -> Tensor:
        """The rows of the events, -1 for padding, `[B, L, K] -> [B, L, K]`."""
        rows, _ = self.readers[self.groups.index(group)](ids)
        return torch.where(ids == NULL_ID, -1, rows)

    def _firsts(self, rows: Tensor, used: Tensor) -> Tensor:
        """Return 1 at one place of every distinct row that is used, else 0, `[n], [n] -> [n]`; no sort, no pass over N.

        Everyone writes their place into the row's slot, and who finds it there afterwards is the one. Padding writes
        into a slot of its own.
        """
        if self._slot.device != rows.device or not len(self._slot):
            self._slot = torch.empty(self.weight.shape[0] + 1, dtype=torch.int64, device=rows.device)
        rows = torch.where(used, rows, self.weight.shape[0])
        place = torch.arange(len(rows), device=rows.device)
        self._slot[rows] = place
        return ((self._slot[rows] == place) & used).to(self.weight.dtype)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding."""
    stages = tuple({"use": name} for name in ("count_rows", "fit", "evaluate", "export"))
    return [Component("embedding", "mba_table", MBATable, stages)]
