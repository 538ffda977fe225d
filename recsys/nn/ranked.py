"""The selector that keeps the best fields of a ranking; who ranks them is given to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from recsys.contracts import Fields, Selection
from recsys.errors import RecipeError

Best = PositiveInt | Annotated[float, Field(gt=0, le=1)]
"""How many of the fields are kept: a number of fields, or a share of them (`1.0`: all; `1`: a single one)."""


@dataclass(frozen=True)
class Ranking:
    """What was found about the fields.

    Args:
        scores: field → importance, larger for what matters more; every field of the model has a finite one.
        passes: what it took to find out, in forward passes of one row; a backward pass counts as two.
    """

    scores: Mapping[str, float]
    passes: int = 0


def best(fields: Fields, scores: Tensor, keep: int | float) -> Tensor:
    """Which fields are among the best, `[F] -> [F]` bool, on the CPU; of equals, those that come first.

    Args:
        fields: all of them.
        scores: importance of each, `[F]`.
        keep: as of `Best`; at least one field is kept.
    """
    order = scores.detach().cpu().argsort(descending=True, stable=True)
    kept = torch.zeros(len(fields), dtype=torch.bool, device="cpu")
    kept[order[: how_many(fields, keep)]] = True
    return kept


def passing(fields: Fields, scores: Tensor, keep: int | float) -> Tensor:
    """Which fields pass a gate, `[F] -> [F]` bool; nothing waits for the device.

    Those that `best` names; all of them as long as no score differs from another, as before anything is learned.

    Args:
        fields: all of them.
        scores: importance of each, `[F]`.
        keep: as of `Best`.
    """
    return among_best(scores, how_many(fields, keep)) | (scores.amax() == scores.amin())


def among_best(scores: Tensor, most: int) -> Tensor:
    """The `most` largest of `[F]`, of equals the first, as bool `[F]`: by the number of better ones."""
    s, place = scores.detach(), torch.arange(len(scores), device=scores.device)
    ahead = (s.unsqueeze(0) > s.unsqueeze(1)) | ((s.unsqueeze(0) == s.unsqueeze(1)) & (place < place.unsqueeze(1)))
    return ahead.sum(1) < most


def how_many(fields: Fields, keep: int | float) -> int:
    """How many fields are kept, `keep` as of `Best`.

    Raises:
        RecipeError: more than there are.
    """
    if isinstance(keep, int):
        if keep > len(fields):
            raise RecipeError(f"keep: {keep} fields are asked for, and the model has {len(fields)}")
        return keep
    return max(round(keep * len(fields)), 1)


def chosen(names: Sequence[str], kept: Tensor) -> Selection:
    """The selection of whole fields, `kept [F]` bool."""
    return Selection(tuple(name for name, own in zip(names, kept.tolist(), strict=True) if own))


class RankedFields(nn.Module):
    """Keeps the best fields of a ranking, that the stage `rank_fields` asks for; until then, all.

    Nothing is learned and nothing is changed while a model is trained; once the fields are ranked, those that are not
    among the best give zeros, and the stage `prune` removes them.

    Args:
        fields: of the model.
        rank: is given the run (`recsys.api.Run`) and finds the ranking; draws by `run.seed(…)` alone.
        keep: how many of the fields are kept, a number or a share.
    """

    def __init__(self, fields: Fields, rank: Callable[[Any], Ranking], keep: int | float) -> None:
        super().__init__()
        how_many(fields, keep)
        self.fields, self.keep, self._rank = fields, keep, rank
        self.importance: Tensor
        self.ranked: Tensor
        self.register_buffer("importance", torch.zeros(len(fields)))
        self.register_buffer("ranked", torch.zeros((), dtype=torch.bool))

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        return torch.where(self._open().view(-1, 1), e, 0.0)

    def penalty(self) -> Tensor:
        """Zero, `[]`."""
        return torch.zeros((), device=self.importance.device)

    def anneal(self, progress: float) -> None:
        """Nothing to anneal."""

    def rank(self, run: Any) -> Ranking:
        """Rank the fields of the run's model as it is, all of them open.

        Raises:
            RecipeError: a field has no finite score.
        """
        self.ranked.fill_(False)
        found = self._rank(run)
        scores = torch.tensor([found.scores.get(name, torch.nan) for name in self.fields.names])
        if not bool(scores.isfinite().all()):
            name = self.fields.names[int((~scores.isfinite()).nonzero()[0])]
            raise RecipeError(f"{run.stage}: the field '{name}' has no finite score")
        self.importance.copy_(scores)
        self.ranked.fill_(True)
        return found

    def kept(self) -> Selection:
        """The best fields; all of them before they are ranked."""
        return chosen(self.fields.names, self._open())

    def scores(self) -> Mapping[str, Tensor]:
        """The importance of each field, `[]`; zero before they are ranked."""
        return dict(zip(self.fields.names, self.importance.detach().clone(), strict=True))

    def _open(self) -> Tensor:
        """Which fields pass, `[F]` bool."""
        return among_best(self.importance, how_many(self.fields, self.keep)) | ~self.ranked
