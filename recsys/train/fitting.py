"""How the fit stage trains: by a Lightning trainer, from the first epoch or from where the stage was stopped."""

from __future__ import annotations

import functools
import logging
import math
import signal
import warnings
from typing import Any, NoReturn

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recsys.contracts import Metric
from recsys.data.batches import TrainBatches
from recsys.data.groups import GroupBatches
from recsys.errors import RecipeError
from recsys.nn.model import Model
from recsys.nn.optim import build_optimizer
from recsys.train import diagnose
from recsys.train.checkpoint import write_json
from recsys.train.epochs import Epochs
from recsys.train.fit_progress import FitProgress
from recsys.train.guard import RandomState, StepGuard
from recsys.train.options import TrainOptions
from recsys.train.progress import bar
from recsys.train.run import Run
from recsys.train.sampled import choose_sampled
from recsys.train.task import EpochBatches, Task
from recsys.train.terminate import TERMINATED
from recsys.train.weights import told


def fit(run: Run, name: str, options: TrainOptions, snapshot_epoch: int | None) -> None:
    """Fit `run.model`; its weights are the best epoch's afterwards.

    Args:
        run: in a stage.
        name: of the stage, for `rewind`.
        options: of the stage.
        snapshot_epoch: also keep the weights after this many epochs.
    """
    batches = _batches(run, options)
    epochs = Epochs(name, snapshot_epoch, run, options, _monitors(run, options), batches.steps)
    if snapshot_epoch == 0:
        run.keep_snapshot(name)
    epochs.resume()
    if snapshot_epoch and epochs.first >= snapshot_epoch:
        run.found_snapshot(name)
    if epochs.first < options.epochs and not epochs.finished:
        _train(run, options, batches, epochs)
    epochs.load_best()
    run.keep_weights()
    if epochs.history and (facts := epochs.weight_facts(epochs.history[-1])):
        run.say(f"{run.stage} · {told(facts)}")
    if epochs.history and (facts := epochs.loss_facts(epochs.history[-1])):
        run.say(f"{run.stage} · loss: " + ", ".join(f"{name} {value:.4f}" for name, value in facts.items()))
    _write_history(run, epochs)


def _batches(run: Run, options: TrainOptions) -> TrainBatches | GroupBatches:
    """The training batches of this process; of whole groups where the loss compares their rows.

    Raises:
        RecipeError: such a loss, and sampled rows.
    """
    split, seed, world, make = run.split("train"), run.seed(run.stage, "order"), run.world, run.build_sampling
    if not run.whole_groups:
        return TrainBatches(
            split,
            options.batch_size,
            seed=seed,
            rank=world.rank,
            ranks=world.size,
            accumulate=options.accumulate,
            shuffle_memory=options.shuffle_memory,
            sampled=None if make is None else make(run.seed(run.stage, "sampling")),
        )
    if make is not None:
        raise RecipeError("sampling: the loss compares the rows of a group, and sampled rows belong to none; remove it")
    return GroupBatches(
        split, options.batch_size, seed=seed, rank=world.rank, ranks=world.size, accumulate=options.accumulate
    )


def _write_history(run: Run, epochs: Epochs) -> None:
    """Write the stage's epochs, from one process; JSON has no NaN, an undefined metric is null."""
    if run.world.leads:
        history = [{k: None if math.isnan(v) else v for k, v in epoch.items()} for epoch in epochs.history]
        written: dict[str, Any] = {"epochs": history, "best_epoch": epochs.best_epoch}
        if epochs.options.non_finite == "skip":
            places = (divmod(step, epochs.steps) for step in epochs.skipped)
            written["skipped"] = [{"epoch": epoch + 1, "step": step + 1} for epoch, step in places]
        write_json(run.stage_folder / "history.json", written)


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


def _train(run: Run, options: TrainOptions, batches: TrainBatches | GroupBatches, epochs: Epochs) -> None:
    steps, first = batches.steps, epochs.first
    if first == 0 and epochs.first_step == 0:
        # Random numbers while training belong to this stage and rank, whatever ran before it.
        lightning.seed_everything(run.seed(run.stage, "dropout", run.world.rank) % 2**32, verbose=False)
    task = Task(
        run.model,
        run.loss,
        functools.partial(_optimizer, options=options, beside=run.loss_parameters()),
        _guard(run, options, batches, epochs.skipped),
        total_steps=steps * options.epochs,
        first_step=steps * first + epochs.first_step,
        clip_norm=options.clip_norm,
        accumulate=options.accumulate,
        prepare=lambda batch: choose_sampled(run.model, batches.sampled, batch),
    )
    # The back ends send no numbers of 16 bits; these are places in pruned tables, the same everywhere, and stay so.
    unsent = [name for name, buffer in task.named_buffers() if buffer.dtype in (torch.int16, torch.uint16)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, unsent)  # type: ignore[no-untyped-call]
    with bar(run.console, disable=not run.world.leads) as progress:
        rows = FitProgress(progress, batches.rows, first, options.epochs, run.stage)
        epochs.begin(task, EpochBatches(batches, first), progress)
        deterministic = torch.are_deterministic_algorithms_enabled()
        trainer = _trainer(run, options, [rows, epochs], max_epochs=options.epochs - first)
        with warnings.catch_warnings():
            # Lightning suggests DataLoader workers; rows come in whole batches and need none.
            warnings.filterwarnings("ignore", module="lightning")
            try:
                trainer.fit(task, train_dataloaders=epochs.loader)
            except SystemExit:
                # That is how Lightning passes Ctrl-C on, after it has turned further ones off.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from None
            finally:
                # Lightning leaves its choice behind: metrics would be added up in another order than `evaluate` does.
                torch.use_deterministic_algorithms(deterministic)
    if epochs.terminated:
        raise SystemExit(TERMINATED)
    run.model.to(run.device)
    if isinstance(run.loss, nn.Module):
        run.loss.to(run.device)
    run.rows_trained += batches.rows * (len(epochs.history) - first)
    run.seconds_training += rows.seconds


def _guard(run: Run, options: TrainOptions, batches: TrainBatches | GroupBatches, skipped: list[int]) -> StepGuard:
    def tell(step: int) -> None:
        epoch, inside = divmod(step, batches.steps)
        run.say(
            f"[yellow]{run.stage} · epoch {epoch + 1}, step {inside + 1} of {batches.steps}: the loss or a gradient "
            f"is not finite; the step is skipped ({len(skipped)} of at most {options.skip_budget})[/yellow]"
        )

    def stop(step: int, random: RandomState) -> NoReturn:
        diagnose.stop(run, batches, step, random, skipped)

    allowed = options.skip_budget if options.non_finite == "skip" else 0
    return StepGuard(run.device, allowed, tell, stop, skipped)


def _optimizer(model: Model, options: TrainOptions, beside: list[nn.Parameter]) -> torch.optim.Optimizer:
    tables, others = model.parameter_groups()
    return build_optimizer(
        (tables, [*others, *beside]),
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
