"""Use a trained run: score new rows, or measure again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console

from recsys.contracts import Source, metric_name
from recsys.data.batches import EvalBatches
from recsys.data.blocks import EncodedColumns
from recsys.data.reading import source_rows
from recsys.data.report import SplitReport
from recsys.data.shards import Shards, write_blocks, write_shards
from recsys.data.split import split_rows
from recsys.errors import DataError, RecipeError, did_you_mean, listing
from recsys.plugin.registry import Registry
from recsys.recipe.build import build_source, data_root, load_trained
from recsys.recipe.check import Recipe
from recsys.train.progress import bar
from recsys.train.propensity import load_propensity
from recsys.train.run import PlantedTruth, Run, Scores
from recsys.train.stages import Evaluate

ENDINGS = (".parquet", ".csv", ".ndjson")
"""Of the files that scores can be written to."""


def predict_files(
    folder: Path,
    registry: Registry,
    files: Sequence[str],
    out: Path,
    *,
    keep: Sequence[str] = (),
    data_root_given: Path | None = None,
    console: Console,
) -> tuple[int, float, str]:
    """Score raw rows, in their order, all of them; write `score` (or `score_<task>`) beside the kept columns.

    Returns:
        (rows, share of values that the encoder did not know, what else encoding met in a few words)

    Raises:
        DataError: a column is missing or a value cannot be read.
    """
    if out.suffix not in ENDINGS:
        raise RecipeError(f"--out {out}: unknown ending '{out.suffix}'; known: {listing(ENDINGS)}")
    recipe, run, _ = load_trained(folder, registry, console)
    source = _source_over(recipe, registry, files, data_root_given)
    logs = source.scan("all")
    known = logs.collect_schema().names()
    for column in keep:
        if column not in known:
            raise RecipeError(f"--keep: no column '{column}'.{did_you_mean(column, known)} Columns: {listing(known)}")
    run.model.to(run.device)
    with tempfile.TemporaryDirectory() as temporary, bar(console) as progress:
        task = progress.add_task("encoding rows", total=None)
        counts = SplitReport()
        blocks = run.encoder.transform(source_rows(source, "all", listing(files, 3)), labels=False, report=counts)
        told = _telling(blocks, lambda: progress.update(task, completed=counts.rows))
        # Rows to be scored have inputs only.
        schema = replace(run.schema, tasks=(), context=())
        shards = write_blocks(schema, told, Path(temporary) / "rows")
        columns = _scores(run, shards)
        frame = pl.DataFrame(columns)
        for column in frame.columns:
            if column in keep:
                raise RecipeError(f"--keep {column}: the scores have that name; rename the column in the logs")
        if keep:
            frame = pl.concat([logs.select(keep).collect(), frame], how="horizontal")
    if frame.height != len(shards):
        raise DataError(f"{listing(files)}: {frame.height} rows were scored, {len(shards)} were read")
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(frame, out)
    names = [field.name for field in run.encoder.real]
    unknown = sum(column.unknown for name, column in counts.columns.items() if name in names)
    return frame.height, unknown / (frame.height * max(len(names), 1)), counts.remark()


def evaluate_run(
    folder: Path,
    registry: Registry,
    *,
    splits: Sequence[str] = (),
    metrics: Sequence[str] = (),
    intervals: float | None = None,
    data_root_given: Path | None = None,
    console: Console,
) -> tuple[Run, Scores]:
    """Measure a trained run again, with its own encoder, on the splits as the data is now.

    Args:
        folder: of the run.
        registry: of the installed plugins.
        splits: by default validation and test.
        metrics: by default those of the recipe.
        intervals: share that bounds of the scores are to hold; by default what the recipe says.
        data_root_given: where relative paths of data are looked for first.
        console: shows the scores.

    Raises:
        RecipeError: no such split or metric.
    """
    recipe, run, _ = load_trained(folder, registry, console)
    names = _named_metrics(recipe, registry, metrics)
    source = build_source(recipe, registry, data_root(recipe, data_root_given))
    rows = split_rows(source, recipe.data.split, rows=recipe.data.batch_rows)
    wanted = list(splits) or [name for name in ("valid", "test") if name in rows]
    for name in wanted:
        if name not in rows:
            raise RecipeError(f"no split '{name}'.{did_you_mean(name, rows)} Splits: {listing(rows)}")
    run.model.to(run.device)
    run.reference = source.reference if isinstance(source, PlantedTruth) else None
    run.scores = {}
    stage = _evaluate_stage(recipe, names, wanted, intervals)
    read = dict.fromkeys([*wanted, "train"] if stage.counts_train else wanted)
    with tempfile.TemporaryDirectory() as temporary:
        if run.propensity is not None:
            load_propensity(run, run.propensity)
        written = {name: write_shards(run.encoder, rows[name], Path(temporary) / name) for name in read}
        run.splits = {name: run.complete(shards) for name, shards in written.items()}
        run.folder = Path(temporary) / "run"
        run.stage = "evaluate"
        stage.run(run)
    return run, run.scores


def plain_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return scores for JSON, where an undefined metric is null."""
    return {
        split: {name: None if math.isnan(value) else value for name, value in values.items()}
        for split, values in scores.items()
    }


def _named_metrics(recipe: Recipe, registry: Registry, names: Sequence[str]) -> list[Any]:
    """The metrics of these names: those that the recipe gives such a name, else any that is installed."""
    stages = [checked.options.get("metrics", ()) for checked in recipe.stages if checked.name == Evaluate.name]
    own = {metric_name(spec): spec for specs in stages for spec in specs}
    for name in names:
        if name not in own:
            registry.check("metric", name, "--metric")
    return [own.get(name, name) for name in names]


def _evaluate_stage(recipe: Recipe, metrics: Sequence[Any], splits: Sequence[str], intervals: float | None) -> Evaluate:
    """The recipe's own stage, or the default one, with what was asked for in its place."""
    own = next((c.options for c in recipe.stages if c.name == Evaluate.name), {})
    chosen = {**own, "splits": tuple(splits) or None}
    chosen |= {"metrics": tuple(metrics)} if metrics else {}
    chosen |= {"intervals": intervals} if intervals is not None else {}
    return Evaluate(**chosen)


def _scores(run: Run, shards: Shards) -> dict[str, Any]:
    parts: dict[str, list[torch.Tensor]] = {}
    run.model.eval()
    with torch.inference_mode():
        for first, batch in EvalBatches(shards, run.train.eval_batch_size):
            for task, logit in run.model(batch.to(run.device)).items():
                if not bool(torch.isfinite(logit).all()):
                    row = first + int((~torch.isfinite(logit)).nonzero()[0, 0]) + 1
                    raise DataError(f"row {row}: the model's prediction is not finite; are its numbers far too large?")
                parts.setdefault(task, []).append(logit.double().sigmoid().cpu())
    single = len(run.schema.tasks) == 1
    return {
        "score" if single else f"score_{task}": (torch.cat(parts[task]) if parts else torch.empty(0)).numpy()
        for task in run.schema.tasks
    }


def _source_over(recipe: Recipe, registry: Registry, files: Sequence[str], given: Path | None) -> Source:
    """Return the recipe's source over other files: side tables are joined on as in training."""
    spec = {"use": "files", "path": list(files)}
    if recipe.data.source.get("use") == "files":
        kept = {k: v for k, v in recipe.data.source.items() if k not in ("train", "valid", "test", "path", "format")}
        spec = {**kept, **spec}
    root = data_root(recipe, given)
    root = replace(root, candidates=(Path.cwd(), *root.candidates))
    return build_source(replace(recipe, data=recipe.data.model_copy(update={"source": spec})), registry, root)


def _write(frame: pl.DataFrame, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    match out.suffix:
        case ".parquet":
            frame.write_parquet(out)
        case ".csv":
            frame.write_csv(out)
        case _:
            frame.write_ndjson(out)


def _telling(blocks: Iterator[EncodedColumns], tell: Callable[[], None]) -> Iterator[EncodedColumns]:
    for block in blocks:
        yield block
        tell()
