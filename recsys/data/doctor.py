"""Examines logs before anybody trains on them: labels, times, missing and unknown values, copies, leaks and drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from recsys.data.doctor_facts import ColumnFacts, Examination, Finding, Limits, Role, SplitFacts
from recsys.data.doctor_rows import Distinct, RowHashes, hash_cells, hash_rows
from recsys.data.doctor_rules import findings
from recsys.data.doctor_scores import EncodedFacts
from recsys.data.doctor_time import Times
from recsys.data.encode import Encoder
from recsys.data.hashing import U64, mix_array
from recsys.data.infer import infer_schema
from recsys.data.quarantine import Quarantine
from recsys.data.reading import Origin, RawBlock, RawRows, source_rows
from recsys.data.report import SplitReport
from recsys.data.rules import Screen
from recsys.data.schema import DataConfig, TimeSplit
from recsys.data.sources import DataRoot, Files
from recsys.data.split import split_rows
from recsys.errors import DataError

ROWS = 1_000_000
"""Rows of each split that are examined unless the user says otherwise."""
_NO_LABEL = "FILL_IN"
"""What `infer_schema` writes where no column can be a label."""
_GROUPS = ("categorical", "numeric", "multi_valued")
Progress = Callable[[str, int], None]
"""Called with what is being done and the rows done so far."""


def examine(
    splits: Mapping[str, RawRows],
    config: DataConfig,
    encoder: Encoder | None,
    *,
    rows: int = ROWS,
    unused: Sequence[str] = (),
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Examination:
    """Read up to `rows` rows of each split once, and say what was found.

    Memory: a block of `config.batch_rows`, the vocabularies, up to 16 bytes for each of 8 million rows, and up to
    about 4 MB for each column and 2^18 rows of numbers, however long the logs are.

    Args:
        splits: split → raw rows, as `split_rows` gives them; `train` first.
        config: the data block.
        encoder: fitted on the train rows that are examined; without it, only what raw values tell is found.
        rows: rows of each split to examine, the first ones.
        unused: columns that the data block leaves out, to look for constants and row ids there too.
        limits: from where on something is a finding.
        progress: told about every block.

    Raises:
        DataError: the logs cannot be read. Values that cannot be encoded are a finding instead.
    """
    work = _Work(config, encoder, Examination(rows), tuple(unused))
    schema = splits["train"].schema
    for name in (*config.columns(labels=False), *unused):
        work.found.columns[name] = ColumnFacts(name, _role(config, name), str(schema[name]), ids=_ids(encoder, name))
    for name, part in splits.items():
        for done in work.read(name, part, rows):
            if progress is not None:
                progress(f"examine {name}", done)
    found = work.finish()
    found.add(findings(found, config, limits or Limits()))
    return found


def examine_logs(
    paths: Sequence[str], *, rows: int = ROWS, limits: Limits | None = None, progress: Progress | None = None
) -> tuple[Examination, Encoder | None]:
    """Examine files of logs with the data block that `infer_schema` guesses, and the columns that it leaves out.

    Raises:
        DataError: the logs cannot be read, or have no column that can be an input.
    """
    if progress is not None:
        progress("guess the data block", 0)
    config = _guessed(paths)
    source = Files(DataRoot((Path(),)), path=tuple(paths))
    extra: list[Finding] = []
    if not config.label:
        message = "no column holds just 0 and 1; write a recipe (`recsys schema infer`) and name a label to find leaks"
        extra.append(Finding("note", "no-label", None, None, None, message))
    try:
        splits = split_rows(source, config.split, rows=config.batch_rows)
    except DataError as error:
        extra.append(Finding("warning", "split", None, None, None, f"{error}; all rows are examined as one split"))
        splits, config = {"train": source_rows(source, "all", "the logs")}, config.model_copy(update={"split": None})
    # A time of the log need not be one that training can use; its range is examined all the same.
    config = config.model_copy(update={"context": {}})
    known = (*config.columns(), *time_columns(config))
    unused = [c for c, dtype in source.schema("all").items() if c not in known and not _is_nested(dtype)]
    try:
        encoder = Encoder.fit(first_rows(splits["train"], rows), config)
    except DataError as error:
        extra.append(_not_encoded("train", error))
        encoder = None
    found = examine(splits, config, encoder, rows=rows, unused=unused, limits=limits, progress=progress)
    found.add(extra)
    return found, encoder


def _guessed(paths: Sequence[str]) -> DataConfig:
    block: dict[str, Any] = yaml.safe_load(infer_schema(*paths))["data"]
    if not any(block.get(group) for group in _GROUPS):
        raise DataError(f"{', '.join(paths)}: no column can be an input: all are constant, nested or all different")
    # YAML has nothing where a column has no options.
    groups = {g: {str(c): o or {} for c, o in block[g].items()} for g in _GROUPS if g in block}
    config = DataConfig.model_validate({**block, **groups})
    return config.model_copy(update={"label": {}}) if block["label"] == _NO_LABEL else config


def time_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns that are known to hold times: of a split by time, and the context time."""
    by_time = [config.split.column] if isinstance(config.split, TimeSplit) else []
    return tuple(dict.fromkeys([*by_time, *(c for n, c in config.context.items() if n == "time")]))


def _role(config: DataConfig, name: str) -> Role:
    if name in config.categorical:
        return "categorical"
    if name in config.numeric:
        return "numeric"
    if name in config.multi_valued:
        return "multi_valued"
    return "history" if name in config.columns(labels=False) else "unused"


def _ids(encoder: Encoder | None, name: str) -> int | None:
    if encoder is None:
        return None
    known = [f for f in encoder.schema.fields if not f.numeric]
    known += [column for history in encoder.schema.histories for column in history.columns]
    return next((f.rows for f in known if f.name == name), None)


def _is_nested(dtype: pl.DataType) -> bool:
    return isinstance(dtype, pl.Struct | pl.Object | pl.Binary)


def _not_encoded(split: str, error: DataError) -> Finding:
    return Finding("error", "encode", None, split, None, f"cannot be encoded: {error}")


class _First:
    """The first rows of a split, as a source of their own."""

    def __init__(self, rows: RawRows, limit: int) -> None:
        self._rows = rows
        self._limit = limit

    def schema(self, split: str) -> pl.Schema:
        return self._rows.schema

    def blocks(self, split: str, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        done = 0
        for block in self._rows.blocks(columns, rows, start):
            frame = block.frame.head(self._limit - done)
            done += frame.height
            yield replace(block, frame=frame, seen=block.seen - block.frame.height + frame.height, end=done)
            if done == self._limit:
                return


def first_rows(rows: RawRows, limit: int) -> RawRows:
    """Return the first `limit` rows of a split."""
    return replace(rows, source=_First(rows, limit), keep=None, needs=())


@dataclass
class _Work:
    """Reads split after split, adding to what was found."""

    config: DataConfig
    encoder: Encoder | None
    found: Examination
    unused: tuple[str, ...]

    def __post_init__(self) -> None:
        self.inputs = self.config.columns(labels=False)
        self.times = time_columns(self.config)
        self.distinct = {name: Distinct() for name in (*self.inputs, *self.unused)}
        self.hashes = RowHashes()
        self.encoded: dict[str, EncodedFacts] = {}
        self.failed = False

    def read(self, split: str, part: RawRows, rows: int) -> Iterator[int]:
        """Read a split; yield the rows read so far."""
        facts = self.found.splits[split] = SplitFacts()
        train = self.found.splits["train"].times
        facts.times = {c: Times(None if split == "train" else train[c].high) for c in self.times}
        if self.encoder is not None:
            self.encoded[split] = EncodedFacts(self.encoder.schema, targets=split == "train")
        report = SplitReport()
        columns = (*self.config.columns(), *self.times, *self.unused)
        screen = None if self.encoder is None else Screen.of(self.config, part.schema, part.what)
        for raw in first_rows(part, rows).blocks(columns, self.config.batch_rows):
            facts.examined += raw.seen
            block = raw.frame
            if screen is not None and split in self.encoded:
                try:
                    block = screen.clean(raw)
                except DataError as error:
                    self._cannot_be_encoded(split, error)
            inputs = self._add_raw(split, facts, block)
            if self.encoder is not None and split in self.encoded:
                whole = self._add_encoded(self.encoder, split, block, part.origin(raw), inputs, report)
                self.hashes.add(split, inputs, whole)
            elif not self.failed and self.encoder is None:
                self.hashes.add(split, inputs, inputs)
            yield facts.examined
        facts.rows = facts.examined if facts.examined < rows else _height(part, self.config.batch_rows)
        self._close(split, facts, report)
        if screen is not None and screen.quarantine is not None and split in self.encoded:
            self._aside(split, screen.quarantine)

    def _cannot_be_encoded(self, split: str, error: DataError) -> None:
        self.found.add([_not_encoded(split, error)])
        del self.encoded[split]
        self.failed = True

    def _aside(self, split: str, quarantine: Quarantine) -> None:
        """Say how many rows would be set aside, or that it is too many."""
        broken = quarantine.found.filter(pl.col("rule") == "non_finite")["column"].value_counts()
        for column, count in broken.rows():
            self.found.columns[column].non_finite[split] = count
        try:
            quarantine.check()
        except DataError as error:
            self.found.add([_not_encoded(split, error)])
        else:
            if quarantine.rows:
                share = quarantine.rows / quarantine.seen
                message = f"{quarantine.rows:,} rows ({share:.3%}) break a rule of data.bad_rows and would be set aside"
                self.found.add([Finding("note", "aside", None, split, share, message)])

    def _add_raw(self, split: str, facts: SplitFacts, block: pl.DataFrame) -> U64:
        """Count distinct values (train only) and times; return the hashes of the rows' inputs, `[n]`."""
        train = split == "train"
        cells = {name: hash_cells(block[name]) for name in (*self.inputs, *(self.unused if train else ()))}
        if train:
            for name, hashed in cells.items():
                self.distinct[name].add(hashed[hashed != 0])
        for column, times in facts.times.items():
            times.add(block[column])
        return hash_rows([cells[name] for name in self.inputs], block.height)

    def _add_encoded(
        self, encoder: Encoder, split: str, block: pl.DataFrame, origin: Origin, inputs: U64, report: SplitReport
    ) -> U64:
        """Take a block that keeps the rules, encoded; return the hashes of the rows' inputs and labels, `[n]`."""
        part = encoder.encode(block, origin, report)
        self.encoded[split].add(part)
        whole = inputs.copy()
        for task in encoder.schema.tasks:
            whole = mix_array(whole ^ mix_array(part.label[task].astype(np.int64)))
        return whole

    def _close(self, split: str, facts: SplitFacts, report: SplitReport) -> None:
        encoded = self.encoded.get(split)
        if encoded is None:
            return
        facts.positives = dict(encoded.positives)
        for name in self.inputs:
            column = self.found.columns[name]
            column.null[split] = encoded.null_rate(name)
            unknown = encoded.unknown_rate(name)
            if unknown is not None and column.ids is not None:
                column.unknown[split] = unknown
            if name in report.columns and report.columns[name].non_finite:
                column.non_finite[split] = report.columns[name].non_finite

    def finish(self) -> Examination:
        """Work out what needs all rows."""
        found = self.found
        for name, counter in self.distinct.items():
            column = found.columns[name]
            column.distinct, column.exact, column.once = counter.result()
            column.present = counter.present
        if not self.failed:
            found.duplicates = self.hashes.result()
        train = self.encoded.get("train")
        if train is not None:
            found.aucs = {task: dict(train.aucs(task)) for task in train.positives}
            others = {name: facts for name, facts in self.encoded.items() if name != "train"}
            found.drift = {name: dict(train.drift_to(facts)) for name, facts in others.items()}
            found.events = {c: n / train.rows for c, n in train.events.items()} if train.rows else {}
        return found


def _height(rows: RawRows, batch_rows: int) -> int:
    return sum(block.seen for block in rows.blocks(rows.schema.names()[:1], batch_rows))
