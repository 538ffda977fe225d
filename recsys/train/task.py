"""The one LightningModule: a batch to logits to a loss; it knows no method."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning
import torch
from torch import Tensor

from recsys.contracts import Batch, Loss
from recsys.data.batches import TrainBatches
from recsys.nn.model import Model


class Task(lightning.LightningModule):
    """Forward, loss and optimizer of a fit stage.

    Args:
        model: what is trained.
        loss: mean loss of a batch.
        optimizer: makes the optimizer of a model.
        total_steps: optimizer steps of the whole stage, for selectors that follow a schedule.
        first_step: steps that were done before, when the stage was resumed.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Callable[[Model], torch.optim.Optimizer],
        total_steps: int,
        first_step: int = 0,
        clip_norm: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._optimizer = optimizer
        self._total_steps = max(total_steps, 1)
        self._first_step = first_step
        self._clip_norm = clip_norm
        # No buffer: those are overwritten by the first rank's before every forward pass.
        self.loss_sum = torch.zeros(())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the stage's optimizer."""
        return self._optimizer(self.model)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient; Lightning's own way refuses fused optimizers under autocast."""
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self._clip_norm)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return this batch's part of the step's mean loss, `[]`."""
        self.model.selector.anneal((self._first_step + self.global_step) / self._total_steps)
        loss = self.loss(self.model(batch), batch) + self.model.penalty()
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach() * batch.share
        return loss * batch.share


class EpochBatches:
    """The training batches of one epoch after the other, as Lightning iterates them."""

    def __init__(self, batches: TrainBatches, epoch: int) -> None:
        self._batches = batches
        self.epoch = epoch
        self.first_step = 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch; one that is resumed in its midst ends earlier."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches.epoch(self.epoch, self.first_step)
