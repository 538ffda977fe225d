"""A model is exchanged under load: every request is answered, whole, by the bundle that the answer names."""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from serving import JSON, ROWS, Server

from recsys.deploy.predictor import load

ADMIN = {**JSON, "authorization": "Bearer a-token-for-the-owner"}
ASKED = ROWS[:3]


@pytest.fixture(scope="module")
def models(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(whole, folder / "one")
    made.write(folder / "two", model={**made.MODEL, "interaction": "fm"})
    made.write(folder / "fewer", data=made.DATA)
    shutil.copytree(whole, folder / "broken")
    (folder / "broken" / "calibration.json").write_text("{}")
    (folder / "link").symlink_to(folder / "two")
    (folder / "token").write_text("a-token-for-the-owner\n")
    running = Server(folder / "one", "--admin-token-file", str(folder / "token"))
    yield running, folder
    _, errors = running.stop()
    assert "Traceback" not in errors


def swap(running: Server, name: Any) -> Any:
    return running.ask("POST", "/v1/swap", {"bundle": name}, ADMIN, running.metrics_port)


class Load:
    """Threads that ask all the time, until they are told to stop."""

    def __init__(self, running: Server, threads: int) -> None:
        self.stop = threading.Event()
        self.answers: list[tuple[int, bytes]] = []
        self.errors: list[Exception] = []
        self._port = running.port
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        body = json.dumps(ASKED)
        while not self.stop.is_set():
            try:
                connection.request("POST", "/v1/score", body, JSON)
                reply = connection.getresponse()
                self.answers.append((reply.status, reply.read()))
            except Exception as error:
                self.errors.append(error)
                return

    def end(self) -> list[tuple[int, bytes]]:
        self.stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors
        return self.answers


def exchanged(models: tuple[Server, Path], seconds: float, least: int) -> None:
    running, folder = models
    wanted = {}
    for name in ("one", "two"):
        predictor = load(folder / name)
        wanted[predictor.id] = predictor.predict(ASKED).probability["click"]
    assert np.abs(np.subtract(*wanted.values())).min() > 1e-4  # a mixture would be seen
    load_ = Load(running, 4)
    swaps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end or swaps < 4:
        reply = swap(running, ("two", "one")[swaps % 2])
        assert reply.status == 200, reply.body
        swaps += 1
        assert swap(running, "broken").status == 422
    answers = load_.end()
    assert {status for status, _ in answers} == {200}
    seen: dict[str, int] = dict.fromkeys(wanted, 0)
    for _, body in answers:
        told = json.loads(body)
        seen[told["bundle"]] += 1
        found = [scores["click"] for scores in told["scores"]]
        np.testing.assert_allclose(found, wanted[told["bundle"]], rtol=0, atol=1e-6)
    assert min(seen.values()) >= least, seen
    print(f"{len(answers):,} requests, {swaps} exchanges, 0 failed")


def test_no_request_fails_or_is_answered_by_two_models(models: tuple[Server, Path]) -> None:
    exchanged(models, 4.0, 5)


@pytest.mark.slow
def test_a_hundred_thousand_requests_while_models_are_exchanged(models: tuple[Server, Path]) -> None:
    exchanged(models, 300.0, 1000)


def test_what_does_not_prove_itself_never_takes_over(models: tuple[Server, Path]) -> None:
    running, folder = models
    assert swap(running, "one").json == {"bundle": load(folder / "one").id}
    before = running.score(ASKED).json
    for name, text in (
        ("broken", "calibration.json: altered"),
        ("nowhere", "no such folder"),
        ("link", "the name leads elsewhere"),
        ("../one", "not a path"),
        (str(folder / "two"), "not a path"),
        (5, "expected the name"),
    ):
        reply = swap(running, name)
        assert reply.status == 422
        assert text in reply.error
        assert str(folder) not in reply.error
    for body in (b"", b"{", b"[]", b'{"bundle": "two", "more": 1}'):
        assert running.ask("POST", "/v1/swap", body, ADMIN, running.metrics_port).status in (400, 422)
    assert running.score(ASKED).json == before
    assert running.metric('recsys_swaps_total{outcome="refused"}') >= 2


def test_a_model_with_other_columns_may_take_over(models: tuple[Server, Path]) -> None:
    running, folder = models
    fewer = load(folder / "fewer")
    assert swap(running, "fewer").status == 200
    rows = [{name: row[name] for name in fewer.columns} for row in ASKED]
    told = running.score(rows).json
    assert told["bundle"] == fewer.id
    found = [scores["click"] for scores in told["scores"]]
    np.testing.assert_allclose(found, fewer.predict(rows).probability["click"], rtol=0, atol=1e-6)
    row = running.ask("GET", "/openapi.json").json["components"]["schemas"]["Row"]
    assert row["required"] == list(fewer.columns)
    assert running.metric(f'recsys_bundle{{bundle="{fewer.id}"}}') == 1
    assert running.metric("recsys_bundle") == 1
    assert swap(running, "one").status == 200


def test_metrics_count_what_was_asked(models: tuple[Server, Path]) -> None:
    running, _ = models
    before = {
        name: running.metric(name)
        for name in ("recsys_rows_total", 'recsys_requests_total{endpoint="score",status="200"}')
    }
    swap(running, "two")  # counts of values begin anew with each model
    for _ in range(5):
        running.score([{**row, "item": "never seen"} for row in ASKED])
    assert running.metric("recsys_rows_total") - before["recsys_rows_total"] == 15
    assert (
        running.metric('recsys_requests_total{endpoint="score",status="200"}')
        - before['recsys_requests_total{endpoint="score",status="200"}']
        == 5
    )
    assert running.metric('recsys_unknown_values_total{column="item"}') == 15
    assert running.metric('recsys_values_total{column="item"}') == 15
    assert running.metric('recsys_scores_count{task="click"}') == 15
    assert running.metric("recsys_clipped_ids_total") == 0
    assert running.metric('recsys_recent_ratio{column="item",what="unknown"}') == pytest.approx(1.0)
