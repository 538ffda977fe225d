"""The stage that has a selector rank the fields."""

from __future__ import annotations

import time

from recsys.abilities import Ranking
from recsys.errors import RecipeError
from recsys.train.checkpoint import write_json
from recsys.train.run import Run

SCORES = "scores.json"
"""What the selector said of each field, in the folder of the stage that asked for it or removed what it left out."""
COST = "cost.json"
"""What it took to find out: seconds, and forward passes of one row."""


class RankFields:
    """Have the selector rank the fields: from the model as it is trained now, or from the rows alone.

    Needed by selectors that do not learn while the model is trained, such as permutation importance; it comes after
    the training that they judge by, and before `prune`. The scores are in `scores.json`, what they took in `cost.json`.
    """

    name = "rank_fields"

    def run(self, run: Run) -> None:
        """Fill the selector's scores.

        Raises:
            RecipeError: the selector has nothing to rank fields by, or is pruned away.
        """
        selector = run.model.selector
        if not isinstance(selector, Ranking):
            raise RecipeError(
                f"{run.stage}: the selector ({type(selector).__name__}) ranks no fields in a stage of its own; leave "
                "this stage out, or put it before prune"
            )
        started = time.monotonic()
        run.model.to(run.device)
        found = selector.rank(run)
        seconds = time.monotonic() - started
        run.row_passes += found.passes
        run.keep_weights()
        order = sorted(found.scores, key=lambda name: -found.scores[name])
        if run.world.leads:
            write_json(run.stage_folder / SCORES, {name: found.scores[name] for name in order})
            write_json(run.stage_folder / COST, {"seconds": round(seconds, 3), "row_passes": found.passes})
        shown = ", ".join(f"{name} {found.scores[name]:.3g}" for name in order[:10])
        run.say(f"{run.stage}: {shown}{', …' if len(order) > 10 else ''} ({seconds:.1f} s)")
        if len(order) > 1 and found.scores[order[0]] == found.scores[order[-1]]:
            run.say(f"[yellow]warning: {run.stage} tells no field from another; the first ones are kept[/yellow]")
