"""A positive row against the rows sampled for it, as a choice among them, corrected for how they were sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.api import Batch, Component, EncodedSchema, RecipeError, gather_rows, hookimpl, pairs

LEAST_LOG_Q = math.log(1e-6)


class SampledSoftmax(nn.Module):
    """Sampled softmax with logQ correction: what is drawn more often is not taken for less wanted.

    loss = (1/N) Σ_i y_i·[−s_i + ln(e^{s_i} + Σ_j e^{s_j})],  s = x/T − ln clip(q, 10⁻⁶, 1), averaged over the tasks

    i are the N logged rows, j the m rows sampled for each, q the probability with which the sampler draws the row's
    item. A sampled row with the item of its logged row, or with a label of 1, is no alternative and is left out; a row
    that none is left for adds nothing. Scores are served without the correction. q of `dns` is that of its candidates.

    Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.

    Args:
        temperature: T.
        correct: subtract ln q; false shows what the sampling distorts.
        correct_positive: also in the score of the logged row, as is common; strictly it was not drawn from q.
        frequency: where q is known from: `sampler`, or `streaming`, estimated from the batches as in the paper: the
            mean number of batches between two with the item, B ← (1 − α)B + α(t − A), A ← t, q = 1/B.
        item: field of the items, for `streaming`.
        rate: α of `streaming`.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        schema: EncodedSchema,
        *,
        temperature: float = 1.0,
        correct: bool = True,
        correct_positive: bool = True,
        frequency: Literal["sampler", "streaming"] = "sampler",
        item: str = "item",
        rate: float = 0.01,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise RecipeError(f"loss.temperature is {temperature}, must be above 0", path=("loss", "temperature"))
        self.tasks = tasks
        self.temperature = temperature
        self.correct = correct
        self.correct_positive = correct_positive
        self.needs: tuple[str, ...] = ("positive", "item", "log_q")
        self.stream = None
        if frequency == "streaming":
            rows = {f.name: f.rows for f in schema.fields}
            if item not in rows:
                raise RecipeError(f"loss.item: no field '{item}'; fields: {', '.join(rows)}", path=("loss", "item"))
            self.stream = Frequencies(rows[item], rate)

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        item_i, item_j = pairs(batch.context["item"], batch)  # [N], [N, m]
        if self.stream is not None and self.training:
            self.stream.see(item_i)
        losses = []
        for task in self.tasks:
            given = logits[task]
            s_i, s_j = pairs((given if given.dtype == torch.float64 else given.float()) / self.temperature, batch)
            y_i, y_j = pairs(batch.label[task].to(s_i.dtype), batch)
            if self.correct:
                log_q = batch.context["log_q"] if self.stream is None else self.stream.log_q(batch.context["item"])
                q_i, q_j = pairs(log_q.detach().to(s_i.dtype).clamp(LEAST_LOG_Q, 0.0), batch)
                s_i, s_j = s_i - q_i if self.correct_positive else s_i, s_j - q_j
            s_j = s_j.masked_fill((item_j == item_i[:, None]) | (y_j > 0), -torch.inf)
            all_of_it = torch.cat([s_i[:, None], s_j], 1)  # [N, 1 + m]
            losses.append((y_i * (all_of_it.logsumexp(1) - s_i)).mean())
        return torch.stack(losses).mean()


class Frequencies(nn.Module):
    """How often items come, estimated while they come; the state is part of the checkpoint.

    Args:
        rows: number of ids.
        rate: α.
    """

    def __init__(self, rows: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.last: Tensor
        self.gap: Tensor
        self.step: Tensor
        self.register_buffer("last", torch.zeros(rows, dtype=torch.float64))
        self.register_buffer("gap", torch.full((rows,), 100.0, dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def see(self, items: Tensor) -> None:
        """Take note of the items of one batch, `[N]`, of all processes together."""
        items = gather_rows(items)
        self.step = self.step + 1.0
        gap = (1.0 - self.rate) * self.gap[items] + self.rate * (self.step - self.last[items])
        # An item that comes twice in a batch is written the same value twice.
        self.gap = self.gap.index_copy(0, items, gap)
        self.last = self.last.index_fill(0, items, self.step)

    def log_q(self, items: Tensor) -> Tensor:
        """`[B] -> [B]`."""
        return -self.gap[items].clamp_min(1.0).log()


@hookimpl
def recsys_components() -> list[Component]:
    """Return the loss."""
    return [Component("loss", "sampled_softmax", SampledSoftmax)]
