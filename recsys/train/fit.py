"""The fit stage: epochs of training, with the best epoch chosen on the validation split."""

from __future__ import annotations

import functools
import logging
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from recsys.contracts import Metric
from recsys.data.batches import TrainBatches
from recsys.errors import RecipeError
from recsys.nn.model import Model
from recsys.nn.optim import build_optimizer
from recsys.train.checkpoint import load_checkpoint, save_checkpoint, write_json
from recsys.train.distributed import average_buffers, gather_rows, wait_for_all
from recsys.train.loggers import make_logger
from recsys.train.options import TrainOptions
from recsys.train.progress import FitProgress, bar
from recsys.train.run import Run
from recsys.train.score import measure, predict
from recsys.train.task import EpochBatches, Task


class Fit:
    """Train for some epochs and keep the weights of the best one.

    The best epoch is the one with the best `train.monitor` on the validation split; without a validation
    split it is the last. An epoch that is not better multiplies the learning rate by
    `train.plateau_factor`; `patience` such epochs in a row end the stage.

    Args:
        name: name of the stage, for its folder and for `rewind`.
        epochs: most epochs; by default `train.epochs`.
        learning_rate: by default `train.learning_rate`.
        patience: by default `train.patience`; 0 never stops early.
        snapshot_epoch: also keep the weights after this many epochs (0: the initial ones) for `rewind`; the
            stage does not stop before.
    """

    def __init__(
        self,
        *,
        name: str = "fit",
        epochs: int | None = None,
        learning_rate: float | None = None,
        patience: int | None = None,
        snapshot_epoch: int | None = None,
    ) -> None:
        self.name = name
        self.snapshot_epoch = snapshot_epoch
        changed = {"epochs": epochs, "learning_rate": learning_rate, "patience": patience}
        self._changed = {key: value for key, value in changed.items() if value is not None}

    def run(self, run: Run) -> None:
        """Fit `run.model`; its weights are the best epoch's afterwards."""
        options = run.train.model_copy(update=self._changed)
        if (self.snapshot_epoch or 0) > options.epochs:
            raise RecipeError(f"{run.stage}: snapshot_epoch is {self.snapshot_epoch}, but epochs is {options.epochs}")
        batches = TrainBatches(
            run.split("train"),
            options.batch_size,
            seed=run.seed(run.stage, "order"),
            rank=run.world.rank,
            ranks=run.world.size,
            accumulate=options.accumulate,
        )
        epochs = Epochs(self, run, options, _monitors(run, options))
        if self.snapshot_epoch == 0:
            run.keep_snapshot(self.name)
        first = epochs.resume()
        if self.snapshot_epoch and first >= self.snapshot_epoch:
            run.found_snapshot(self.name)
        if first < options.epochs and not epochs.finished:
            _train(run, options, batches, epochs, first)
        epochs.load_best()
        run.keep_weights()
        write_json_once(run, {"epochs": epochs.history, "best_epoch": epochs.best_epoch})


def write_json_once(run: Run, value: Mapping[str, Any]) -> None:
    """Write the stage's epochs, from one process."""
    if run.world.leads:
        write_json(run.stage_folder / "history.json", value)


def _monitors(run: Run, options: TrainOptions) -> dict[str, Metric]:
    names = dict.fromkeys((options.monitor, "auc", "logloss"))
    metrics = {name: run.metric(name) for name in names}
    for name, metric in metrics.items():
        missing = [need for need in metric.needs if need not in run.schema.context]
        if missing and name == options.monitor:
            raise RecipeError(
                f"train.monitor: '{name}' needs the context column '{missing[0]}'; add it to data.context"
            )
    return metrics


def _train(run: Run, options: TrainOptions, batches: TrainBatches, epochs: Epochs, first: int) -> None:
    steps = batches.steps
    if first == 0:
        # Random numbers while training belong to this stage and rank, whatever ran before it.
        lightning.seed_everything(run.seed(run.stage, "dropout", run.world.rank) % 2**32, verbose=False)
    task = Task(
        run.model,
        run.loss,
        functools.partial(_optimizer, options=options),
        total_steps=steps * options.epochs,
        first_step=steps * first,
        clip_norm=options.clip_norm,
    )
    with bar(run.console, disable=not run.world.leads) as progress:
        rows = FitProgress(progress, len(run.split("train")), first, options.epochs, run.stage)
        epochs.begin(task, EpochBatches(batches, first), progress, first)
        trainer = _trainer(run, options, [rows, epochs], max_epochs=options.epochs - first)
        deterministic = torch.are_deterministic_algorithms_enabled()
        with warnings.catch_warnings():
            # Lightning suggests DataLoader workers; rows come from memory maps and need none.
            warnings.filterwarnings("ignore", module="lightning")
            try:
                trainer.fit(task, train_dataloaders=epochs.loader)
            except SystemExit:
                # That is how Lightning passes Ctrl-C on, after it has turned further ones off.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from None
        # Lightning leaves its choice behind, and metrics would be summed in another order than `recsys evaluate` does.
        torch.use_deterministic_algorithms(deterministic)
    run.model.to(run.device)
    run.rows_trained += len(run.split("train")) * (len(epochs.history) - first)
    run.seconds_training += rows.seconds


def _optimizer(model: Model, options: TrainOptions) -> torch.optim.Optimizer:
    return build_optimizer(
        model.parameter_groups(),
        name=options.optimizer,
        lr=options.learning_rate,
        embedding_l2=options.embedding_l2,
        network_l2=options.network_l2,
    )


def _trainer(run: Run, options: TrainOptions, callbacks: list[Callback], max_epochs: int) -> lightning.Trainer:
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    on_gpu = run.device.type == "cuda"
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=int(options.devices) if run.world.size > 1 else 1,
        num_nodes=max(1, run.world.size // options.devices),
        strategy="ddp" if run.world.size > 1 else "auto",
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        max_epochs=max_epochs,
        accumulate_grad_batches=options.accumulate,
        callbacks=callbacks,
        logger=False,
        deterministic="warn" if on_gpu else True,
        sync_batchnorm=options.sync_batch_norm and on_gpu,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=run.stage_folder,
    )


@dataclass(eq=False)
class Epochs(Callback):
    """After every epoch: score, keep the best, lower the learning rate, stop, checkpoint."""

    stage: Fit
    run: Run
    options: TrainOptions
    metrics: Mapping[str, Metric]
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_value: float | None = None
    without_gain: int = 0
    finished: bool = False
    _resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def resume(self) -> int:
        """Take up the newest checkpoint of this stage; return how many epochs it has behind it."""
        found = load_checkpoint(self._checkpoints)
        if found is None:
            return 0
        tensors, state, skipped = found
        for sentence in skipped:
            self.run.say(sentence)
        self.history = state["history"]
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self.without_gain, self.finished = state["without_gain"], state["finished"]
        self.best = _with_prefix(tensors, "best.")
        self.run.model.load_state_dict(_with_prefix(tensors, "model."))
        self._resumed = (tensors, state)
        return len(self.history)

    def begin(self, task: Task, loader: EpochBatches, progress: Any, first: int) -> None:
        """Say what is about to be trained."""
        self.task, self.loader, self.progress, self.first = task, loader, progress, first
        self.logger: Logger | None = None
        if self.run.world.leads:
            self.logger = make_logger(self.options.logger, self.run.folder, self.run.stage)
            for epoch, scores in enumerate(self.history, 1):
                self.logger.log_metrics(scores, step=epoch)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the optimizer and the random numbers the state of the checkpoint."""
        if self._resumed is None:
            return
        tensors, state = self._resumed
        trainer.optimizers[0].load_state_dict(_optimizer_state(tensors, state["optimizer"]))
        torch.set_rng_state(tensors["rng.cpu"][self.run.world.rank])
        if self.run.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"][self.run.world.rank], self.run.device)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Choose the epoch's order of rows."""
        self.loader.epoch = self.first + trainer.current_epoch
        self.task.loss_sum = torch.zeros_like(self.task.loss_sum)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the epoch and act on it."""
        average_buffers(self.run.model)
        epoch = self.first + trainer.current_epoch + 1
        scores = {"train/loss": self._train_loss(), "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]}
        scores |= {f"valid/{name}": value for name, value in self._score().items()}
        self.history.append(scores)
        better = self._note(epoch, scores)
        if not better:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.options.plateau_factor
        if self.stage.snapshot_epoch == epoch:
            self.run.keep_snapshot(self.stage.name)
        due = epoch >= (self.stage.snapshot_epoch or 0)
        self.finished = due and bool(self.options.patience) and self.without_gain >= self.options.patience
        self._tell(epoch, scores, better)
        self._save(trainer.optimizers[0], epoch)
        trainer.should_stop = self.finished

    def load_best(self) -> None:
        """Give the model the weights of the best epoch."""
        if self.best:
            self.run.model.load_state_dict(self.best)

    @property
    def _checkpoints(self) -> Path:
        return self.run.stage_folder / "checkpoints"

    def _score(self) -> dict[str, float]:
        if "valid" not in self.run.splits:
            return {}
        shards = self.run.splits["valid"]
        known = {n: m for n, m in self.metrics.items() if all(need in self.run.schema.context for need in m.needs)}
        bar_id = self.progress.add_task(f"{self.run.stage} · scoring valid", total=len(shards))
        advance = functools.partial(self.progress.advance, bar_id)
        predictions = predict(
            self.run.model, shards, self.options.eval_batch_size, self.run.world, self.run.device, advance
        )
        self.progress.remove_task(bar_id)
        return measure(predictions, known)

    def _train_loss(self) -> float:
        local = (self.task.loss_sum / max(len(self.loader), 1)).reshape(1)
        return float(gather_rows(local).mean())

    def _monitored(self, scores: Mapping[str, float]) -> float | None:
        names = [name for name in scores if name == f"valid/{self.options.monitor}"]
        names = names or [name for name in scores if name.endswith(f"/{self.options.monitor}")]
        if not names:
            return None
        value = sum(scores[name] for name in names) / len(names)
        sign = 1.0 if self.metrics[self.options.monitor].higher_is_better else -1.0
        # An undefined monitor (one class in the validation split) chooses nothing.
        return sign * value if value == value else None

    def _note(self, epoch: int, scores: Mapping[str, float]) -> bool:
        value = self._monitored(scores)
        best = self.best_value
        better = value is None or best is None or value > best + self.options.min_delta
        if better:
            self.best_epoch, self.best_value, self.without_gain = epoch, value, 0
            self.best = {name: t.detach().clone() for name, t in self.run.model.state_dict().items()}
        else:
            self.without_gain += 1
        return better

    def _tell(self, epoch: int, scores: Mapping[str, float], better: bool) -> None:
        if self.logger is not None:
            self.logger.log_metrics(dict(scores), step=epoch)
            self.logger.save()
        shown = "  ".join(f"{name} {value:.5f}" for name, value in scores.items() if name != "learning_rate")
        self.run.say(f"{self.run.stage} · epoch {epoch}: {shown}{'  *' if better else ''}")

    def _save(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        tensors = {f"model.{name}": t for name, t in self.run.model.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors["rng.cpu"] = gather_rows(torch.get_rng_state()[None].to(self.run.device)).cpu()
        if self.run.device.type == "cuda":
            tensors["rng.cuda"] = gather_rows(torch.cuda.get_rng_state(self.run.device)[None].to(self.run.device)).cpu()
        facts = {
            "epoch": epoch,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "without_gain": self.without_gain,
            "finished": self.finished,
            "optimizer": state["param_groups"],
        }
        if self.run.world.leads:
            save_checkpoint(self._checkpoints, epoch, tensors, facts)
        wait_for_all()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_state(tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in _with_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = t
    return {"state": state, "param_groups": groups}
