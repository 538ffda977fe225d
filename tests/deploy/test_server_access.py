"""Who may ask for what: names of models, tokens, logs, and limits that are options."""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import GOOD, JSON, ROW, ROWS, Server, status


@pytest.fixture(autouse=True)
def _stays_ready(server: Server) -> Iterator[None]:
    """After each attempt: ready, and the right scores."""
    scores = server.score(ROWS[:9]).json
    yield
    assert server.ready
    assert server.score(ROWS[:9]).json == scores


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..%2fx",
        "%2e%2e",
        "%2e%2e%2fetc%2fpasswd",
        "x" * 4096,
        "recsуs",
        "ｒecsys",
        "recsys%00",
        "RECSYS",
        "recsys%20",
        "%ff",
    ],
)
def test_a14_names_of_models(server: Server, name: str) -> None:
    path = b"/v2/models/" + name.encode()
    for target in (path, path + b"/infer", path + b"/versions/..", path + b"/ready"):
        method = b"POST" if target.endswith(b"infer") else b"GET"
        escaped = b"".join(b"%%%02x" % byte if byte > 127 else bytes([byte]) for byte in target)
        body = json.dumps({"inputs": list(GOOD.values())}).encode() if method == b"POST" else b""
        head = b"%s %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        assert status(server.raw(head % (method, escaped, len(body)) + body)) == 404
    for version in ("..", "%2e%2e", "../one"):
        assert server.ask("GET", f"/v2/models/recsys/versions/{version}").status == 404


WATCHED = """
import asyncio, json, sys
from recsys.deploy.server import app
from recsys.deploy.server.gate import Gate
from recsys.deploy.server.limits import Limits
from recsys.deploy.server.metrics import Metrics
from recsys.deploy.server.service import Service
from pathlib import Path

folder, names = Path(sys.argv[1]), json.loads(sys.argv[2])
metrics = Metrics()
service = Service(Limits(), metrics, threads=1)
service.swap(folder)
gate = Gate(app.make_app(service, "recsys"), Limits(), metrics, app.endpoint)
seen, found = [], []

async def ask(path):
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message):
        if "status" in message:
            found.append(message["status"])
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 1)}
    await gate(scope, receive, send)

asyncio.run(ask("/v2/models/recsys"))
sys.addaudithook(lambda event, given: seen.append((event, given)) if event in EVENTS else None)
EVENTS = {"open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.remove", "import", "glob.glob"}

async def every():
    for name in names:
        await ask(f"/v2/models/{name}")
        await ask(f"/v2/models/recsys/versions/{name}")

asyncio.run(every())
print(json.dumps([found, [str(event) for event in seen]]))
"""


def test_a14_no_file_is_touched_for_a_name(whole: Path) -> None:
    names = ["../one", "..", "../../etc/passwd", str(whole), whole.name, "x" * 4096, "recsуs", "~root", "file:///etc"]
    command = [sys.executable, "-c", WATCHED, str(whole), json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, seen = json.loads(done.stdout)
    assert found == [200] + [404] * 2 * len(names)
    assert seen == []


SECRET, ADMIN = "s3cret-token-of-a-client", "another-token-for-the-owner"


@pytest.fixture(scope="module")
def guarded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "token").write_text(f"{SECRET}\n")
    (folder / "admin").write_text(f"{ADMIN}\n")
    log = folder / "requests.jsonl"
    options = ["--token-file", str(folder / "token"), "--admin-token-file", str(folder / "admin")]
    running = Server(whole, *options, "--log-requests", str(log))
    yield running, log
    running.stop()


def bearer(token: str) -> dict[str, str]:
    return {**JSON, "authorization": f"Bearer {token}"}


def test_a15_tokens(guarded: tuple[Server, Path]) -> None:
    running, _ = guarded
    for headers in (JSON, bearer(""), bearer("wrong"), bearer(SECRET[:-1]), bearer(SECRET + "x"), bearer(ADMIN)):
        for path in ("/v1/score", "/v2/models/recsys/infer", "/nowhere"):
            reply = running.ask("POST", path, ROW, headers)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.error
    assert running.score(ROW, {**JSON, "authorization": f"Basic {SECRET}"}).status == 401
    assert running.score(ROW, {**JSON, "authorization": "Bearer \xff"}).status == 401
    for path in ("/openapi.json", "/v2", "/v2/models/recsys"):
        assert running.ask("GET", path).status == 401
    assert running.ready
    assert running.score(ROW, bearer(SECRET)).status == 200
    assert running.score(ROW, {**JSON, "authorization": f"bearer {SECRET}"}).status == 200


def test_a15_the_comparison_takes_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are compared, all of them, and by the function that is made for it."""
    import hmac

    from recsys.deploy.server.access import Token
    from recsys.deploy.server.limits import Refused

    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    token = Token(SECRET)
    for header in (b"Bearer x", b"Bearer " + SECRET[:-1].encode(), b"Basic " + SECRET.encode(), None):
        with pytest.raises(Refused) as refused:
            token.check(header)
        assert refused.value.status == 401
    token.check(b"Bearer " + SECRET.encode())
    assert len(seen) == 5
    assert all(len(a) == len(b) == 32 for a, b in seen)
    assert SECRET not in repr(token) + str(vars(token))


def test_a15_no_exchange_through_the_port_for_scores(guarded: tuple[Server, Path], server: Server) -> None:
    running, _ = guarded
    for token in (SECRET, ADMIN):
        for path in ("/v1/swap", "/v2/repository/models/recsys/load", "/v2/repository/models/recsys/unload"):
            assert running.ask("POST", path, {"bundle": "bundle"}, bearer(token)).status in (401, 403), (token, path)
    swap = {"bundle": "bundle"}
    assert running.ask("POST", "/v1/swap", swap, JSON, running.metrics_port).status == 401
    assert running.ask("POST", "/v1/swap", swap, bearer(SECRET), running.metrics_port).status == 401
    assert running.ask("POST", "/v1/swap", swap, bearer(ADMIN), running.metrics_port).status == 200
    assert server.ask("POST", "/v1/swap", swap, bearer(ADMIN), server.metrics_port).status == 403
    assert server.ask("POST", "/v1/swap", swap, JSON).status == 403


def test_a16_the_log_of_requests_holds_no_secret_and_no_value(guarded: tuple[Server, Path], server: Server) -> None:
    running, log = guarded
    marked = {**ROW, "item": "private-item-77", "price": 4711.25}
    assert running.score(marked, {**bearer(SECRET), "cookie": "crumb-88"}).status == 200
    assert running.score({**marked, "user": {"private-user": 1}}, bearer(SECRET)).status == 422
    assert running.ask("GET", "/v2/models/private-name?token=private-query", headers=bearer(SECRET)).status == 404
    assert running.score(marked, bearer("wrong-token-99")).status == 401
    for _ in range(100):  # a line is written after the answer is sent
        text = log.read_text()
        last = [json.loads(line) for line in text.splitlines()[-4:]]
        if last[-1]["status"] == 401 and last[-2]["status"] == 404:
            break
        time.sleep(0.1)
    assert [line["status"] for line in last] == [200, 422, 404, 401]
    assert last[0]["rows"] == 1
    assert len(last[0]["bundle"]) == 64
    for secret in (SECRET, ADMIN, "crumb-88", "wrong-token-99", "private", "4711"):
        assert secret not in text, secret
    for running_ in (running, server):
        for port in (running_.port, running_.metrics_port):
            assert "private" not in running_.ask("GET", "/metrics", headers=bearer(SECRET), port=port).body.decode()


def test_a16_nothing_is_written_unless_asked(whole: Path) -> None:
    running = Server(whole)
    assert running.score({**ROW, "item": "private"}, bearer("private-token-12345")).status == 200
    assert running.score({**ROW, "price": "private"}).status == 422
    running.process.terminate()
    out, errors = running.process.communicate(timeout=30)
    assert "private" not in out + errors


def test_more_requests_than_may_wait(whole: Path) -> None:
    """Each is answered, most of them by 503 with Retry-After; the right scores go to the others."""
    running = Server(whole, "--queue", "4")
    try:
        wanted = running.score(ROWS).json
        found: list[Any] = []

        def ask() -> None:
            for _ in range(6):
                found.append(running.score(ROWS))

        workers = [threading.Thread(target=ask) for _ in range(24)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 24 * 6
        assert {answer.status for answer in found} == {200, 503}
        for answer in found:
            if answer.status == 503:
                assert answer.headers["retry-after"] == "1"
                assert "try again later" in answer.error
            else:
                assert answer.json == wanted
    finally:
        running.stop()


def test_scores_that_take_too_long(whole: Path) -> None:
    running = Server(whole, "--timeout", "0.002")
    try:
        late = [running.score(ROWS * 2) for _ in range(5)]
        assert statistics.mode(answer.status for answer in late) == 503
        assert any("no scores within 0.002 seconds" in answer.error for answer in late if answer.status == 503)
        assert running.ready
    finally:
        running.stop()


def test_limits_are_options(whole: Path) -> None:
    options = ["--max-rows", "2", "--max-string", "5", "--max-body", "2000", "--max-values", "90"]
    running = Server(whole, *options)
    try:
        short = {**ROW, "city": "Paris"}
        assert running.score([short] * 2).status == 200
        assert "at most 2" in running.score([short] * 3).error
        assert "at most 5" in running.score({**short, "item": "sixsix"}).error
        assert "at most 2,000" in running.score({**short, "x": " " * 3000}).error
        assert "more than 90 values" in running.score({**short, "tags": ["t"] * 200}).error
    finally:
        running.stop()
