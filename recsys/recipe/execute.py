"""Carry a recipe out: data, stages, result; anew or from where a run stopped, in one process or several."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from recsys.abilities import Checking, Ranking
from recsys.contracts import Source, Stage
from recsys.data.encode import Encoder
from recsys.data.encode_pass import QUARANTINE
from recsys.data.prepare import Prepared
from recsys.deploy.calibrate import Calibrate, check_calibrated_last
from recsys.deploy.export import Export
from recsys.errors import RecipeError, RecsysError, RunError, listing
from recsys.nn.fixed import Fixed
from recsys.nn.selection import KeepAll
from recsys.plugin.options import arguments
from recsys.plugin.registry import Registry
from recsys.recipe import reader
from recsys.recipe.build import (
    build_run,
    build_source,
    data_root,
    describe_run,
    prepare_data,
    read_run,
    write_run,
)
from recsys.recipe.check import Recipe, check_document
from recsys.train import distributed
from recsys.train.checkpoint import alone_in, read_json, sweep, write_json
from recsys.train.memory import keep_freed_memory
from recsys.train.propensity import fit_propensity
from recsys.train.run import Run
from recsys.train.stages import CountRows, Prune, Quantize, RankFields, check_order

DRIFT = ("recsys", "packages", "plugins")
"""What must be as it was for a resumed run to go on as if it had never stopped; and the data, always."""

CHANGEABLE = tuple(
    f"train.{name}"
    for name in ("learning_rate", "clip_norm", "non_finite", "skip_budget", "epochs", "patience", "save_every")
)
"""Options that a resumed run may change; a checkpoint of the others' values would mean something else."""


def new_folder(recipe: Recipe, out: Path | None) -> Path:
    """Return the folder of a new run.

    Raises:
        RunError: `out` holds something already.
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{recipe.folder.name}-{recipe.name}-{stamp}-{os.getpid() % 10000:04d}"
    if out.exists() and not _launched() and not _never_began(out):
        raise RunError(
            f"{out} is not empty. Continue the run in it with `recsys train --resume {out}`, or name another folder"
        )
    return out


def _never_began(folder: Path) -> bool:
    """Whether the folder holds nothing but what a start that was killed before `run.json` leaves."""
    names = {path.name for path in folder.iterdir()}
    return all(n in ("encoder", "recipe.json") or (n.startswith(".") and n.endswith(".tmp")) for n in names)


def resumed(
    folder: Path, registry: Registry, changes: Sequence[str] = (), allow_drift: bool = False
) -> tuple[Recipe, Path]:
    """Return the recipe of a run that is to go on.

    Args:
        folder: of the run.
        registry: of the installed plugins.
        changes: overrides of options in `CHANGEABLE`.
        allow_drift: whether the user asked for changes.

    Raises:
        RunError: a change that was not asked for, or one of an option that the checkpoint depends on.
    """
    recipe, _ = read_run(folder, registry)
    if not changes:
        return recipe, folder
    fixed = [text for text in changes if text.split("=")[0].strip() not in CHANGEABLE]
    if fixed:
        raise RunError(f"--resume: {listing(fixed)} cannot change within a run; what can: {listing(CHANGEABLE)}")
    if not allow_drift:
        raise RunError(f"{folder}: the run was started with other options; --allow-drift changes them all the same")
    document = recipe.document
    for text in changes:
        document = reader.override(document, text)
    changed = check_document(document, registry, recipe.name, recipe.folder)
    return replace(changed, data_root=recipe.data_root), folder


def must_launch(recipe: Recipe) -> bool:
    """Whether other processes have to be started for this recipe."""
    return recipe.train.devices > 1 and not _launched()


def launch_all(arguments: Sequence[str], recipe: Recipe) -> None:
    """Start the processes of a recipe that trains on several devices, and exit as they do."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if recipe.train.accelerator == "gpu" and torch.cuda.device_count() < recipe.train.devices:
        raise RunError(
            f"train.devices: {recipe.train.devices} asked for, this machine has {torch.cuda.device_count()} GPUs"
        )
    try:
        distributed.launch(arguments, recipe.train.devices)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@dataclass
class Session:
    """One call of `recsys train`."""

    recipe: Recipe
    registry: Registry
    folder: Path
    resume: bool = False
    allow_drift: bool = False
    data_root: Path | None = None
    console: Console = field(default_factory=Console)

    def run(self) -> dict[str, Any] | None:
        """Do everything; return the result, from the process that leads."""
        started = time.monotonic()
        keep_freed_memory()
        if self.recipe.train.threads:
            torch.set_num_threads(self.recipe.train.threads)
        world = distributed.join_world(self.recipe.train.accelerator)
        try:
            run = self._run(world, self.console)
            return self._report(run, time.monotonic() - started) if world.leads else None
        except RecsysError as error:
            # Every process meets the same error; one message is enough.
            if world.leads:
                raise
            sys.stderr.write(f"rank {world.rank}: {error}\n")
            sys.exit(1)
        except KeyboardInterrupt:
            if world.leads and (self.folder / "run.json").exists():
                sys.stderr.write(f"stopped; `recsys train --resume {self.folder}` continues\n")
            raise
        finally:
            distributed.leave_world()

    def _run(self, world: distributed.World, console: Console) -> Run:
        source = build_source(self.recipe, self.registry, data_root(self.recipe, self.data_root))
        prepared = prepare_data(self.recipe, source, console, world)
        facts = describe_run(self.recipe, self.registry, prepared.fingerprint, sys.argv[1:], self.data_root)
        with contextlib.ExitStack() as held:
            distributed.led(world, lambda: held.enter_context(alone_in(self.folder)) if world.leads else None)
            return self._train(source, prepared, facts, world)

    def _train(self, source: Source, prepared: Prepared, facts: Mapping[str, Any], world: distributed.World) -> Run:
        console, encoder = self.console, prepared.encoder
        if world.leads:
            sweep(self.folder)
        if self.resume:
            self._refuse_drift(facts, console)
            self._keep_changes(world, console)
            encoder = Encoder.load(self.folder / "encoder")
        elif world.leads:
            write_run(self.folder, self.recipe, facts, encoder)
        distributed.wait_for_all()
        run = build_run(
            self.recipe,
            self.registry,
            self.folder,
            encoder,
            prepared.splits,
            world=world,
            console=console,
            source=source,
        )
        run.restore()
        run.restore_loss()
        fit_propensity(run, prepared.splits["train"])
        parameters = sum(p.numel() for p in run.model.parameters())
        rows = ", ".join(f"{name} {len(shards):,}" for name, shards in prepared.splits.items())
        run.say(f"{self.recipe.name}: {rows} rows · {len(run.schema.fields)} fields · {parameters:,} parameters")
        if world.leads and not (self.folder / "data.json").exists():
            see = "data.json"
            if (aside := prepared.folder / QUARANTINE).is_file():
                shutil.copyfile(aside, self.folder / QUARANTINE)
                see += f" and {QUARANTINE}"
            write_json(self.folder / "data.json", prepared.report.to_json())
            for remark in prepared.report.remarks():
                run.say(escape(f"{remark} (see {see})"))
            for warning in prepared.report.warnings:
                run.say(f"[yellow]warning: {escape(warning)}[/yellow]")
        run.model.to(run.device)
        if isinstance(run.loss, nn.Module):
            run.loss.to(run.device)
        run_stages(run, self.recipe, self.registry)
        return run

    def _refuse_drift(self, now: Mapping[str, Any], console: Console) -> None:
        _, then = read_run(self.folder, self.registry)
        if then["data"] != now["data"]:
            raise RunError(
                f"{self.folder}: the data has changed since the run was started; its ids would mean other values"
            )
        lines = [line for key in DRIFT for line in _differences(key, then.get(key), now[key])]
        if lines and not self.allow_drift:
            raise RunError(
                f"{self.folder}: what the run was started with has changed; --allow-drift goes on all the same:\n  "
                + "\n  ".join(lines)
            )
        for line in lines:
            console.print(f"[yellow]changed since the run was started: {line}[/yellow]")

    def _keep_changes(self, world: distributed.World, console: Console) -> None:
        """Write the recipe of a resumed run with the options that the user has changed."""
        distributed.wait_for_all()  # every process has read the folder
        now = self.recipe.document.value
        if world.leads:
            lines = _differences("", read_json(self.folder / "recipe.json"), now)
            for line in lines:
                console.print(f"[yellow]changed since the run was started: {escape(line.lstrip('.'))}[/yellow]")
            if lines:
                write_json(self.folder / "recipe.json", now)

    def _report(self, run: Run, seconds: float) -> dict[str, Any]:
        result = {
            "run": str(self.folder),
            "metrics": {
                split: {name: None if math.isnan(value) else value for name, value in scores.items()}
                for split, scores in run.scores.items()
            },
            "seconds": round(seconds, 3),
            "stage_seconds": run.stage_seconds,
            "resumed": self.resume,
            "rows_per_second": round(run.rows_trained / run.seconds_training, 1) if run.seconds_training else None,
            "row_passes": 3 * run.rows_trained + run.row_passes,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "bytes": run.model.bytes(),
            "embedding_bytes": sum(t.nbytes for t in run.model.embedding.export_tables().values()),
        }
        write_json(self.folder / "metrics.json", result)
        speed = f"{result['rows_per_second']:,.0f} rows/s · " if result["rows_per_second"] else ""
        run.say(f"{seconds:.1f} s · {speed}{result['parameters']:,} parameters · saved in {self.folder}")
        return result


def run_stages(run: Run, recipe: Recipe, registry: Registry) -> None:
    """Run the stages in order, skipping those that the run has behind it."""
    stages: list[tuple[str, Stage]] = []
    for index, checked in enumerate(recipe.stages, 1):
        stage = registry.get("stage", checked.name).component.factory(**arguments(checked.options))
        stages.append((f"{index}-{checked.options.get('name') or checked.name}", stage))
    check_order([named for named in stages if not isinstance(named[1], Calibrate | Export)])
    check_calibrated_last(stages)
    pruned = any(isinstance(stage, Prune) for _, stage in stages)
    if pruned and not run.state["selections"]:
        try:
            run.model.check_budgets(next((stage.to for _, stage in stages if isinstance(stage, Quantize)), "float32"))
        except RecipeError as error:
            raise recipe.located(error) from error
    _check_stages_of_parts(run, stages)
    if run.model.decides and not pruned:
        run.say("[yellow]warning: the model chooses what to leave out, but no stage `prune` removes it[/yellow]")
    selector = run.model.selector
    judges = not isinstance(selector, KeepAll | Fixed | Ranking)  # by what it learns while the model is trained
    if judges and not run.state["stages"] and run.model.head.table_parameters():
        run.say(
            "[yellow]warning: first-order weights (`model.head.wide`) do not pass the selector; a field that they use "
            "looks less useful to it than it is, and stays in them when it is dropped[/yellow]"
        )
    for label, stage in stages:
        if label in run.state["stages"]:
            run.say(f"{label}: done before")
            continue
        run.stage = label
        registry.hooks.recsys_before_stage(run=run, stage=label)
        # A stage that follows others draws what it would draw if the run had been stopped and resumed before it.
        lightning.seed_everything(run.seed(label, "stage", run.world.rank) % 2**32, verbose=False)
        started = time.monotonic()
        stage.run(run)
        run.stage_seconds[label] = round(time.monotonic() - started, 3)
        run.stage_done(label)
        registry.hooks.recsys_after_stage(run=run, stage=label, metrics=run.scores)


def _check_stages_of_parts(run: Run, stages: Sequence[tuple[str, Stage]]) -> None:
    """Refuse a recipe that lacks a stage which a part of the model needs, or columns that are to be measured.

    Raises:
        RecipeError: nobody counts rows or ranks fields; or a column is missing.
    """
    for label, stage in stages:
        if isinstance(stage, Checking) and label not in run.state["stages"]:
            run.stage = label
            stage.check(run)
    kinds = [type(stage) for _, stage in stages]
    needing = [part for part in run.model.counting() if part.needs_counts]
    if needing and CountRows not in kinds:
        raise RecipeError(
            f"stages: {type(needing[0]).__name__} must know how often values are used; put {{use: count_rows}} first"
        )
    if isinstance(run.model.selector, Ranking) and Prune in kinds and RankFields not in kinds[: kinds.index(Prune)]:
        label = stages[kinds.index(Prune)][0]
        raise RecipeError(f"{label}: the selector has ranked no fields; put {{use: rank_fields}} before")


def _differences(key: str, then: Any, now: Any) -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = sorted({*then, *now})
        return [line for name in names for line in _differences(f"{key}.{name}", then.get(name), now.get(name))]
    return [] if then == now else [f"{key}: {then} → {now}"]
