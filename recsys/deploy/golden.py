"""Golden rows: raw rows with every kind of value that a service meets, and the scores that training gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys.contracts import Batch
from recsys.data.blocks import EncodedColumns
from recsys.data.encode import Encoder
from recsys.data.schema import Categorical, MultiValued
from recsys.data.values import STORED
from recsys.data.vocabulary import Vocabulary
from recsys.deploy.calibration import sigmoid
from recsys.nn.model import Model, Vectors

ROWS = 320
_ROUNDED = (1e-5, 1e-4)
"""Rows of which rounding moves the probability by more are no golden rows; the second, where a tenth of them is so."""
_TEXTS = (
    "",
    " ",
    "never seen",
    "\u00e9\u0301 na\u00efve",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600",
    "x" * 2000,
    "a|b",
    "\t\n",
    "0",
    "-1",
    "1.0",
)
_NUMBERS = (2**53 + 1, 2**62, 2**63 - 1, -(2**62), -1, 0, 987_654_321)
_FLOATS = (0.0, -0.0, 1e300, -1e300, 3.5e38, 1e-300, 1.5, -7.0)
Row = dict[str, Any]
Logits = np.ndarray[Any, Any]


def golden_rows(encoder: Encoder, seed: int = 1) -> list[Row]:
    """Return raw rows: known values, and among them unseen, missing, empty, strange and very large ones.

    A function of the encoder and the seed. Row 0 has only missing values, row 1 only unseen ones.
    """
    random = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {}
    config = encoder.config
    for name in config.categorical:
        columns[name] = _ids(encoder, name, config.options(name), ROWS, random)
    for name, spec in encoder.numerics.items():
        known = spec.mean + spec.scale * random.standard_normal(ROWS)
        if spec.transform == "log":
            known = np.sign(known) * np.expm1(np.minimum(np.abs(known), 300.0))
        if spec.bounds:
            known = random.choice(np.asarray(spec.bounds), ROWS) + random.choice([-1e-9, 0.0, 1e-9], ROWS)
        columns[name] = _mixed(known.tolist(), [None, *_FLOATS], random)
    for name, bag in config.multi_valued.items():
        columns[name] = _lists(encoder, name, bag, _lengths(bag.max_length, random), bag.max_length, random)
    for sequence in config.sequences.values():
        lengths = _lengths(sequence.max_length, random)
        for target, column in sequence.columns.items():
            columns[column] = _lists(encoder, target, config.options(target), lengths, sequence.max_length, random)
    return [{name: values[at] for name, values in columns.items()} for at in range(ROWS)]


def _ids(encoder: Encoder, field: str, options: Categorical, count: int, random: np.random.Generator) -> list[Any]:
    lookup = encoder.lookup(field)
    strange: list[Any] = [None, *(_TEXTS if lookup.kind == "text" else _NUMBERS)]
    if lookup.kind == "uint":
        strange = [n for n in strange if n is None or n >= 0] + [2**64 - 1]
    strange += [token for token in options.null_values or () if isinstance(token, str) == (lookup.kind == "text")]
    if not isinstance(lookup, Vocabulary) or not len(lookup.values):
        return _mixed([strange[i] for i in random.integers(0, len(strange), count)], strange, random)
    size = len(lookup.values)
    at = np.minimum(random.geometric(min(0.5, 8 / size), count) - 1, size - 1)
    at[::2] = random.integers(0, size, len(at[::2]))
    return _mixed(lookup.values.gather(at).to_list(), strange, random)


def _mixed(known: list[Any], strange: Sequence[Any], random: np.random.Generator) -> list[Any]:
    """Put a strange value in the place of every fourth one; row 0 gets the first, row 1 the third of them."""
    odd = random.random(len(known)) < 0.25
    picks = random.integers(0, len(strange), len(known))
    found = [strange[p] if o else k for k, o, p in zip(known, odd.tolist(), picks.tolist(), strict=True)]
    for at, pick in ((0, 0), (1, 3)):
        if at < len(found):
            found[at] = strange[pick % len(strange)]
    return found


def _lengths(longest: int, random: np.random.Generator) -> list[int]:
    """Lengths of lists: none, one, all that is kept, and more."""
    found = random.integers(0, longest + 1, ROWS)
    found[random.random(ROWS) < 0.1] = longest + 3
    found[:4] = [0, 1, longest, 2 * longest + 1]
    return [int(n) for n in found]


def _lists(
    encoder: Encoder,
    field: str,
    options: Categorical | MultiValued,
    lengths: Sequence[int],
    longest: int,
    random: np.random.Generator,
) -> list[Any]:
    flat = _ids(encoder, field, options, sum(lengths), random)
    ends = np.cumsum(lengths)
    found: list[Any] = [flat[end - n : end] for n, end in zip(lengths, ends.tolist(), strict=True)]
    return [None if not values and at % 2 == 0 else values for at, values in enumerate(found)]


def frame_of(encoder: Encoder, rows: Sequence[Row]) -> pl.DataFrame:
    """Return raw rows as the training encoder reads them."""
    config = encoder.config
    schema: dict[str, Any] = {name: STORED[encoder.lookup(name).kind] for name in config.categorical}
    schema |= dict.fromkeys(config.numeric, pl.Float64())
    schema |= {name: pl.List(STORED[encoder.lookup(name).kind]) for name in config.multi_valued}
    for sequence in config.sequences.values():
        schema |= {c: pl.List(STORED[encoder.lookup(target).kind]) for target, c in sequence.columns.items()}
    return pl.DataFrame({name: [row[name] for row in rows] for name in schema}, schema=schema, strict=True)


def training_logits(encoder: Encoder, model: Model, frame: pl.DataFrame) -> dict[str, Logits]:
    """Return what the training code says of raw rows: its own encoder, its own model; task → `[rows]` float64."""
    found = [logits_of(model, batch_of(encoder, block)) for block in encoder.transform(frame.lazy(), labels=False)]
    return {task: np.concatenate([part[task] for part in found]) for task in found[0]}


def logits_of(model: Model, batch: Batch) -> dict[str, Logits]:
    """Return the model's logits, as evaluation computes them; task → `[B]` float64."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        found = {task: logit.double().cpu().numpy() for task, logit in model(batch.to(device)).items()}
    model.train(was_training)
    return found


def exact_logits(model: Model, batch: Batch) -> dict[str, Logits] | None:
    """Return the logits that double precision gives for the same vectors; None where a part does without it.

    The embedding stays as it is, and is not copied.
    """
    device = next(model.parameters()).device
    whole = copy.deepcopy(model, {id(model.embedding): model.embedding}).eval()
    try:
        with torch.inference_mode():
            for name, part in whole.named_children():
                if name != "embedding":
                    part.double()
            batch = batch.to(device)
            found = whole.look_up(batch.ids, batch.values, batch.history)
            histories = {name: (events.double(), length) for name, (events, length) in found.histories.items()}
            x = whole.combine(Vectors(found.fields.double(), histories), batch.ids)
            values = None if batch.values is None else batch.values.double()
            return {task: z.cpu().numpy() for task, z in whole.decide(x.double(), batch.ids, values).items()}
    except (RuntimeError, TypeError):
        return None


def rounding(model: Model, batch: Batch) -> Logits:
    """Return by how much rounding alone moves the probabilities of the rows, `[B]`; zeros where that is not known.

    That is the distance of what single precision gives in the training code from double precision. Parts that add and
    subtract large numbers, such as unscaled attention, make it larger than a bundle may otherwise differ by.
    """
    exact = exact_logits(model, batch)
    if exact is None:
        return np.zeros(len(batch))
    gaps = [np.abs(sigmoid(z) - sigmoid(exact[task])) for task, z in logits_of(model, batch).items()]
    found: Logits = np.nan_to_num(np.max(gaps, axis=0), nan=0.0)
    return found


def alone(model: Model, batch: Batch) -> float:
    """Return by how much a probability depends on which rows are scored together, in the training code itself.

    Single precision rounds sums of many rows otherwise than those of one.
    """
    together = logits_of(model, batch)
    worst = 0.0
    for at in range(len(batch)):
        one = slice(at, at + 1)
        history = {name: (ids[one], length[one]) for name, (ids, length) in batch.history.items()}
        values = None if batch.values is None else batch.values[one]
        found = logits_of(model, Batch(batch.ids[one], values, history))
        gaps = [abs(sigmoid(z) - sigmoid(together[task][one])).max() for task, z in found.items()]
        worst = max(worst, *(float(gap) for gap in gaps))
    return worst


def batch_of(encoder: Encoder, block: EncodedColumns) -> Batch:
    """Return an encoded block as the one batch that the model takes."""
    schema = encoder.schema
    ids = np.empty((block.rows, len(schema.fields)), dtype=np.int64)
    values = np.ones((block.rows, len(schema.fields)), dtype=np.float32)
    for f, field in enumerate(schema.fields):
        if field.numeric:
            numbers = block.values[field.name]
            missing = np.isnan(numbers)
            ids[:, f] = ~missing  # NUMERIC_VALUE_ID or NULL_ID
            values[:, f] = np.where(missing, 1.0, numbers)
        else:
            ids[:, f] = block.ids[field.name]
    history = {}
    for h in schema.histories:
        ragged = block.history[h.name]
        longest = max(int(ragged.length.max(initial=0)), 1)
        padded = np.zeros((block.rows, longest, len(h.columns)), dtype=np.int64)
        padded[np.arange(longest) < ragged.length[:, None]] = ragged.values
        history[h.name] = (torch.from_numpy(padded), torch.from_numpy(ragged.length.copy()))
    return Batch(torch.from_numpy(ids), torch.from_numpy(values) if schema.has_numeric else None, history)


def answers(
    rows: Sequence[Row], logits: Mapping[str, Logits], rounded: Logits
) -> tuple[list[Row], dict[str, Logits], float]:
    """Return the rows whose scores can be compared, these scores, and the largest rounding among them.

    A number may be too large for a model: its score is then not finite, or nothing but rounding is left of it.

    Args:
        rows: raw.
        logits: task → `[rows]`.
        rounded: what rounding moves the probability of each row by, `[rows]`.
    """
    good = np.all([np.isfinite(z) for z in logits.values()], axis=0)
    most = float(np.quantile(rounded[good], 0.9)) if good.any() else 0.0
    good &= rounded <= min(max(_ROUNDED[0], most), _ROUNDED[1])
    kept = [row for row, keep in zip(rows, good.tolist(), strict=True) if keep]
    return kept, {t: z[good] for t, z in logits.items()}, float(rounded[good].max(initial=0.0))
