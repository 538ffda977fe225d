"""Rows of a split in classes of a column: a sensitive attribute, rare and popular items, users that are new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data.shards import Shards
from recsys.data.vocabulary import Vocabulary
from recsys.errors import RecipeError, did_you_mean, listing
from recsys.train.run import Run
from recsys.train.score import Predictions

Measure = Literal["value", "train_rows", "train_positives"]
Rule = Literal["values"] | dict[Measure, tuple[float, ...]]
"""`values`: a class for each value. Else thresholds: on the value, or on how often the train split has it."""

MOST = 50
"""Classes of a column; more are no table that anybody reads."""
READ = 1 << 16
"""Rows that are read at once."""


@dataclass(frozen=True)
class Classes:
    """The classes of a split's rows by one rule.

    Args:
        what: the column, and what of it is compared with thresholds.
        names: of the classes, with `what` in front.
        known: class → whether it is one to compare; the missing and the unknown value are not.
        of: `[rows]` int64, the class of each row.
    """

    what: str
    names: tuple[str, ...]
    known: tuple[bool, ...]
    of: Tensor


def divide(run: Run, split: str, predictions: Predictions, rules: Mapping[str, Rule]) -> tuple[Classes, ...]:
    """Return the classes of a split's rows, by every rule.

    Raises:
        RecipeError: a column has too many values.
    """
    found = []
    for column, rule in rules.items():
        values = _values(run, run.split(split), column, predictions)
        if rule == "values":
            found.append(_by_value(run, column, values))
            continue
        for measure, thresholds in rule.items():
            numbers = values.double() if measure == "value" else _train_counts(run, column, values, measure)
            what = column if measure == "value" else f"{column} {measure}"
            found.append(_by_threshold(what, numbers, thresholds))
    return tuple(found)


def counts_train(rules: Mapping[str, Rule]) -> bool:
    """Whether the rules need the train split."""
    return any(isinstance(rule, dict) and set(rule) - {"value"} for rule in rules.values())


def check_rules(run: Run, rules: Mapping[str, Rule]) -> None:
    """Refuse rules that no rows can be divided by.

    Raises:
        RecipeError: there is no such column, or thresholds do not rise.
    """
    fields = [field.name for field in run.schema.fields if not field.numeric]
    known = [*fields, *run.schema.context]
    for column, rule in rules.items():
        if column not in known:
            raise RecipeError(
                f"{run.stage}: by: '{column}' is neither a categorical field nor under data.context."
                f"{did_you_mean(column, known)} There are: {listing(known)}"
            )
        for measure, thresholds in rule.items() if isinstance(rule, dict) else ():
            if not thresholds or list(thresholds) != sorted(set(thresholds)):
                raise RecipeError(f"{run.stage}: by.{column}.{measure}: expected rising numbers, got {thresholds}")


def _values(run: Run, shards: Shards, column: str, predictions: Predictions | None = None) -> Tensor:
    """Ids of a field, or a context column, of all rows of a split; every process reads all of them."""
    if predictions is not None and column in predictions.context:
        return predictions.context[column]
    fields = [field.name for field in run.schema.fields]
    parts = []
    for low in range(0, len(shards), READ):
        batch = shards.read(low, min(low + READ, len(shards)))
        parts.append(batch.ids[:, fields.index(column)].clone() if column in fields else batch.context[column].clone())
    return torch.cat(parts)


def _by_value(run: Run, column: str, values: Tensor) -> Classes:
    distinct, of = torch.unique(values, return_inverse=True)
    if len(distinct) > MOST:
        raise RecipeError(
            f"{run.stage}: by.{column}: {len(distinct):,} values, at most {MOST} can be shown; give thresholds, for "
            f"instance `{column}: {{train_rows: [10]}}`"
        )
    if column in run.schema.context:
        unknown = [column == "attribute" and int(value) == -1 for value in distinct.tolist()]
        names = ["unknown" if u else f"{v:g}" for u, v in zip(unknown, distinct.tolist(), strict=True)]
    else:
        unknown = [value < FIRST_ID for value in distinct.tolist()]
        names = [_value_name(run, column, value) for value in distinct.tolist()]
    return Classes(column, tuple(f"{column}={name}" for name in names), tuple(not u for u in unknown), of)


def _value_name(run: Run, field: str, number: int) -> str:
    if number < FIRST_ID:
        return {NULL_ID: "missing", UNKNOWN_ID: "unknown"}[number]
    lookup = run.encoder.lookup(field)
    return str(lookup.values[number - FIRST_ID]) if isinstance(lookup, Vocabulary) else f"#{number}"


def _by_threshold(what: str, numbers: Tensor, thresholds: tuple[float, ...]) -> Classes:
    of = torch.bucketize(numbers, torch.tensor(thresholds, dtype=numbers.dtype))
    names = [f"{what} ≤{thresholds[0]:g}"]
    names += [f"{what} >{a:g} ≤{b:g}" for a, b in pairwise(thresholds)]
    names += [f"{what} >{thresholds[-1]:g}"]
    return Classes(what, tuple(names), (True,) * len(names), of)


def _train_counts(run: Run, column: str, values: Tensor, measure: Measure) -> Tensor:
    """How many rows of the train split, or how many positive ones, have the value of each row, `[rows]` float64.

    What the encoder does not know has none: the train split had too few of it to learn it.
    """
    train = run.split("train")
    seen = _values(run, train, column)
    if measure == "train_positives":
        seen = seen[torch.from_numpy(train.labels(run.schema.tasks[0])) == 1]
    if column not in run.schema.context:
        seen = seen[seen >= FIRST_ID]
    if not len(seen):
        return torch.zeros(len(values), dtype=torch.float64)
    distinct, count = torch.unique(seen, return_counts=True)
    place = torch.searchsorted(distinct, values).clamp(max=len(distinct) - 1)
    return torch.where(distinct[place] == values, count[place], 0).double()
