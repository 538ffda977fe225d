"""The server does what its OpenAPI document says, for requests that fit it and for such that do not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import positive_data_acceptance
from serving import ROWS, Server

SECONDS = int(os.environ.get("RECSYS_FUZZ_SECONDS", "600"))
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
]


FEW = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_what_the_document_says(server: Server, mode: schemathesis.GenerationMode) -> None:
    """What no schema can say, such as lists of equal length, may still be refused, by 4xx."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    asked = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def conforms(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        if mode is schemathesis.GenerationMode.POSITIVE or operation.method == "post":
            conforms()
            asked.append(operation.label)
    assert len(asked) == (11 if mode is schemathesis.GenerationMode.POSITIVE else 4), asked


@pytest.mark.slow
def test_ten_minutes_of_anything(whole: Path) -> None:
    """No answer of 500, no lost memory, and the same scores after as before."""
    running = Server(whole)
    try:
        wanted = running.score(ROWS[:50]).json
        url = f"http://127.0.0.1:{running.port}/openapi.json"
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", url, "--checks", ",".join(CHECKS)]
        command += ["--no-color", "--max-examples", "100000"]
        # Memory is compared after the first minute, when every kind of request has been answered once.
        for number, seconds in enumerate((60, SECONDS)):
            memory = running.rss
            options = ["--seed", str(number), "--max-time", str(seconds)]
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=2 * seconds + 600)
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert running.rss - memory < 50
        assert running.ready
        assert running.score(ROWS[:50]).json == wanted
        assert running.metric('recsys_requests_total{endpoint="score",status="500"}') == 0
        asked = running.metric("recsys_requests_total")
        print(f"{asked:,.0f} requests, {running.rss - memory:+.1f} MiB")
    finally:
        running.stop()
