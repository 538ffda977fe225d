"""A bundle as a model of MLflow: its folder holds no code, and what MLflow loads gives the predictor's scores."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import yaml

from recsys.deploy.bundle import open_bundle
from recsys.deploy.mlflow import write_mlflow
from recsys.deploy.predictor import load
from recsys.errors import BundleError, ExportError, RequestError

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # nothing is told to anybody, whatever the package does by itself
needs_mlflow = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mlflow", "pandas")),
    reason="mlflow (or mlflow-skinny) and pandas are not installed (the extra `test` brings them)",
)


@pytest.fixture(scope="module")
def folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow") / "model"
    write_mlflow(open_bundle(whole), folder)
    return folder


def test_the_folder_says_how_it_is_loaded_and_holds_no_code(folder: Path, whole: Path) -> None:
    body = yaml.safe_load((folder / "MLmodel").read_text())
    flavour = body["flavors"]["python_function"]
    assert (flavour["loader_module"], flavour["data"]) == ("recsys.deploy.mlflow", "bundle")
    assert open_bundle(folder / "bundle").id == open_bundle(whole).id == body["metadata"]["bundle"]
    assert {path.suffix for path in folder.iterdir()} == {"", ".json", ".txt", ".yaml"}
    inputs = {entry["name"]: entry["type"] for entry in json.loads(body["signature"]["inputs"])}
    assert inputs == {
        "user": "any",
        **dict.fromkeys(("item", "shop", "city"), "string"),
        **dict.fromkeys(("price", "age"), "double"),
        **dict.fromkeys(("tags", "past", "past_shop"), "any"),
    }
    assert [entry["name"] for entry in json.loads(body["signature"]["outputs"])] == ["click"]
    example = json.loads((folder / body["saved_input_example_info"]["artifact_path"]).read_text())
    rows = [dict(zip(example["columns"], values, strict=True)) for values in example["data"]]
    assert len(load(whole).predict(rows)) == 5


def test_an_existing_folder_stays_as_it_is(whole: Path, folder: Path) -> None:
    with pytest.raises(ExportError, match="exists; remove it, or choose another folder"):
        write_mlflow(open_bundle(whole), folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(folder))


def frame_of(rows: list[Any]) -> Any:
    import pandas

    frame = pandas.DataFrame(rows)
    text = [None if row["user"] is None else str(row["user"]) for row in rows]  # MLflow would make floats of them
    return frame.assign(user=pandas.Series(text, dtype=object), age=frame["age"].astype(float))


@needs_mlflow
def test_mlflow_gives_the_predictors_scores(whole: Path, model: Any) -> None:
    predictor = load(whole)
    rows = predictor.bundle.lines("golden/requests.jsonl")
    found = model.predict(frame_of(rows))
    assert list(found.columns) == ["click"]
    np.testing.assert_array_equal(found["click"], predictor.predict(rows).probability["click"])
    logs = made.LOGS.drop("click", "buy").to_dicts()
    shuffled = frame_of(logs).assign(more=1).sample(frac=1, random_state=3)
    scores = model.predict(shuffled)
    wanted = predictor.predict(logs).probability["click"]
    np.testing.assert_allclose(scores["click"], wanted[shuffled.index], atol=1e-6)
    assert list(scores.index) == list(shuffled.index)
    assert np.ptp(wanted) > 0.1
    model.predict(model.input_example)


@needs_mlflow
def test_mlflow_refuses_what_the_signature_or_the_bundle_does_not_know(model: Any) -> None:
    import mlflow

    logs = frame_of(made.LOGS.drop("click", "buy").to_dicts())
    with pytest.raises(mlflow.exceptions.MlflowException, match="price"):
        model.predict(logs.drop(columns="price"))
    with pytest.raises(mlflow.exceptions.MlflowException, match="price"):
        model.predict(logs.assign(price="cheap"))
    with pytest.raises(RequestError, match=r"row 1, column 'user': 0.5 is no whole number"):
        model.predict(logs.assign(user=0.5))


@needs_mlflow
def test_a_damaged_bundle_is_not_loaded(whole: Path, tmp_path: Path) -> None:
    import mlflow

    write_mlflow(open_bundle(whole), tmp_path / "model")
    (tmp_path / "model" / "bundle" / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match=r"calibration.json: altered after the bundle was written"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_the_command_needs_neither_mlflow_nor_onnx(whole: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "onnx", "mlflow", "pandas", "polars"):
    sys.modules[name] = None
from recsys.cli import main
sys.argv = ["recsys", "export", {str(whole)!r}, "--mlflow", {str(tmp_path / "model")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "MLmodel").is_file()
