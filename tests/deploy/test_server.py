"""A server gives the predictor's scores over HTTP, says what is wrong, and is ready only when it has proven itself."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from serving import ROW, ROWS, Server, tensors
from test_bundle import reseal

from recsys.deploy.predictor import Predictor, load

FULL = [row for row in ROWS if all(value is not None for value in row.values()) and row["tags"] and row["past"]]


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


def test_raw_rows_get_the_predictors_scores(server: Server, predictor: Predictor) -> None:
    wanted = predictor.predict(ROWS).probability["click"]
    many = server.score(ROWS)
    assert many.status == 200
    assert many.json["model"] == "recsys"
    assert many.json["bundle"] == predictor.id
    found = [scores["click"] for scores in many.json["scores"]]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.ptp(found) > 0.05
    for at in (0, 5, 17):
        one = server.score(ROWS[at]).json["scores"]
        assert len(one) == 1
        assert one[0]["click"] == pytest.approx(wanted[at], abs=1e-6)
    strange = {
        **ROW,
        "user": None,
        "item": "never seen \ud83d",
        "shop": True,
        "age": "12.5",
        "tags": "t1|t2",
        "more": [{}],
    }
    assert server.score(strange).json["scores"][0]["click"] == pytest.approx(
        predictor.predict(strange).probability["click"][0], abs=1e-6
    )


def test_the_protocol_gives_the_same_scores(server: Server, predictor: Predictor) -> None:
    wanted = predictor.predict(FULL)
    reply = server.infer({"id": "a7", "inputs": tensors(FULL)})
    assert reply.status == 200, reply.body
    told = reply.json
    assert (told["model_name"], told["model_version"], told["id"]) == ("recsys", predictor.id, "a7")
    outputs = {output["name"]: output for output in told["outputs"]}
    assert list(outputs) == ["probability", "logit"]
    assert outputs["logit"]["shape"] == [len(FULL), 1]
    np.testing.assert_allclose(outputs["probability"]["data"], wanted.probability["click"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs["logit"]["data"], wanted.logit["click"], rtol=0, atol=1e-5)
    one = server.infer({"inputs": tensors(FULL), "outputs": [{"name": "logit"}]}).json["outputs"]
    assert [output["name"] for output in one] == ["logit"]
    path = f"/v2/models/recsys/versions/{predictor.id}/infer"
    assert server.ask("POST", path, {"inputs": tensors(FULL)}).json["outputs"] == told["outputs"]


def test_lists_as_tensors_of_two_dimensions(server: Server, predictor: Predictor) -> None:
    rows = [{**row, "past": ["i3", "i9"], "past_shop": ["s1", "s2"]} for row in FULL[:6]]
    inputs = {tensor["name"]: tensor for tensor in tensors(rows)}
    for name in ("past", "past_shop"):
        nested = [row[name] for row in rows]
        inputs[name] = {"name": name, "shape": [6, 2], "datatype": "BYTES", "data": nested}
    wanted = predictor.predict(rows).probability["click"]
    nested_reply = server.infer({"inputs": list(inputs.values())})
    np.testing.assert_allclose(nested_reply.json["outputs"][0]["data"], wanted, rtol=0, atol=1e-6)
    inputs["past"]["data"] = [event for row in rows for event in row["past"]]
    assert server.infer({"inputs": list(inputs.values())}).json == nested_reply.json


def binary_request(rows: list[dict[str, Any]], **more: Any) -> tuple[bytes, dict[str, str]]:
    inputs, blobs = [], []
    for tensor in tensors(rows):
        data = tensor.pop("data")
        if tensor["datatype"] == "BYTES":
            blob = b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in data)
        else:
            blob = np.array(data, "<i8" if tensor["datatype"] == "INT64" else "<f8").tobytes()
        inputs.append({**tensor, "parameters": {"binary_data_size": len(blob)}})
        blobs.append(blob)
    head = json.dumps({"inputs": inputs, **more}).encode()
    headers = {"content-type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return b"".join([head, *blobs]), headers


def test_binary_tensors_in_and_out(server: Server, predictor: Predictor) -> None:
    rows = [{**row, "price": None if at % 3 == 0 else row["price"]} for at, row in enumerate(FULL)]
    wanted = predictor.predict(rows)
    sent = [{**row, "price": np.nan if row["price"] is None else row["price"]} for row in rows]
    body, headers = binary_request(sent, outputs=[{"name": "logit", "parameters": {"binary_data": True}}])
    reply = server.infer(body, headers)
    assert reply.status == 200, reply.body
    length = int(reply.headers["inference-header-content-length"])
    told = json.loads(reply.body[:length])
    assert told["outputs"][0]["parameters"]["binary_data_size"] == len(reply.body) - length == 8 * len(rows)
    np.testing.assert_allclose(np.frombuffer(reply.body[length:], "<f8"), wanted.logit["click"], rtol=0, atol=1e-5)
    body, headers = binary_request(sent, parameters={"binary_data_output": True})
    reply = server.infer(body, headers)
    tail = np.frombuffer(reply.body[int(reply.headers["inference-header-content-length"]) :], "<f8")
    np.testing.assert_allclose(tail[: len(rows)], wanted.probability["click"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(tail[len(rows) :], wanted.logit["click"], rtol=0, atol=1e-5)
    assert server.infer(*binary_request(sent)).headers["content-type"] == "application/json"


def test_health_and_metadata(server: Server, predictor: Predictor) -> None:
    assert server.ask("GET", "/v2/health/live").json == {"live": True}
    assert server.ask("GET", "/v2/health/ready").json == {"ready": True}
    assert server.ask("GET", "/v2").json["extensions"] == ["binary_tensor_data"]
    about = server.ask("GET", "/v2/models/recsys").json
    assert about == server.ask("GET", f"/v2/models/recsys/versions/{predictor.id}").json
    assert about["versions"] == [predictor.id]
    assert [i["name"] for i in about["inputs"]] == list(predictor.columns)
    assert {i["name"]: i["datatype"] for i in about["inputs"]}["user"] == "INT64"
    for path in ("/v2/models/recsys/ready", f"/v2/models/recsys/versions/{predictor.id}/ready"):
        assert server.ask("GET", path).json == {"name": "recsys", "ready": True}
    for path in ("/v2/models/other", "/v2/models/recsys/versions/1", "/v2/models/recsys/versions/1/ready", "/v3"):
        assert server.ask("GET", path).status == 404
        assert server.ask("GET", path).error
    assert server.ask("POST", "/v2/models/recsys/versions/1/infer", {"inputs": tensors(FULL)}).status == 404
    assert server.ask("GET", "/v1/score").status == 405
    assert server.ask("GET", "/v1/score").error == "the path does not take this method"


def test_rows_that_cannot_be_read_are_named(server: Server) -> None:
    short = {name: value for name, value in ROW.items() if name != "shop"}
    assert server.score([ROW, short]).error.startswith("row 2, column 'shop': there is no such column.")
    assert server.score({**ROW, "price": "cheap"}).error == "row 1, column 'price': 'cheap' is no number"
    assert server.score([ROW, ROW, {**ROW, "user": 1.5}]).error.startswith("row 3, column 'user': 1.5 is no whole")
    assert server.score({**ROW, "user": {}}).status == 422
    for body in ([], 3, b"null", "x", [1], [ROW, None]):
        assert server.score(body).status == 422, body
        assert server.score(body).error


def test_the_document_knows_the_models_columns(server: Server, predictor: Predictor) -> None:
    told = server.ask("GET", "/openapi.json").json
    assert told["components"]["schemas"]["Row"]["required"] == list(predictor.columns)
    assert "/v2/models/{model}/versions/{version}/infer" in told["paths"]
    text = json.dumps(told)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in told["components"]["schemas"], name


def test_a_bundle_that_fails_its_golden_rows_never_gets_ready(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    table = max((t for t in model.graph.initializer if t.data_type == 1), key=lambda t: len(t.raw_data))
    table.raw_data = (np.frombuffer(table.raw_data, np.float32) * np.float32(1.01)).tobytes()
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    reseal(copy)
    command = [sys.executable, "-m", "recsys.cli", "serve", str(copy), "--port", "0", "--metrics-port", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "golden row" in done.stderr
    assert "ready" not in done.stdout


def test_a_port_that_is_taken_and_options_that_are_wrong(server: Server, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc\n")
    for options, text in (
        (["--port", str(server.port)], "cannot listen there"),
        (["--name", "../x"], "letters, digits"),
        (["--token-file", str(tmp_path / "none")], "no token can be read"),
        (["--token-file", str(tmp_path / "short")], "at least 16"),
    ):
        command = [sys.executable, "-m", "recsys.cli", "serve", str(whole), "--metrics-port", "-1", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert text in done.stderr
        assert done.stderr.count("\n") == 1


def test_serving_imports_neither_torch_nor_lightning_nor_pluggy() -> None:
    code = "import sys, recsys.deploy.server.run; print({'torch', 'lightning', 'pluggy', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
