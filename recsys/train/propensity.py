"""The recipe's propensity model: fitted once on the train split, kept in the run's folder, taken up on resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recsys.contracts import Batch, Propensity
from recsys.data.batches import EvalBatches
from recsys.data.shards import Shards
from recsys.errors import RecipeError, RunError
from recsys.train.checkpoint import load_tensors, save_tensors
from recsys.train.distributed import led, wait_for_all
from recsys.train.run import Run

FILE = "propensity.safetensors"
"""In the run's folder: what was fitted."""


class Rows:
    """All rows of a split in the order of the logs, a batch at a time, as often as one likes."""

    def __init__(self, shards: Shards, batch_size: int) -> None:
        self._batches = EvalBatches(shards, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self._batches)


def fit_propensity(run: Run, shards: Shards) -> None:
    """Fit the run's propensity model, unless that was done before; every process then has what one of them fitted.

    Args:
        run: nothing happens if its recipe has no propensity model.
        shards: rows of the train split.

    Raises:
        RecipeError: the log has a propensity of its own.
        DataError: the rows cannot tell it.
    """
    model = run.propensity
    if model is None:
        return
    if "propensity" in shards.schema.context:
        raise RecipeError(
            "propensity: the log has a context column 'propensity' already; keep one of the two", path=("propensity",)
        )
    path = run.folder / FILE

    def fit() -> None:
        if not run.world.leads or path.exists():
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed("propensity"))
            model.fit(Rows(shards, run.train.eval_batch_size))
        save_tensors(path, model.state_dict())

    led(run.world, fit)
    wait_for_all()
    load_propensity(run, model)


def load_propensity(run: Run, model: Propensity) -> None:
    """Take up what was fitted when the run was started.

    Raises:
        RunError: the file is missing, damaged or of another model.
    """
    path = run.folder / FILE
    state = load_tensors(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{path}: what was fitted does not fit the recipe's propensity model\n{error}") from None
