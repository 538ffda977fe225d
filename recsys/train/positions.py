"""The stage that tells how likely a look at each position is, as far as a part of the run has learned it."""

from __future__ import annotations

import torch
from rich.table import Table as TextTable
from torch import Tensor

from recsys.abilities import Examining
from recsys.data.batches import EvalBatches
from recsys.errors import RecipeError
from recsys.train.checkpoint import write_json
from recsys.train.run import Run


class Positions:
    """Tell how likely a look at each position is, as the loss or the propensity model found, beside the rate of clicks.

    All as multiples of the first position's. The rate of clicks is that of the rows of the train split, where better
    rows usually stand first: it falls faster than looks do. Written to `positions.json`.
    """

    name = "positions"

    def run(self, run: Run) -> None:
        """Write and print the table.

        Raises:
            RecipeError: neither the loss nor the propensity model learns it, or the data has no positions.
        """
        parts: dict[str, object] = {"loss": run.loss, "propensity": run.propensity}
        knowing = {name: part for name, part in parts.items() if isinstance(part, Examining)}
        found = {name: part.examination().cpu().double() for name, part in knowing.items()}
        if not found:
            raise RecipeError(f"{run.stage}: neither the loss nor the propensity model learns looks at positions")
        if not run.world.leads:
            return
        numbers, rate = _click_rate(run)
        columns = {"click_rate": rate, **found}
        columns = {name: values[: len(numbers)] / values[0] for name, values in columns.items()}
        written = {name: [round(v, 6) for v in values.tolist()] for name, values in columns.items()}
        write_json(run.stage_folder / "positions.json", {"position": numbers.tolist(), **written})
        table = TextTable(title=run.stage, title_justify="left")
        for name in ("position", *columns):
            table.add_column(name.replace("_", " "), justify="right")
        for i, number in enumerate(numbers.tolist()):
            cells = [values[i] if i < len(values) else values[-1] for values in columns.values()]
            table.add_row(str(number), *(f"{float(cell):.4f}" for cell in cells))
        run.console.print(table)


def _click_rate(run: Run) -> tuple[Tensor, Tensor]:
    """The positions of the train split in ascending order, and the mean label of the first task at each."""
    if "position" not in run.schema.context:
        raise RecipeError(f"{run.stage}: the data has no context column 'position'; name one under data.context")
    places, labels = [], []
    for _, batch in EvalBatches(run.split("train"), run.train.eval_batch_size):
        places.append(batch.context["position"])
        labels.append(batch.label[run.schema.tasks[0]].double())
    numbers, place = torch.unique(torch.cat(places), return_inverse=True)
    rows = torch.bincount(place, minlength=len(numbers))
    return numbers, torch.bincount(place, torch.cat(labels), len(numbers)) / rows
