"""What a selection table runs: searches, that rank the fields, and the base with the best fields of every ranking."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recsys.bench.execute import Job
from recsys.bench.ranking import order
from recsys.bench.retraining import PRUNE, Retraining, search_stages
from recsys.bench.table import Bench, Entry
from recsys.errors import RunError
from recsys.train.rank import SCORES

SEARCHES, RETRAINS = "search", "retrain"
"""Folders of the runs: by row and seed, and by set of fields and seed."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        scores: field → score.
        order: the fields from the best to the worst.
        seconds: of its stages; None if it was stopped in between and went on.
        passes: forward passes of one row; a backward pass counts as two.
    """

    scores: Mapping[str, float]
    order: tuple[str, ...]
    seconds: float | None
    passes: int


def search(entry: Entry, seed: int, out: Path) -> Job:
    """Return the search of a row: its recipe up to the first `prune`."""
    stages = f"stages={json.dumps(search_stages(entry.recipe))}"
    own = replace(entry, overrides=(*entry.overrides, stages))
    return Job(own, seed, out / SEARCHES / entry.name / f"seed-{seed}")


def retrain(bench: Bench, fields: Sequence[str], seed: int, out: Path) -> Job:
    """Return the base with these fields alone; the same set has the same folder, whoever chose it."""
    judged = judging(bench)
    names = sorted(fields)
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    name = f"{len(names):03d}-{digest}"
    selector = {"use": "fixed", "fields": names}
    stages = [{"use": PRUNE}, judged.fit, {"use": "evaluate", "metrics": list(bench.metrics)}]
    overrides = (*judged.overrides, f"model.selector={json.dumps(selector)}", f"stages={json.dumps(stages)}")
    entry = Entry(name, judged.path, overrides, judged.recipe, {}, "", name)
    return Job(entry, seed, out / RETRAINS / name / f"seed-{seed}")


def found(job: Job, bench: Bench) -> Found | None:
    """Return what a search found; None while it is not finished.

    Raises:
        RunError: it gave a field no finite score.
    """
    if not job.done:
        return None
    files = sorted(job.folder.glob(f"*-{PRUNE}/{SCORES}"))
    written: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    scores = {name: written.get(name) for name in judging(bench).fields}
    known = {name: float(s) for name, s in scores.items() if s is not None and math.isfinite(s)}
    if len(known) < len(scores):
        lacks = next(name for name in scores if name not in known)
        raise RunError(f"{job.entry.name}, seed {job.seed}: the search gave '{lacks}' no finite score ({job.folder})")
    result = job.result()
    seconds = None if result["resumed"] else sum(result["stage_seconds"].values())
    return Found(known, order(known, job.seed), seconds, result["row_passes"])


def searches(entries: Sequence[Entry], seed: int, out: Path) -> list[Job]:
    """Return the searches of these rows with one seed."""
    return [search(entry, seed, out) for entry in entries]


def retrains(bench: Bench, done: Sequence[Found], seed: int, out: Path) -> list[Job]:
    """Return what has to be trained for these rankings, every set of fields once, the smallest first."""
    sets = {frozenset(ranking.order[:count]) for ranking in done for count in judging(bench).counts}
    jobs = [retrain(bench, tuple(fields), seed, out) for fields in sets]
    return sorted(jobs, key=lambda job: job.entry.name)


def judging(bench: Bench) -> Retraining:
    """Return how the rankings of a selection table are judged."""
    assert bench.retraining is not None
    return bench.retraining
