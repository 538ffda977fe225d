"""Requests for one row in a second, and how long they take: in the process and over HTTP, with joined runs and without.

    python tests/benchmarks/serve_http.py [--seconds 5] [--connections 16] [--rate 1000]

39 columns (26 of ids with 25,000 values each, 13 of numbers), embedding of 16, cross network and perceptron. The client
runs on the same cores as the server; the load average is printed beside the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))
import made

from recsys.deploy.predictor import load

VALUES = 25_000
MODEL = {"embedding": {"use": "table", "dim": 16}, "interaction": ["cross", {"use": "mlp", "hidden": [256, 128]}]}


def bundle(folder: Path) -> list[dict[str, Any]]:
    """Write a bundle; return rows to ask it."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {f"c{f}": [f"v{f}_{n}" for n in range(VALUES)] for f in range(26)}
    columns |= {f"n{f}": random.standard_normal(VALUES) for f in range(13)}
    made.LOGS = pl.DataFrame({**columns, "click": [n % 2 for n in range(VALUES)]})
    ids = {f"c{f}": {"min_count": 1} for f in range(26)}
    numbers: dict[str, Any] = {f"n{f}": {} for f in range(13)}
    data = {"source": made.DATA["source"], "label": {"click": "click"}, "categorical": ids, "numeric": numbers}
    made.write(folder, data=data, model=MODEL)
    return made.LOGS.drop("click").head(2000).to_dicts()


def told(name: str, seconds: list[float], whole: float, cpu: float) -> None:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    own = cpu / len(seconds) * 1e6
    text = f"{len(seconds) / whole:8,.0f}/s  p50 {p50:7.2f} ms  p99 {p99:7.2f} ms  CPU {own:8,.0f} µs each"
    print(f"{name:<46} {text}  (load {os.getloadavg()[0]:.1f})", flush=True)


def cpu_of(pid: int) -> float:
    """Return the seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Client(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] | None = None
        self.content = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.content += data
        head, found, body = self.content.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.split(b"content-length: ")[1].split(b"\r\n")[0]) and self.answer:
            assert head.startswith(b"HTTP/1.1 200"), self.content
            self.content = b""
            self.answer.set_result(None)

    async def ask(self, request: bytes) -> None:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self.answer


def requests(rows: list[dict[str, Any]], size: int) -> list[bytes]:
    found = []
    for first in range(0, len(rows) - size + 1, size):
        body = json.dumps(rows[first] if size == 1 else rows[first : first + size]).encode()
        head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        found.append(head % len(body) + body)
    return found


async def closed(port: int, bodies: list[bytes], connections: int, seconds: float) -> tuple[list[float], float]:
    """Every connection asks again as soon as it is answered."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(connections)]
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def work(client: Client, first: int) -> None:
        at = first
        while (began := time.perf_counter()) < end:
            await client.ask(bodies[at % len(bodies)])
            took.append(time.perf_counter() - began)
            at += connections

    began = time.perf_counter()
    await asyncio.gather(*(work(client, n) for n, client in enumerate(clients)))
    for client in clients:
        client.transport.close()
    return took, time.perf_counter() - began


async def paced(port: int, bodies: list[bytes], rate: float, seconds: float) -> tuple[list[float], float]:
    """Ask at a fixed rate, whatever the answers do; the time begins when a request was due."""
    loop = asyncio.get_running_loop()
    free: asyncio.Queue[Client] = asyncio.Queue()
    for _ in range(64):
        free.put_nowait((await loop.create_connection(Client, "127.0.0.1", port))[1])
    took: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    first = time.perf_counter()

    async def one(due: float, body: bytes) -> None:
        client = await free.get()
        await client.ask(body)
        took.append(time.perf_counter() - due)
        free.put_nowait(client)

    count = int(rate * seconds)
    for n in range(count):
        due = first + n / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(due, bodies[n % len(bodies)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return took, time.perf_counter() - first


def server(folder: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    command = [
        sys.executable,
        "-m",
        "recsys.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--metrics-port",
        "-1",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline().rsplit(":", 1)[1])
    assert process.stdout.readline().startswith("ready")
    return process, port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1000.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "bundle"
        rows = bundle(folder)
        predictor = load(folder)
        for size in (1, 32, 512):
            took = []
            began, used = time.perf_counter(), time.process_time()
            while time.perf_counter() - began < given.seconds / 2:
                at = len(took) * size % (len(rows) - size)
                start = time.perf_counter()
                predictor.predict(rows[at] if size == 1 else rows[at : at + size])
                took.append(time.perf_counter() - start)
            told(f"in the process, {size} rows", took, time.perf_counter() - began, time.process_time() - used)
        for options in ((64, 0.0), (0, 0.0), (64, 2.0)):
            over_http(folder, rows, given, *options)


def over_http(folder: Path, rows: list[dict[str, Any]], given: argparse.Namespace, joined: int, wait: float) -> None:
    """Measure one server."""
    process, port = server(folder, "--batch-rows", str(joined), "--batch-wait-ms", str(wait))
    one, seconds = requests(rows, 1), given.seconds
    name = f"joined {joined}, wait {wait:g} ms"

    def measure(text: str, work: Any) -> None:
        used = cpu_of(process.pid)
        told(f"HTTP, {text}, {name}", *uvloop.run(work), cpu_of(process.pid) - used)

    try:
        uvloop.run(closed(port, one, 4, 1.0))
        for connections in (1, given.connections):
            measure(f"1 row, {connections} conn.", closed(port, one, connections, seconds))
        measure(f"1 row, {given.rate:g}/s", paced(port, one, given.rate, seconds))
        for size in (32, 512):
            measure(f"{size} rows, 2 conn.", closed(port, requests(rows, size), 2, seconds / 2))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
