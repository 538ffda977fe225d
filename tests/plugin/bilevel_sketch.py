"""A plugin as its author would write it, on `recsys.api` alone: a gated selector and the stage that searches its gates.

DARTS-like, first order: weights step on the training rows, gates on validation rows, in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.api import (
    Batch,
    Component,
    Fields,
    RecipeError,
    Run,
    Selection,
    TrainBatches,
    build_optimizer,
    hookimpl,
    measure,
    predict,
)


class Gates(nn.Module):
    """One gate per field: e_f ← σ(a_f) e_f while training, and afterwards the best fields as they are.

    Args:
        keep: how many fields survive.
    """

    def __init__(self, fields: Fields, *, keep: int = 4) -> None:
        super().__init__()
        self.fields, self.keep = fields, keep
        self.gate = nn.Parameter(torch.zeros(len(fields)))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:  # [B, F, D], [B, F] -> [B, F, D]
        gate = self.gate.sigmoid() if self.training else self._hard()
        return e * gate.view(1, -1, 1)

    def penalty(self) -> Tensor:
        return self.gate.new_zeros(())

    def anneal(self, progress: float) -> None:
        pass

    def kept(self) -> Selection:
        return Selection(tuple(name for name, on in zip(self.fields.names, self._hard().tolist(), strict=True) if on))

    def _hard(self) -> Tensor:  # -> [F]
        best = self.gate.topk(min(self.keep, len(self.fields))).indices
        return torch.zeros_like(self.gate).index_fill(0, best, 1.0)

    def scores(self) -> Mapping[str, Tensor]:
        return dict(zip(self.fields.names, self.gate.detach().sigmoid(), strict=True))


class BilevelFit:
    """Search the gates on validation rows while the weights learn on training rows.

    Args:
        epochs: passes over the training rows.
        gate_rate: learning rate of the gates.
    """

    name = "bilevel_sketch"

    def __init__(self, *, epochs: int = 1, gate_rate: float = 0.05) -> None:
        self.epochs, self.gate_rate = epochs, gate_rate

    def run(self, run: Run) -> None:
        if run.world.size > 1:
            raise RecipeError(f"{run.stage}: one process only")
        torch.manual_seed(run.seed(run.stage))
        model = run.model.to(run.device).train()
        gates = list(model.selector.parameters())
        tables, others = model.parameter_groups()
        mine = {id(p) for p in gates}
        lower = build_optimizer(
            (tables, [p for p in others if id(p) not in mine]), name=run.train.optimizer, lr=run.train.learning_rate
        )
        upper = torch.optim.Adam(gates, lr=self.gate_rate)

        def batches(split: str) -> TrainBatches:
            return TrainBatches(run.split(split), run.train.batch_size, run.seed(run.stage, split))

        for epoch in range(self.epochs):
            validation = iter(batches("valid").epoch(epoch))
            for batch in batches("train").epoch(epoch):
                self._step(run, lower, batch)
                if (held_out := next(validation, None)) is not None:
                    self._step(run, upper, held_out)
            found = predict(model, run.split("valid"), run.train.eval_batch_size, run.world, run.device)
            scores = measure(found, {"auc": run.metric("auc")})
            run.scores["valid"] = scores
            run.say(f"{run.stage}: epoch {epoch} {scores}")
        run.keep_weights()

    def _step(self, run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        moved = batch.to(run.device)
        run.model.zero_grad()
        loss = run.model.objective(run.loss, moved)
        (loss * batch.share).backward()
        optimizer.step()


@hookimpl
def recsys_components() -> list[Component]:
    stages = (
        {"use": "bilevel_sketch"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate", "metrics": ["auc"]},
    )
    return [
        Component("selector", "gates_sketch", Gates, stages),
        Component("stage", "bilevel_sketch", BilevelFit),
    ]
