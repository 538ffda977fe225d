"""SHARK's F-permutation: what a trained model would lose, to first order, if a field's vector were always its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.api import (
    Best,
    Component,
    EvalBatches,
    Fields,
    RankedFields,
    Ranking,
    Run,
    bar,
    field_gradients,
    gather_rows,
    hookimpl,
)


def shark(fields: Fields, *, keep: Best = 0.5) -> RankedFields:
    """Ranks fields by the first-order loss of putting a field's mean vector in the place of each of its vectors.

    I_f = (1/N) Σ_b |⟨∂ℓ_b/∂e_bf, ē_f − e_bf⟩| over the validation rows, with e `[B, F, D]` from the trained embedding,
    ē_f the mean of e_bf over the same rows, and ℓ_b the recipe's loss of row b (with several tasks, their mean). This
    is permutation importance by a Taylor expansion, for one look at the vectors and one forward and backward pass,
    whatever the number of fields; each process makes those of its share of the rows, and the sums are added up.

    Zhang et al., "SHARK: A Lightweight Model Compression Approach for Large-scale Recommender Systems", CIKM 2023,
    arXiv 2308.09395, §"F-permutation"; its quantization of rows is not part of this. The code of ERASE (KDD 2024, arXiv
    2403.12660) makes a backward pass for every single row. Here one makes the gradients of a whole batch, the same
    numbers, since no row sees another in evaluation mode; a loss that compares rows has none of a single row, and then
    it is the batch's that counts.

    First-order weights, which stay when a field is pruned, do not count; a field that is the target of a history
    counts for that too. To first order a field counts as much as the loss leans on it: rows that the model is sure of
    have hardly any gradient. These rows choose the fields, so judge the result by others.

    Args:
        fields: of the model.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    return RankedFields(fields, rank, keep)


def rank(run: Run) -> Ranking:
    """Rank the fields of a run's model.

    Raises:
        RecipeError: there is no validation split.
    """
    shards, model = run.split("valid"), run.model
    batches = EvalBatches(shards, run.train.eval_batch_size, run.world.rank, run.world.size)
    fields = model.embedding.fields
    total = torch.zeros(len(fields), fields.dim, dtype=torch.float64, device=run.device)
    lost = torch.zeros(len(fields), dtype=torch.float64, device=run.device)
    with bar(run.console, disable=not run.world.leads) as progress:
        rows = progress.add_task(run.stage, total=2 * len(shards))
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for _, given in batches:
                batch = given.to(run.device)
                total += model.embedding(batch.ids, batch.values).sum(0, dtype=torch.float64)
                progress.advance(rows, len(batch) * run.world.size)
        model.train(was_training)
        mean = _added(total) / len(shards)
        for _, e, gradient in field_gradients(run, batches):
            lost += (gradient * (mean.to(e.dtype) - e)).sum(2).abs().sum(0, dtype=torch.float64)
            progress.advance(rows, len(e) * run.world.size)
    scores = (_added(lost) / len(shards)).tolist()
    return Ranking(dict(zip(fields.names, scores, strict=True)), 3 * len(shards))


def _added(own: Tensor) -> Tensor:
    """The sum over the processes, in one order, so that all come to the same."""
    return gather_rows(own.unsqueeze(0)).sum(0)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "fit"},
        {"use": "rank_fields"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "shark", shark, stages)]
