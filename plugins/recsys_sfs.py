"""SFS: how much the loss of a trained model leans on a mask of one at each field."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt

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


def sfs(fields: Fields, *, batches: PositiveInt = 100, keep: Best = 0.5) -> RankedFields:
    """Ranks fields by the gradient of the loss at a mask of ones, one number for each field, over some batches.

    e'_bf = m_f e_bf with m = 1, and I_f = mean over batches of |∂L/∂m_f| = |Σ_b ⟨∂L/∂e_bf, e_bf⟩|, L the recipe's loss
    of a batch (with several tasks, their mean), then divided by Σ_f I_f. A first-order estimate of what taking a field
    away, all at once and to zero, would change: one forward and backward pass of some rows, whatever the number of
    fields. Within a batch, rows that want more of a field and rows that want less of it cancel out, so a batch must be
    as large as those of training, and scores depend on `train.batch_size`.

    Wang et al., "Single-shot Feature Selection for Multi-task Recommendations", SIGIR 2023, whose scores for each task
    are merged by learned relations of the tasks; here the tasks' loss is one. The idea of the mask: Lee, Ajanthan and
    Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, arXiv 1810.02340. The code of
    ERASE (KDD 2024, arXiv 2403.12660) takes the first 100 batches of its loader; here the batches are drawn at random
    from the validation split without replacement, for logs in order of time begin with one hour.

    First-order weights, which stay when a field is pruned, do not count; a field that is the target of a history
    counts for that too. These rows choose the fields, so judge the result by others.

    Args:
        fields: of the model.
        batches: how many, each of `train.batch_size` rows; fewer where the split ends, and then only whole ones, or all
            of it as one.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    return RankedFields(fields, SFS(batches), keep)


@dataclass(frozen=True)
class SFS:
    """Ranks the fields of a run's model; for the arguments see `sfs`."""

    batches: int

    def __call__(self, run: Run) -> Ranking:
        """Rank them.

        Raises:
            RecipeError: there is no validation split.
        """
        shards = run.split("valid")
        size = min(run.train.batch_size, len(shards))
        generator = torch.Generator().manual_seed(run.seed("sfs"))
        drawn = torch.randperm(len(shards), generator=generator)[: min(self.batches, len(shards) // size) * size]
        batches = EvalBatches(shards, size, run.world.rank, run.world.size, drawn.numpy())
        names = run.model.embedding.fields.names
        slopes = [torch.zeros(0, len(names), dtype=torch.float64, device=run.device)]
        with bar(run.console, disable=not run.world.leads) as progress:
            rows = progress.add_task(run.stage, total=len(drawn))
            for _, e, gradient in field_gradients(run, batches):
                slopes.append((gradient * e).sum(2).sum(0, dtype=torch.float64).abs().unsqueeze(0))
                progress.advance(rows, len(e) * run.world.size)
        mean = gather_rows(torch.cat(slopes)).mean(0)
        scores = mean / mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)
        return Ranking(dict(zip(names, scores.tolist(), strict=True)), 3 * len(drawn))


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
    return [Component("selector", "sfs", sfs, stages)]
