"""A bundle as a model of MLflow: the flavour `python_function`, without cloudpickle.

    recsys export runs/mine --mlflow mine_mlflow
    mlflow.pyfunc.load_model("mine_mlflow").predict(frame)

The folder holds `MLmodel` with a signature, an input example, the requirements, and the bundle as it is; this module is
its `loader_module`. Nothing in it is a pickle, and nothing but this package is run by loading it. MLflow is needed to
load the model, not to write it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recsys
from recsys.deploy.bundle import COLUMNS, WARMUP, Bundle
from recsys.deploy.predictor import Predictor, load
from recsys.errors import ExportError

_DATA = "bundle"
_EXAMPLE = "input_example.json"
_EXAMPLES = 5
_TYPES = {"string": "string", "integer": "any", "number": "double", "list": "any"}
"""Whole numbers and lists are `any`: MLflow has no missing values among its integers and arrays."""


class Model:
    """What MLflow asks for scores.

    Args:
        predictor: of the bundle.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return a frame with the probability of each task, one row for each row of a pandas frame.

        Args:
            model_input: the frame; columns that the model does not read are ignored.
            params: none are known.

        Raises:
            RequestError: a column is missing, or a value cannot be read.
        """
        cells = model_input.astype(object)
        rows = cells.where(model_input.notna(), None).to_dict("records")
        scores = self.predictor.predict(rows)
        return type(model_input)(dict(scores.probability), index=model_input.index)


def _load_pyfunc(path: str) -> Model:
    """Load the bundle at a path; MLflow calls this. It is refused unless it gives the answers of its golden rows."""
    return Model(load(path))


def write_mlflow(bundle: Bundle, folder: Path) -> None:
    """Write a folder that MLflow loads.

    Args:
        bundle: whose files were verified.
        folder: to be made.

    Raises:
        ExportError: it exists, or cannot be written.
    """
    import yaml

    if folder.exists():
        raise ExportError(f"{folder}: exists; remove it, or choose another folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    requirement = f"recsys[serve]=={recsys.__version__}"
    python = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    try:
        draft.mkdir(parents=True)
        shutil.copytree(bundle.folder, draft / _DATA)
        (draft / "requirements.txt").write_text(f"mlflow\n{requirement}\npandas\n", encoding="utf-8")
        (draft / "python_env.yaml").write_text(yaml.safe_dump(python, sort_keys=False), encoding="utf-8")
        (draft / _EXAMPLE).write_text(_example(bundle), encoding="utf-8")
        (draft / "MLmodel").write_text(yaml.safe_dump(_model(bundle), sort_keys=False), encoding="utf-8")
        os.rename(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ExportError(f"{folder}: cannot be written ({error.strerror})") from None


def _model(bundle: Bundle) -> dict[str, Any]:
    """The content of `MLmodel`."""
    tasks = bundle.manifest["tasks"]
    columns = bundle.json(COLUMNS)["columns"]
    return {
        "flavors": {
            "python_function": {
                "loader_module": "recsys.deploy.mlflow",
                "data": _DATA,
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": platform.python_version(),
            },
        },
        "metadata": {"bundle": bundle.id, "recsys": recsys.__version__},
        "model_uuid": bundle.id[:32],
        "saved_input_example_info": {"artifact_path": _EXAMPLE, "pandas_orient": "split", "type": "dataframe"},
        "signature": {
            "inputs": json.dumps([_column(column) for column in columns], ensure_ascii=False),
            "outputs": json.dumps([{"name": task, "type": "double", "required": True} for task in tasks]),
            "params": None,
        },
    }


def _column(column: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": column["name"], "type": _TYPES[column["type"]], "required": True}


def _example(bundle: Bundle) -> str:
    """The rows, of those that warm a predictor up, in which the fewest values are missing; as pandas writes frames."""
    rows = bundle.lines(WARMUP)
    fullest = sorted(rows, key=lambda row: sum(value in (None, [], "") for value in row.values()))[:_EXAMPLES]
    columns = [column["name"] for column in bundle.json(COLUMNS)["columns"]]
    body = {"columns": columns, "data": [[row[name] for name in columns] for row in fullest]}
    return json.dumps(body, ensure_ascii=False) + "\n"
