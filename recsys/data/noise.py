"""Planted noise: encoded inputs that no label depends on, drawn for each row from a seed, beside the real ones.

A number is a function of the seed, the input's name, the row's number and the name that its source has the rows under;
the size of blocks, the number of processes and what else is planted change nothing. Rows that are given without a
split, such as those to be scored, draw what test rows draw.

A shuffled copy draws each row's value from how often the train split has each value, by inverting the cumulative counts
at a uniform number. A true permutation would need the whole column at hand, and has none to give to new rows; a draw
has the same distribution, takes memory for the field's ids alone, and is the same for a row read alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID, Field
from recsys.data.blocks import EncodedColumns
from recsys.data.hashing import hash_text
from recsys.data.noise_config import Planted
from recsys.data.numeric import RowSample
from recsys.data.simulate_random import Draws

FLAGS = 0.01
"""Share of the rows in which a flag is set."""
_OTHERS = {"all": "test"}
"""Rows of the first name draw what those of the second one do; no source divides rows of both."""
Marginals = Mapping[str, npt.NDArray[Any]]
"""Field that is copied → how often each id occurs, `[rows]` int64; of a numeric one, a sorted sample of its numbers."""


def fields_of(inputs: Sequence[Planted], real: Sequence[Field]) -> list[Field]:
    """Return the planted inputs as fields; those that are like a real field have as many ids."""
    known = {field.name: field for field in real}
    found = []
    for planted in inputs:
        if planted.kind in ("copy", "random"):
            found.append(replace(known[planted.of], name=planted.name, shares=None))
        else:
            numeric = planted.kind == "vector"
            found.append(Field(planted.name, 2 if numeric else FIRST_ID + 2, numeric=numeric))
    return found


class MarginalFit:
    """Learns how often the train split has each value of the fields that are copied, block by block.

    Of numbers, exactly in the first `SAMPLE_ROWS` (262,144) rows and from so many rows drawn at random in more.

    Args:
        fields: that are copied.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._counts = {f.name: np.zeros(f.rows, np.int64) for f in fields if not f.numeric}
        self._samples = {f.name: RowSample(np.float32) for f in fields if f.numeric}
        self._rows = 0

    def add(self, block: EncodedColumns) -> None:
        """Take a block of encoded rows."""
        for name, count in self._counts.items():
            count += np.bincount(block.ids[name], minlength=len(count))
        numbers = np.arange(self._rows, self._rows + block.rows)
        for name, sample in self._samples.items():
            sample.add(block.values[name], numbers)
        self._rows += block.rows

    def result(self) -> Marginals:
        """Return what was learned."""
        return {**self._counts, **{name: np.sort(sample.values) for name, sample in self._samples.items()}}


@dataclass(frozen=True)
class Sower:
    """Draws the planted inputs of rows.

    Args:
        seed: of the recipe.
        inputs: what is planted.
        fields: the same as fields.
        marginals: of the fields that are copied.
    """

    seed: int
    inputs: Sequence[Planted]
    fields: Sequence[Field]
    marginals: Marginals

    def draw(
        self, scanned: str, rows: npt.NDArray[np.int64]
    ) -> tuple[dict[str, npt.NDArray[np.integer]], dict[str, npt.NDArray[np.float32]]]:
        """Return ids and numbers of rows `[n]`, by input.

        Args:
            scanned: the name that the source has the rows under.
            rows: their numbers among these.
        """
        ids: dict[str, npt.NDArray[np.integer]] = {}
        values: dict[str, npt.NDArray[np.float32]] = {}
        draws = Draws(self.seed, rows)
        for planted, field in zip(self.inputs, self.fields, strict=True):
            stream = hash_text(f"{_OTHERS.get(scanned, scanned)} {planted.name}")
            if planted.kind == "vector":
                values[field.name] = draws.normal(stream).astype(np.float32)
            elif planted.kind == "flag":
                ids[field.name] = FIRST_ID + (draws.uniform(stream) < FLAGS)
            elif planted.kind == "random":
                ids[field.name] = FIRST_ID + draws.below(stream, field.rows - FIRST_ID)
            elif field.numeric:
                known = self.marginals[planted.of]
                values[field.name] = known[draws.below(stream, len(known))]
            else:
                until = np.cumsum(self.marginals[planted.of])
                ids[field.name] = np.searchsorted(until, draws.below(stream, int(until[-1])), side="right")
        return ids, values
