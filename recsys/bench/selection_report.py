"""What a selection table comes to: how good the fields of every ranking are, what it took to find them."""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.bench.execute import Job
from recsys.bench.ranking import AUKC, aukc, precision, rank_auc, spearman, stability
from recsys.bench.report import Spread, markdown, plain
from recsys.bench.retraining import AUC, count
from recsys.bench.selection import Found, found, judging, retrain, search
from recsys.bench.table import Bench, Entry
from recsys.errors import RunError

Read = Callable[[tuple[str, ...], int], Mapping[str, Any] | None]
"""(fields, seed) → what the base came to with these fields alone; None while it is not trained."""


@dataclass(frozen=True)
class Point:
    """The base, trained with the best fields of a ranking.

    Args:
        count: of the fields.
        fields: their names, the best first.
        metrics: split → metric → value.
        auc: on the table's split, the mean over tasks; None where it is undefined.
    """

    count: int
    fields: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float | None]]
    auc: float | None


@dataclass(frozen=True)
class Ranked:
    """What one seed of a row came to.

    Args:
        seed: of the search and of the training.
        search: what it found.
        curve: what is trained of it so far, the fewest fields first.
        aukc: of the whole curve; None while a point is missing.
        training: what training with all fields takes, in forward passes of one row; None where that is not trained.
        spearman: correlation of the ranks with those of the reference and the same seed.
        rank_auc: how likely an informative field has a larger score than a planted one.
        precision: share of informative fields among the first k, where k is how many there are.
    """

    seed: int
    search: Found
    curve: tuple[Point, ...]
    aukc: float | None
    training: int | None
    spearman: float | None
    rank_auc: float | None
    precision: float | None


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Args:
        name: of the row.
        seeds: those with a finished search.
        aukc: area under the curve, of the seeds whose curve is whole.
        curve: number of fields → AUC on the table's split.
        seconds: of the search.
        passes: what the search takes, in forward passes of one row; a backward pass counts as two.
        relative: the same, by what training once with all fields takes.
        stability: mean Jaccard index of the best halves of all pairs of seeds.
        spearman: correlation of the ranks with those of the reference.
        rank_auc: how likely an informative field has a larger score than a planted one.
        precision: share of informative fields among the first k, where k is how many there are.
    """

    name: str
    seeds: tuple[Ranked, ...]
    aukc: Spread | None
    curve: Mapping[int, Spread]
    seconds: Spread | None
    passes: Spread | None
    relative: Spread | None
    stability: float | None
    spearman: Spread | None
    rank_auc: Spread | None
    precision: Spread | None

    @property
    def whole(self) -> int:
        """How many seeds have a whole curve."""
        return sum(ranked.aukc is not None for ranked in self.seeds)


def summarise(bench: Bench, out: Path) -> list[Line]:
    """Return a line for every row of a table, from its finished runs."""
    known = {(e.name, seed): _search(bench, e, seed, out) for e in bench.entries for seed in bench.seeds}
    read = functools.cache(lambda fields, seed: _result(retrain(bench, fields, seed, out)))
    lines = []
    for entry in bench.entries:
        seeds = []
        for seed in bench.seeds:
            if (search := known[entry.name, seed]) is not None:
                reference = known.get((judging(bench).reference or "", seed))
                seeds.append(_ranked(bench, seed, search, reference, read))
        lines.append(_line(entry.name, seeds))
    return lines


def _search(bench: Bench, entry: Entry, seed: int, out: Path) -> Found | None:
    try:
        return found(search(entry, seed, out), bench)
    except RunError:
        return None  # what is wrong with it was told when it ended


def _result(job: Job) -> Mapping[str, Any] | None:
    return job.result() if job.done else None


def _ranked(bench: Bench, seed: int, search: Found, reference: Found | None, read: Read) -> Ranked:
    """One seed of a row."""
    judged = judging(bench)
    known = judged.informative, judged.planted
    curve = []
    for n in judged.counts:
        # Of a set, whoever ranked it: the runs are found by the names in one order.
        if (result := read(tuple(sorted(search.order[:n])), seed)) is not None:
            metrics = result["metrics"]
            curve.append(Point(n, search.order[:n], metrics, _auc(metrics.get(bench.split, {}))))
    areas = {point.count: point.auc for point in curve if point.auc is not None}
    plainly = read(tuple(sorted(judged.fields)), seed)
    return Ranked(
        seed,
        search,
        tuple(curve),
        aukc(areas) if len(areas) == len(judged.counts) else None,
        None if plainly is None else plainly["row_passes"],
        None if reference is None else _known(spearman(search.scores, reference.scores)),
        _known(rank_auc(search.scores, *known)),
        _known(precision(search.order, *known)) if judged.planted else None,
    )


def _auc(metrics: Mapping[str, float | None]) -> float | None:
    """The AUC, the mean over tasks; None where it is undefined."""
    values = [value for name, value in metrics.items() if name.rsplit("/", 1)[-1] == AUC]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _line(name: str, seeds: Sequence[Ranked]) -> Line:
    curve: dict[int, list[float]] = {}
    for ranked in seeds:
        for point in ranked.curve:
            if point.auc is not None:
                curve.setdefault(point.count, []).append(point.auc)
    halves = [ranked.search.order[: count(len(ranked.search.order), 0.5)] for ranked in seeds]
    return Line(
        name,
        tuple(seeds),
        _spread(ranked.aukc for ranked in seeds),
        {n: Spread.of(values) for n, values in sorted(curve.items())},
        _spread(ranked.search.seconds for ranked in seeds),
        _spread(ranked.search.passes for ranked in seeds),
        _spread(ranked.search.passes / ranked.training if ranked.training else None for ranked in seeds),
        _known(stability(halves)),
        _spread(ranked.spearman for ranked in seeds),
        _spread(ranked.rank_auc for ranked in seeds),
        _spread(ranked.precision for ranked in seeds),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


def cells(bench: Bench, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table, as text."""
    judged = judging(bench)
    columns: dict[str, Callable[[Line], str]] = {
        "row": lambda line: line.name,
        "curves": lambda line: f"{line.whole}/{len(bench.seeds)}",
        "AUKC": lambda line: _text(line.aukc, ".5f"),
        "search s": lambda line: _text(line.seconds, ".1f"),
        "row passes": lambda line: _text(line.passes, ",.0f"),
        "× training": lambda line: _text(line.relative, ".2f"),
        "stability": lambda line: "" if line.stability is None else f"{line.stability:.3f}",
    }
    if judged.reference is not None:
        columns[f"Spearman with {judged.reference}"] = lambda line: _text(line.spearman, ".3f")
    if judged.planted:
        columns["rank AUC"] = lambda line: _text(line.rank_auc, ".3f")
        columns["precision"] = lambda line: _text(line.precision, ".3f")
    return list(columns), [[text(line) for text in columns.values()] for line in lines]


def curve_cells(bench: Bench, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the curves, as text."""
    counts = judging(bench).counts
    rows = [[line.name, *(_text(line.curve.get(n), ".5f") for n in counts)] for line in lines]
    return ["row", *map(str, counts)], rows


def _text(spread: Spread | None, form: str) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:{form}}" + ("" if math.isnan(spread.sd) else f" ± {spread.sd:{form}}")


def legend(bench: Bench) -> list[str]:
    """Return what the columns mean, a line each."""
    judged = judging(bench)
    lines = [
        f"AUKC = {AUKC}, AUC on the {bench.split} split of {judged.recipe.name}, trained with the best n fields alone.",
        "search s: of the stages that rank, on the machine as it was; not of searches that were stopped and went on.",
        "row passes: of the search; a step of training counts as three a row. × training: by those of one training "
        "with all fields.",
        "stability: mean Jaccard index of the best halves of two seeds.",
    ]
    if noise := judged.planted:
        rest = len(judged.fields) - len(noise)
        told = "all others" if len(judged.informative) == rest else ", ".join(judged.informative)
        lines.append(
            f"rank AUC, precision: informative fields ({told}) before planted ones ({', '.join(noise)}); among the "
            f"best {len(judged.informative)} of them."
        )
    return lines


def write(bench: Bench, lines: Sequence[Line], out: Path) -> None:
    """Write `table.md`, `table.csv` and `table.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    header, rows = cells(bench, lines)
    curves = f"{bench.split} AUC by the number of fields:"
    text = "\n\n".join([markdown(header, rows), *legend(bench), curves, markdown(*curve_cells(bench, lines))])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (out / "table.json").write_text(json.dumps(to_json(bench, lines), indent=2) + "\n", encoding="utf-8")


def to_json(bench: Bench, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the table as plain values, with every curve and ranking; a standard deviation of one run is null."""
    judged = judging(bench)
    return {
        "table": bench.name,
        "split": bench.split,
        "seeds": list(bench.seeds),
        "base": judged.recipe.name,
        "fields": list(judged.fields),
        "planted": list(judged.planted),
        "informative": list(judged.informative),
        "counts": list(judged.counts),
        "reference": judged.reference,
        "aukc": AUKC,
        "rows": [plain(asdict(line)) for line in lines],
    }
