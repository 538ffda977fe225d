"""The stages that every recipe can use besides `fit`: rewind, reset, prune, quantize, evaluate; others are apart."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from recsys.abilities import Lasting
from recsys.contracts import Stage
from recsys.errors import RecipeError, did_you_mean, listing
from recsys.nn.model import Model
from recsys.nn.selection import is_everything, is_nothing
from recsys.train.checkpoint import read_json, write_json
from recsys.train.counts import CountRows
from recsys.train.evaluate import Evaluate
from recsys.train.fit import Fit
from recsys.train.positions import Positions
from recsys.train.rank import SCORES, RankFields
from recsys.train.run import Run, no_snapshot
from recsys.train.speed import first_rows, milliseconds

__all__ = [
    "CountRows",
    "Evaluate",
    "Fit",
    "Positions",
    "Prune",
    "Quantize",
    "RankFields",
    "Reset",
    "Rewind",
    "check_order",
]

SELECTOR_PREFIX = "selector."


class Rewind:
    """Put the weights back to the snapshot of an earlier fit stage; what was decided to leave out stays decided.

    The selector keeps all that it learned, and the embedding its decision.

    It comes before `prune`: the other order would undo the pruning.

    Args:
        to: name of the fit stage that kept a snapshot (`snapshot_epoch`).
        keep: names of parameters that stay as they are, such as `interactions.0.bias`; `*` stands for any part of one.
    """

    name = "rewind"

    def __init__(self, *, to: str, keep: tuple[str, ...] = ()) -> None:
        self.to = to
        self.keep = keep

    def run(self, run: Run) -> None:
        """Load the snapshot into `run.model`."""
        if run.state["selections"]:
            raise RecipeError(f"{run.stage}: rewind after prune would undo the pruning; put it before")
        stay = [name for pattern in self.keep for name in self._matching(run, pattern)]
        now = run.model.state_dict()
        _load_all_but_decisions(run.model, {**run.snapshot(self.to), **{name: now[name] for name in stay}})
        run.keep_weights()

    def _matching(self, run: Run, pattern: str) -> list[str]:
        """The parameters with such names.

        Raises:
            RecipeError: there is none.
        """
        known = [name for name, _ in run.model.named_parameters()]
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            hint = f"{did_you_mean(pattern, known)} Parameters: {listing(known)}"
            raise RecipeError(f"{run.stage}: keep: no parameter is called '{pattern}'.{hint}")
        return found


class Reset:
    """Start again from fresh initial weights; what was decided to leave out stays decided.

    The selector keeps all that it learned, and the embedding its decision. It comes before `prune`.

    Args:
        reseed: draw other initial weights than the first ones.
    """

    name = "reset"

    def __init__(self, *, reseed: bool = False) -> None:
        self.reseed = reseed

    def run(self, run: Run) -> None:
        """Give `run.model` initial weights."""
        if run.state["selections"]:
            raise RecipeError(f"{run.stage}: reset after prune would undo the pruning; put it before")
        seed = run.seed(run.stage, "weights") if self.reseed else run.seed("weights")
        _load_all_but_decisions(run.model, run.build_model(seed).state_dict())
        run.keep_weights()


class Prune:
    """Remove what the selector and the embedding left out, physically: a smaller model, the same predictions.

    Its `prune.json` tells the bytes before and after, and the median time of scoring some rows.
    """

    name = "prune"

    def run(self, run: Run) -> None:
        """Replace `run.model` by its smaller version."""
        before, rows = run.model.bytes(), first_rows(run.split("train"))
        slow = milliseconds(run.model, rows) if run.world.leads else 0.0
        selection, scores = run.model.kept(), run.model.scores()
        whole = is_everything(selection, run.model.embedding.fields)
        gone = [name for name in run.model.embedding.fields.names if name not in selection.fields]
        run.apply_selection(selection)
        run.keep_weights()
        after = run.model.bytes()
        if run.world.leads:
            quick = milliseconds(run.model, rows)
            told: dict[str, float] = {"bytes_before": before, "bytes_after": after, "rows_timed": len(rows)}
            told |= {"milliseconds_before": round(slow, 3), "milliseconds_after": round(quick, 3)}
            write_json(run.stage_folder / "prune.json", told)
            if scores:
                write_json(run.stage_folder / SCORES, scores)
        nothing = " (everything is kept)" if whole else ""
        run.say(f"{run.stage}: {before:,} → {after:,} bytes{nothing}")
        if run.world.leads:
            run.say(f"{run.stage}: {len(rows):,} rows are scored in {slow:.2f} → {quick:.2f} ms")
        if gone and run.model.head.table_parameters():
            run.say(
                f"[yellow]warning: {run.stage} removes {listing(gone)} from the embedding alone; first-order weights "
                "(`model.head.wide`) keep them, and the model goes on reading them[/yellow]"
            )
        if is_nothing(selection, run.model.embedding.fields):
            run.say(
                f"[yellow]warning: {run.stage} kept no number of any field; the embedding tells no row apart[/yellow]"
            )


class Quantize:
    """Store the numbers of the embedding in fewer bits; stages after it see the rounded ones, which learn no more.

    int8: whole numbers times a step for each vocabulary, the largest of its numbers divided by 127. The rest of the
    model stays as it is, and can still be trained.

    Args:
        to: how numbers are stored.
    """

    name = "quantize"

    def __init__(self, *, to: Literal["float16", "int8"] = "int8") -> None:
        self.to = to

    def run(self, run: Run) -> None:
        """Replace the embedding of `run.model`.

        Raises:
            RecipeError: the embedding cannot do it, or has done it already.
        """
        before = run.model.bytes()
        try:
            run.apply_quantization(self.to)
        except RecipeError as error:
            raise RecipeError(f"{run.stage}: {error}") from error
        run.keep_weights()
        after = run.model.bytes()
        if run.world.leads:
            write_json(run.stage_folder / "quantize.json", {"bytes_before": before, "bytes_after": after})
        run.say(f"{run.stage}: {before:,} → {after:,} bytes")


def selector_scores(run: Run) -> dict[str, float]:
    """What the selector says of each field, or said before it was pruned away; empty if there was none."""
    kept = [run.folder / name for name in run.state["selections"]]
    written = [path.with_name(SCORES) for path in kept if path.with_name(SCORES).exists()]
    return dict(read_json(written[-1])) if written else run.model.scores()


def check_order(stages: Sequence[tuple[str, Stage]]) -> None:
    """Refuse stages that cannot follow each other, before hours are spent on those in front.

    Args:
        stages: (label, stage) in order.

    Raises:
        RecipeError: a rewind to a snapshot that no stage before it keeps; a rewind or reset after prune or quantize; a
            prune after quantize.
    """
    kept: list[str] = []
    pruned = quantized = other = False
    for label, stage in stages:
        if isinstance(stage, Fit):
            kept += [stage.name] if stage.snapshot_epoch is not None else []
        elif isinstance(stage, Prune):
            pruned = True
            if quantized:
                raise RecipeError(f"{label}: prune after quantize; put it before")
        elif isinstance(stage, Quantize):
            if quantized:
                raise RecipeError(f"{label}: the numbers are stored in fewer bits already")
            quantized = True
        elif isinstance(stage, Rewind | Reset):
            if pruned or quantized:
                undone = "prune would undo the pruning" if pruned else "quantize would undo the rounding"
                raise RecipeError(f"{label}: {stage.name} after {undone}; put it before")
            if isinstance(stage, Rewind) and stage.to not in kept and not other:
                raise RecipeError(f"{label}: {no_snapshot(stage.to, kept)}")
        elif not isinstance(stage, CountRows | Evaluate | Positions | RankFields):
            other = True  # a plugin's stage may keep snapshots of any name


def _load_all_but_decisions(model: Model, weights: Mapping[str, Any]) -> None:
    own = {name: t for name, t in model.state_dict().items() if name.startswith(SELECTOR_PREFIX)}
    if isinstance(model.embedding, Lasting):
        own |= {f"embedding.{name}": t for name, t in model.embedding.decision().items()}
    model.load_state_dict({**weights, **own})
