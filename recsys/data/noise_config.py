"""The `noise:` key of a recipe's data block: which inputs are planted that tell nothing, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from recsys.errors import did_you_mean, listing

Count = Annotated[int, Field(ge=0)]


def _as_columns(value: Any) -> Any:
    """YAML gives lists where the frozen model keeps tuples; a single name stands for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


Columns = Annotated[Count | tuple[str, ...], BeforeValidator(_as_columns)]


class Noise(BaseModel):
    """Inputs that no label depends on, planted beside the real ones, to see whether a feature selector finds them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    copies: Columns = Field(
        default=0,
        description="shuffled copies of these categorical or numeric fields, or of so many in turn: the same values, "
        "as often as in the train split, in rows drawn at random; called noise_copy_FIELD",
    )
    random: Columns = Field(
        default=0,
        description="ids at random, all equally often, as many different ones as these categorical fields have, or so "
        "many fields in turn; called noise_random_FIELD",
    )
    flags: Count = Field(default=0, description="columns that are 1 in 1 % of the rows, else 0; called noise_flag_N")
    vectors: Count = Field(
        default=0, description="groups of `width` columns of standard normal numbers; called noise_vector_N_M"
    )
    width: int = Field(default=8, ge=1, description="columns of a vector")
    seed: int = Field(default=0, description="another seed gives other noise")


@dataclass(frozen=True)
class Planted:
    """An input that is planted.

    Args:
        name: of the input.
        kind: what it is.
        of: the real field that it is like, for copies and random ids.
    """

    name: str
    kind: Literal["copy", "random", "flag", "vector"]
    of: str = ""


def planted(noise: Noise, categorical: Sequence[str], numeric: Sequence[str]) -> tuple[Planted, ...]:
    """Return what a recipe plants, in the order of the inputs.

    Args:
        noise: as the recipe says.
        categorical: its categorical fields.
        numeric: its numeric fields.

    Raises:
        ValueError: a field that is like none of these.
    """
    copied = _named("copies", "categorical or numeric field", noise.copies, (*categorical, *numeric))
    drawn = _named("random", "categorical field", noise.random, categorical)
    return (
        *(Planted(name, "copy", of) for name, of in _numbered("copy", copied)),
        *(Planted(name, "random", of) for name, of in _numbered("random", drawn)),
        *(Planted(f"noise_flag_{i + 1}", "flag") for i in range(noise.flags)),
        *(Planted(f"noise_vector_{i + 1}_{j + 1}", "vector") for i in range(noise.vectors) for j in range(noise.width)),
    )


def _named(key: str, what: str, wanted: int | tuple[str, ...], known: Sequence[str]) -> Sequence[str]:
    """Return the fields that are named, or so many in turn."""
    if isinstance(wanted, int):
        if wanted and not known:
            raise ValueError(f"noise.{key}: there is no {what} to be like")
        return [known[i % len(known)] for i in range(wanted)]
    for name in wanted:
        if name not in known:
            raise ValueError(f"noise.{key}: {name!r} is no {what}.{did_you_mean(name, known)} Fields: {listing(known)}")
    return wanted


def _numbered(kind: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, field); from the second one of a field on, with its number."""
    seen: Counter[str] = Counter()
    for field in fields:
        seen[field] += 1
        yield f"noise_{kind}_{field}{f'_{seen[field]}' if seen[field] > 1 else ''}", field
