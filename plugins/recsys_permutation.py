"""Permutation importance: what a trained model loses when the values of one field change places between rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PositiveInt
from torch import Tensor

from recsys.api import (
    Batch,
    Best,
    Component,
    EvalBatches,
    Fields,
    Model,
    Named,
    Predictions,
    RankedFields,
    Ranking,
    RecipeError,
    Run,
    Vectors,
    bar,
    gather_rows,
    hookimpl,
    measure,
    predict,
)

Rows = npt.NDArray[np.int64]

HELD = 1 << 28
"""Bytes of shuffled logits that are held at a time."""


def permutation(
    fields: Fields,
    *,
    metric: Annotated[str | dict[str, Any], Named("metric")] = "auc",
    repeats: PositiveInt = 5,
    rows: PositiveInt | None = None,
    keep: Best = 0.5,
) -> RankedFields:
    """Ranks fields by what the trained model loses when one field's values are shuffled over the validation rows.

    I_f = mean_r [metric(rows) − metric(rows with x_bf replaced by x_{π_r(b) f})], with the sign turned round for a
    metric that is better when lower; with several tasks, the mean over those for which the metric is defined. π_r gives
    every row the values of another one; all fields share it, so that their scores differ by what the fields do and not
    by luck. A field that never changes has exactly 0, and a useless one about 0, of either sign.

    Everything that the field does is lost: its vector, its first-order weight, and its part in a target of a history,
    but not the history itself. A number moves together with its being missing. The model is as it is trained and is
    asked again only where a row has got another value: the vectors of all other fields, and the histories that the
    field is no target of, are taken as they are. About rows · (1 + fields · repeats) forward passes in all; each
    process makes those of its share of the rows, and the logits are gathered.

    Breiman, "Random Forests", Machine Learning 45, 2001, §10; Fisher, Rudin and Dominici, "All Models are Wrong, but
    Many are Useful", JMLR 20, 2019, arXiv 1801.01489. What ERASE (KDD 2024, arXiv 2403.12660) calls permutation is
    something else, here `rf_permutation`: the importance for a random forest of ten trees, on the rows that it has
    learned from. Here it is the recipe's own model that is asked, about rows that it has not learned from. These rows
    choose the fields, so judge the result by others.

    Fields that stand in for one another all look useless, since each is shuffled alone.

    Args:
        fields: of the model.
        metric: what is lost, the name of a metric or `{use: NAME, …}`.
        repeats: number of shuffles.
        rows: how many of the validation rows are used, drawn at random. null: all of them.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    return RankedFields(fields, Permutation(metric, repeats, rows), keep)


@dataclass(frozen=True)
class Permutation:
    """Ranks the fields of a run's model; for the arguments see `permutation`."""

    metric: str | dict[str, Any]
    repeats: int
    rows: int | None

    def __call__(self, run: Run) -> Ranking:
        """Ask the model about every field and repeat.

        Raises:
            RecipeError: there is no validation split, or the metric is undefined on its rows.
        """
        shards = run.split("valid")
        rows, name = self.drawn(run, len(shards)), self.metric if isinstance(self.metric, str) else self.metric["use"]
        metric = {name: run.measuring(self.metric)}
        sign = 1.0 if metric[name].higher_is_better else -1.0
        whole = predict(run.model, shards, run.train.eval_batch_size, run.world, run.device, rows=rows)
        before = defined(run, name, measure(whole, metric), len(rows))
        shuffled = Shuffled(run, rows, whole)
        names = run.model.embedding.fields.names
        lost = [0.0] * len(names)
        with evaluating(run.model), bar(run.console, disable=not run.world.leads) as progress:
            task = progress.add_task(run.stage, total=len(rows) * len(names) * self.repeats)
            for repeat in range(self.repeats):
                donors = rows[others(len(rows), run.seed("permutation", repeat))]
                for f, logit in shuffled.logits(donors, lambda done: progress.advance(task, done)):
                    now = measure(Predictions(logit, whole.label, whole.context), metric)
                    lost[f] += sign * sum(value - now[key] for key, value in before.items()) / len(before)
        scores = {n: total / self.repeats for n, total in zip(names, lost, strict=True)}
        return Ranking(scores, len(rows) + shuffled.passes())

    def drawn(self, run: Run, total: int) -> Rows:
        """Which of the rows are asked about, in the order of the files."""
        if self.rows is None or self.rows >= total:
            return np.arange(total)
        generator = torch.Generator().manual_seed(run.seed("permutation", "rows"))
        found: Rows = torch.randperm(total, generator=generator)[: self.rows].sort().values.numpy()
        return found


def defined(run: Run, name: str, values: Mapping[str, float], rows: int) -> dict[str, float]:
    """The values that are defined, of a metric for each task.

    Raises:
        RecipeError: there are none.
    """
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    if not known:
        raise RecipeError(
            f"{run.stage}: '{name}' is undefined on the {rows:,} validation rows that fields are ranked by, as it is "
            "where all labels are the same; take a validation split, or more `rows` of it, with both labels, or "
            "another metric, such as `model.selector.metric: logloss`"
        )
    if len(known) < len(values):
        left = ", ".join(key.removesuffix(f"/{name}") for key in values if key not in known)
        run.say(f"[yellow]warning: {run.stage}: '{name}' is undefined for {left}, which ranks no fields[/yellow]")
    return known


def others(rows: int, seed: int) -> Rows:
    """For each of some rows another one, each once, `[rows]`: a random circle, on which a row gets the next one."""
    circle = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(circle)
    found[circle] = circle.roll(1)
    moved: Rows = found.numpy()
    return moved


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Shuffled:
    """What a run's model says of some validation rows once the values of a field come from other rows.

    Args:
        run: whose model is asked.
        rows: of the validation split.
        whole: what it says of them as they are.
    """

    def __init__(self, run: Run, rows: Rows, whole: Predictions) -> None:
        self.run, self.rows, self.whole = run, rows, whole
        self.shards = run.split("valid")
        targets = {name for h in run.schema.histories for name in h.target}
        self.is_target = torch.tensor([f.name in targets for f in run.schema.fields], device=run.device)
        self._asked = 0

    def passes(self) -> int:
        """How often the model was asked about a row, by all processes together."""
        return int(gather_rows(torch.tensor([self._asked], device=self.run.device)).sum())

    def logits(self, donors: Rows, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (number of the field, task → `[rows]` float64, on the CPU), on every process.

        Args:
            donors: for every row the one whose value it gets.
            advance: is told how many pairs of row and field are done.
        """
        count = len(self.run.schema.fields)
        together = max(HELD // (8 * len(self.rows) * len(self.whole.logit)), 1)
        for low in range(0, count, together):
            fields = range(low, min(low + together, count))
            table = self._table(donors, fields, advance)
            for i, f in enumerate(fields):
                yield f, {task: columns[:, i].contiguous() for task, columns in table.items()}

    @torch.inference_mode()
    def _table(self, donors: Rows, fields: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """Task → `[rows, G]`, a column for each of the G fields; of all rows, whoever asked about them."""
        run, device = self.run, self.run.device
        parts = {task: [torch.zeros(0, len(fields), dtype=torch.float64, device=device)] for task in self.whole.logit}
        size = run.train.eval_batch_size
        for low, batch in EvalBatches(self.shards, size, run.world.rank, run.world.size, self.rows):
            own = slice(low, low + len(batch))
            known = {task: logit[own].to(device) for task, logit in self.whole.logit.items()}
            donor = self.shards.gather(donors[own])
            for task, columns in self._ask(batch.to(device), donor.to(device), known, fields).items():
                parts[task].append(columns.T)
            advance(len(batch) * len(fields) * run.world.size)
        return {task: gather_rows(torch.cat(columns)).cpu() for task, columns in parts.items()}

    def _ask(self, batch: Batch, donor: Batch, known: Mapping[str, Tensor], fields: range) -> dict[str, Tensor]:
        """Task → `[G, B]`: only the pairs of field and row that differ from `known [B]` have to be asked about."""
        differs = donor.ids != batch.ids
        if batch.values is not None and donor.values is not None:
            differs |= donor.values != batch.values
        f, b = differs[:, fields.start : fields.stop].T.nonzero(as_tuple=True)
        self._asked += len(f)
        swap = Swap(self.run.model, batch, donor)
        logits = {task: logit.repeat(len(fields), 1) for task, logit in known.items()}  # [G, B]
        is_target = self.is_target[f + fields.start]
        for pairs, through in ((~is_target).nonzero(), False), (is_target.nonzero(), True):
            for some in torch.split(pairs.squeeze(1), self.run.train.eval_batch_size):
                if len(some):
                    column, row = f[some], b[some]
                    for task, logit in swap(row, column + fields.start, through).items():
                        logits[task][column, row] = logit.double()
        return logits


class Swap:
    """The model's logits of rows in which one field has another row's value; what is the same is computed once.

    Args:
        model: in evaluation mode.
        batch: the rows.
        donor: as many others, whose values the fields get.
    """

    def __init__(self, model: Model, batch: Batch, donor: Batch) -> None:
        self.model, self.batch, self.donor = model, batch, donor
        self.vectors = model.look_up(batch.ids, batch.values, batch.history)
        self.seen = model.combine(self.vectors, batch.ids)  # [B, F', D]
        self.others = model.embedding(donor.ids, donor.values)  # [B, F, D]
        self.gated = model.selector(self.others, donor.ids)

    def __call__(self, row: Tensor, field: Tensor, through: bool) -> dict[str, Tensor]:
        """Row numbers and the field that is swapped in each, `[n], [n] -> {task: [n]}`.

        Args:
            row: of the batch; a row may appear more than once.
            field: the field of each that gets the other's value.
            through: whether the fields may be targets, so that histories have to be read anew.
        """
        ids = self._swapped(self.batch.ids, self.donor.ids, row, field)
        values = self.batch.values
        if values is not None and self.donor.values is not None:
            values = self._swapped(values, self.donor.values, row, field)
        if not through:
            return self.model.decide(self._swapped(self.seen, self.gated, row, field), ids, values)
        e = self._swapped(self.vectors.fields, self.others, row, field)
        histories = {name: (events[row], length[row]) for name, (events, length) in self.vectors.histories.items()}
        return self.model.decide(self.model.combine(Vectors(e, histories), ids), ids, values)

    @staticmethod
    def _swapped(own: Tensor, other: Tensor, row: Tensor, field: Tensor) -> Tensor:
        """`[B, F', …], [B, F, …], [n], [n] -> [n, F', …]`."""
        found = own.index_select(0, row)
        found[torch.arange(len(row), device=row.device), field] = other[row, field]
        return found


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
    return [Component("selector", "permutation", permutation, stages)]
