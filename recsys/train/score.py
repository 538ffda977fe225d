"""Score every row of a split once, in order, and measure; the same numbers for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.contracts import Batch, Metric
from recsys.data.batches import EvalBatches
from recsys.data.schema import FLOAT_CONTEXT
from recsys.data.shards import Shards
from recsys.errors import DataError
from recsys.nn.model import Model
from recsys.train.distributed import World, gather_rows


@dataclass(frozen=True)
class Predictions:
    """All rows of a split in the order of its files, or those that were asked for, in that order.

    Args:
        logit: task → `[rows]` float64, on the CPU.
        label: task → `[rows]` float64, on the CPU.
        context: name → `[rows]`, on the CPU.
    """

    logit: Mapping[str, Tensor]
    label: Mapping[str, Tensor]
    context: Mapping[str, Tensor]


def predict(
    model: Model,
    shards: Shards,
    batch_size: int,
    world: World,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
    rows: npt.NDArray[np.int64] | None = None,
) -> Predictions:
    """Return the model's logits for every row, or for those named, on every rank.

    The grid of batches does not depend on the number of ranks, and each rank scores a run of whole
    batches, so that concatenating in rank order gives the file order without padding or duplicates.

    Raises:
        DataError: a logit is NaN or infinite; a wrong number is never averaged away.
    """
    was_training = model.training
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for _, batch in EvalBatches(shards, batch_size, rank=world.rank, ranks=world.size, rows=rows):
            _collect(columns, batch, model(batch.to(device)))
            if advance is not None:
                advance(len(batch))
    model.train(was_training)
    names = _column_names(shards)
    whole = {name: _join(columns.get(name, []), name, device) for name in names}
    for name, values in whole.items():
        if name.startswith("logit.") and not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise DataError(f"the model's prediction for row {row + 1} is {float(values[row])}; training has diverged")
    return Predictions(**{kind: _of_kind(whole, kind) for kind in ("logit", "label", "context")})


def measure(predictions: Predictions, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return metric → value; with several tasks, `task/metric` → value."""
    values = {}
    tasks = tuple(predictions.logit)
    for task in tasks:
        for name, metric in metrics.items():
            context = {need: predictions.context[need] for need in metric.needs}
            # Every rank holds all rows already; synchronised by torchmetrics, each would count once per rank.
            metric.distributed_available_fn = _alone  # type: ignore[attr-defined]
            metric.reset()  # type: ignore[attr-defined]
            metric.update(predictions.logit[task], predictions.label[task], **context)
            values[name if len(tasks) == 1 else f"{task}/{name}"] = float(metric.compute())
    return values


def _alone() -> bool:
    return False


def _collect(columns: dict[str, list[Tensor]], batch: Batch, logits: Mapping[str, Tensor]) -> None:
    for task, logit in logits.items():
        columns.setdefault(f"logit.{task}", []).append(logit.double())
    for task, label in batch.label.items():
        columns.setdefault(f"label.{task}", []).append(label.double())
    for name, values in batch.context.items():
        columns.setdefault(f"context.{name}", []).append(values)


def _column_names(shards: Shards) -> list[str]:
    schema = shards.schema
    return [f"{kind}.{task}" for kind in ("logit", "label") for task in schema.tasks] + [
        f"context.{name}" for name in schema.context
    ]


def _join(parts: list[Tensor], name: str, device: torch.device) -> Tensor:
    whole_number = name.startswith("context.") and name.removeprefix("context.") not in FLOAT_CONTEXT
    empty = torch.empty(0, dtype=torch.int64 if whole_number else torch.float64, device=device)
    local = torch.cat(parts).to(device) if parts else empty
    if not whole_number:
        local = local.double()
    return gather_rows(local).cpu()


def _of_kind(columns: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in columns.items() if name.startswith(f"{kind}.")}
