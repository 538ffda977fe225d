"""The OpenAPI document of a server: the protocol's own messages, and the rows that the served model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recsys.deploy.predictor import Predictor
from recsys.deploy.server.limits import Limits
from recsys.deploy.server.oip import TYPES, inputs_of
from recsys.deploy.spec import EncoderSpec

Schema = dict[str, Any]
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_LARGEST = 1e300


def ref(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Mapping[str, Any], *needed: str) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(needed)}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


TEXT: Schema = {"type": "string"}
PARAMETERS: Schema = {"type": "object"}
TENSOR = _object(
    {"name": TEXT, "datatype": {"enum": list(TYPES)}, "shape": _list({"type": "integer"})}, "name", "datatype", "shape"
)
NUMBERS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}
REPLIES: Mapping[str, Schema] = {
    "Error": _object({"error": TEXT}, "error"),
    "Live": _object({"live": {"type": "boolean"}}, "live"),
    "Ready": _object({"ready": {"type": "boolean"}}, "ready"),
    "ModelReady": _object({"name": TEXT, "ready": {"type": "boolean"}}, "name", "ready"),
    "Server": _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)}, "name", "version", "extensions"),
    "Model": _object(
        {"name": TEXT, "versions": _list(TEXT), "platform": TEXT, "inputs": _list(TENSOR), "outputs": _list(TENSOR)},
        *("name", "versions", "platform", "inputs", "outputs"),
    ),
    "Inference": _object(
        {
            "model_name": TEXT,
            "model_version": TEXT,
            "id": TEXT,
            "outputs": _list(
                {**TENSOR, "properties": {**TENSOR["properties"], "data": _list({"type": "number"}), "parameters": {}}}
            ),
        },
        *("model_name", "model_version", "outputs"),
    ),
    "Scores": _object(
        {
            "model": TEXT,
            "bundle": TEXT,
            "scores": _list(NUMBERS),
        },
        *("model", "bundle", "scores"),
    ),
    "Explanations": _object(
        {
            "model": TEXT,
            "bundle": TEXT,
            "base": NUMBERS,
            "explanations": _list(
                _object(
                    {"logit": NUMBERS, "contributions": {"type": "object", "additionalProperties": NUMBERS}},
                    *("logit", "contributions"),
                )
            ),
        },
        *("model", "bundle", "base", "explanations"),
    ),
}


def schemas(predictor: Predictor | None, limits: Limits) -> dict[str, Schema]:
    """Return the schemas of the document; rows and tensors are known once a model is there."""
    row: Schema = {"type": "object"}
    named: Schema = _tensor({"type": "string"}, limits)
    if predictor is not None:
        row = _row(predictor.spec, limits)
        named = _tensor({"enum": [i["name"] for i in inputs_of(predictor)]}, limits)
    output = _object({"name": {"enum": ["probability", "logit"]}, "parameters": PARAMETERS}, "name")
    request = _object(
        {
            "id": {"type": "string", "maxLength": limits.string},
            "parameters": PARAMETERS,
            "inputs": _list(named, minItems=1),
            "outputs": _list(output),
        },
        "inputs",
    )
    rows = {"anyOf": [ref("Row"), _list(ref("Row"), minItems=1, maxItems=limits.rows)]}
    return {**REPLIES, "Row": row, "Rows": rows, "InferenceRequest": request}


def _tensor(name: Schema, limits: Limits) -> Schema:
    data = {"type": "array", "maxItems": limits.values}
    shape = _list({"type": "integer", "minimum": 0, "maximum": limits.values}, minItems=1, maxItems=3)
    properties = {"name": name, "datatype": {"enum": list(TYPES)}, "shape": shape, "data": data}
    return _object({**properties, "parameters": PARAMETERS}, "name", "datatype", "shape")


def _row(spec: EncoderSpec, limits: Limits) -> Schema:
    text: Schema = {"type": "string", "maxLength": limits.string, "pattern": r"^[^\u0000]*$"}
    whole: Schema = {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}
    null: Schema = {"type": "null"}
    flag: Schema = {"type": "boolean"}
    value: Schema = {"anyOf": [text, whole, flag, null]}
    number: Schema = {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST}
    properties: Schema = {c.column: value for c in spec.ids}
    for column in spec.numbers:
        shown = text if column.text_is_missing else {**text, "pattern": _NUMBER, "maxLength": 40}
        properties[column.column] = {"anyOf": [number, shown, flag, null]}
    for group in spec.lists:
        for event in group.columns:
            properties[event.column] = {"anyOf": [_list(value, maxItems=1000), text, null]}
    return {**_object(properties, *properties), "description": "Raw values; other columns are ignored."}
