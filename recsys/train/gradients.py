"""What the loss of each row would make of a change of its fields' vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from recsys.contracts import Batch
from recsys.train.run import Run


def field_gradients(run: Run, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number of the first row, e `[B, F, D]`, ∂ℓ_b/∂e_b `[B, F, D]`) for batches such as those of `EvalBatches`.

    ℓ_b is the recipe's loss of row b alone, from the model's logits in evaluation mode, where no row sees another: one
    backward pass of Σ_b ℓ_b = B · loss finds the gradients of all rows. Of a loss that compares rows, it is the
    gradient of B times the batch's. e is what the embedding gives, before the selector; where a field is the target of
    a history, the way through the history counts too. First-order weights are no part of e.

    A pass has at most as many rows as a process trains on at a time, whatever the batches have.

    Args:
        run: whose model and loss are meant.
        batches: (number of the first row, rows), on any device.
    """
    model, train = run.model, run.train
    most = -(-train.batch_size // (train.accumulate * train.devices))
    was_training, deterministic = model.training, torch.are_deterministic_algorithms_enabled()
    model.eval()
    torch.use_deterministic_algorithms(True, warn_only=run.device.type == "cuda")
    try:
        for first, batch in batches:
            parts = [_pass(run, _rows(batch, slice(low, low + most))) for low in range(0, len(batch), most)]
            e, gradient = (torch.cat(found) for found in zip(*parts, strict=True))
            yield first, e, gradient
    finally:
        torch.use_deterministic_algorithms(deterministic)
        model.train(was_training)


def _pass(run: Run, given: Batch) -> tuple[Tensor, Tensor]:
    """Vectors and gradients of the rows of one pass, each `[B, F, D]`."""
    model, batch = run.model, given.to(run.device)
    with torch.no_grad():
        vectors = model.look_up(batch.ids, batch.values, batch.history)
    e = vectors.fields.detach().requires_grad_()
    with torch.enable_grad():
        x = model.combine(replace(vectors, fields=e), batch.ids)
        loss = run.loss(model.decide(x, batch.ids, batch.values), batch) * len(batch)
        (gradient,) = torch.autograd.grad(loss, e, allow_unused=True, materialize_grads=True)
    return e.detach(), gradient


def _rows(batch: Batch, own: slice) -> Batch:
    """Some rows of a batch."""
    if own.start == 0 and own.stop >= len(batch):
        return batch
    return Batch(
        batch.ids[own],
        None if batch.values is None else batch.values[own],
        {name: (ids[own], length[own]) for name, (ids, length) in batch.history.items()},
        {task: label[own] for task, label in batch.label.items()},
        {name: column[own] for name, column in batch.context.items()},
    )
