"""The `data:` block of a recipe: which columns are read, and how each becomes ids, numbers, labels or context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from recsys.data.noise_config import Noise, Planted, planted
from recsys.errors import did_you_mean, listing

ContextName = Literal[
    "weight",
    "propensity",
    "popularity",
    "delay",
    "elapsed",
    "grade",
    "position",
    "group",
    "time",
    "attribute",
    "observed",
    "uniform",
]
CONTEXT: tuple[str, ...] = get_args(ContextName)
"""Names of the context columns: what a loss or a metric may read of a row beside the label."""
FLOAT_CONTEXT = ("weight", "propensity", "popularity", "delay", "elapsed", "grade")
"""Context columns that are float32; the others are int64."""
Value = str | bool | int | float
"""A raw value as a recipe can write it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _as_tuple(value: Any) -> Any:
    """YAML gives lists where the frozen model keeps tuples; a single value stands for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str | bool | int | float) else value


def _as_options(value: Any) -> Any:
    """Read `[a, b]` as `{a: {}, b: {}}`, and `{a: null}` as `{a: {}}`."""
    if isinstance(value, list | tuple):
        names = [v for v in value if isinstance(v, str)]
        if len(names) != len(value):
            raise ValueError("expected column names, or a mapping from column name to options")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"listed twice: {listing(twice)}")
        return {name: {} for name in names}
    if isinstance(value, Mapping):
        return {name: {} if options is None else options for name, options in value.items()}
    return value


Normal = Literal["nfc", "strip", "lower"]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Values = Annotated[tuple[Value, ...], BeforeValidator(_as_tuple)]
Normals = Annotated[tuple[Normal, ...], BeforeValidator(_as_tuple)]


class Defaults(_Strict):
    """Options of every categorical and multi-valued field that does not say otherwise."""

    min_count: int = Field(default=1, ge=1, description="values seen less often in the train split are unknown")
    max_size: int | None = Field(default=None, ge=1, description="keep only this many values, the most frequent ones")
    null_values: Values = Field(default=(), description='raw values that mean "missing", such as "?"')
    normalize: Normals = Field(default=(), description="what is done to text, in this order: nfc, strip, lower")
    max_bytes: int = Field(default=1024, ge=1, description="text of more bytes than this in UTF-8 is unknown")


class Categorical(_Strict):
    """One id per row, from a vocabulary learned on the train split or from hash buckets."""

    min_count: int | None = Field(
        default=None, ge=1, description="values seen less often in the train split are unknown"
    )
    max_size: int | None = Field(default=None, ge=1, description="keep only this many values, the most frequent ones")
    hash_buckets: int | None = Field(
        default=None, ge=1, description="hash values into this many ids; no vocabulary is kept"
    )
    share: str | None = Field(
        default=None, description="use the vocabulary (and so the embedding rows) of this other field"
    )
    null_values: Values | None = Field(default=None, description='raw values that mean "missing", such as "?"')
    normalize: Normals | None = Field(
        default=None, description="what is done to text, in this order: nfc, strip, lower; null values are raw ones"
    )
    max_bytes: int | None = Field(
        default=None, ge=1, description="text of more bytes than this in UTF-8, when normalised, is unknown"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Categorical:
        learned = self.min_count is not None or self.max_size is not None
        if self.hash_buckets is not None and (learned or self.share is not None):
            raise ValueError("hash_buckets keeps no vocabulary; drop min_count, max_size and share, or hash_buckets")
        if self.share is not None and learned:
            raise ValueError(f"min_count and max_size belong to the field that is shared ({self.share!r})")
        if self.share is not None and (self.normalize is not None or self.max_bytes is not None):
            raise ValueError(f"normalize and max_bytes belong to the field that is shared ({self.share!r})")
        return self


class MultiValued(Categorical):
    """A bag of values per row, from a list column or a text with separators."""

    max_length: int = Field(default=20, ge=1, description="keep the last so many values of a row")
    separator: str = Field(default="|", min_length=1, description="between values, when the column is text")


class Numeric(_Strict):
    """One number per row."""

    transform: Literal["standard", "log", "raw", "quantile"] = Field(
        default="standard",
        description="standard: (x - mean) / sd; log: the same of sign(x) log(1 + |x|); raw: x; quantile: bucket id",
    )
    buckets: int = Field(default=32, ge=2, description="number of quantile buckets")
    null_values: Values = Field(default=(), description='raw values that mean "missing", such as "NA" or -1')


class SequenceGroup(_Strict):
    """Past events of a row, oldest first, compared with the row's own item."""

    columns: dict[str, str] = Field(description="categorical field -> list column with its past values")
    max_length: int = Field(
        default=50, ge=1, description="keep the newest so many events, that is the last of the list"
    )
    separator: str = Field(default="|", min_length=1, description="between events, when the columns are text")

    @field_validator("columns")
    @classmethod
    def _not_empty(cls, columns: dict[str, str]) -> dict[str, str]:
        if not columns:
            raise ValueError("needs at least one `field: column`")
        return columns


class Label(_Strict):
    """A 0/1 label, or a rule that makes one."""

    column: str = Field(description="column of the logs")
    at_least: float | int | None = Field(default=None, description="1 where the column is at least this number")
    positive: Values | None = Field(default=None, description="1 where the column is one of these values")

    @model_validator(mode="after")
    def _one_rule(self) -> Label:
        if self.at_least is not None and self.positive is not None:
            raise ValueError("at_least and positive exclude each other")
        return self


class TimeSplit(_Strict):
    """Train strictly before valid, valid strictly before test; equal times stay together."""

    by: Literal["time"]
    column: str = Field(description="column with the time: number, date or datetime")
    valid: float = Field(default=0.1, ge=0, lt=1, description="share of rows")
    test: float = Field(default=0.1, ge=0, lt=1, description="share of rows")


class HashSplit(_Strict):
    """By the fixed hash of some columns: rows with equal values stay together."""

    by: Literal["hash"]
    columns: Names = Field(default=(), description="columns to hash; none: the row number")
    valid: float = Field(default=0.1, ge=0, lt=1, description="share of rows")
    test: float = Field(default=0.1, ge=0, lt=1, description="share of rows")
    seed: int = Field(default=0, description="another seed gives another split")


class ColumnSplit(_Strict):
    """By the values of a column; the rest is the train split."""

    by: Literal["column"]
    column: str = Field(description="column that tells the split")
    valid: Values = Field(default=(), description="values of the valid split")
    test: Values = Field(default=(), description="values of the test split")


Split = Annotated[TimeSplit | HashSplit | ColumnSplit, Field(discriminator="by")]


class DatasetNote(_Strict):
    """Where a public data set is obtained and what it must contain; printed when the files are not found."""

    name: str = Field(description="name of the data set")
    where: str = Field(description="where it is officially obtained, and under which terms")
    columns: Names = Field(default=(), description="columns that the files must have")


def _as_labels(value: Any) -> Any:
    if isinstance(value, str):
        return {"label": {"column": value}}
    if isinstance(value, Mapping):
        return {task: {"column": rule} if isinstance(rule, str) else rule for task, rule in value.items()}
    return value


class BadRows(_Strict):
    """What is done with a row that breaks a rule, for each rule.

    `error` stops and names file, row, column and value; `quarantine` sets the row aside, with its address, in
    `quarantine.parquet`; `map` counts the value and takes it for missing. When scoring, no row is ever set aside:
    numbers that are not finite are mapped, everything else is an error.
    """

    fields: Literal["error", "quarantine"] = Field(
        default="quarantine", description="a line of a text file with too few or too many fields, or a repeated header"
    )
    json_object: Literal["error", "quarantine"] = Field(
        default="quarantine", description="a line of an NDJSON file that is no JSON object"
    )
    encoding: Literal["error", "quarantine"] = Field(
        default="quarantine",
        description="a line that is not UTF-8, has a NUL character, or a byte order mark in the midst of the file",
    )
    non_finite: Literal["error", "quarantine", "map"] = Field(
        default="quarantine", description="NaN, infinite, or too large for float32, in a numeric column"
    )
    number: Literal["error", "quarantine", "map"] = Field(
        default="error", description="a text in a numeric column that is no number and no declared null value"
    )
    whole: Literal["error", "quarantine"] = Field(
        default="error",
        description="a number in a categorical column that is not whole, or too large to be exact or an id",
    )
    label: Literal["error", "quarantine"] = Field(
        default="error", description="a label that is null, or not 0 or 1 where no rule makes it so"
    )
    context: Literal["error", "quarantine"] = Field(
        default="error", description="a null or impossible value of a context column, such as a propensity of 0"
    )
    events: Literal["error", "quarantine"] = Field(
        default="error", description="columns of a sequence with different numbers of events"
    )
    budget: float = Field(default=0.001, ge=0, le=1, description="largest share of rows set aside; more is an error")


class DataConfig(_Strict):
    """Everything that turns raw logs into encoded rows."""

    source: dict[str, Any] = Field(description="the source component, for instance `{use: files, train: …}`")
    dataset: DatasetNote | None = Field(default=None, description="what to tell a user who lacks the files")
    split: Split | None = Field(default=None, description="how to divide the rows; none: the source gives the splits")
    label: Annotated[dict[str, Label], BeforeValidator(_as_labels)] = Field(
        description="column with 0/1 labels; or task -> column; or task -> {column, at_least | positive}"
    )
    defaults: Defaults = Field(default=Defaults(), description="options of fields that do not say otherwise")
    categorical: Annotated[dict[str, Categorical], BeforeValidator(_as_options)] = Field(
        default={}, description="columns with one value per row"
    )
    numeric: Annotated[dict[str, Numeric], BeforeValidator(_as_options)] = Field(
        default={}, description="columns of numbers"
    )
    multi_valued: Annotated[dict[str, MultiValued], BeforeValidator(_as_options)] = Field(
        default={}, description="columns with several values per row"
    )
    sequences: dict[str, SequenceGroup] = Field(default={}, description="groups of past events")
    noise: Noise = Field(default=Noise(), description="inputs that tell nothing, planted to judge feature selectors by")
    context: dict[ContextName, str] = Field(default={}, description="columns for losses and metrics, never features")
    bad_rows: BadRows = Field(default=BadRows(), description="what is done with rows that break a rule")
    batch_rows: int = Field(default=131_072, ge=1, description="rows read and encoded at once; bounds the memory")
    shard_rows: int = Field(default=4_194_304, ge=1, description="rows per encoded file")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not self.label:
            raise ValueError("label: needs at least one task")
        if not (self.categorical or self.numeric or self.multi_valued):
            raise ValueError("no inputs: list columns under categorical, numeric or multi_valued")
        self._check_names()
        for name, options in self._vocabularies():
            if options.share is not None:
                self._check_share(name, options.share)
        for group, sequence in self.sequences.items():
            for target in sequence.columns:
                if target not in self.categorical:
                    hint = did_you_mean(target, self.categorical)
                    raise ValueError(f"sequences.{group}.columns: {target!r} is no categorical field.{hint}")
        return self

    def _check_names(self) -> None:
        used: dict[str, str] = {}
        for where, name in self._inputs():
            if name in used:
                raise ValueError(f"column {name!r} is listed under {used[name]} and under {where}; keep one")
            used[name] = where
        for group in self.sequences:
            if group in used:
                raise ValueError(f"sequences.{group}: the name is taken by {used[group]}; rename the group")
        for task, rule in self.label.items():
            if rule.column in used:
                raise ValueError(
                    f"label {task!r} is column {rule.column!r}, which is an input too ({used[rule.column]}); "
                    "a model that sees its label learns nothing"
                )
        used |= {group: "sequences" for group in self.sequences}
        used |= {rule.column: f"label {task!r}" for task, rule in self.label.items()}
        used |= {column: f"context {name}" for name, column in self.context.items()}
        for name in self.planted:
            if name in used:
                raise ValueError(
                    f"noise: {name!r} is to be planted, and the name is taken by {used[name]}; rename that"
                )
            used[name] = "noise"

    def noise_inputs(self) -> tuple[Planted, ...]:
        """Return the inputs that are planted, in order; they come after the real ones."""
        return planted(self.noise, tuple(self.categorical), tuple(self.numeric))

    @property
    def planted(self) -> tuple[str, ...]:
        """Names of the inputs that are planted noise, in order: none of them tells anything about a label."""
        return tuple(column.name for column in self.noise_inputs())

    def _check_share(self, name: str, owner: str) -> None:
        fields = dict(self._vocabularies())
        if owner == name or owner not in fields:
            hint = did_you_mean(owner, [f for f in fields if f != name])
            raise ValueError(f"{name}.share: {owner!r} is no other categorical or multi-valued field.{hint}")
        if fields[owner].share is not None:
            raise ValueError(f"{name}.share: {owner!r} itself shares {fields[owner].share!r}; name that field")

    def _vocabularies(self) -> Iterator[tuple[str, Categorical]]:
        yield from self.categorical.items()
        yield from self.multi_valued.items()

    def _inputs(self) -> Iterator[tuple[str, str]]:
        for name in self.categorical:
            yield "categorical", name
        for name in self.numeric:
            yield "numeric", name
        for name in self.multi_valued:
            yield "multi_valued", name
        for group, sequence in self.sequences.items():
            for column in sequence.columns.values():
                yield f"sequences.{group}", column

    def options(self, name: str) -> Categorical:
        """Return the options of a categorical or multi-valued field, defaults filled in."""
        fields = dict(self._vocabularies())
        own = fields[name]
        text = own if own.share is None else fields[own.share]
        update: dict[str, Any] = {
            "null_values": self.defaults.null_values if own.null_values is None else own.null_values,
            "normalize": self.defaults.normalize if text.normalize is None else text.normalize,
            "max_bytes": self.defaults.max_bytes if text.max_bytes is None else text.max_bytes,
        }
        if own.hash_buckets is None and own.share is None:
            update["min_count"] = self.defaults.min_count if own.min_count is None else own.min_count
            update["max_size"] = self.defaults.max_size if own.max_size is None else own.max_size
        return own.model_copy(update=update)

    def columns(self, *, labels: bool = True) -> tuple[str, ...]:
        """Return the columns that encoding reads, each once; without labels, the inputs only."""
        names = [name for _, name in self._inputs()]
        if labels:
            names += [rule.column for rule in self.label.values()]
            names += list(self.context.values())
        return tuple(dict.fromkeys(names))
