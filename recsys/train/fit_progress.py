"""The progress of fitting, epoch by epoch."""

from __future__ import annotations

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.progress import Progress

from recsys.contracts import Batch


class FitProgress(Callback):
    """Shows one bar per epoch and counts the seconds spent training."""

    def __init__(self, progress: Progress, rows: int, first_epoch: int, epochs: int, stage: str) -> None:
        self._progress = progress
        self._rows = rows
        self._first_epoch = first_epoch
        self._epochs = epochs
        self._stage = stage
        self._started = 0.0
        self.seconds = 0.0
        self._task = progress.add_task(stage, total=rows)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the epoch's bar."""
        epoch = self._first_epoch + trainer.current_epoch + 1
        self._progress.reset(self._task, total=self._rows, description=f"{self._stage} · epoch {epoch}/{self._epochs}")
        self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count the rows of all ranks (this rank's share stands for the others')."""
        self._progress.advance(self._task, len(batch) * trainer.world_size)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the epoch's seconds."""
        self.seconds += time.monotonic() - self._started
