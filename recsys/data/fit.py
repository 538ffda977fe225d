"""One pass over the train split: counts of values, moments of numbers, classes of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import polars as pl

from recsys.data.blocks import event_type, flatten
from recsys.data.numeric import NumericFit, NumericSpec
from recsys.data.reading import RawRows
from recsys.data.rules import Screen
from recsys.data.schema import DataConfig
from recsys.data.values import Kind, context, id_values, kind_of, labels, numbers, with_nulls
from recsys.data.vocabulary import Buckets, Counts, Lookup, Vocabulary, lookup_kind
from recsys.errors import DataError


@dataclass(frozen=True)
class Use:
    """A column that uses a field's vocabulary: its own column, one that shares it, or past events."""

    column: str
    field: str
    separator: str | None


@dataclass(frozen=True)
class Learned:
    """What a pass over the train split found."""

    lookups: dict[str, Lookup]
    numerics: dict[str, NumericSpec]


def uses(config: DataConfig) -> dict[str, list[Use]]:
    """Return, for every field that owns a vocabulary, the columns that use it.

    All of them are counted: a value that only ever appears in a history or in a sharing field gets an id too.
    """
    found: dict[str, list[Use]] = {}

    def add(field: str, column: str, separator: str | None) -> None:
        found.setdefault(config.options(field).share or field, []).append(Use(column, field, separator))

    for name in config.categorical:
        add(name, name, None)
    for name, options in config.multi_valued.items():
        add(name, name, options.separator)
    for sequence in config.sequences.values():
        for target, column in sequence.columns.items():
            add(target, column, sequence.separator)
    return found


def _kind(use: Use, schema: pl.Schema) -> Kind:
    dtype = schema[use.column]
    if use.separator is not None:
        return kind_of(use.column, event_type(use.column, dtype))
    return kind_of(use.column, dtype)


def learn(logs: RawRows, config: DataConfig, progress: Callable[[int], None] | None = None) -> Learned:
    """Read the train split once; rows that the recipe's rules set aside are not learned from.

    Args:
        logs: raw rows.
        config: the recipe's data block.
        progress: called with the number of raw rows of the source read so far.

    Raises:
        DataError: no rows, an all-null column, a row that breaks a rule, or a task with one class only.
    """
    screen = Screen.of(config, logs.schema, logs.what)
    by_owner = uses(config)
    schema = logs.schema
    kinds = {owner: lookup_kind([_kind(use, schema) for use in users]) for owner, users in by_owner.items()}
    counts = {owner: Counts(kinds[owner]) for owner in by_owner if config.options(owner).hash_buckets is None}
    fits = {name: NumericFit(options) for name, options in config.numeric.items()}
    present = dict.fromkeys([u.column for users in by_owner.values() for u in users], 0)
    positives = dict.fromkeys(config.label, 0)
    rows, weighted, weight = 0, 0, config.context.get("weight")
    for raw in logs.blocks(config.columns(), config.batch_rows):
        block = screen.clean(raw)
        for owner, use, values in _values(config, by_owner, block):
            ready, _ = id_values(values, kinds[owner], config.options(owner))
            present[use.column] += len(ready) - ready.null_count()
            if owner in counts:
                counts[owner].add(ready)
        for name, options in config.numeric.items():
            fits[name].add(numbers(block[name], options.null_values).value, rows)
        for task, rule in config.label.items():
            positives[task] += int(labels(block[rule.column], rule).sum())
        if weight is not None:
            weighted += int((context("weight", block[weight]) > 0).sum())
        rows += block.height
        if progress is not None:
            progress(raw.end)
    if screen.quarantine is not None:
        screen.quarantine.check()
    if not rows:
        raise DataError(f"0 rows in {logs.what}")
    if weight is not None and not weighted:
        raise DataError(f"{logs.what}: context weight {weight!r} is 0 in all {rows} rows; no row would teach anything")
    present |= {name: fit.count for name, fit in fits.items()}
    _check(config, present, positives, rows, logs.what)
    lookups: dict[str, Lookup] = {}
    for owner in by_owner:
        own = config.options(owner)
        if own.hash_buckets is not None:
            lookups[owner] = Buckets(kinds[owner], own.hash_buckets)
        else:
            table = counts[owner].table()
            lookups[owner] = Vocabulary.learn(kinds[owner], table, own.min_count or 1, own.max_size)
    return Learned(lookups, {name: fit.spec() for name, fit in fits.items()})


def _values(
    config: DataConfig, by_owner: dict[str, list[Use]], block: pl.DataFrame
) -> Iterator[tuple[str, Use, pl.Series]]:
    """Yield (owner, use, values with declared nulls removed) for every column of a block."""
    for owner, users in by_owner.items():
        for use in users:
            values = block[use.column]
            if use.separator is not None:
                values = flatten(values, use.separator, _max_length(config, use))[0]
            yield owner, use, with_nulls(values, config.options(use.field).null_values or ())


def _max_length(config: DataConfig, use: Use) -> int:
    if use.column in config.multi_valued:
        return config.multi_valued[use.column].max_length
    return next(s.max_length for s in config.sequences.values() if use.column in s.columns.values())


def _check(config: DataConfig, present: dict[str, int], positives: dict[str, int], rows: int, what: str) -> None:
    for column, count in present.items():
        if not count:
            raise DataError(f"{what}: column {column!r} has no value in any of {rows} rows; drop it from the recipe")
    for task, ones in positives.items():
        if ones in (0, rows):
            column = config.label[task].column
            raise DataError(
                f"{what}: label {task!r} (column {column!r}) is {int(ones > 0)} in all {rows} rows; "
                "a model needs both classes"
            )
