"""What hostile clients send ends in an error of the protocol, little memory, and a server that is still ready."""

import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import GOOD, JSON, ROW, ROWS, Server, read_all, status

HEAD = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ALLOWED = (400, 408, 413, 415, 422, 429, 431, 503)
BOMB = gzip.compress(b" " * (100 << 20), 9)
GROWTH = 50.0
"""MiB."""


@pytest.fixture(scope="module")
def quick(whole: Path) -> Iterator[Server]:
    """A server that waits a second for slow clients, so that the tests need not wait long."""
    running = Server(whole, "--receive-timeout", "1", "--max-connections", "200", "--idle-timeout", "2")
    yield running
    _, errors = running.stop()
    assert "Traceback" not in errors, errors


@pytest.fixture(autouse=True)
def _stays_ready(server: Server, quick: Server) -> Iterator[None]:
    """After each abuse: ready, right scores, little memory."""
    before = [(s, s.score(ROWS[:9]).json, s.rss) for s in (server, quick)]
    yield
    for running, scores, memory in before:
        assert running.ready
        assert running.score(ROWS[:9]).json == scores
        assert running.rss - memory < GROWTH


def test_a13_a_body_of_65_mb(server: Server) -> None:
    body = b'{"user": "' + b"x" * (65 << 20) + b'"}'
    reply = server.raw(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert status(reply) == 413
    assert b"at most 8,388,608" in reply


def test_a13_a_chunked_body_of_65_mb(server: Server) -> None:
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    reply = server.raw(HEAD + b"transfer-encoding: chunked\r\n\r\n" + piece * 1040 + b"0\r\n\r\n")
    assert status(reply) == 413


@pytest.mark.slow
def test_a13_half_a_million_pieces_of_six_bytes(server: Server) -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    reply = server.raw(head + b"6\r\n      \r\n" * 500_000 + b"0\r\n\r\n", 60.0)
    assert status(reply) in (400, 408)
    body = json.dumps(ROW).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[n : n + 6] for n in range(0, len(body), 6)))
    good = server.raw(head.replace(b"host: x", b"host: x\r\nconnection: close") + pieces + b"0\r\n\r\n")
    assert good.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_a13_a_compressed_bomb(server: Server, coding: str) -> None:
    assert len(BOMB) < 1 << 20
    assert server.score(BOMB, {**JSON, "content-encoding": coding}).status == 415
    transfer = HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n%x\r\n" % len(BOMB) + BOMB + b"\r\n0\r\n\r\n"
    assert status(server.raw(transfer)) in ALLOWED


def trickle(server: Server, content: bytes, first: int) -> tuple[bytes, float]:
    """Send the first bytes at once, and the others one by one; return the reply and how long it took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as own:
        own.sendall(content[:first])
        try:
            for at in range(first, len(content)):
                own.sendall(content[at : at + 1])
                time.sleep(0.05)
                if time.monotonic() - began > 15:
                    pytest.fail("the server waits for ever")
        except OSError:
            pass
        return read_all(own), time.monotonic() - began


def test_a13_one_byte_at_a_time_of_the_head_and_of_the_body(quick: Server) -> None:
    reply, seconds = trickle(quick, HEAD + b"x: " + b"y" * 1000, 0)
    assert seconds < 10
    assert not reply or status(reply) == 408
    content = HEAD + b"content-length: 5000\r\n\r\n" + b" " * 5000
    reply, seconds = trickle(quick, content, len(content) - 5000)
    assert seconds < 10
    assert not reply or status(reply) == 408
    assert quick.metric('recsys_dropped_connections_total{why="slow"}') >= 1
    assert quick.metric('recsys_requests_total{endpoint="score",status="408"}') >= 1


def test_a13_connections_that_say_nothing_are_ended(quick: Server) -> None:
    with socket.create_connection(("127.0.0.1", quick.port), timeout=20) as own:
        assert read_all(own) == b""
    assert quick.metric('recsys_dropped_connections_total{why="idle"}') >= 1


def test_a13_ten_thousand_connections(quick: Server) -> None:
    """Held open, as many as this process may have; then others, up to ten thousand in all."""
    before = quick.files
    refused = 0
    held: list[socket.socket] = []
    try:
        for _ in range(10_000):
            own = socket.socket()
            own.settimeout(20)
            own.connect(("127.0.0.1", quick.port))
            held.append(own)
            if len(held) == 400:
                own = held[-1]
                reply = read_all(own)
                refused += bool(reply) and status(reply) == 503
                for own in held[200:]:
                    own.close()
                del held[200:]
        assert quick.files - before <= 200 + 300
        assert refused >= 20
        assert quick.metric('recsys_dropped_connections_total{why="many"}') >= 5000
    finally:
        for own in held:
            own.close()
    for _ in range(100):
        if quick.files <= before + 5:
            break
        time.sleep(0.1)
    assert quick.files <= before + 5


def test_a13_no_length(server: Server) -> None:
    assert status(server.raw(HEAD + b"connection: close\r\n\r\n")) == 400
    assert status(server.raw(HEAD + b"connection: close\r\n\r\n" + json.dumps(ROW).encode())) == 400
    assert status(server.raw(HEAD + b"content-length: -5\r\n\r\n")) == 400
    assert status(server.raw(HEAD + b"content-length: 99999999999999999999999\r\n\r\n")) in (400, 413)
    assert status(server.raw(HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")) in ALLOWED


BODIES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "deep lists": (b"[" * 200_000, (400,)),
    "more deep lists": (b"[" * 4_000_000, (413,)),
    "deep objects": (b'{"a":' * 2_000, (400,)),
    "more deep objects": (b'{"a":' * 1_000_000, (413,)),
    "deep lists in a row": (json.dumps(ROW).encode()[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", (400,)),
    "NaN": (json.dumps({**ROW, "price": float("nan")}).encode(), (400,)),
    "-Infinity": (json.dumps({**ROW, "price": float("-inf")}).encode(), (400,)),
    "1e999": (json.dumps({**ROW, "price": 12345}).replace("12345", "1e999").encode(), (400,)),
    "a number of 5000 digits": (json.dumps({**ROW, "price": 12345}).replace("12345", "9" * 5000).encode(), (400,)),
    "a name twice": (json.dumps(ROW).encode()[:-1] + b', "user": 1}', (400,)),
    "a million rows": (b"[" + b"{}," * 1_000_000 + b"{}]", (413,)),
    "1025 rows": (json.dumps([ROW] * 1025).encode(), (413,)),
    "four million numbers": (b"[" + b"0," * 4_000_000 + b"0]", (413,)),
    "a text of 1 MB": (json.dumps({**ROW, "item": "x" * (1 << 20)}).encode(), (413,)),
    "a text of 1 MB in a list": (json.dumps({**ROW, "tags": ["x" * (1 << 20)]}).encode(), (413,)),
    "a text of 1025 bytes": (json.dumps({**ROW, "item": "é" * 512 + "x"}).encode(), (413,)),
    "NUL": (json.dumps({**ROW, "item": "a\0b"}).encode(), (422,)),
    "a raw NUL": (json.dumps(ROW).encode().replace(b'"i', b'"\0i'), (400,)),
    "no UTF-8": (json.dumps(ROW).encode().replace(b'"i', b'"\xff\xfei'), (400,)),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), (400,)),
    "UTF-32": (json.dumps(ROW).encode("utf-32"), (400,)),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(ROW).encode(), (400,)),
    "cut short": (json.dumps(ROW).encode()[:-20], (400,)),
    "two values": (json.dumps(ROW).encode() * 2, (400,)),
    "a text without end": (b'"' + b'\\"' * 3_000_000, (400,)),
    "quotes": (b'"' * 8_000_000, (400,)),
    "backslashes": (b'["' + b"\\" * 8_000_001, (400,)),
    "commas in a text": (json.dumps({**ROW, "item": "," * 300_000}).encode(), (413,)),
    "nothing": (b"", (400,)),
    "spaces": (b" " * 8_000_000, (400,)),
    "a pickle": (b"\x80\x04\x95\x00", (400,)),
}


@pytest.mark.parametrize("name", BODIES)
def test_a13_bodies(server: Server, name: str) -> None:
    body, wanted = BODIES[name]
    before = server.rss
    for path in ("/v1/score", "/v2/models/recsys/infer"):
        began = time.monotonic()
        reply = server.ask("POST", path, body)
        if reply.status == 503:  # a machine that others use too may take more than the second it has for an answer
            reply = server.ask("POST", path, body)
        assert reply.status in (wanted if path == "/v1/score" else ALLOWED), reply.body
        assert reply.error
        assert len(reply.body) < 3000
        assert time.monotonic() - began < 10
    assert server.rss - before < GROWTH


def test_a13_types_of_content(server: Server) -> None:
    for kind in (
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    ):
        assert server.score(ROW, {"content-type": kind}).status == 415, kind
    assert server.score(ROW, {"content-type": "application/json; charset=utf-8"}).status == 200


def test_a13_a_large_head(server: Server) -> None:
    assert status(server.raw(HEAD + b"x: " + b"y" * 300_000)) in (400, 431)
    assert status(server.raw(HEAD + b"x: y\r\n" * 5000 + b"\r\n")) in (400, 431)
    assert status(server.raw(b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\n\r\n")) in (400, 431)


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW /v1/score HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v2/health/ready HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"\0" * 100_000,
    ],
    ids=range(9),
)
def test_a13_no_http(quick: Server, content: bytes) -> None:
    reply = quick.raw(content)
    assert reply == b"" or status(reply) in ALLOWED


def changed(name: str, **change: Any) -> list[dict[str, Any]]:
    return [{**tensor, **change} if tensor["name"] == name else tensor for tensor in GOOD.values()]


TENSORS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "data shorter than shape": (changed("user", data=[1]), 400),
    "data longer than shape": (changed("user", data=[1, 2, 3]), 400),
    "a product of 2**63": (changed("past", shape=[2, 2**62]), 413),
    "an overflow": (changed("past", shape=[1024, 2**62]), 413),
    "a size of 2**63": (changed("user", shape=[2**63]), 400),
    "a size of 10**40": (changed("user", shape=[10**40]), 400),
    "a negative dimension": (changed("user", shape=[-1]), 400),
    "negative dimensions": (changed("past", shape=[-1, -2]), 400),
    "a real dimension": (changed("user", shape=[2.0]), 400),
    "a true dimension": (changed("user", shape=[True]), 400),
    "no dimension": (changed("user", shape=[]), 400),
    "many dimensions": (changed("user", shape=[1] * 1000), 400),
    "no shape": ([{k: v for k, v in t.items() if k != "shape"} for t in GOOD.values()], 400),
    "INT322": (changed("user", datatype="INT322"), 400),
    "no datatype": (changed("user", datatype=None), 400),
    "a list as datatype": (changed("user", datatype=["INT64"]), 400),
    "an unknown input": ([*GOOD.values(), {**GOOD["user"], "name": "nobody"}], 400),
    "an input twice": ([*GOOD.values(), GOOD["user"]], 400),
    "a missing input": (list(GOOD.values())[1:], 400),
    "no inputs": ([], 400),
    "no rows": ([{**t, "shape": [0], "data": []} for t in GOOD.values()], 400),
    "a million rows": (changed("user", shape=[1_000_000], data=[]), 413),
    "other numbers of rows": (changed("user", shape=[1], data=[1]), 400),
    "a text as number": (changed("user", data=["1", "2"]), 400),
    "a real as whole number": (changed("user", data=[1.0, 2.0]), 400),
    "a flag as whole number": (changed("user", data=[True, False]), 400),
    "a null": (changed("user", data=[None, 1]), 400),
    "2**63 as INT64": (changed("user", data=[2**63, 1]), 400),
    "-1 as UINT8": (changed("user", datatype="UINT8", data=[-1, 1]), 400),
    "1e300 as FP32": (changed("price", datatype="FP32", data=[1e300, 1]), 400),
    "10**300 as FP64": (changed("price", data=[10**390, 1]), 400),
    "ids as FP32": (changed("user", datatype="FP32", data=[1.0, 2.0]), 400),
    "data as object": (changed("user", data={"a": 1}), 400),
    "NUL": (changed("item", data=["a\0", "b"]), 400),
    "1 MB": (changed("item", data=["x" * (1 << 20), "b"]), 413),
    "nested unevenly": (changed("past", shape=[2, 2], data=[["a"], ["b", "c", "d"]]), 400),
    "nested deeper": (changed("past", shape=[2, 1], data=[[["a"]], [["b"]]]), 400),
    "parameters as list": (changed("user", parameters=[]), 400),
    "binary without bytes": (changed("user", parameters={"binary_data_size": 16}), 400),
    "a negative binary size": (changed("user", parameters={"binary_data_size": -1}), 400),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a13_tensors(server: Server, name: str) -> None:
    inputs, wanted = TENSORS[name]
    reply = server.infer({"inputs": inputs})
    assert reply.status == wanted, reply.body
    assert reply.error


def test_a13_requests_that_are_none(server: Server) -> None:
    good = list(GOOD.values())
    assert server.infer({"inputs": good}).status == 200
    for more in ({"id": 5}, {"id": "x" * 2000}, {"parameters": 1}, {"outputs": 1}, {"outputs": [{"name": "x"}]}):
        assert server.infer({"inputs": good, **more}).status == 400, more
    for more in ({"outputs": [{"name": "logit"}] * 2}, {"outputs": [{}]}, {"outputs": [5]}, {"inputs": 5}):
        assert server.infer({"inputs": good, **more}).status == 400, more


@pytest.mark.parametrize(
    ("blob", "wanted"),
    [
        (struct.pack("<I", 3) + b"a\0b" + struct.pack("<I", 1) + b"x", 400),
        (struct.pack("<I", 2) + b"\xff\xfe" + struct.pack("<I", 1) + b"x", 400),
        (struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + struct.pack("<I", 1) + b"x", 413),
        (struct.pack("<I", 2**32 - 1) + b"x", 400),
        (struct.pack("<I", 1) + b"x", 400),
        (struct.pack("<I", 1) + b"x" + struct.pack("<I", 1) + b"x" + b"more", 400),
        (b"\x01\x02", 400),
        (b"", 400),
        (struct.pack("<I", 0) * 1_000_000, 400),
    ],
    ids=["NUL", "no UTF-8", "1 MB", "4 GB", "too few", "too many", "cut", "none", "a million"],
)
def test_a13_binary_texts(server: Server, blob: bytes, wanted: int) -> None:
    inputs = [dict(tensor) for tensor in GOOD.values()]
    for tensor in inputs:
        if tensor["name"] == "item":
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": len(blob)}
    head = json.dumps({"inputs": inputs}).encode()
    reply = server.infer(head + blob, {"Inference-Header-Content-Length": str(len(head))})
    assert reply.status == wanted, reply.body
    assert reply.error
    for length in ("-1", "x", "99999999", "1e3", "9" * 5000, ""):
        assert server.infer(head + blob, {"Inference-Header-Content-Length": length}).status in ALLOWED
