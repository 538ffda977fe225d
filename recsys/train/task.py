"""The one LightningModule: a batch to logits to a loss; it knows no method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

from recsys.abilities import Summing, Weighing
from recsys.contracts import Batch, Loss
from recsys.data.batches import TrainBatches
from recsys.data.groups import GroupBatches
from recsys.nn.model import Model
from recsys.train.guard import Buffers, StepGuard
from recsys.train.weights import SIZE, weighed


class Task(lightning.LightningModule):
    """Forward, loss and optimizer of a fit stage.

    Args:
        model: what is trained.
        loss: mean loss of a batch; one with parameters of its own is trained too.
        optimizer: makes the optimizer of a model.
        guard: keeps steps that are not finite away from the model.
        total_steps: optimizer steps of the whole stage, for selectors that follow a schedule.
        first_step: steps that were done before, when the stage was resumed.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
        accumulate: micro-batches per optimizer step.
        prepare: what is done to a batch before the model sees it.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Callable[[Model], torch.optim.Optimizer],
        guard: StepGuard,
        total_steps: int,
        first_step: int = 0,
        clip_norm: float = 0.0,
        accumulate: int = 1,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._optimizer = optimizer
        self._total_steps = max(total_steps, 1)
        self._first_step = first_step
        self._clip_norm = clip_norm
        self._accumulate = accumulate
        self._prepare = prepare
        self.guard = guard
        self._kept = Buffers(self)
        self._masks = False
        # No buffer: those are overwritten by the first rank's before every forward pass.
        self.loss_sum = self._loss_before = torch.zeros(())
        self.weighing = self._weighing_before = torch.zeros(SIZE, dtype=torch.float64)
        facts = torch.zeros_like(loss.sums()) if isinstance(loss, Summing) else torch.zeros(0)
        self.loss_facts = self._facts_before = facts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the stage's optimizer; a fused one reads from `guard.masked` whether to make its update."""
        optimizer = self._optimizer(self.model)
        self._masks = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        if self._masks:
            optimizer.found_inf = self.guard.masked  # type: ignore[attr-defined]
        return optimizer

    @property
    def step(self) -> int:
        """Number of the optimizer step in hand, from 0 in the stage."""
        return self._first_step + self.global_step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keep what a step changes besides the weights, in case that it is skipped."""
        if batch_idx % self._accumulate == 0:
            self.guard.begin(self.step)
            self._kept.remember()
            self._loss_before, self._weighing_before = self.loss_sum, self.weighing
            self._facts_before = self.loss_facts

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient, and keep what is not finite away from the model.

        Lightning's own way of clipping refuses fused optimizers under autocast.

        Raises:
            NonFiniteError: the guard has learned of a step that stops.
        """
        for searched in self.model.searched():
            for parameter in searched.architecture():  # nothing here moves them, nor takes their gradients away
                parameter.grad = None
        if self._clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self._clip_norm)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        masked = self.guard.judge(self.step, norm, self.loss_sum)
        self.loss_sum = torch.where(masked, self._loss_before, self.loss_sum)
        if isinstance(self.loss, Weighing):
            self.weighing = torch.where(masked, self._weighing_before, self.weighing)
        if isinstance(self.loss, Summing):
            self.loss_facts = torch.where(masked, self._facts_before, self.loss_facts)
        self._kept.restore_where(masked)
        self.guard.look(self.step)
        for part in self.model.stepped():
            for parameter in part.own_parameters():
                if parameter.grad is not None:
                    parameter.grad = torch.where(masked, 0.0, parameter.grad)
        if not self._masks and bool(masked):
            # An optimizer without a mask leaves alone what has no gradient: neither decay, nor moments, nor counts.
            for parameter in self.parameters():
                parameter.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the optimizer's step, then let the parts make changes of their own."""
        super().optimizer_step(*args, **kwargs)
        for part in self.model.stepped():
            part.after_step()
            for parameter in part.own_parameters():
                parameter.grad = None

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return this batch's part of the step's mean loss, `[]`."""
        self.model.selector.anneal(self.step / self._total_steps)
        batch = self._prepare(batch)
        loss = self.model.objective(self.loss, batch)
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach() * batch.share
        if isinstance(self.loss, Weighing):
            self.weighing = weighed(self.weighing.to(loss.device), *self.loss.weights(batch), batch)
        if isinstance(self.loss, Summing):
            self.loss_facts = self.loss_facts.to(loss.device) + self.loss.sums().to(loss.device)
        return loss * batch.share


class EpochBatches:
    """The training batches of one epoch after the other, as Lightning iterates them."""

    def __init__(self, batches: TrainBatches | GroupBatches, epoch: int) -> None:
        self._batches = batches
        self.epoch = epoch
        self.first_step = 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch; one that is resumed in its midst ends earlier."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches.epoch(self.epoch, self.first_step)
