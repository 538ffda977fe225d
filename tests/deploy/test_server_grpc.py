"""Calls over gRPC, by a client whose code is generated from the protocol's own text, get what HTTP gives."""

import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_tools import protoc
from serving import GOOD, ROW, ROWS, Server, tensors

from recsys.deploy.predictor import load
from recsys.deploy.server import messages
from recsys.deploy.server.limits import Limits, Refused

SECRET = "s3cret-token-of-a-client"
CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents", "FP64": "fp64_contents"}
FULL = [row for row in ROWS if None not in row.values()][:40]


@pytest.fixture(scope="session")
def pb(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The client's messages and stub."""
    folder = tmp_path_factory.mktemp("client")
    here = Path(__file__).parent
    given = ["protoc", f"-I{here}", f"--python_out={folder}", f"--grpc_python_out={folder}", "open_inference.proto"]
    assert protoc.main(given) == 0
    sys.path.insert(0, str(folder))
    try:
        found = importlib.import_module("open_inference_pb2")
        found.stub = importlib.import_module("open_inference_pb2_grpc").GRPCInferenceServiceStub
    finally:
        sys.path.remove(str(folder))
    return found


class Calls:
    """A server with both ports, and a client of the second."""

    def __init__(self, bundle: Path, pb: Any, *options: str) -> None:
        self.server = Server(bundle, "--grpc-port", "0", *options, ready=False)
        stdout = self.server.process.stdout
        assert stdout is not None
        more = [stdout.readline(), stdout.readline()]
        assert more[1].startswith("ready: "), more
        self.port = int(more[0].rsplit(":", 1)[1])
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = pb.stub(self.channel)
        self.pb = pb

    def infer(self, request: Any, *metadata: tuple[str, str]) -> Any:
        return self.stub.ModelInfer(request, timeout=20, metadata=metadata)

    def refused(self, request: Any, *metadata: tuple[str, str]) -> tuple[Any, str]:
        """The status and text of a refusal."""
        with pytest.raises(grpc.RpcError) as error:
            self.infer(request, *metadata)
        return error.value.code(), error.value.details()

    def close(self) -> None:
        self.channel.close()
        status, errors = self.server.stop()
        assert "Traceback" not in errors, errors
        assert status in (0, -15)


@pytest.fixture(scope="module")
def calls(whole: Path, pb: Any) -> Iterator[Calls]:
    made = Calls(whole, pb)
    yield made
    made.close()


def request(pb: Any, rows: list[dict[str, Any]], raw: bool = False, **more: Any) -> Any:
    """Rows without missing values as a call."""
    return of_tensors(pb, tensors(rows), raw, **more)


def of_tensors(pb: Any, given: list[dict[str, Any]], raw: bool = False, **more: Any) -> Any:
    found = pb.ModelInferRequest(**{"model_name": "recsys", **more})
    for tensor in given:
        kind, values = tensor["datatype"], tensor["data"]
        flat = [value.encode() for value in values] if kind == "BYTES" else values
        made = found.inputs.add(name=tensor["name"], datatype=kind, shape=tensor["shape"])
        if not raw:
            getattr(made.contents, CONTENTS[kind]).extend(flat)
        elif kind == "BYTES":
            found.raw_input_contents.append(b"".join(struct.pack("<I", len(v)) + v for v in flat))
        else:
            found.raw_input_contents.append(np.array(flat, "<i8" if kind == "INT64" else "<f8").tobytes())
    return found


def outputs(reply: Any) -> dict[str, Any]:
    found = {}
    for at, output in enumerate(reply.outputs):
        assert output.datatype == "FP64"
        raw = reply.raw_output_contents
        flat = np.frombuffer(raw[at], "<f8") if raw else np.array(output.contents.fp64_contents)
        found[output.name] = flat.reshape(list(output.shape))
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_a_call_gets_the_predictors_scores(calls: Calls, pb: Any, whole: Path, raw: bool) -> None:
    reply = calls.infer(request(pb, FULL, raw, id="mine"))
    wanted = load(whole).predict(FULL)
    assert (reply.model_name, reply.id, reply.model_version) == ("recsys", "mine", load(whole).id)
    assert bool(reply.raw_output_contents) == raw
    found = outputs(reply)
    assert list(found) == ["probability", "logit"]
    np.testing.assert_allclose(found["probability"][:, 0], wanted.probability["click"], atol=1e-7)
    np.testing.assert_allclose(found["logit"][:, 0], wanted.logit["click"], atol=1e-5)
    asked = request(pb, FULL[:1], raw, model_version=reply.model_version)
    asked.outputs.add(name="logit")
    assert list(outputs(calls.infer(asked))) == ["logit"]


def test_what_a_client_asks_of_server_and_model(calls: Calls, pb: Any, whole: Path) -> None:
    assert calls.stub.ServerLive(pb.ServerLiveRequest()).live
    assert calls.stub.ServerReady(pb.ServerReadyRequest()).ready
    assert calls.stub.ServerMetadata(pb.ServerMetadataRequest()).name == "recsys"
    assert calls.stub.ModelReady(pb.ModelReadyRequest(name="recsys")).ready
    told = calls.stub.ModelMetadata(pb.ModelMetadataRequest(name="recsys"))
    assert list(told.versions) == [load(whole).id]
    over_http = calls.server.ask("GET", "/v2/models/recsys").json
    for side, given in (("inputs", told.inputs), ("outputs", told.outputs)):
        assert over_http[side] == [{"name": t.name, "datatype": t.datatype, "shape": [*t.shape]} for t in given]
    with pytest.raises(grpc.RpcError) as error:
        calls.stub.ModelReady(pb.ModelReadyRequest(name="../recsys"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    check = calls.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"") == b"\x08\x01"  # SERVING


def changed(**more: Any) -> list[dict[str, Any]]:
    """Good tensors, one of them changed."""
    return [{**tensor, **more} if tensor["name"] == "user" else tensor for tensor in GOOD.values()]


def test_what_is_wrong_is_refused_as_over_http(calls: Calls, pb: Any) -> None:
    invalid, many = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED

    def refused(found: Any) -> tuple[Any, str]:
        return calls.refused(found)

    good = list(GOOD.values())
    assert calls.infer(of_tensors(pb, good)).outputs
    assert refused(of_tensors(pb, good, model_name="x"))[0] == grpc.StatusCode.NOT_FOUND
    assert refused(of_tensors(pb, good, model_version="1"))[0] == grpc.StatusCode.NOT_FOUND
    assert refused(of_tensors(pb, [*good, good[0]])) == (invalid, f"the input {good[0]['name']!r} is there twice")
    assert "is missing" in refused(of_tensors(pb, good[1:]))[1]
    assert "there is no input" in refused(of_tensors(pb, [*good, {**good[0], "name": "x"}]))[1]
    for shape in ([2**62, 4], [-1], [3], [2, 2]):
        assert refused(of_tensors(pb, changed(shape=shape)))[0] in (invalid, many), shape
    wrong = of_tensors(pb, good)
    wrong.inputs[0].datatype = "INT322"
    assert refused(wrong)[0] == invalid
    other = of_tensors(pb, good)
    other.inputs[0].contents.fp32_contents.append(1.0)
    assert "fp32_contents" in refused(other)[1]
    both = of_tensors(pb, good, raw=True)
    both.inputs[0].contents.int64_contents.append(1)
    assert "both" in refused(both)[1]
    fewer = of_tensors(pb, good, raw=True)
    del fewer.raw_input_contents[-1]
    assert refused(fewer)[0] == invalid
    bad = of_tensors(pb, good)
    text = next(tensor for tensor in bad.inputs if tensor.datatype == "BYTES")
    text.contents.bytes_contents[0] = b"\xff\xfe"
    assert "UTF-8" in refused(bad)[1]
    assert refused(request(pb, [ROW | {"city": "x" * 2000}]))[0] == many
    assert refused(request(pb, FULL[:1] * 1025))[0] == many
    for content in (b"\xff" * 20, b"\x2a\xff\xff\xff\xff\x0f", b"\x0a\x01"):
        with pytest.raises(grpc.RpcError) as error:
            calls.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(content)
        assert error.value.code() == invalid
    assert calls.infer(of_tensors(pb, good)).outputs


def test_messages_that_would_take_far_more_memory_than_their_bytes(calls: Calls, pb: Any) -> None:
    """Empty tensors, empty texts and packed numbers by the million are counted before they are parsed."""
    ask = calls.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    before = calls.server.rss
    million = 1_500_000
    texts = b"\x42\x00" * million  # bytes_contents
    contents = b"\x2a" + length(len(texts)) + texts
    numbers = b"\x1a" + length(2 * million) + b"\x01" * 2 * million  # int64_contents, packed
    bodies = [
        b"\x2a\x00" * million,  # inputs
        b"\x3a\x00" * million,  # raw_input_contents
        b"\x2a" + length(len(contents)) + contents,
        b"\x2a" + length(len(numbers) + 5) + b"\x2a" + length(len(numbers)) + numbers,
    ]
    for body in bodies:
        with pytest.raises(grpc.RpcError) as error:
            ask(body, timeout=20)
        assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(grpc.RpcError) as error:
        ask(b"\x3a" + length(9 << 20) + b"x" * (9 << 20), timeout=20)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert calls.server.rss - before < 60
    assert calls.server.ready


def length(size: int) -> bytes:
    found = b""
    while size > 127:
        found, size = found + bytes([size & 127 | 128]), size >> 7
    return found + bytes([size])


def test_values_are_counted_before_parsing(pb: Any) -> None:
    good = of_tensors(pb, list(GOOD.values()))
    found = sum(len(t["data"]) + 40 for t in GOOD.values())
    messages.check_values(good.SerializeToString(), Limits(values=found))
    with pytest.raises(Refused) as refused:
        messages.check_values(good.SerializeToString(), Limits(values=10))
    assert refused.value.status == 413
    own = messages.messages()["ModelInferRequest"].FromString(good.SerializeToString())
    assert own.SerializeToString(deterministic=True) == good.SerializeToString(deterministic=True)


def test_tokens_metrics_and_the_log(whole: Path, pb: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    log = tmp_path / "log.jsonl"
    made = Calls(whole, pb, "--token-file", str(tmp_path / "token"), "--log-requests", str(log))
    try:
        asked = request(pb, FULL[:2])
        for given in ([], [("authorization", "Bearer wrong")], [("authorization", f"Basic {SECRET}")]):
            assert made.refused(asked, *given)[0] == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as error:
            made.stub.ModelMetadata(pb.ModelMetadataRequest(name="recsys"))
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert made.stub.ServerReady(pb.ServerReadyRequest()).ready
        assert len(outputs(made.infer(asked, ("authorization", f"Bearer {SECRET}")))["logit"]) == 2
        assert made.server.metric('recsys_requests_total{endpoint="grpc_infer",status="200"}') == 1
        assert made.server.metric('recsys_requests_total{endpoint="grpc_infer",status="401"}') == 3
        assert SECRET not in log.read_text()
        assert '"grpc_infer", "status": 200' in log.read_text()
    finally:
        made.close()


def connects(channel: Any, seconds: float = 2.0) -> bool:
    try:
        grpc.channel_ready_future(channel).result(seconds)
    except grpc.FutureTimeoutError:
        return False
    return True


def test_connections_and_calls_beyond_the_limits_are_refused_until_some_end(whole: Path, pb: Any) -> None:
    made = Calls(whole, pb, "--max-connections", "3", "--queue", "2", "--timeout", "20", "--batch-rows", "0")
    ready = pb.ServerReadyRequest()
    own = [("grpc.use_local_subchannel_pool", 1)]  # each channel with a connection of its own
    channels = [grpc.insecure_channel(f"127.0.0.1:{made.port}", options=own) for _ in range(4)]
    try:
        assert made.stub.ServerReady(ready, timeout=20).ready
        let = [channel for channel in channels if connects(channel)]
        assert len(let) == 2, "beside the first one"
        assert made.stub.ServerReady(ready, timeout=20).ready, "those that are open go on"
        for channel in channels:  # those that were refused too: they try again by themselves, and would take the places
            channel.close()
        again = grpc.insecure_channel(f"127.0.0.1:{made.port}", options=own)
        channels.append(again)
        assert connects(again, 20)

        large = request(pb, FULL * 25)
        stubs = [made.stub, pb.stub(again)]  # of one connection, only as many come as may; the rest wait in the client
        asked = [stub.ModelInfer.future(large, timeout=60) for _ in range(15) for stub in stubs]
        codes = [None if (error := call.exception()) is None else error.code() for call in asked]
        # Of a busy server, whichever of its two bounds is met first.
        refusals = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
        assert None in codes
        assert set() < set(codes) - {None} <= refusals
        assert made.stub.ServerReady(ready, timeout=20).ready
    finally:
        for channel in channels:
            channel.close()
        made.close()
