"""A server in a process of its own, for the tests."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import made

ROW: dict[str, Any] = made.LOGS.drop("click", "buy").row(5, named=True)
ROWS: list[dict[str, Any]] = made.LOGS.drop("click", "buy").to_dicts()
JSON = {"content-type": "application/json"}


class Answer:
    """Status, headers and body of an answer."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error in the form of the Open Inference Protocol."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        assert isinstance(self.json["error"], str)
        return self.json["error"]


class Server:
    """`recsys serve` as a user starts it."""

    def __init__(self, bundle: Path, *options: str, ready: bool = True) -> None:
        command = [sys.executable, "-m", "recsys.cli", "serve", str(bundle), "--port", "0", "--metrics-port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=bundle.parent
        )
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in range(3 if ready else 2)]
        assert "listening" in self.lines[1], self.process.communicate()
        self.metrics_port = int(self.lines[0].split("/metrics")[0].rsplit(":", 1)[1])
        self.port = int(self.lines[1].rsplit(":", 1)[1])
        assert not ready or self.lines[2].startswith("ready: "), self.process.communicate()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = JSON, port: int | None = None
    ) -> Answer:
        """Send one request; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, dict(headers))
        reply = connection.getresponse()
        answer = Answer(reply.status, dict(reply.getheaders()), reply.read())
        connection.close()
        return answer

    def score(self, body: Any, headers: Mapping[str, str] = JSON) -> Answer:
        return self.ask("POST", "/v1/score", body, headers)

    def infer(self, body: Any, headers: Mapping[str, str] = JSON) -> Answer:
        return self.ask("POST", "/v2/models/recsys/infer", body, headers)

    def raw(self, content: bytes, seconds: float = 20.0) -> bytes:
        """Send bytes, and return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as own:
            with suppress(OSError):
                own.sendall(content)
            return read_all(own)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; `name` may hold some of them."""
        text = self.ask("GET", "/metrics", port=self.metrics_port).body.decode()
        found = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name)]
        return sum(float(value) for _, value in found)

    @property
    def ready(self) -> bool:
        return self.ask("GET", "/v2/health/ready").status == 200

    @property
    def rss(self) -> float:
        """Resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> tuple[int, str]:
        """Stop it; return its exit status and what it said of errors."""
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def read_all(own: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionResetError):
        while piece := own.recv(65536):
            found += piece
    return found


def tensors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as inputs of the Open Inference Protocol; a list as one text."""
    kinds = {"user": "INT64", "price": "FP64", "age": "FP64"}
    found = []
    for name in rows[0]:
        values = ["|".join(row[name]) if isinstance(row[name], list) else row[name] for row in rows]
        found.append({"name": name, "shape": [len(rows)], "datatype": kinds.get(name, "BYTES"), "data": values})
    return found


def status(reply: bytes) -> int:
    """Return the status of a raw reply, whose body must be an error of the protocol."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert list(json.loads(body)) == ["error"], reply
    return int(head.split()[1])


GOOD = {tensor["name"]: tensor for tensor in tensors([{**ROW, "past": ["i3"], "past_shop": ["s1"]}] * 2)}
"""Tensors of two good rows, by name."""
