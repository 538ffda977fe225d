"""How long a model takes to score rows, for what a stage tells of a smaller one."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from recsys.contracts import Batch
from recsys.data.shards import Shards
from recsys.nn.model import Model

ROWS = 1024
"""Rows of the batch that is scored, fewer where there are fewer."""


def first_rows(shards: Shards) -> Batch:
    """Return the batch that models are timed with."""
    return shards.gather(np.arange(min(ROWS, len(shards))))


def milliseconds(model: Model, batch: Batch, repeats: int = 9) -> float:
    """Return the median time of scoring a batch, after one round to warm up; nothing of the model changes."""
    parameter = next(iter(model.parameters()), torch.empty(0))
    batch, was_training = batch.to(parameter.device), model.training
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(batch)
            if parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)
            times.append(1000 * (time.perf_counter() - start))
    model.train(was_training)
    return statistics.median(times[1:])
