"""What happens between the batches of a fit stage: scores, the best epoch, checkpoints, stopping."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from recsys.abilities import Summing, Weighing
from recsys.contracts import Batch, Metric
from recsys.errors import RecipeError, RunError
from recsys.train.checkpoint import load_checkpoint, save_checkpoint
from recsys.train.distributed import any_rank, average_buffers, gather_rows, wait_for_all
from recsys.train.loggers import make_logger
from recsys.train.options import TrainOptions
from recsys.train.run import Run
from recsys.train.score import measure, predict
from recsys.train.task import EpochBatches, Task
from recsys.train.terminate import Termination
from recsys.train.weights import LARGEST_Z, REFUSE, WARN, flattened, merged, weight_facts

T = TypeVar("T")

ASK_EVERY = 16
"""Steps after which ranks ask each other whether one of them was told to stop; alone, a process knows at once."""

WEIGHTS, FACTS = "weights/", "loss/"
"""What weights of rows were like in an epoch, and what the loss tells, is recorded under such names, and told at the
end of the stage."""

UNSHOWN = ("learning_rate", "train/skipped_steps")
"""Numbers of an epoch that are recorded but not printed; skipped steps have their own lines."""


@dataclass(eq=False)
class Epochs(Callback):
    """After every epoch: score, keep the best, lower the learning rate, stop; and checkpoints now and then.

    Args:
        name: of the stage, for its snapshot.
        snapshot_epoch: keep the weights after this epoch for `rewind`.
        run: what is trained.
        options: of the stage.
        metrics: measured after every epoch.
        steps: optimizer steps per epoch.
    """

    name: str
    snapshot_epoch: int | None
    run: Run
    options: TrainOptions
    metrics: Mapping[str, Metric]
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_value: float | None = None
    without_gain: int = 0
    finished: bool = False
    first_step: int = 0
    skipped: list[int] = field(default_factory=list)
    termination: Termination = field(default_factory=Termination)
    terminated: bool = False
    _resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @property
    def first(self) -> int:
        """The first epoch that is trained, from 0; `first_step` of its steps were done before the run was stopped."""
        return self._first

    _first: int = 0

    def resume(self) -> None:
        """Take up the newest checkpoint of this stage, if there is one.

        Raises:
            RunError: it does not fit the model or this version.
        """
        found = load_checkpoint(self._checkpoints, self.run.say)
        if found is None:
            return
        try:
            self._take_up(*found)
        except (KeyError, TypeError, RuntimeError) as error:
            raise RunError(f"{self._checkpoints}: the checkpoint does not fit this run\n{error!r}") from None

    def _take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.history = state["history"]
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self.without_gain, self.finished = state["without_gain"], state["finished"]
        self.skipped = state.get("skipped", [])
        self.best = _with_prefix(tensors, "best.")
        self.best_loss = _with_prefix(tensors, "best_loss.")
        self.run.model.load_state_dict(_with_prefix(tensors, "model."))
        self.run.load_loss_state(_with_prefix(tensors, "loss."))
        self._first, self.first_step = len(self.history), state["step"]
        self._resumed = (tensors, state)

    def begin(self, task: Task, loader: EpochBatches, progress: Any) -> None:
        """Say what is about to be trained."""
        self.task, self.loader, self.progress = task, loader, progress
        self.logger: Logger | None = None
        if self.run.world.leads:
            self.logger = make_logger(self.options.logger, self.run.folder, self.run.stage)
            for epoch, scores in enumerate(self.history, 1):
                self.logger.log_metrics(scores, step=epoch)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the optimizer and the random numbers the state of the checkpoint; listen for SIGTERM."""
        self.termination.listen()
        if self._resumed is None:
            return
        tensors, state = self._resumed
        trainer.optimizers[0].load_state_dict(_optimizer_state(tensors, state["optimizer"]))
        before = state.get("learning_rate", self.options.learning_rate)
        if before != self.options.learning_rate:  # changed for the resumed run; what plateaus took off stays off
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.options.learning_rate / before
        # Copies: torch refuses the view of a second rank's state in a larger tensor ("Invalid mt19937 state").
        torch.set_rng_state(tensors["rng.cpu"][self.run.world.rank].clone())
        if self.run.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"][self.run.world.rank].clone(), self.run.device)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Choose the epoch's order of rows."""
        resumes_inside = trainer.current_epoch == 0 and self.first_step > 0 and self._resumed is not None
        self.loader.epoch = self.first + trainer.current_epoch
        self.loader.first_step = self.first_step if resumes_inside else 0
        if resumes_inside and self._resumed is not None:
            self.task.loss_sum = self._resumed[0]["loss_sum"][self.run.world.rank].to(self.run.device)
            if "weighing" in self._resumed[0]:
                self.task.weighing = self._resumed[0]["weighing"][self.run.world.rank].to(self.run.device)
            if "loss_facts" in self._resumed[0]:
                self.task.loss_facts = self._resumed[0]["loss_facts"][self.run.world.rank].to(self.run.device)
        else:
            self.task.loss_sum = torch.zeros_like(self.task.loss_sum)
            self.task.weighing = torch.zeros_like(self.task.weighing)
            self.task.loss_facts = torch.zeros_like(self.task.loss_facts)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Save every `save_every` steps; save and stop after the step in which SIGTERM came."""
        steps, inside = divmod(batch_idx + 1, self.options.accumulate)
        step = self.loader.first_step + steps
        if inside or step >= self.steps:
            return  # within a step, or at the end of the epoch, which is saved when it has been scored
        self.terminated = self._told_to_stop(step)
        every = self.options.save_every
        if self.terminated or (every and step % every == 0):
            self._save(trainer.optimizers[0], self.first + trainer.current_epoch, step)
        trainer.should_stop = self.terminated

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave SIGTERM to whoever had it before."""
        self.termination.ignore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave SIGTERM to whoever had it before."""
        self.termination.ignore()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the epoch and act on it."""
        if self.terminated:
            return  # in the midst of the epoch, which is saved
        self.task.guard.settle()
        average_buffers(self.run.model)
        if isinstance(self.run.loss, nn.Module):
            average_buffers(self.run.loss)
        epoch = self.first + trainer.current_epoch + 1
        skipped = sum(step // self.steps == epoch - 1 for step in self.skipped)
        scores = {"train/loss": self._train_loss(skipped), "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]}
        if self.options.non_finite == "skip":
            scores["train/skipped_steps"] = float(skipped)
        scores |= self._weigh(epoch) | self._loss_facts()
        scores |= {f"valid/{name}": value for name, value in self._score().items()}
        self.history.append(scores)
        reached = self.run.model.reached()
        better = self._note(epoch, scores, aims=reached is not None)
        if not better and self.without_gain % self.options.plateau_patience == 0:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.options.plateau_factor
        if self.snapshot_epoch == epoch:
            self.run.keep_snapshot(self.name)
        due = epoch >= (self.snapshot_epoch or 0)
        impatient = bool(self.options.patience) and self.without_gain >= self.options.patience
        self.finished = due and (impatient or reached is True)
        self._tell(epoch, scores, better)
        self._save(trainer.optimizers[0], epoch, 0)
        self.terminated = not self.finished and epoch < self.options.epochs and self._told_to_stop(0)
        trainer.should_stop = self.finished or self.terminated

    def load_best(self) -> None:
        """Give the model the weights of the best epoch."""
        if self.best:
            self.run.model.load_state_dict(self.best)
            self.run.load_loss_state(self.best_loss)

    def _told_to_stop(self, step: int) -> bool:
        if self.run.world.size == 1:
            return self.termination.asked
        return step % ASK_EVERY == 0 and any_rank(self.termination.asked, self.run.device)

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

    def _train_loss(self, skipped: int) -> float:
        """Return the mean loss of the epoch's steps but the skipped ones, NaN if all were."""
        if skipped == self.steps:
            return math.nan
        local = (self.task.loss_sum / (len(self.loader) - skipped * self.options.accumulate)).reshape(1)
        return float(gather_rows(local).mean())

    @staticmethod
    def loss_facts(scores: Mapping[str, float]) -> dict[str, float]:
        """What the loss tells of an epoch's rows; empty for most."""
        return _with_prefix(scores, FACTS)

    def _loss_facts(self) -> dict[str, float]:
        if not isinstance(self.run.loss, Summing):
            return {}
        sums = gather_rows(self.task.loss_facts[None].to(self.run.device)).sum(0).cpu()
        return {f"{FACTS}{name}": value for name, value in self.run.loss.facts(sums).items()}

    @staticmethod
    def weight_facts(scores: Mapping[str, float]) -> dict[str, float]:
        """What the weights of rows were like in an epoch; empty where the loss has none."""
        return _with_prefix(scores, WEIGHTS)

    def _weigh(self, epoch: int) -> dict[str, float]:
        """What the weights of the epoch's rows were like; warns of few effective rows, and refuses very few.

        Raises:
            RecipeError: fewer than 1 % of the rows are effective, or none of the weights is within its bound, and the
                loss does not allow that.
        """
        loss = self.run.loss
        if not isinstance(loss, Weighing):
            return {}
        sums = merged(gather_rows(self.task.weighing[None].to(self.run.device)).cpu())
        facts = weight_facts(sums)
        if (flat := flattened(sums)) is not None and not loss.allow_low_ess:
            raise RecipeError(
                f"{self.run.stage} · epoch {epoch}: {flat}. Check the propensities, bound the weights less, or set the "
                "loss's allow_low_ess: true"
            )
        if (share := facts.get("ess_share", 1.0)) < WARN:
            what = (
                f"{self.run.stage} · epoch {epoch}: the weights leave {facts['ess']:,.1f} effective rows of "
                f"{facts['ess'] / share:,.0f} (ESS/n {share:.4f}"
            )
            if share < REFUSE and not loss.allow_low_ess:
                raise RecipeError(
                    f"{what}, below {REFUSE}); the largest weight is {facts['max_share']:.1%} of their sum. Check the "
                    "propensities, or set the loss's allow_low_ess: true, with a bound on the weights"
                )
            self.run.say(f"[yellow]warning: {what}, below {WARN}); expect a high variance[/yellow]")
        if abs(z := facts.get("calibration_z", 0.0)) > LARGEST_Z:
            self.run.say(
                f"[yellow]warning: {self.run.stage} · epoch {epoch}: the propensities do not fit what was observed: "
                f"mean(observed/propensity) is {z:.1f} standard errors away from 1[/yellow]"
            )
        return {f"{WEIGHTS}{name}": value for name, value in facts.items()}

    def _monitored(self, scores: Mapping[str, float]) -> float | None:
        names = [name for name in scores if name == f"valid/{self.options.monitor}"]
        names = names or [n for n in scores if n.startswith("valid/") and n.endswith(f"/{self.options.monitor}")]
        # With one class in the validation split a task's metric is undefined; if every task's is, nothing is chosen.
        values = [scores[name] for name in names if not math.isnan(scores[name])]
        if not values:
            return None
        sign = 1.0 if self.metrics[self.options.monitor].higher_is_better else -1.0
        return sign * sum(values) / len(values)

    def _note(self, epoch: int, scores: Mapping[str, float], aims: bool) -> bool:
        """Note the best epoch so far; while parts aim at a target, that is the newest one."""
        value = self._monitored(scores)
        best = self.best_value
        better = aims or value is None or best is None or value > best + self.options.min_delta
        if better:
            self.best_epoch, self.best_value, self.without_gain = epoch, value, 0
            self.best = {name: t.detach().clone() for name, t in self.run.model.state_dict().items()}
            self.best_loss = {name: t.detach().clone() for name, t in self.run.loss_state().items()}
        else:
            self.without_gain += 1
        return better

    def _tell(self, epoch: int, scores: Mapping[str, float], better: bool) -> None:
        if self.logger is not None:
            self.logger.log_metrics(dict(scores), step=epoch)
            self.logger.save()
        plain = {name: value for name, value in scores.items() if not name.startswith((*UNSHOWN, WEIGHTS, FACTS))}
        shown = "  ".join(f"{name} {value:.5f}" for name, value in plain.items())
        self.run.say(f"{self.run.stage} · epoch {epoch}: {shown}{'  *' if better else ''}")

    def _save(self, optimizer: torch.optim.Optimizer, epoch: int, step: int) -> None:
        """Save the state after `epoch` whole epochs and `step` steps of the next one."""
        self.task.guard.settle()
        tensors = {f"model.{name}": t for name, t in self.run.model.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        tensors |= {f"loss.{name}": t for name, t in self.run.loss_state().items()}
        tensors |= {f"best_loss.{name}": t for name, t in self.best_loss.items()}
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors["rng.cpu"] = gather_rows(torch.get_rng_state()[None].to(self.run.device)).cpu()
        if self.run.device.type == "cuda":
            tensors["rng.cuda"] = gather_rows(torch.cuda.get_rng_state(self.run.device)[None].to(self.run.device)).cpu()
        tensors["loss_sum"] = gather_rows(self.task.loss_sum[None].to(self.run.device)).cpu()
        if isinstance(self.run.loss, Weighing):
            tensors["weighing"] = gather_rows(self.task.weighing[None].to(self.run.device)).cpu()
        if isinstance(self.run.loss, Summing):
            tensors["loss_facts"] = gather_rows(self.task.loss_facts[None].to(self.run.device)).cpu()
        facts = {
            "epoch": epoch,
            "step": step,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "without_gain": self.without_gain,
            "finished": self.finished,
            "skipped": self.skipped,
            "learning_rate": self.options.learning_rate,
            "optimizer": state["param_groups"],
        }
        if self.run.world.leads:
            save_checkpoint(self._checkpoints, epoch * self.steps + step, tensors, facts)
        wait_for_all()


def _with_prefix(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_state(tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in _with_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = t
    return {"state": state, "param_groups": groups}
