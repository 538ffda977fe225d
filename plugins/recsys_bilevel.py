"""Bilevel search: weights learn on training rows and an architecture on validation rows, in turn."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Batch,
    Buffers,
    Component,
    RecipeError,
    RecsysError,
    Run,
    TrainBatches,
    bar,
    build_optimizer,
    hookimpl,
    measure,
    predict,
)


class BilevelFit:
    """Search an architecture on validation rows while the weights learn on training rows.

    min_α L_valid(Θ*(α), α) with Θ*(α) = argmin_Θ L_train(Θ, α), where α are the parameters that parts of the model
    declare as their architecture. In turn, one training batch moves Θ (by `train.optimizer`), and one validation batch
    moves α by g = ∂L_valid(Θ, α)/∂α, in the way of the part that it belongs to. With `second_order`, g is the whole
    derivative of L_valid(Θ - ξ ∂L_train(Θ, α)/∂Θ, α), with the learning rate as ξ, and α moves before Θ.

    Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv 1806.09055, §2.3 and algorithm 1.

    An epoch reads the training rows once, and the validation rows as often as that takes. The best epoch is the one of
    the smallest logloss on the validation split; epochs that are not better lower the learning rate as in a fit stage,
    and `patience` such epochs in a row end the stage. Parts with a target are trained until it is reached, as in a fit
    stage. Batches are not divided into micro-batches. What validation rows have chosen has to be judged on others.

    Args:
        epochs: most epochs; by default `train.epochs`.
        learning_rate: of the weights; by default `train.learning_rate`.
        patience: by default `train.patience`; 0 never stops early.
        rate: step size of the architecture.
        weights: which weights learn: `all`, or `tables`, those of the embedding and of the first-order term.
        second_order: see what the next step of the weights would change; two passes more in every step.
    """

    name = "bilevel_fit"

    def __init__(
        self,
        *,
        epochs: PositiveInt | None = None,
        learning_rate: PositiveFloat | None = None,
        patience: NonNegativeInt | None = None,
        rate: PositiveFloat = 0.01,
        weights: Literal["all", "tables"] = "all",
        second_order: bool = False,
    ) -> None:
        changed = {"epochs": epochs, "learning_rate": learning_rate, "patience": patience}
        self._changed = {key: value for key, value in changed.items() if value is not None}
        self.rate, self.weights, self.second_order = rate, weights, second_order

    def check(self, run: Run) -> None:
        """Refuse, before anything is trained, losses that this stage cannot search with.

        Raises:
            RecipeError: a validation batch would teach the loss, or it needs other batches than this stage makes.
        """
        _check_loss(run)

    def run(self, run: Run) -> None:
        """Search; the weights and the architecture are those of the best epoch afterwards.

        Raises:
            RecipeError: nothing to search, no validation split, second order with several processes, or a loss that
                needs more than the rows of a batch.
        """
        if not run.model.searched():
            raise RecipeError(f"{run.stage}: no part of the model has an architecture to search")
        if self.second_order and run.world.size > 1:
            raise RecipeError(f"{run.stage}: second_order needs a single process; set train.devices to 1")
        _check_loss(run)
        run.split("valid")
        options = run.train.model_copy(update=self._changed)
        run.model.to(run.device).train()
        search = Search(run, options.learning_rate, self.rate, self.weights == "tables", self.second_order)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=run.device.type == "cuda")
        try:
            history, best = _epochs(run, search, options.epochs, options.patience)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        run.keep_weights()
        if run.world.leads:
            text = json.dumps({"epochs": history, "best_epoch": best}, indent=2)
            (run.stage_folder / "history.json").write_text(text + "\n", encoding="utf-8")


def _check_loss(run: Run) -> None:
    """Refuse losses that a validation batch would teach too, or that need other batches than this stage makes.

    Raises:
        RecipeError: it has weights or a state of its own, compares the rows of a group, or rows are sampled for it.
    """
    if run.loss_parameters():
        raise RecipeError(f"{run.stage}: the loss has weights of its own, which only the stage fit trains")
    if state := run.loss_state():
        raise RecipeError(
            f"{run.stage}: the loss keeps a state over the batches ({', '.join(sorted(state))}), into which validation "
            "batches would go as well; search with a loss without one, such as bce"
        )
    if run.whole_groups:
        raise RecipeError(
            f"{run.stage}: the loss compares the rows of a group, and only the stage fit makes batches of whole groups"
        )
    if run.build_sampling is not None:
        raise RecipeError(f"{run.stage}: only the stage fit adds sampled rows; remove the block `sampling:`")


def _epochs(run: Run, search: Search, epochs: int, patience: int) -> tuple[list[dict[str, float]], int]:
    """Run the epochs and leave the best one's state in the model; returns the scores of each and the best's number."""
    history: list[dict[str, float]] = []
    best, least, without_gain = 0, math.inf, 0
    state: Mapping[str, Tensor] = {}
    valid = _forever(_batches(run, "valid"))
    train = _batches(run, "train")
    for epoch in range(epochs):
        started = time.monotonic()
        loss = _epoch(run, search, train, valid, epoch, epochs)
        run.rows_trained += len(run.split("train"))
        run.row_passes += len(run.split("train")) * (9 if search.second_order else 3)
        run.seconds_training += time.monotonic() - started
        scores = {"train/loss": loss, "learning_rate": search.optimizer.param_groups[0]["lr"]}
        scores |= {f"valid/{name}": value for name, value in _score(run).items()}
        values = [value for name, value in scores.items() if name.endswith("logloss") and not math.isnan(value)]
        now = sum(values) / len(values)
        reached = run.model.reached()
        better = reached is not None or now < least - run.train.min_delta
        history.append(scores)
        shown = "  ".join(f"{name} {value:.5f}" for name, value in scores.items() if name != "learning_rate")
        run.say(f"{run.stage} · epoch {epoch + 1}: {shown}{'  *' if better else ''}")
        if better:
            best, least, without_gain = epoch + 1, now, 0
            state = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
            if reached:
                break
            continue
        without_gain += 1
        if without_gain % run.train.plateau_patience == 0:
            for group in search.optimizer.param_groups:
                group["lr"] *= run.train.plateau_factor
        if patience and without_gain >= patience:
            break
    run.model.load_state_dict(state)
    return history, best


def _epoch(run: Run, search: Search, train: TrainBatches, valid: Iterator[Batch], epoch: int, epochs: int) -> float:
    """Take the steps of one epoch; returns the mean loss of its training batches.

    Raises:
        RecsysError: it is not finite.
    """
    total = torch.zeros((), device=run.device)
    with bar(run.console, disable=not run.world.leads) as progress:
        rows = progress.add_task(f"{run.stage} · epoch {epoch + 1}/{epochs}", total=len(run.split("train")))
        for step, batch in enumerate(train.epoch(epoch)):
            run.model.selector.anneal((epoch * train.steps + step) / (epochs * train.steps))
            total += search.step(batch.to(run.device), next(valid).to(run.device))
            progress.advance(rows, len(batch) * run.world.size)
    loss = float(_mean(run, [total])[0]) / train.steps
    if not math.isfinite(loss):
        raise RecsysError(f"{run.stage}: the loss of epoch {epoch + 1} is not finite; lower its learning_rate")
    return loss


class Search:
    """The steps of the weights and of the architecture.

    Args:
        run: whose model is searched.
        learning_rate: of the weights.
        rate: of the architecture.
        tables: only the tables learn.
        second_order: as of `BilevelFit`.
    """

    def __init__(self, run: Run, learning_rate: float, rate: float, tables: bool, second_order: bool) -> None:
        self.run, self.rate, self.second_order = run, rate, second_order
        self.objective = Objective(run)
        self.architecture = [p for part in run.model.searched() for p in part.architecture()]
        own = [p for part in run.model.stepped() for p in part.own_parameters()]
        table, other = run.model.parameter_groups()
        groups = (table, [] if tables else other)
        self.learning = [p for p in (*groups[0], *groups[1], *own) if p.requires_grad]
        self.own, self.kept = own, Buffers(run.model)
        self.optimizer = build_optimizer(
            groups,
            name=run.train.optimizer,
            lr=learning_rate,
            embedding_l2=run.train.embedding_l2,
            network_l2=run.train.network_l2,
        )

    def step(self, train: Batch, valid: Batch) -> Tensor:
        """Move weights and architecture once; returns the loss of the training batch, `[]`."""
        if self.second_order:
            self.move_architecture(valid, train)
            return self.move_weights(train)
        loss = self.move_weights(train)
        self.move_architecture(valid)
        return loss

    def move_weights(self, batch: Batch) -> Tensor:
        """Move the weights by the gradient of a training batch; the architecture stays."""
        loss = self.objective(batch)
        self._give(self.learning, torch.autograd.grad(loss, self.learning, allow_unused=True))
        if self.run.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.learning, self.run.train.clip_norm)
        self.optimizer.step()
        for part in self.run.model.stepped():
            part.after_step()
        for parameter in self.learning:
            parameter.grad = None
        return loss.detach()  # type: ignore[no-any-return]

    def move_architecture(self, valid: Batch, train: Batch | None = None) -> None:
        """Move the architecture by the gradient of a validation batch; weights and statistics stay.

        Args:
            valid: the batch.
            train: the batch of the weights' next step, for the second order.
        """
        self.kept.remember()
        if train is None:
            found: Sequence[Tensor | None] = torch.autograd.grad(
                self.objective(valid), self.architecture, allow_unused=True
            )
        else:
            named = {id(p): name for name, p in self.objective.named_parameters()}
            weights = {named[id(p)]: p for p in self.learning}
            ahead = self.optimizer.param_groups[0]["lr"]
            found = unrolled(self.objective, weights, self.architecture, train, valid, ahead)
        self.kept.restore_where(torch.ones((), dtype=torch.bool, device=self.run.device))
        self._give(self.architecture, found)
        for part in self.run.model.searched():
            part.search_step(self.rate)
        for parameter in self.architecture:
            parameter.grad = None

    def _give(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients to the mean over the processes; all of them then make the same step."""
        if self.run.world.size > 1:
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            gradients = _mean(self.run, whole)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class Objective(nn.Module):
    """A batch's part of the mean loss of a step, as a module, so that other weights can be put in its place."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self._loss = run.model, run.loss
        self._half = run.train.precision == "bf16"
        self._device = run.device.type

    def forward(self, batch: Batch) -> Tensor:
        """`Batch -> []`."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
            return self.model.objective(self._loss, batch) * batch.share


def unrolled(
    objective: nn.Module,
    weights: Mapping[str, Tensor],
    architecture: Sequence[Tensor],
    train: Batch,
    valid: Batch,
    ahead: float,
) -> Sequence[Tensor | None]:
    """Return dL_valid(Θ - ξ ∂L_train(Θ, α)/∂Θ, α)/dα, whole and exact.

    Args:
        objective: a batch to its loss.
        weights: Θ, by their names in `objective`.
        architecture: α.
        train: the batch of L_train.
        valid: the batch of L_valid.
        ahead: ξ.
    """
    slopes = torch.autograd.grad(objective(train), list(weights.values()), create_graph=True, allow_unused=True)
    moved = {
        name: w if slope is None else w - ahead * slope
        for (name, w), slope in zip(weights.items(), slopes, strict=True)
    }
    loss = torch.func.functional_call(objective, moved, (valid,))
    return torch.autograd.grad(loss, list(architecture), allow_unused=True)


def _batches(run: Run, split: str) -> TrainBatches:
    return TrainBatches(
        run.split(split),
        run.train.batch_size,
        run.seed(run.stage, split),
        rank=run.world.rank,
        ranks=run.world.size,
        shuffle_memory=run.train.shuffle_memory,
    )


def _forever(batches: TrainBatches) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def _score(run: Run) -> dict[str, float]:
    """AUC and logloss of the validation split, with statistics that are the mean of the processes'."""
    _mean(run, [b for b in run.model.buffers() if b.is_floating_point()])
    found = predict(run.model, run.split("valid"), run.train.eval_batch_size, run.world, run.device)
    return measure(found, {name: run.metric(name) for name in ("auc", "logloss")})


def _mean(run: Run, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Replace tensors, in place, by their mean over the processes."""
    if run.world.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= run.world.size
    return tensors


@hookimpl
def recsys_components() -> list[Component]:
    """Return the stage."""
    return [Component("stage", "bilevel_fit", BilevelFit)]
