"""`recsys serve`: answer requests for scores with a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import make_console, require
from recsys.errors import RecsysError

_NETWORK = "Network"
_LIMITS = "Limits (what a request may ask; more is refused with 413, 408, 429 or 503)"
_SPEED = "Speed"
_ACCESS = "Access"


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or of a run that has one.")],
    name: Annotated[
        str, typer.Option("--name", help="Name of the model in paths (/v2/models/NAME/infer) and answers.")
    ] = "recsys",
    host: Annotated[
        str,
        typer.Option(
            "--host",
            rich_help_panel=_NETWORK,
            help="Address for scores. The default is seen from this machine alone; 0.0.0.0 opens it to all: use a "
            "token then, and a proxy that speaks TLS.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, rich_help_panel=_NETWORK, help="Port; 0 takes a free one.")
    ] = 8080,
    metrics_host: Annotated[
        str, typer.Option("--metrics-host", rich_help_panel=_NETWORK, help="Address for metrics and exchange.")
    ] = "127.0.0.1",
    metrics_port: Annotated[
        int,
        typer.Option(
            "--metrics-port",
            min=-1,
            max=65535,
            rich_help_panel=_NETWORK,
            help="Port of Prometheus' /metrics; it needs no token, so keep it inside. 0 takes a free one, -1 opens "
            "none.",
        ),
    ] = 9090,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            "--grpc-port",
            min=0,
            max=65535,
            rich_help_panel=_NETWORK,
            help="Also answer over gRPC, on this port; 0 takes a free one. Needs the extra `grpc`.",
        ),
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, rich_help_panel=_LIMITS, help="Bytes of one body.")] = 8
    << 20,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, rich_help_panel=_LIMITS, help="Rows of one request.")
    ] = 1024,
    max_string: Annotated[
        int, typer.Option("--max-string", min=1, rich_help_panel=_LIMITS, help="Bytes of one text.")
    ] = 1024,
    max_values: Annotated[
        int,
        typer.Option("--max-values", min=1, rich_help_panel=_LIMITS, help="Values of one request; bounds its memory."),
    ] = 1 << 18,
    max_held: Annotated[
        int,
        typer.Option("--max-held", min=1, rich_help_panel=_LIMITS, help="Bytes of all bodies that are read at once."),
    ] = 32 << 20,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.001, rich_help_panel=_LIMITS, help="Seconds that scoring may take: 503."),
    ] = 1.0,
    receive_timeout: Annotated[
        float,
        typer.Option(
            "--receive-timeout",
            min=0.01,
            rich_help_panel=_LIMITS,
            help="Seconds that a client may take to send a head or a body; slower ones are dropped.",
        ),
    ] = 5.0,
    idle_timeout: Annotated[
        float,
        typer.Option("--idle-timeout", min=0.1, rich_help_panel=_LIMITS, help="Seconds without a request."),
    ] = 30.0,
    queue: Annotated[
        int,
        typer.Option(
            "--queue", min=1, rich_help_panel=_LIMITS, help="Requests at once; one more gets 503 with Retry-After."
        ),
    ] = 256,
    max_connections: Annotated[
        int, typer.Option("--max-connections", min=1, rich_help_panel=_LIMITS, help="Connections at once.")
    ] = 1024,
    max_rate: Annotated[
        float,
        typer.Option(
            "--max-rate",
            min=0.0,
            rich_help_panel=_LIMITS,
            help="Requests a second of one client address; more get 429. 0: not counted. Behind a proxy all clients "
            "have its address.",
        ),
    ] = 0.0,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency",
            min=0,
            rich_help_panel=_SPEED,
            help="Requests that are scored at once; 0: as many as there are cores.",
        ),
    ] = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, rich_help_panel=_SPEED, help="Threads of one run of the graph.")
    ] = 1,
    batch_rows: Annotated[
        int,
        typer.Option(
            "--batch-rows",
            min=0,
            rich_help_panel=_SPEED,
            help="Requests that wait together are scored in one run of up to so many rows; 0: each one alone.",
        ),
    ] = 64,
    batch_wait_ms: Annotated[
        float,
        typer.Option(
            "--batch-wait-ms",
            min=0.0,
            rich_help_panel=_SPEED,
            help="Milliseconds that a request waits for others though nothing else is to do; 0 joins only what waits "
            "anyway.",
        ),
    ] = 0.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            rich_help_panel=_ACCESS,
            help="File with the token that every request but health must send: `Authorization: Bearer TOKEN`.",
        ),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-token-file",
            rich_help_panel=_ACCESS,
            help="File with another token, for POST /v1/swap on the port of the metrics: the model is exchanged for a "
            "bundle beside BUNDLE that has proven itself. Without it there is no exchange.",
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--key-file",
            rich_help_panel=_ACCESS,
            help="File with the key that must have signed the bundle, and every one that takes its place.",
        ),
    ] = None,
    log_requests: Annotated[
        Path | None,
        typer.Option(
            "--log-requests",
            rich_help_panel=_ACCESS,
            help="File that gets one line of JSON for each request: time, status, rows, bundle; no values, no headers.",
        ),
    ] = None,
) -> None:
    """Answer requests for scores with a bundle, over HTTP and gRPC.

    `recsys serve runs/mine/bundle`, then `curl -d '{"user": "u17", "item": "i4"}' -H 'content-type: application/json'
    127.0.0.1:8080/v1/score`; or the Open Inference Protocol below /v2. The server says ready (/v2/health/ready) only
    when every file has its hash and the golden rows have their scores.

    Needs the extra `serve`, not torch.
    """
    require("serve")
    if grpc_port is not None:
        require("grpc")
    from recsys.deploy.server.access import Token
    from recsys.deploy.server.limits import Limits
    from recsys.deploy.server.run import Options, serve
    from recsys.deploy.signature import read_key

    if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise RecsysError(f"--name {name!r}: letters, digits, `-`, `_` and `.` only; it stands in paths")
    console = make_console()
    inside = bundle / "bundle"
    limits = Limits(
        body=max_body,
        rows=max_rows,
        string=max_string,
        values=max_values,
        held=max_held,
        timeout=timeout,
        receive=receive_timeout,
        idle=idle_timeout,
        queue=queue,
        connections=max_connections,
        rate=max_rate,
    )
    log = None if log_requests is None else log_requests.open("a", encoding="utf-8")
    options = Options(
        bundle=inside if inside.is_dir() else bundle,
        name=name,
        host=host,
        port=port,
        metrics_host=metrics_host,
        metrics_port=None if metrics_port < 0 else metrics_port,
        grpc_port=grpc_port,
        limits=limits,
        threads=concurrency or len(os.sched_getaffinity(0)),
        graph_threads=threads,
        batch_rows=batch_rows,
        batch_wait=batch_wait_ms / 1000,
        key=None if key_file is None else read_key(key_file),
        token=None if token_file is None else Token.of_file(token_file),
        admin_token=None if admin_token_file is None else Token.of_file(admin_token_file),
        log=log,
    )
    try:
        serve(options, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    finally:
        if log is not None:
            log.close()
