"""The columns of a request: types, limits, and what they looked like in training, to notice when they change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recsys.contracts import NULL_ID, UNKNOWN_ID, Batch
from recsys.data.encode import Encoder
from recsys.data.limits import LARGEST
from recsys.data.numeric import NumericSpec
from recsys.deploy.calibration import Calibration
from recsys.deploy.spec import EncoderSpec, IdColumn
from recsys.nn.model import Model

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NEAR = 1e-6
"""Numbers this close count as equal, for they are rounded on the way."""
_SCORED = 8192
_TYPES = {"int": "integer", "uint": "integer", "text": "string"}


def describe(encoder: Encoder, spec: EncoderSpec, sample: Batch) -> dict[str, Any]:
    """Return the content of `schema.json`.

    Args:
        encoder: of the model.
        spec: the same as plain values.
        sample: encoded training rows.
    """
    ids = sample.ids.numpy()
    columns = []
    for f, column in enumerate(spec.ids):
        columns.append({**_id_column(spec, column), "baseline": _id_rates(ids[:, f])})
    for n, number in enumerate(spec.numbers):
        f = len(spec.ids) + n
        missing = ids[:, f] == NULL_ID
        baseline: dict[str, Any] = {"missing": _share(missing)}
        if number.transform != "quantile" and sample.values is not None:
            known = sample.values.numpy()[~missing, f]
            baseline |= _quantiles(known, encoder.numerics[number.column])
        columns.append(
            {
                "name": number.column,
                "type": "number",
                "nullable": True,
                "null_values": list(number.null_values),
                "range": [-LARGEST, LARGEST],
                "baseline": baseline,
            }
        )
    for group in spec.lists:
        events, length = (t.numpy() for t in sample.history[group.name])
        inside = np.arange(events.shape[1]) < length[:, None]
        for k, column in enumerate(group.columns):
            rates = {**_id_rates(events[inside, k]), "empty": _share(length == 0), "mean_length": _mean(length)}
            columns.append(
                {
                    **_id_column(spec, column),
                    "type": "list",
                    "items": _TYPES[spec.vocabularies[column.vocabulary].kind],
                    "group": group.name,
                    "max_length": group.max_length,
                    "separator": group.separator,
                    "baseline": rates,
                }
            )
    return {"rows": len(ids), "columns": columns}


def _id_column(spec: EncoderSpec, column: IdColumn) -> dict[str, Any]:
    vocabulary = spec.vocabularies[column.vocabulary]
    return {
        "name": column.column,
        "type": _TYPES[vocabulary.kind],
        "nullable": True,
        "null_values": list(column.null_values),
        "max_bytes": column.max_bytes,
        "values": vocabulary.size,
        "hashed": vocabulary.file is None,
    }


def _id_rates(ids: npt.NDArray[np.int64]) -> dict[str, float]:
    return {"missing": _share(ids == NULL_ID), "unknown": _share(ids == UNKNOWN_ID)}


def _share(mask: npt.NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _mean(x: npt.NDArray[np.int64]) -> float:
    return float(x.mean()) if len(x) else 0.0


def _quantiles(scaled: npt.NDArray[np.float32], fitted: NumericSpec) -> dict[str, dict[str, float]]:
    """Of the raw numbers, from those that were scaled, and the share of rows that have at most each of them."""
    if not len(scaled):
        return {"quantiles": {}, "at_most": {}}
    edges = np.quantile(scaled.astype(np.float64), QUANTILES)
    y = edges * fitted.scale + fitted.mean
    raw = np.clip(np.sign(y) * np.expm1(np.abs(y)) if fitted.transform == "log" else y, -LARGEST, LARGEST)
    shares = [_share(scaled <= edge + NEAR * max(1.0, abs(edge))) for edge in edges.tolist()]
    return {
        "quantiles": {str(q): float(x) for q, x in zip(QUANTILES, raw, strict=True)},
        "at_most": {str(q): share for q, share in zip(QUANTILES, shares, strict=True)},
    }


def describe_scores(model: Model, sample: Batch, calibration: Calibration) -> dict[str, Any]:
    """Return, for each task, quantiles of the probabilities in training and the share of rows with at most each.

    Args:
        model: trained.
        sample: encoded training rows; of many, some thousands are scored.
        calibration: of the bundle.
    """
    part = slice(None, None, max(1, len(sample) // _SCORED))
    history = {name: (events[part], length[part]) for name, (events, length) in sample.history.items()}
    values = None if sample.values is None else sample.values[part]
    rows = replace(sample, ids=sample.ids[part], values=values, history=history, label={}, context={})
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = model(rows.to(next(model.parameters()).device))
    model.train(was_training)
    found = calibration.probabilities({task: z.double().cpu().numpy() for task, z in logits.items()})
    scores = {}
    for task, p in found.items():
        edges = np.unique(np.quantile(p[np.isfinite(p)], QUANTILES)).tolist() if np.isfinite(p).any() else []
        scores[task] = {"edges": edges, "at_most": [_share(p <= edge + NEAR) for edge in edges]}
    return scores
