"""Conversions that come late: losses for rows whose label may still change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
import torch
from pydantic import Field as Limits
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import (
    Batch,
    Component,
    DataError,
    DataRoot,
    EncodedSchema,
    first_order,
    full,
    hookimpl,
    row_mean,
)

LEAST_RATE = 1e-6
SPLITS = ("train", "valid", "test")
ADDED = ("label", "event_time", "delay", "elapsed")
Share = Annotated[float, Limits(gt=0, lt=0.5)]


class ConversionStream:
    """Clicks and their late conversions as training would have met them: doubled, as known on a day, or in the end.

    Training stops at a moment, before the newest `valid` + `test` of the clicks. Each row has the file's columns, and
    `label`, `event_time`, `delay` (conversion minus click; 0 where there is no conversion) and `elapsed` (that moment
    minus click), the latter two as numbers of `unit`.

    stream: every click before the moment as a row with label 0 at the time of the click, and a second one with label 1
    at the time of its conversion, if that was before the moment too. snapshot: every click before the moment once, with
    label 1 if it has converted by then. final: the same with all conversions of the file, which no training could have
    known. `valid` and `test` always are the later clicks, each once, with all conversions of the file.

    Args:
        path: Parquet file or files; rows without a click time are left out.
        click_time: column of the click's time, a number or a date with time.
        conversion_time: column of the conversion's time, missing where there was none.
        form: stream, snapshot or final.
        unit: what one unit of `delay` and `elapsed` is; in seconds for columns of dates, else in the column's own unit.
        valid: share of the clicks.
        test: share of the clicks.
    """

    def __init__(
        self,
        root: DataRoot,
        *,
        path: str,
        click_time: str = "click_time",
        conversion_time: str = "conversion_time",
        form: Literal["stream", "snapshot", "final"] = "stream",
        unit: PositiveFloat = 86400.0,
        valid: Share = 0.1,
        test: Share = 0.1,
    ) -> None:
        self._root, self._path, self._form, self._unit = root, path, form, unit
        self._click, self._conversion = click_time, conversion_time
        self._valid, self._test = valid, test

    def identity(self) -> str:
        """Return a text that is equal exactly when the rows are."""
        digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in self._root.find(self._path)]
        return repr((digests, self._click, self._conversion, self._form, self._unit, self._valid, self._test))

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the rows of `train`, `valid` or `test`, by time; a click before a conversion of the same time.

        Raises:
            DataError: another split; a column is missing or in the way; a conversion before its click.
        """
        if split not in SPLITS:
            raise DataError(f"source conversion_stream: no {split!r} split; it gives {', '.join(SPLITS)}")
        clicks = self._read()
        rank = clicks["__click"].rank("min") - 1  # clicks that are strictly earlier
        cuts = [round(len(clicks) * (1 - self._valid - self._test)), round(len(clicks) * (1 - self._test))]
        part = (rank >= cuts[0]).cast(pl.Int8) + (rank >= cuts[1]).cast(pl.Int8)
        now = clicks["__click"].filter(part > 0).min()
        if now is None or not (part == 0).any():
            raise DataError(f"source conversion_stream: {self._path}: {len(clicks)} clicks are too few to be divided")
        return self._rows(clicks.filter(part == SPLITS.index(split)), split, float(str(now))).lazy()

    def _rows(self, clicks: pl.DataFrame, split: str, now: float) -> pl.DataFrame:
        known = pl.col("__conversion").is_not_null()
        if split == "train" and self._form != "final":
            known &= pl.col("__conversion") < now
        event = pl.col("__click")
        if split == "train" and self._form == "stream":
            converted = clicks.filter(known)
            clicks = pl.concat(
                [clicks.with_columns(__label=pl.lit(False)), converted.with_columns(__label=pl.lit(True))]
            )
            known = pl.col("__label")
            event = pl.when(known).then("__conversion").otherwise("__click")
        frame = clicks.with_columns(
            label=known.cast(pl.Int8),
            event_time=event,
            delay=pl.when(known).then((pl.col("__conversion") - pl.col("__click")) / self._unit).otherwise(0.0),
            elapsed=((now - pl.col("__click")) / self._unit).clip(0.0),
        )
        return frame.sort("event_time", "label", maintain_order=True).drop(pl.selectors.starts_with("__"))

    def _read(self) -> pl.DataFrame:
        """The clicks, with both times as float64 under names of our own."""
        log = pl.concat([pl.read_parquet(f) for f in self._root.find(self._path)])
        for column in (self._click, self._conversion):
            if column not in log.columns:
                raise DataError(f"source conversion_stream: {self._path}: no column {column!r}; has {log.columns}")
        taken = [name for name in ADDED if name in log.columns]
        if taken:
            raise DataError(f"source conversion_stream: {self._path}: the column {taken[0]!r} is in the way; rename it")
        log = log.with_columns(__click=_seconds(log[self._click]), __conversion=_seconds(log[self._conversion])).filter(
            pl.col("__click").is_not_null()
        )
        early = log.filter(pl.col("__conversion") < pl.col("__click"))
        if len(early):
            raise DataError(f"source conversion_stream: {self._path}: {len(early)} conversions come before their click")
        return log


def _seconds(time: pl.Series) -> pl.Series:
    """Dates with time as seconds, numbers as they are, in float64."""
    if time.dtype.is_temporal():
        return time.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6
    return time.cast(pl.Float64)


class FNW(nn.Module):
    """Fake negatives, weighted: every click is a negative at once, and a second row is a positive when it converts.

    L = (1/B) Σ_b [y (1 + sg(p)) softplus(−x) + (1 − y) (1 − sg(p)) (1 + sg(p)) softplus(x)], p = σ(x), sg no gradient:
    the weights undo what the extra row per conversion does, and p comes out as P(conversion). Needs the doubled stream,
    such as the source `conversion_stream` gives. Several tasks are averaged; row weights are honoured.

    The same stream under `bce` is FNC, fake negative calibration: the model then says b = p / (1 + p), and what is
    served must be p = b / (1 − b), at most 1, which is the logit −log(exp(−x) − 1) for x < 0.

    Ktena et al., "Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR Prediction",
    RecSys 2019.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.needs: tuple[str, ...] = ()

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        return torch.stack([row_mean(self._rows(full(logits[t]), batch.label[t]), batch) for t in self.tasks]).mean()

    @staticmethod
    def _rows(x: Tensor, label: Tensor) -> Tensor:
        """`[B], [B] -> [B]`."""
        p = torch.sigmoid(x.detach())
        y = label.to(x.dtype)
        return (1 + p) * (y * F.softplus(-x) + (1 - y) * (1 - p) * F.softplus(x))


class DFM(nn.Module):
    """The delayed feedback model: whether a click converts, and how long that takes, from clicks of any age.

    A conversion has p λ exp(−λ delay), p = σ(x); a click that has not converted for the time `elapsed` has
    1 − p + p exp(−λ elapsed); the loss is the mean of minus the logarithms. λ = softplus(v) + 1e-6 for each row, v a
    bias and a weight for each value of each field, which belong to the loss and are not served. Both columns are in
    the same unit, best one in which usual delays are around 1. Several tasks share the columns, each with its own λ.

    Chapelle, "Modeling Delayed Feedback in Display Advertising", KDD 2014.
    """

    def __init__(self, tasks: tuple[str, ...], schema: EncodedSchema) -> None:
        super().__init__()
        self.tasks = tasks
        self.head = first_order(schema, len(tasks))
        self.bias = nn.Parameter(torch.zeros(len(tasks)))
        self.needs: tuple[str, ...] = ("delay", "elapsed")

    def forward(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`, float32 also under autocast."""
        rates = self.rates(batch)
        losses = [self._rows(full(logits[t]), batch.label[t], rates[:, i], batch) for i, t in enumerate(self.tasks)]
        return torch.stack([row_mean(loss, batch) for loss in losses]).mean()

    def rates(self, batch: Batch) -> Tensor:
        """λ of each row and task, `[B, T]`."""
        raw = full(self.head(batch.ids, batch.values)).sum(1) + self.bias
        return F.softplus(raw) + LEAST_RATE

    @staticmethod
    def _rows(x: Tensor, label: Tensor, rate: Tensor, batch: Batch) -> Tensor:
        """`[B], [B], [B] -> [B]`; each row reads one of the two columns, and the other one may hold anything."""
        converted = label > 0.5
        delay = batch.context["delay"].to(x.dtype).where(converted, 0.0)
        elapsed = batch.context["elapsed"].to(x.dtype).where(~converted, 0.0)
        rate = rate.to(x.dtype)
        seen = F.logsigmoid(x) + rate.log() - rate * delay
        unseen = torch.logaddexp(F.logsigmoid(-x), F.logsigmoid(x) - rate * elapsed)
        return -seen.where(converted, unseen)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the losses, and the source of their rows."""
    return [
        Component("source", "conversion_stream", ConversionStream),
        Component("loss", "fnw", FNW),
        Component("loss", "dfm", DFM),
    ]
