"""Unlabelled rows beside the logged ones: the same user and context with another item of the train split.

Which item a row gets is a function of (seed, epoch, position of the logged row), so neither a stop nor the number of
processes changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recsys.abilities import Choosing
from recsys.contracts import SAMPLED, Batch, EncodedSchema, Items, Sampler
from recsys.data.hashing import mix, mix_array
from recsys.data.items import Catalogue, read_catalogue
from recsys.data.popularity import SlotPopularity, read_popularity
from recsys.data.shards import Shards
from recsys.errors import RecipeError, did_you_mean, listing

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ROUNDS = 64
"""How often a positive pair is drawn again; of a user who likes nine draws in ten, one in 850 remains."""
UNLOGGED = ("observed", "uniform")
"""Context columns that are 0 for a sampled row: nobody logged it."""
OF_ITEM = ("popularity", "propensity")
"""Context columns that a sampled row takes from the newest row of its item, not from the row it belongs to."""


class SamplingOptions(BaseModel):
    """The `sampling:` block of a recipe, but for the sampler itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    item: str = Field(description="categorical field that tells items apart")
    fields: tuple[str, ...] = Field(
        default=(),
        description="fields and multi-valued fields that belong to the item and change with it; all others stay",
    )
    user: str | None = Field(default=None, description="categorical field that tells users apart")
    negatives: int = Field(default=4, ge=1, description="sampled rows for each logged row")
    positives: Literal["ignore", "exclude", "label"] = Field(
        default="ignore",
        description="what is done with a sampled pair of user and item that the train split has as a positive: give "
        "it the label 0 like any other, draw another item, or keep its label of 1",
    )
    rows: Literal["all", "positives"] = Field(
        default="all", description="logged rows that are trained on: all, or only those with a label of 1"
    )
    popularity_slots: int = Field(
        default=0,
        ge=0,
        description="fill the context column `popularity` with the item's share of the clicks of the row's time slot, "
        "from 0 to 1, so many slots of equal length; 0 does not",
    )

    @property
    def context(self) -> tuple[str, ...]:
        """The context columns that batches get."""
        return (*SAMPLED, *(("popularity",) if self.popularity_slots else ()))


def check_sampling(options: SamplingOptions, schema: EncodedSchema) -> None:
    """Raise a `RecipeError` where the block names what the encoded rows do not have."""
    fields = {f.name: f for f in schema.fields}
    bags = {h.name for h in schema.histories if not h.target}
    for key, name in (("item", options.item), *([("user", options.user)] if options.user else [])):
        if name not in fields:
            raise RecipeError(
                f"sampling.{key}: no field '{name}'.{did_you_mean(name, fields)} Fields: {listing(fields)}",
                path=("sampling", key),
            )
        if fields[name].numeric:
            raise RecipeError(
                f"sampling.{key}: '{name}' is numeric; expected a categorical field", path=("sampling", key)
            )
    for name in options.fields:
        if name not in fields and name not in bags:
            raise RecipeError(
                f"sampling.fields: no field '{name}'.{did_you_mean(name, [*fields, *bags])} "
                f"Fields: {listing([*fields, *bags])}",
                path=("sampling", "fields"),
            )
    if options.user in (options.item, *options.fields):
        raise RecipeError(f"sampling.user: '{options.user}' belongs to the item", path=("sampling", "user"))
    if options.popularity_slots and "popularity" in schema.context:
        raise RecipeError(
            "sampling.popularity_slots: the data has a context column `popularity` already; leave one of them out",
            path=("sampling", "popularity_slots"),
        )
    if options.positives != "ignore" and options.user is None:
        raise RecipeError(
            f"sampling.positives: '{options.positives}' needs to know the user; name its field as sampling.user",
            path=("sampling", "positives"),
        )


@dataclass(frozen=True)
class RowDraws:
    """See `recsys.contracts.Draws`.

    Args:
        key: of seed and epoch.
        positions: `[B]` int64, of the rows in the epoch.
        items: `[B]` int64.
        places: `[B]` int64.
        step: gives the numbers of the items of the whole step.
        round: how often it was drawn before.
    """

    key: int
    positions: Numbers
    items: Numbers
    places: Numbers
    step: Callable[[], Numbers]
    round: int = 0

    def uniform(self, count: int, stream: int = 0) -> Floats:
        """`[B, count]` in (0, 1)."""
        key = np.uint64(mix(mix(self.key ^ stream) ^ self.round))
        rows = mix_array(self.positions.astype(np.uint64) + key)  # [B]
        words = mix_array(rows[:, None] ^ mix_array(np.arange(count)))  # [B, count]
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def step_items(self) -> Numbers:
        """`[S]`."""
        return self.step()

    def again(self, rows: Numbers) -> RowDraws:
        """The next round, for some of the rows."""
        taken = {"positions": self.positions[rows], "items": self.items[rows], "places": self.places[rows]}
        return replace(self, **taken, round=self.round + 1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sampling:
    """What a fit stage adds to its batches.

    Args:
        options: of the recipe.
        catalogue: the items, and who likes which.
        sampler: draws their numbers.
        popularity: of the items over time, where it is asked for.
        seed: of the stage.
    """

    options: SamplingOptions
    catalogue: Catalogue
    sampler: Sampler
    popularity: SlotPopularity | None = None
    seed: int = 0

    @classmethod
    def of(cls, shards: Shards, options: SamplingOptions, make: Callable[[Items], Sampler]) -> Sampling:
        """Read the items of the train split, and build the sampler on them."""
        check_sampling(options, shards.schema)
        catalogue = read_catalogue(
            shards, options.item, options.fields, options.user, positives_only=options.rows == "positives"
        )
        slots = options.popularity_slots
        popularity = read_popularity(shards, catalogue, slots) if slots else None
        return cls(options, catalogue, make(catalogue.items), popularity)

    @property
    def rows(self) -> Numbers | None:
        """The logged rows that are trained on, `[n]` int64 ascending; None: all."""
        return self.catalogue.positive_rows if self.options.rows == "positives" else None

    @property
    def per_row(self) -> int:
        """How many items are drawn for each logged row, candidates counted."""
        return self.options.negatives * self.candidates

    @property
    def candidates(self) -> int:
        """How many items are drawn for one sampled row, of which one is chosen by the model's scores."""
        return self.sampler.candidates if isinstance(self.sampler, Choosing) else 1

    def extend(self, batch: Batch, epoch: int, low: int, places: Numbers, step: Callable[[], Batch]) -> Batch:
        """Return the batch with sampled rows after its own.

        Args:
            batch: logged rows.
            epoch: from 0.
            low: position of the first of them in the epoch.
            places: `[B]` int64, where they stand in their optimizer step.
            step: gives all logged rows of that step.
        """
        positions = np.arange(low, low + len(batch), dtype=np.int64)
        key = mix(mix(self.seed) ^ epoch)
        own = self.catalogue.numbers(batch)
        draws = RowDraws(key, positions, own, places, lambda: self.catalogue.numbers(step()))
        numbers = self._drawn(draws, batch)
        extended = self._appended(batch, own, torch.from_numpy(numbers))
        if self.candidates > 1:
            noise = torch.from_numpy(draws.uniform(self.per_row, _CHOICE)).float().flatten()
            context = {**extended.context, "draw": torch.cat([noise.new_zeros(len(batch)), noise])}
            extended = replace(extended, context=context)
        return extended

    def _drawn(self, draws: RowDraws, batch: Batch) -> Numbers:
        """`[B, per_row]` item numbers; without known positives if they are to be excluded."""
        numbers = self.sampler.draw(draws, self.per_row)
        if self.options.positives != "exclude":
            return numbers
        users = self.catalogue.users(batch)
        left = draws
        rows = np.arange(len(batch))
        for _ in range(ROUNDS):
            bad = self.catalogue.any_positive(users[rows, None], numbers[rows])  # [rows, per_row]
            hit = bad.any(1)
            if not hit.any():
                break
            bad, rows, left = bad[hit], rows[hit], left.again(np.flatnonzero(hit))
            numbers[rows] = np.where(bad, self.sampler.draw(left, self.per_row), numbers[rows])
        return numbers

    def _appended(self, batch: Batch, own: Numbers, drawn: Tensor) -> Batch:
        """The rows of the batch, then `drawn [B, m]` in their places."""
        logged, count = drawn.shape
        row = torch.arange(logged).repeat_interleave(count)  # [B·m]
        numbers = drawn.flatten()
        sampled = self.catalogue.put(repeated(batch, row), numbers)
        label = {task: torch.zeros_like(value) for task, value in sampled.label.items()}
        if self.options.positives == "label":
            users = self.catalogue.users(batch)[row.numpy()]
            known = {task: self.catalogue.positive(task, users, numbers.numpy()) for task in label}
            label = {task: torch.from_numpy(value).to(label[task].dtype) for task, value in known.items()}
        context = dict(sampled.context)
        context |= {name: torch.zeros_like(context[name]) for name in UNLOGGED if name in context}
        context |= {name: self.catalogue.context[name][numbers] for name in OF_ITEM if name in context}
        both = _stacked(batch, replace(sampled, label=label, context=context))
        ids = both.ids[:, self.catalogue.item_column]
        every = np.concatenate([own, numbers.numpy()])
        marks = {
            "positive": torch.cat([torch.full((logged,), -1), row]),
            "item": ids.contiguous(),
            "log_q": torch.from_numpy(np.where(every >= 0, self._log_q[every], -np.inf)).float(),
        }
        if self.popularity is not None:
            marks["popularity"] = self.popularity.of(both.context["time"], every)
        return replace(both, context={**both.context, **marks}, negatives=count)

    @cached_property
    def _log_q(self) -> Floats:
        return self.sampler.log_q()


_CHOICE = 1
"""Stream of the random numbers with which one of several candidates is chosen; 0 draws them."""


def repeated(batch: Batch, rows: Tensor) -> Batch:
    """Return the batch of `rows [n]` int64 of a batch, in that order."""
    return replace(
        batch,
        ids=batch.ids[rows],
        values=None if batch.values is None else batch.values[rows],
        history={group: (ids[rows], length[rows]) for group, (ids, length) in batch.history.items()},
        label={task: value[rows] for task, value in batch.label.items()},
        context={name: value[rows] for name, value in batch.context.items()},
    )


def _stacked(a: Batch, b: Batch) -> Batch:
    def join(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([value, y[name]]) for name, value in x.items()}

    def padded(ids: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(ids, (0, 0, 0, length - ids.shape[1]))  # NULL_ID is 0

    history = {}
    for group, (ids, length) in a.history.items():
        other, other_length = b.history[group]
        longest = max(ids.shape[1], other.shape[1])
        history[group] = (
            torch.cat([padded(ids, longest), padded(other, longest)]),
            torch.cat([length, other_length]),
        )
    return replace(
        a,
        ids=torch.cat([a.ids, b.ids]),
        values=None if a.values is None or b.values is None else torch.cat([a.values, b.values]),
        history=history,
        label=join(a.label, b.label),
        context=join(a.context, b.context),
    )
