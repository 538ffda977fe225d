"""Runs a server: the port for scores, the port for metrics, and the model that is checked before either says ready."""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import uvicorn

from recsys.deploy.server import admin, app
from recsys.deploy.server.access import Token
from recsys.deploy.server.connections import Connection, Watch
from recsys.deploy.server.gate import Gate
from recsys.deploy.server.limits import Limits
from recsys.deploy.server.metrics import Metrics
from recsys.deploy.server.service import Service
from recsys.errors import RecsysError

_SWITCH = 0.0005
"""Seconds that a thread may keep others from Python; large bodies are read in threads beside small ones."""
_GRACE = 10
"""Seconds that requests have to end when the server is told to stop."""


@dataclass(frozen=True)
class Options:
    """How a server runs.

    Args:
        bundle: folder of the first model.
        name: of the model, in paths and answers.
        host: address for scores.
        port: for scores; 0 takes a free one.
        metrics_host: address for metrics.
        metrics_port: for metrics; 0 takes a free one, None opens none.
        grpc_port: for gRPC, at the address for scores; 0 takes a free one, None opens none.
        limits: of requests.
        threads: requests that are scored at once.
        graph_threads: that one run of the graph may use.
        batch_rows: rows of one run of the graph; 0 joins no requests.
        batch_wait: seconds that a request waits for others.
        key: that must have signed every bundle.
        token: that requests need.
        admin_token: that an exchange of the model needs.
        log: gets one line for each request.
    """

    bundle: Path
    name: str = "recsys"
    host: str = "127.0.0.1"
    port: int = 8080
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 9090
    grpc_port: int | None = None
    limits: Limits = field(default_factory=Limits)
    threads: int = 1
    graph_threads: int = 1
    batch_rows: int = 64
    batch_wait: float = 0.0
    key: bytes | None = None
    token: Token | None = None
    admin_token: Token | None = None
    log: TextIO | None = None


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve until the process is told to stop.

    Args:
        options: of the server.
        say: is told what happens.

    Raises:
        RecsysError: a port is taken, or the model does not prove itself.
    """
    sys.setswitchinterval(_SWITCH)
    _raise_file_limit()
    metrics = Metrics()
    service = Service(
        options.limits,
        metrics,
        threads=options.threads,
        batch_rows=options.batch_rows,
        batch_wait=options.batch_wait,
        graph_threads=options.graph_threads,
        key=options.key,
    )
    scores = Gate(
        app.make_app(service, options.name),
        options.limits,
        metrics,
        app.endpoint,
        token=options.token,
        open_endpoints=app.OPEN,
        log=options.log,
    )
    own = _bind(options.host, options.port)
    main = _server(scores, options.limits, metrics)
    side, thread = None, None
    if options.metrics_port is not None:
        told = _bind(options.metrics_host, options.metrics_port)
        inner = admin.make_admin(service, root=options.bundle.resolve().parent, token=options.admin_token)
        side = _server(Gate(inner, options.limits, metrics, admin.endpoint, log=options.log), options.limits, metrics)
        thread = threading.Thread(target=side.run, args=([told],), name="metrics", daemon=True)
        thread.start()
        say(f"metrics on http://{_address(told)}/metrics")
    say(f"listening on http://{_address(own)}")
    failed: list[RecsysError] = []
    loading = threading.Thread(target=_load, args=(service, options, main, failed, say), name="load", daemon=True)
    try:
        with asyncio.Runner(loop_factory=main.config.get_loop_factory()) as runner:
            runner.run(_until_told(main, own, service, options, say, loading.start))
    except KeyboardInterrupt:
        pass
    finally:
        service.close()
        if side is not None and thread is not None:
            side.should_exit = True
            thread.join(_GRACE)
    if failed:
        raise failed[0]


async def _until_told(
    main: uvicorn.Server,
    own: socket.socket,
    service: Service,
    options: Options,
    say: Callable[[str], None],
    load: Callable[[], None],
) -> None:
    """Answer over HTTP, and over gRPC where that is asked for, until the process is told to stop."""
    rpc = None
    if options.grpc_port is not None:
        from recsys.deploy.server.rpc import Rpc

        calls = Rpc(service, options.name, token=options.token, log=options.log)
        rpc, port = await calls.start(options.host, options.grpc_port)
        say(f"gRPC on {options.host}:{port}")
    load()
    try:
        await main.serve([own])
    finally:
        if rpc is not None:
            await rpc.stop(_GRACE)


def _load(
    service: Service, options: Options, main: uvicorn.Server, failed: list[RecsysError], say: Callable[[str], None]
) -> None:
    try:
        bundle = service.swap(options.bundle)
    except RecsysError as error:
        failed.append(error)
        main.should_exit = True
    except Exception as error:  # a thread's error is seen by nobody else
        failed.append(RecsysError(f"{options.bundle}: cannot be served ({type(error).__name__}: {error})"))
        main.should_exit = True
    else:
        say(f"ready: {options.name} is bundle {bundle}; its files and golden rows are right")


def _server(gate: Gate, limits: Limits, metrics: Metrics) -> uvicorn.Server:
    protocol: Any = functools.partial(Connection, Watch(limits, metrics))
    config = uvicorn.Config(
        gate,
        http=protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(limits.idle) + 1,
        timeout_graceful_shutdown=_GRACE,
        backlog=2048,
    )
    return uvicorn.Server(config)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        raise RecsysError(f"{host}:{port}: cannot listen there ({error.strerror or error})") from None
    own.set_inheritable(False)
    return own


def _address(own: socket.socket) -> str:
    host, port = own.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_file_limit() -> None:
    """Let every connection that is allowed have its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
