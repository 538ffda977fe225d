"""Fields in random order: what any ranking of fields has to be better than."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recsys.api import Best, Component, Fields, RankedFields, Ranking, Run, hookimpl


def random_order(fields: Fields, *, keep: Best = 0.5) -> RankedFields:
    """Ranks fields at random, as a control for selectors that claim to know better.

    I_f = 1 for the first field of a random order, then less, in equal steps down to 1/F for the last. The order follows
    from `train.seed` alone: repeat a comparison with several seeds, for one order may be a lucky one. It looks at
    nothing, so no training comes before it.

    Args:
        fields: of the model.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    return RankedFields(fields, RandomOrder(fields.names), keep)


@dataclass(frozen=True)
class RandomOrder:
    """Ranks fields by a run's seed."""

    names: tuple[str, ...]

    def __call__(self, run: Run) -> Ranking:
        """Draw the order."""
        generator = torch.Generator().manual_seed(run.seed("random_order"))
        order = torch.randperm(len(self.names), generator=generator).tolist()
        return Ranking({self.names[f]: (len(order) - place) / len(order) for place, f in enumerate(order)})


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = ({"use": "rank_fields"}, {"use": "prune"}, {"use": "fit"}, {"use": "evaluate"}, {"use": "export"})
    return [Component("selector", "random_order", random_order, stages)]
