"""Sampled rows in a training step: a choice between candidates by the model's scores, and pairs for losses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from recsys.abilities import Choosing
from recsys.contracts import Batch
from recsys.data.batches import SampledRows
from recsys.data.sampling import Sampling, repeated
from recsys.errors import RecipeError
from recsys.nn.model import Model


def choose_sampled(model: Model, sampled: SampledRows | None, batch: Batch) -> Batch:
    """Let a sampler that draws several candidates keep one of them for each sampled row; other batches stay.

    The scores are the logits of the model as it is, without dropout, averaged over the tasks.
    """
    if not isinstance(sampled, Sampling) or not isinstance(sampled.sampler, Choosing) or sampled.candidates == 1:
        return batch
    count, candidates = sampled.options.negatives, sampled.candidates
    logged = len(batch) // (1 + batch.negatives)
    device = batch.ids.device
    scores = _scores(model, repeated(batch, torch.arange(logged, len(batch), device=device)))
    shape = (logged, count, candidates)
    noise = batch.context["draw"][logged:].reshape(shape)
    chosen = sampled.sampler.choose(scores.reshape(shape), noise)  # [N, m]
    first = torch.arange(logged * count, device=device).reshape(logged, count) * candidates
    rows = torch.cat([torch.arange(logged, device=device), logged + (first + chosen).flatten()])
    kept = repeated(batch, rows)
    context = {name: value for name, value in kept.context.items() if name != "draw"}
    return replace(kept, context=context, negatives=count)


def pairs(value: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Take apart the values of logged rows and of the rows sampled for them: `[B] -> [N], [N, m]`, B = N·(1 + m).

    Raises:
        RecipeError: nothing was sampled.
    """
    if not batch.negatives:
        raise RecipeError("the loss compares logged rows with sampled ones; name a sampler in the block `sampling:`")
    logged = len(batch) // (1 + batch.negatives)
    return value[:logged], value[logged:].reshape(logged, batch.negatives)


def _scores(model: Model, batch: Batch) -> Tensor:
    """`Batch -> [B]` float32; the parts of the model are as they were afterwards."""
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        logits = torch.stack([logit.float() for logit in model(batch).values()]).mean(0)
    for module in training:
        module.training = True
    return logits
