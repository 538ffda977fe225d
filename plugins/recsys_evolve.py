"""Evolution of widths: which dimensions each field of an embedding keeps, found on validation rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import pydantic
import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from recsys.api import (
    Batch,
    Component,
    EncodedSchema,
    Fields,
    Layout,
    Predictions,
    RecipeError,
    Run,
    Selection,
    Stored,
    TrainBatches,
    hookimpl,
    measure,
    pruned_bytes,
)

Candidate = tuple[int, ...]
"""The width of every vocabulary, each in 1 … D."""
Statistics = Sequence[tuple[Tensor, ...]]
"""Mean, variance and count of each batch normalisation."""
Probability = Annotated[float, pydantic.Field(gt=0, le=1)]
TOGETHER = 1 << 21
"""Numbers of embedding output, over all candidates of one forward pass; more would leave the cache of a processor."""
FINALISTS = 5
"""Candidates that are scored on all validation rows where the search had only some of them."""
TRIES = 100
"""Draws in vain after which a generation stays smaller: hardly a candidate is left that is new and small enough."""


@runtime_checkable
class Elastic(Protocol):
    """An embedding whose vocabularies can do with fewer dimensions."""

    fields: Fields
    layout: Layout
    schema: EncodedSchema
    stored: Stored
    """How numbers are stored in the end: what `check_budget` was told."""

    def sizes(self) -> Mapping[str, int]:
        """Vocabulary → number of kept rows, in the order of a candidate."""
        ...

    def try_out(self, masks: Tensor | None, *, same_rows: bool = False) -> None:
        """Answer for candidates, `[C, V, D]`, to batches that hold their rows C times, until None is given."""
        ...

    def decide(self, widths: Sequence[int]) -> None:
        """Keep these widths."""
        ...

    def kept(self) -> Selection:
        """What it keeps."""
        ...

    def prune(self, selection: Selection) -> Any:
        """Return the smaller embedding."""
        ...


@dataclass
class Search:
    """Candidates, generation after generation; what was scored is never scored again, nor changed.

    Args:
        length: numbers in a candidate.
        dim: the largest of them.
        random: the source of all random numbers.
        parents: how many of the best have children.
        mutants: children in which each number is drawn anew with probability `mutation`.
        crossovers: children with the first numbers of one parent and the others of another.
        mutation: see `mutants`.
        allowed: whether a candidate is small enough.
        scores: of all candidates so far, in the order in which they were scored.
    """

    length: int
    dim: int
    random: Random
    parents: int
    mutants: int
    crossovers: int
    mutation: float
    allowed: Callable[[Candidate], bool]
    scores: dict[Candidate, float] = field(default_factory=dict)

    def first(self, population: int) -> list[Candidate]:
        """All widths whole, to compare with, and a random population."""
        whole = (self.dim,) * self.length
        return [whole, *self._fill(population, self._draw, {whole})]

    def children(self) -> list[Candidate]:
        """The next generation."""
        best = self.best(self.parents)
        if not best:
            return self._fill(self.mutants + self.crossovers, self._draw, set())
        mutants = self._fill(self.mutants, lambda: self._mutate(self.random.choice(best)), set())
        if len(best) < 2 or self.length < 2:
            return mutants
        crossed = self._fill(self.crossovers, lambda: self._cross(*self.random.sample(best, 2)), set(mutants))
        return mutants + crossed

    def best(self, count: int) -> list[Candidate]:
        """The best allowed candidates so far, best first; of equals, the one that was scored first."""
        known = [c for c, score in self.scores.items() if not math.isnan(score) and self.allowed(c)]
        return sorted(known, key=lambda c: -self.scores[c])[:count]

    def _fill(self, count: int, make: Callable[[], Candidate], taken: set[Candidate]) -> list[Candidate]:
        """Up to `count` candidates that are new and allowed."""
        found: dict[Candidate, None] = {}
        misses = 0
        while len(found) < count and misses < TRIES:
            made = make()
            if made in self.scores or made in taken or made in found or not self.allowed(made):
                misses += 1
            else:
                found[made], misses = None, 0
        return list(found)

    def _draw(self) -> Candidate:
        """Uniform over the widths; where that is too large, small widths become more and more probable."""
        widths, tilt = range(1, self.dim + 1), 1.0
        for _ in range(TRIES):
            made = tuple(self.random.choices(widths, [tilt**d for d in widths], k=self.length))
            if self.allowed(made):
                break
            tilt *= 0.9
        return made

    def _mutate(self, parent: Candidate) -> Candidate:
        return tuple(
            self.random.randint(1, self.dim) if self.random.random() < self.mutation else width for width in parent
        )

    def _cross(self, one: Candidate, other: Candidate) -> Candidate:
        cut = self.random.randint(1, self.length - 1)
        return one[:cut] + other[cut:]


class Scorer:
    """Scores candidates on the validation split by `train.monitor`, many in one pass; processes share them.

    Args:
        run: whose model has an elastic embedding.
        recalibration: training batches that batch normalisation sees anew for each candidate.
        rows: how many of the validation rows to score on, the same for all candidates; None for all.
    """

    def __init__(self, run: Run, recalibration: int, rows: int | None = None) -> None:
        self.run = run
        embedding = run.model.embedding
        if not isinstance(embedding, Elastic):
            raise RecipeError("stage evolve: the embedding has no widths to choose; use optembed, for instance")
        self.embedding = embedding
        self.shards = run.split("valid")
        self.rows: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if rows is not None and rows < len(self.shards):
            drawn = np.random.default_rng(run.seed(run.stage, "rows"))
            self.rows = np.sort(drawn.choice(len(self.shards), rows, replace=False))
        self.metric = run.metric(run.train.monitor)
        self.sign = 1.0 if self.metric.higher_is_better else -1.0
        self.norms = [m for m in run.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms = [m for m in self.norms if m.running_mean is not None]
        self.batches = self._training_batches(recalibration) if self.norms else []

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """One number per candidate, higher is better; NaN where the metric is undefined."""
        model, world = self.run.model, self.run.world
        was_training = model.training
        model.eval()
        scores = torch.zeros(len(candidates), dtype=torch.float64, device=self.run.device)
        mine = range(world.rank, len(candidates), world.size)
        before = _statistics(self.norms)
        try:
            with torch.inference_mode():
                values = self._score([candidates[i] for i in mine])
        finally:
            _restore(self.norms, before)
            self.embedding.try_out(None)
            model.train(was_training)
        scores[list(mine)] = torch.tensor(values, dtype=torch.float64, device=self.run.device)
        if world.size > 1:
            dist.all_reduce(scores)
        return [float(score) for score in scores]

    def _score(self, candidates: Sequence[Candidate]) -> list[float]:
        if not candidates:
            return []
        masks = self._masks(candidates)  # [C, V, D]
        statistics = [self._recalibrate(mask) for mask in masks] if self.batches else None
        logits: dict[str, list[Tensor]] = {task: [] for task in self.run.schema.tasks}
        labels: dict[str, list[Tensor]] = {task: [] for task in self.run.schema.tasks}
        context: dict[str, list[Tensor]] = {need: [] for need in self.metric.needs}
        size = self.run.train.eval_batch_size
        count = len(self.shards) if self.rows is None else len(self.rows)
        for low in range(0, count, size):
            high = min(low + size, count)
            batch = self.shards.read(low, high) if self.rows is None else self.shards.gather(self.rows[low:high])
            for task, columns in self._logits(batch.to(self.run.device), masks, statistics).items():
                logits[task].append(columns)
            for task, given in batch.label.items():
                labels[task].append(given.double())
            for need in self.metric.needs:
                values = batch.context[need]
                context[need].append(values.double() if values.is_floating_point() else values)
        whole = {task: torch.cat(parts, 1) for task, parts in logits.items()}  # each [C, rows]
        label = {task: torch.cat(parts) for task, parts in labels.items()}
        known = {need: torch.cat(parts) for need, parts in context.items()}
        return [
            self._measure(Predictions({task: z[i].double() for task, z in whole.items()}, label, known))
            for i in range(len(candidates))
        ]

    def _logits(self, batch: Batch, masks: Tensor, statistics: Sequence[Statistics] | None) -> dict[str, Tensor]:
        """Task → `[C, B]`, on the CPU; the rows are looked up once."""
        numbers = len(batch) * len(self.run.schema.fields) * self.embedding.fields.dim
        size = 1 if statistics else min(max(1, TOGETHER // max(numbers, 1)), len(masks))
        parts: dict[str, list[Tensor]] = {task: [] for task in self.run.schema.tasks}
        for low in range(0, len(masks), size):
            some = masks[low : low + size]
            if statistics:
                _restore(self.norms, statistics[low])
            self.embedding.try_out(some, same_rows=low > 0)
            for task, logit in self.run.model(repeated(batch, len(some))).items():
                parts[task].append(logit.view(len(some), -1).cpu())
        return {task: torch.cat(columns) for task, columns in parts.items()}

    def _masks(self, candidates: Sequence[Candidate]) -> Tensor:
        """`[C, V, D]`: ones in the first dimensions, as many as the candidate says."""
        width = torch.tensor(candidates, device=self.run.device)
        dims = torch.arange(self.embedding.fields.dim, device=self.run.device)
        return (dims < width.unsqueeze(2)).float()

    def _measure(self, predictions: Predictions) -> float:
        values = measure(predictions, {"score": self.metric}).values()
        known = [value for value in values if not math.isnan(value)]
        return self.sign * sum(known) / len(known) if known else math.nan

    def _training_batches(self, count: int) -> list[Batch]:
        if not count:
            return []
        seed = self.run.seed(self.run.stage, "recalibration")
        batches = TrainBatches(self.run.split("train"), self.run.train.batch_size, seed=seed).epoch(0)
        return list(islice(batches, count))

    def _recalibrate(self, mask: Tensor) -> Statistics:
        """Mean and variance of each batch normalisation under one candidate, averaged over the training batches."""
        for norm in self.norms:
            norm.reset_running_stats()
            norm.train()
        momenta = [norm.momentum for norm in self.norms]
        try:
            for norm in self.norms:
                norm.momentum = None  # the plain average
            for batch in self.batches:
                self.embedding.try_out(mask.unsqueeze(0))
                self.run.model(batch.to(self.run.device))
        finally:
            for norm, momentum in zip(self.norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()
        return _statistics(self.norms)


class Evolve:
    """Choose by evolution how many dimensions each field keeps, by their worth on the validation split.

    Generation 0 is the whole table and a random population, d_f uniform in 1 … D. Every further generation has
    mutants (a parent with each d_f drawn anew with some probability) and crossovers (the first d_f of one parent, the
    others of another), of parents among the best so far. The embedding keeps the best of all that were scored. Scored
    is by `train.monitor` over validation rows, so what the validation split says afterwards is flattered: judge by the
    test split. `search.json` in the stage's folder lists every candidate and its score. Each candidate costs about as
    much as a validation pass; of a split of millions of rows, `rows` may be a hundred thousand or two.

    Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020; for embeddings
    Lyu et al., CIKM 2022, arXiv 2208.04482.

    Args:
        population: random candidates of generation 0.
        generations: generations after that.
        mutants: of each generation.
        crossovers: of each generation.
        mutation: probability with which a mutant's width is drawn anew.
        parents: how many of the best have children.
        budget: most bytes of the pruned embedding, as a share of those of the whole table in float32; larger candidates
            are never chosen. With the stage `quantize`, numbers count as they are stored in the end.
        recalibration: training batches on which batch normalisation is averaged anew for each candidate; 0 leaves its
            statistics as training on random widths left them. It costs as many forward passes per candidate.
        rows: of the validation split, drawn once, that candidates are compared on; the best five are then scored on
            all of them, and the best of these is kept. null: all rows, always.
    """

    name = "evolve"

    def __init__(
        self,
        *,
        population: PositiveInt = 20,
        generations: NonNegativeInt = 30,
        mutants: NonNegativeInt = 10,
        crossovers: NonNegativeInt = 10,
        mutation: Probability = 0.1,
        parents: PositiveInt = 15,
        budget: PositiveFloat | None = None,
        recalibration: NonNegativeInt = 0,
        rows: PositiveInt | None = None,
    ) -> None:
        self.population, self.generations = population, generations
        self.mutants, self.crossovers, self.mutation, self.parents = mutants, crossovers, mutation, parents
        self.budget, self.recalibration, self.rows = budget, recalibration, rows

    def run(self, run: Run) -> None:
        """Give the embedding of `run.model` its widths.

        Raises:
            RecipeError: its widths cannot be chosen, or none meets the budget.
        """
        scorer = Scorer(run, self.recalibration, self.rows)
        embedding = scorer.embedding
        cost = Cost.of(embedding)
        limit = math.inf if self.budget is None else self.budget * cost.whole
        if (least := cost((1,) * len(cost.rows))) > limit:
            raise RecipeError(
                f"{run.stage}: a budget of {self.budget:g} is {int(limit):,} bytes, but a dimension of every kept row, "
                f"and what finds the rows, take {least:,}"
            )
        seed = run.seed(run.stage, "search")
        search = Search(
            length=len(cost.rows),
            dim=embedding.fields.dim,
            random=Random(seed),
            parents=self.parents,
            mutants=self.mutants,
            crossovers=self.crossovers,
            mutation=self.mutation,
            allowed=lambda c: cost(c) <= limit,
        )
        log = self._search(run, search, scorer, cost)
        finalists = self._finalists(run, search, scorer)
        if not finalists:
            sampled = scorer.rows if not search.best(1) else None
            where = "" if sampled is None else f"{len(sampled):,} of the rows of "
            raise RecipeError(f"{run.stage}: '{run.train.monitor}' is undefined on {where}the validation split")
        best = max(finalists, key=lambda c: finalists[c])
        embedding.decide(best)
        run.keep_weights()
        if run.world.leads:
            found = {"seed": seed, "vocabularies": embedding.sizes(), "generations": log, "best": best}
            found |= {"score": finalists[best], "bytes": cost(best)}
            if scorer.rows is not None:
                found |= {
                    "rows": len(scorer.rows),
                    "finalists": [{"widths": c, "score": z} for c, z in finalists.items()],
                }
            (run.stage_folder / "search.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        run.say(f"{run.stage}: widths {dict(zip(embedding.sizes(), best, strict=True))}, {cost(best):,} bytes")

    def _finalists(self, run: Run, search: Search, scorer: Scorer) -> dict[Candidate, float]:
        """The best candidates and their scores on all validation rows; of equals, the one that was scored first."""
        if scorer.rows is None:
            return {c: search.scores[c] for c in search.best(1)}
        best = search.best(FINALISTS)
        scores = zip(best, Scorer(run, self.recalibration)(best), strict=True)
        return {c: score for c, score in scores if not math.isnan(score)}

    def _search(self, run: Run, search: Search, scorer: Scorer, cost: Cost) -> list[list[dict[str, Any]]]:
        log = []
        for generation in range(self.generations + 1):
            candidates = search.children() if generation else search.first(self.population)
            search.scores |= zip(candidates, scorer(candidates), strict=True)
            scores = [None if math.isnan(search.scores[c]) else search.scores[c] for c in candidates]  # as JSON has it
            pairs = zip(candidates, scores, strict=True)
            log.append([{"widths": c, "score": score, "bytes": cost(c)} for c, score in pairs])
            shown = f"best {search.scores[search.best(1)[0]]:.5f}" if search.best(1) else "none is small enough"
            run.say(f"{run.stage} · generation {generation}: {len(candidates)} candidates, {shown}")
        return log


@dataclass(frozen=True)
class Cost:
    """Bytes of the pruned embedding under a candidate, as stored in the end: n Σ k_f d_f, and what finds the rows.

    Args:
        rows: k, the kept rows of each vocabulary.
        fixed: bytes that do not depend on the widths.
        whole: bytes of the whole table in float32.
        number: n, bytes of a number.
    """

    rows: Candidate
    fixed: int
    whole: int
    number: int = 4

    @classmethod
    def of(cls, embedding: Elastic) -> Cost:
        """Measure what does not depend on widths with all of them whole."""
        rows, dim, stored = tuple(embedding.sizes().values()), embedding.fields.dim, embedding.stored
        kept = embedding.kept()
        found = sum(t.nbytes for t in embedding.prune(kept).export_tables().values())
        fixed = found - 4 * sum(rows) * dim
        number = 4 if stored == "float32" else 2 if stored == "float16" else 1
        if number < 4:
            fixed = pruned_bytes(embedding.schema, dim, kept, stored) - number * sum(rows) * dim
        return cls(rows, fixed, 4 * sum(embedding.layout.rows) * dim, number)

    def __call__(self, candidate: Candidate) -> int:
        """Bytes of the pruned embedding."""
        return self.fixed + self.number * sum(k * d for k, d in zip(self.rows, candidate, strict=True))


def repeated(batch: Batch, times: int) -> Batch:
    """The rows of a batch `times` over, as far as a model reads them."""
    return Batch(
        batch.ids.repeat(times, 1),
        None if batch.values is None else batch.values.repeat(times, 1),
        {g: (ids.repeat(times, 1, 1), length.repeat(times)) for g, (ids, length) in batch.history.items()},
    )


def _statistics(norms: Sequence[Any]) -> Statistics:
    return [(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()) for norm in norms]


def _restore(norms: Sequence[Any], statistics: Statistics) -> None:
    for norm, (mean, variance, count) in zip(norms, statistics, strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.copy_(count)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the stage."""
    return [Component("stage", "evolve", Evolve)]
