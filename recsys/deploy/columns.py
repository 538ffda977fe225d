"""The columns of a request: types, limits, and what they looked like in training, to notice when they change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import NULL_ID, UNKNOWN_ID, Batch
from recsys.data.encode import Encoder
from recsys.data.limits import LARGEST
from recsys.data.numeric import NumericSpec
from recsys.deploy.spec import EncoderSpec, IdColumn

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
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
            baseline["quantiles"] = _quantiles(known, encoder.numerics[number.column])
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


def _quantiles(scaled: npt.NDArray[np.float32], fitted: NumericSpec) -> dict[str, float]:
    """Of the raw numbers, from those that were scaled."""
    if not len(scaled):
        return {}
    y = np.quantile(scaled.astype(np.float64), QUANTILES) * fitted.scale + fitted.mean
    raw = np.sign(y) * np.expm1(np.abs(y)) if fitted.transform == "log" else y
    return {str(q): float(x) for q, x in zip(QUANTILES, np.clip(raw, -LARGEST, LARGEST), strict=True)}
