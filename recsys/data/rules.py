"""The rules that a raw row must keep, and what is done with one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import polars as pl

from recsys.data.blocks import as_lists, event_type, is_list
from recsys.data.limits import LARGEST
from recsys.data.quarantine import BAD_ROWS, ROW, Quarantine, address
from recsys.data.reading import RawBlock
from recsys.data.schema import BadRows, Categorical, DataConfig, Label, SequenceGroup, Value
from recsys.data.values import (
    context_limit,
    is_one_of,
    is_readable_number,
    is_wide,
    kind_of,
    label_reading,
    largest_exact,
    number_of,
)
from recsys.errors import DataError, listing

Rule = Literal["number", "non_finite", "whole", "label", "context", "events"]
"""Rules of the values of a column."""
READING_RULES = ("fields", "json_object", "encoding")
"""Rules of lines that cannot be read at all; they are seen to where the file is read."""
_LISTED = 10
Say = Callable[[Sequence[str], int], str]
"""Makes the text of an error out of the distinct bad values, as shown, and the number of bad rows."""


@dataclass(frozen=True)
class Check:
    """A rule for one column.

    Args:
        rule: its name in the recipe's `bad_rows`.
        column: of the logs.
        wrong: true for the rows that break it, else false.
        shown: what the row has instead, as text.
        problem: what is wrong with that.
        say: makes the error, address aside.
    """

    rule: Rule
    column: str
    wrong: pl.Expr
    shown: pl.Expr
    problem: str
    say: Say

    def error(self, rows: pl.DataFrame, file: str | None) -> DataError:
        """Return the error for rows that break the rule, with the address of the first."""
        shown = rows.select(self.shown).to_series().unique(maintain_order=True).head(_LISTED)
        text = rows.schema.get(self.column) == pl.String
        values = ["null" if v is None else repr(v) if text else v for v in shown.to_list()]
        return DataError(f"{address(file, rows[ROW][0])}{self.say(values, len(rows))}")

    def bad_rows(self, rows: pl.DataFrame, file: str | None) -> pl.DataFrame:
        """Return rows that break the rule as `BAD_ROWS`."""
        found = rows.select(
            file=pl.lit(file, pl.String),
            row=pl.col(ROW),
            column=pl.lit(self.column),
            value=self.shown.cast(pl.String),
            rule=pl.lit(self.rule),
            problem=pl.lit(self.problem),
        )
        return found.select(BAD_ROWS.columns)


def checks(config: DataConfig, schema: Mapping[str, pl.DataType], *, labelled: bool) -> Iterator[Check]:
    """Yield the rules of a recipe for logs of these types; those that cannot be broken are left out.

    Raises:
        DataError: a column's type does not fit its use.
    """
    for name in config.categorical:
        if is_list(schema[name]):
            raise DataError(f"column {name!r} is {schema[name]}; list it under multi_valued or sequences")
        yield from _whole(name, schema[name], config.options(name), labelled)
    for name, bag in config.multi_valued.items():
        yield from _whole_events(name, schema[name], config.options(name), bag.separator, labelled)
    for sequence in config.sequences.values():
        for target, column in sequence.columns.items():
            yield from _whole_events(column, schema[column], config.options(target), sequence.separator, labelled)
        yield from _events(sequence, schema)
    for name, numeric in config.numeric.items():
        yield from _number(name, schema[name], numeric.null_values)
    if labelled:
        for rule in config.label.values():
            yield _label(rule, schema[rule.column])
        for use, column in config.context.items():
            yield _context(use, column, schema[column])


def _is_rounded(dtype: pl.DataType, labelled: bool) -> bool:
    """Whether a type may hold something that is no id; when scoring, an id beyond 64 bits is just unknown."""
    return dtype.is_float() or dtype.is_decimal() or (labelled and is_wide(dtype))


def _whole(column: str, dtype: pl.DataType, options: Categorical, labelled: bool) -> Iterator[Check]:
    kind_of(column, dtype)
    if _is_rounded(dtype, labelled):
        wrong = _is_not_whole(pl.col(column), dtype, options.null_values or ())
        yield Check("whole", column, wrong, pl.col(column).cast(pl.String), "no whole number", _say_whole(column))


def _whole_events(
    column: str, dtype: pl.DataType, options: Categorical, separator: str, labelled: bool
) -> Iterator[Check]:
    inner = event_type(column, dtype)
    kind_of(column, inner)
    if _is_rounded(inner, labelled):
        lists = as_lists(pl.col(column), dtype, separator)
        wrong = lists.list.eval(_is_not_whole(pl.element(), inner, options.null_values or ())).list.any()
        shown = lists.list.eval(pl.element().cast(pl.String)).list.join(", ", ignore_nulls=True)
        yield Check("whole", column, wrong.fill_null(False), shown, "has no whole number", _say_whole(column))


def _is_not_whole(value: pl.Expr, dtype: pl.DataType, tokens: Sequence[Value]) -> pl.Expr:
    """Return whether a value is neither missing nor a whole number that its type can hold exactly."""
    if is_wide(dtype):
        wrong = value.is_not_null() & value.cast(pl.Int64, strict=False).is_null()
    else:
        number = value.cast(pl.Float64)
        wrong = ~number.is_nan() & ((number.floor() != number) | (number.abs() > largest_exact(dtype)))
    if tokens:
        wrong &= ~is_one_of(value, dtype, tokens)
    return wrong.fill_null(False)


def _say_whole(column: str) -> Say:
    return lambda values, rows: (
        f", column {column!r}: {values[0]} is no whole number that its type can hold exactly; "
        "ids must be 64-bit whole numbers or text. List the column under `numeric`, or store it as integers or text."
    )


def _number(column: str, dtype: pl.DataType, tokens: Sequence[Value]) -> Iterator[Check]:
    if not is_readable_number(dtype):
        raise DataError(f"column {column!r} is {dtype}; a numeric column holds numbers. Cast it in the logs.")
    raw = pl.col(column)
    number = number_of(raw, dtype)
    given = raw.is_not_null()
    if tokens and dtype != pl.Null:
        given &= ~is_one_of(raw, dtype, tokens)
    shown = raw.cast(pl.String)
    if dtype == pl.String:
        wrong = given & number.is_null()
        yield Check("number", column, wrong, shown, "is no number", _say_number(column))
    if dtype == pl.String or dtype.is_float() or dtype.is_decimal():
        wrong = (given & ~(number.abs() <= LARGEST)).fill_null(False)
        yield Check("non_finite", column, wrong, shown, "is not finite as float32", _say_non_finite(column))


def _say_number(column: str) -> Say:
    return lambda values, rows: (
        f", column {column!r}: {values[0]} is no number. "
        f"If it means missing, declare it: numeric: {{{column}: {{null_values: [{values[0]}]}}}}"
    )


def _say_non_finite(column: str) -> Say:
    return lambda values, rows: (
        f", column {column!r}: {values[0]} is not finite as float32. "
        "To take it for missing: data: {bad_rows: {non_finite: map}}"
    )


def _label(rule: Label, dtype: pl.DataType) -> Check:
    reading = label_reading(rule, dtype)
    column = rule.column

    def say(values: Sequence[str], rows: int) -> str:
        return (
            f", label column {column!r}: expected {reading.expected}, found {listing(values)} "
            f"({rows} rows of those read so far). "
            "To make a 0/1 label of other values, give `{column: …, at_least: …}` or `{column: …, positive: […]}`."
        )

    return Check("label", column, ~reading.valid, pl.col(column).cast(pl.String), f"expected {reading.expected}", say)


def _context(use: str, column: str, dtype: pl.DataType) -> Check:
    if use == "group":
        kind_of(column, dtype)
    expected, valid = context_limit(use, column, dtype)

    def say(values: Sequence[str], rows: int) -> str:
        return f", context {use} {column!r}: expected {expected}, found {values[0]}"

    return Check("context", column, ~valid, pl.col(column).cast(pl.String), f"expected {expected} as {use}", say)


def _events(sequence: SequenceGroup, schema: Mapping[str, pl.DataType]) -> Iterator[Check]:
    first, *others = sequence.columns.values()
    length = {c: as_lists(pl.col(c), schema[c], sequence.separator).list.len().fill_null(0) for c in (first, *others)}
    for column in others:
        shown = pl.format(f"{{}} events in {first!r} but {{}} in {column!r}", length[first], length[column])
        problem = "the columns of a sequence must have one value per event each"
        yield Check("events", column, length[column] != length[first], shown, problem, _say_events(problem))


def _say_events(problem: str) -> Say:
    return lambda values, rows: f": {values[0]}; {problem}"


@dataclass(frozen=True)
class Screen:
    """Applies the rules of a recipe to blocks of raw rows.

    Args:
        checks: the rules.
        policy: what is done with rows that break them.
        quarantine: takes the rows set aside; None where every row must stay, as in scoring.
    """

    checks: tuple[Check, ...]
    policy: BadRows
    quarantine: Quarantine | None

    @classmethod
    def of(
        cls,
        config: DataConfig,
        schema: Mapping[str, pl.DataType],
        what: str,
        *,
        labelled: bool = True,
        quarantine: Quarantine | None = None,
    ) -> Screen:
        """Return the screen of a recipe for logs of these types.

        Args:
            config: the recipe's data block.
            schema: types of the raw columns.
            what: how errors call the rows.
            labelled: false when scoring: labels are not read, and no row is set aside.
            quarantine: takes the rows set aside; by default one of its own.

        Raises:
            DataError: a column's type does not fit its use.
        """
        found = tuple(checks(config, schema, labelled=labelled))
        if labelled:
            return cls(found, config.bad_rows, quarantine or Quarantine(config.bad_rows, what))
        changed = dict.fromkeys([*get_args(Rule), *READING_RULES], "error") | {"non_finite": "map"}
        if config.bad_rows.number == "map":
            changed["number"] = "map"
        return cls(found, config.bad_rows.model_copy(update=changed), None)

    def clean(self, block: RawBlock) -> pl.DataFrame:
        """Return the rows of a block that keep the rules.

        Raises:
            DataError: a row breaks a rule whose policy is `error`, or too many are set aside.
        """
        frame = block.frame
        broken = self._broken(frame)
        fatal = [c for c in broken if getattr(self.policy, c.rule) == "error"]
        self._refuse(frame, block, fatal)
        aside = [c for c in broken if getattr(self.policy, c.rule) == "quarantine"]
        bad = [c.bad_rows(frame.filter(c.wrong), block.file) for c in aside]
        if aside:
            frame = frame.filter(~pl.any_horizontal(c.wrong for c in aside))
        if self.quarantine is not None:
            self.quarantine.add(pl.concat([block.bad, *bad]).sort("row", maintain_order=True), block.seen)
        return frame

    def take_unreadable(self, block: RawBlock) -> None:
        """Set aside what of a block could not be read, its other rows being looked at elsewhere.

        Raises:
            DataError: the policy is `error`, or too many rows are set aside.
        """
        self._refuse(block.frame, block, [])
        if self.quarantine is not None:
            self.quarantine.add(block.bad, len(block.bad))

    def _broken(self, frame: pl.DataFrame) -> list[Check]:
        if not self.checks:
            return []
        any_wrong = frame.select(c.wrong.any().alias(str(i)) for i, c in enumerate(self.checks)).row(0)
        return [c for c, wrong in zip(self.checks, any_wrong, strict=True) if wrong]

    def _refuse(self, frame: pl.DataFrame, block: RawBlock, fatal: Sequence[Check]) -> None:
        """Raise the error of the first row that must not be there."""
        firsts = []
        for check in fatal:
            rows = frame.filter(check.wrong)
            firsts.append((rows[ROW][0], check.error(rows, block.file)))
        for row in block.bad.iter_rows(named=True):
            if getattr(self.policy, row["rule"]) == "error":
                firsts.append((row["row"], DataError(f"{row['file']}, {row['problem']}: {row['value']!r}")))
                break
        if firsts:
            raise min(firsts, key=lambda first: first[0])[1]
