"""The encoder: learns vocabularies and number scales on the train split, then turns raw rows into ids and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.contracts import UNKNOWN_ID, EncodedSchema, Field, History
from recsys.data import encoder_files
from recsys.data.blocks import EncodedColumns, Ragged, flatten
from recsys.data.fit import learn
from recsys.data.noise import MarginalFit, Marginals, Sower, fields_of
from recsys.data.noise_config import Noise
from recsys.data.numeric import NumericSpec
from recsys.data.reading import Origin, RawRows, rows_of
from recsys.data.report import SplitReport
from recsys.data.rules import Screen
from recsys.data.schema import Categorical, DataConfig
from recsys.data.values import context, id_values, labels, numbers, with_nulls
from recsys.data.vocabulary import Ids, Lookup, Vocabulary
from recsys.errors import DataError, did_you_mean, listing


@dataclass(frozen=True)
class Encoder:
    """A fitted encoder: a value without code, saved as JSON and Parquet.

    Args:
        config: the recipe's data block.
        lookups: field that owns a vocabulary → the vocabulary or hash buckets.
        numerics: numeric field → its fitted transform.
        marginals: field of which a shuffled copy is planted → how often the train split has each value.
    """

    config: DataConfig
    lookups: Mapping[str, Lookup]
    numerics: Mapping[str, NumericSpec]
    marginals: Marginals = dataclass_field(default_factory=dict)

    @classmethod
    def fit(
        cls, logs: RawRows | pl.LazyFrame, config: DataConfig, *, progress: Callable[[int], None] | None = None
    ) -> Encoder:
        """Learn from the train split, in one pass; in two where shuffled copies of fields are planted.

        Memory: a block of `config.batch_rows` rows, and the vocabularies.

        Args:
            logs: raw rows of the train split.
            config: the recipe's data block.
            progress: called with the number of raw rows read so far.

        Raises:
            DataError: a column is missing, all null, or of an unusable type; a row breaks a rule; all labels are equal.
        """
        rows = rows_of(logs, "the train split") if isinstance(logs, pl.LazyFrame) else logs
        require(rows, config.columns())
        learned = learn(rows, config, progress)
        encoder = cls(config, learned.lookups, learned.numerics)
        copied = {planted.of for planted in config.noise_inputs() if planted.kind == "copy"}
        if not copied:
            return encoder
        fit = MarginalFit([field for field in encoder.real if field.name in copied])
        bare = replace(encoder, config=config.model_copy(update={"noise": Noise()}))
        for block in bare.transform(rows):
            fit.add(block)
        return replace(encoder, marginals=fit.result())

    @cached_property
    def schema(self) -> EncodedSchema:
        """Inputs in order: categorical fields, then numeric ones, each as listed in the recipe, then planted noise."""
        fields = (*self.real, *self.sower.fields)
        histories = [
            History(n, (Field(n, self.lookup(n).rows, shares=o.share),), o.max_length)
            for n, o in self.config.multi_valued.items()
        ]
        for group, sequence in self.config.sequences.items():
            columns = tuple(
                Field(column, self.lookup(target).rows, shares=self.owner(target))
                for target, column in sequence.columns.items()
            )
            histories.append(History(group, columns, sequence.max_length, tuple(sequence.columns)))
        return EncodedSchema(fields, tuple(histories), tuple(self.config.label), tuple(self.config.context))

    @cached_property
    def real(self) -> tuple[Field, ...]:
        """The inputs that the logs have."""
        fields = [Field(n, self.lookup(n).rows, shares=o.share) for n, o in self.config.categorical.items()]
        for name, spec in self.numerics.items():
            quantile = spec.transform == "quantile"
            fields.append(Field(name, spec.rows if quantile else 2, numeric=not quantile))
        return tuple(fields)

    @cached_property
    def sower(self) -> Sower:
        """What draws the inputs that are planted."""
        inputs = self.config.noise_inputs()
        return Sower(self.config.noise.seed, inputs, fields_of(inputs, self.real), self.marginals)

    def owner(self, field: str) -> str:
        """Return the field whose vocabulary a categorical or multi-valued field uses: itself, or the one it shares."""
        return self.config.options(field).share or field

    def lookup(self, field: str) -> Lookup:
        """Return the vocabulary or the hash buckets that a categorical or multi-valued field uses."""
        return self.lookups[self.owner(field)]

    @cached_property
    def digest(self) -> str:
        """Of all that says which id a value has; equal encoders have equal ones."""
        parts = [f"{name} {lookup.digest()}" for name, lookup in self.lookups.items()]
        parts += [f"{name} {spec}" for name, spec in self.numerics.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def vocabularies(self) -> dict[str, str]:
        """Columns of the schema that own a vocabulary that was learned → its name in `lookups`."""
        learned = [name for name, lookup in self.lookups.items() if isinstance(lookup, Vocabulary)]
        return {name if name in self.config.categorical else f"{name}.{name}": name for name in learned}

    def reordered(self, orders: Mapping[str, Ids]) -> Encoder:
        """Return an encoder that gives the values of some vocabularies other ids.

        Args:
            orders: name in `lookups` → the old ids, `[rows]`, in their new order; missing and unknown stay first.
        """
        changed = {name: cast("Vocabulary", self.lookups[name]).reordered(order) for name, order in orders.items()}
        return replace(self, lookups={**self.lookups, **changed})

    def transform(
        self, logs: RawRows | pl.LazyFrame, *, labels: bool = True, report: SplitReport | None = None
    ) -> Iterator[EncodedColumns]:
        """Yield encoded blocks in the order of the logs.

        Args:
            logs: raw rows with the columns of the recipe; others are ignored.
            labels: whether to read labels and context columns too; not when predicting, where every row stays.
            report: counts of missing, unknown, non-finite and cut values are added to it.

        Raises:
            DataError: a column is missing or of an unusable type; a row breaks a rule.
        """
        rows = rows_of(logs, "the logs") if isinstance(logs, pl.LazyFrame) else logs
        columns = self.config.columns(labels=labels)
        require(rows, columns)
        screen = Screen.of(self.config, rows.schema, rows.what, labelled=labels)
        counts = SplitReport() if report is None else report
        for block in rows.blocks(columns, self.config.batch_rows):
            clean = screen.clean(block)
            if not clean.is_empty():
                yield self.encode(clean, rows.origin(block), counts, labelled=labels)
        if screen.quarantine is not None:
            screen.quarantine.check()
            counts.aside += screen.quarantine.rows

    def encode(
        self, block: pl.DataFrame, origin: Origin, report: SplitReport, *, labelled: bool = True
    ) -> EncodedColumns:
        """Return a block of raw rows that keep the rules, encoded; counts are added to the report.

        Args:
            block: the rows, with their numbers.
            origin: where they are from; what is planted goes by it.
            report: gets the counts of real inputs.
            labelled: whether to read labels and context columns too.
        """
        return _Block(self, report, labelled).encode(block, origin)

    def save(self, folder: Path) -> None:
        """Write `encoder.json`, `vocabulary/*.parquet` and `noise/*.parquet`, with a sha256 of each in the JSON."""
        encoder_files.write(folder, self.config, self.lookups, self.numerics, self.marginals)

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing, unreadable or altered.
        """
        return cls(*encoder_files.read(folder))


def require(logs: RawRows, columns: tuple[str, ...]) -> None:
    """Raise a `DataError` with the nearest name when the logs lack one of `columns`."""
    known = logs.schema.names()
    for column in columns:
        if column not in known:
            raise DataError(
                f"{logs.what}: no column {column!r}.{did_you_mean(column, known)} Columns: {listing(known)}"
            )


@dataclass
class _Block:
    """Encodes block after block, adding to the report."""

    encoder: Encoder
    report: SplitReport
    labelled: bool

    def encode(self, block: pl.DataFrame, origin: Origin) -> EncodedColumns:
        config = self.encoder.config
        self.report.rows += block.height
        ids: dict[str, npt.NDArray[np.integer]] = {n: self._ids(n, n, block[n]) for n in config.categorical}
        values = {}
        for name, spec in self.encoder.numerics.items():
            read = numbers(block[name], config.numeric[name].null_values)
            self.report.column(name).add(null=read.nulls, unreadable=read.unreadable, non_finite=read.non_finite)
            if spec.transform == "quantile":
                ids[name] = spec.bucket_ids(read.value)
            else:
                values[name] = spec.values(read.value)
        drawn = self.encoder.sower.draw(origin.scanned, origin.numbers(block))
        ids, values = {**ids, **drawn[0]}, {**values, **drawn[1]}
        history = {name: self._bag(name, block[name]) for name in config.multi_valued}
        history |= {group: self._events(group, block) for group in config.sequences}
        label, beside = {}, {}
        if self.labelled:
            for task, rule in config.label.items():
                label[task] = labels(block[rule.column], rule)
                positives = self.report.positives
                positives[task] = positives.get(task, 0) + int(label[task].sum())
            beside = {str(n): context(n, block[c]) for n, c in config.context.items()}
        return EncodedColumns(block.height, ids, values, history, label, beside)

    def _ids(self, field: str, column: str, raw: pl.Series) -> Ids:
        """Encode one value per row (or per event) with the vocabulary of `field`, counting under `column`."""
        options: Categorical = self.encoder.config.options(field)
        lookup = self.encoder.lookup(field)
        marked = with_nulls(raw, options.null_values or ())
        if marked.dtype.is_float():
            marked = marked.fill_nan(None)
        present = marked.is_not_null().to_numpy()
        ready, long = id_values(marked, lookup.kind, options)
        ids = lookup.ids(ready, present)
        missing = len(present) - int(present.sum())
        self.report.column(column).add(null=missing, unknown=int((ids == UNKNOWN_ID).sum()), too_long=long)
        return ids

    def _bag(self, name: str, raw: pl.Series) -> Ragged:
        options = self.encoder.config.multi_valued[name]
        flat, length, cut = flatten(raw, options.separator, options.max_length)
        self.report.column(name).add(null=int((length == 0).sum()), cut=cut)
        return Ragged(self._ids(name, name, flat)[:, None], length)

    def _events(self, group: str, block: pl.DataFrame) -> Ragged:
        sequence = self.encoder.config.sequences[group]
        parts = []
        for target, column in sequence.columns.items():
            flat, length, cut = flatten(block[column], sequence.separator, sequence.max_length)
            self.report.column(column).add(null=int((length == 0).sum()), cut=cut)
            parts.append(self._ids(target, column, flat))
        return Ragged(np.stack(parts, axis=1).astype(np.int64, copy=False), length)
