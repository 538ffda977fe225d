"""What each column of a row does to its score: the logit, less the logit of the same row without the column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.contracts import NULL_ID
from recsys.deploy.encode import Encoded
from recsys.deploy.spec import EncoderSpec

Floats = npt.NDArray[np.float64]
Logits = Callable[[Encoded], Mapping[str, Floats]]
_ROWS = 4096
"""Rows of one run of the graph, at most."""


@dataclass(frozen=True)
class Explanation:
    """What the columns of `B` rows do to their scores.

    contribution = logit(row) − logit(row with the column missing). It is 0 for a value that is missing already; only
    without interactions do contributions add up to logit − base.

    Args:
        names: of the C columns; a sequence is one, under its name.
        logit: task → `[B]`.
        base: task → the logit of a row in which everything is missing.
        contribution: task → `[B, C]`.
    """

    names: tuple[str, ...]
    logit: Mapping[str, Floats]
    base: Mapping[str, float]
    contribution: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(next(iter(self.logit.values())))


def names_of(spec: EncoderSpec) -> tuple[str, ...]:
    """Return what is left out one by one, in the order of the graph's inputs."""
    scalar = [*(c.column for c in spec.ids), *(c.column for c in spec.numbers)]
    return (*scalar, *(group.name for group in spec.lists))


def explain(spec: EncoderSpec, encoded: Encoded, logits: Logits) -> Explanation:
    """Score rows with each column left out in turn, many of them in one run.

    Args:
        spec: of the encoder.
        encoded: rows.
        logits: scores encoded rows.
    """
    names = names_of(spec)
    nothing = _without(_taken(encoded, slice(0, 1)), np.ones((1, len(names)), dtype=bool))
    base = {task: float(z[0]) for task, z in logits(nothing).items()}
    whole: dict[str, list[Floats]] = {task: [] for task in base}
    parts: dict[str, list[Floats]] = {task: [] for task in base}
    for some in _chunks(len(encoded.ids), len(names)):
        for task, z in logits(_without_each(_taken(encoded, some), len(names))).items():
            table = z.reshape(-1, 1 + len(names))
            whole[task].append(table[:, 0])
            parts[task].append(table[:, :1] - table[:, 1:])
    return Explanation(
        names,
        {task: np.concatenate(found) for task, found in whole.items()},
        base,
        {task: np.concatenate(found) for task, found in parts.items()},
    )


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    size = max(_ROWS // (1 + columns), 1)
    return (slice(first, first + size) for first in range(0, rows, size))


def _taken(encoded: Encoded, some: slice) -> Encoded:
    values = None if encoded.values is None else encoded.values[some]
    return Encoded(encoded.ids[some], values, tuple((events[some], n[some]) for events, n in encoded.lists))


def _without_each(encoded: Encoded, columns: int) -> Encoded:
    """Every row as it is, then without its first column, then without its second one, …: `[B] -> [B · (1 + C)]`."""
    rows, times = len(encoded.ids), 1 + columns
    left_out = np.tile(np.eye(times, columns, k=-1, dtype=bool), (rows, 1))
    values = None if encoded.values is None else encoded.values.repeat(times, 0)
    lists = tuple((events.repeat(times, 0), length.repeat(times)) for events, length in encoded.lists)
    return _without(Encoded(encoded.ids.repeat(times, 0), values, lists), left_out)


def _without(encoded: Encoded, left_out: npt.NDArray[np.bool_]) -> Encoded:
    """The rows with what `left_out [B, C]` says missing, as the encoder would have it."""
    scalar, own = encoded.ids.shape[1], left_out[:, : encoded.ids.shape[1]]
    values = None if encoded.values is None else np.where(own, np.float32(1), encoded.values)
    lists = tuple(
        (np.where(left_out[:, scalar + g, None, None], NULL_ID, events), np.where(left_out[:, scalar + g], 0, length))
        for g, (events, length) in enumerate(encoded.lists)
    )
    return Encoded(np.where(own, NULL_ID, encoded.ids), values, lists)
