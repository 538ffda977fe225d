"""Clients that ask too often get 429, and no other client minds."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import ROW, Server

from recsys.deploy.server.limits import Refused
from recsys.deploy.server.rate import Rate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def allowed(rate: Rate, client: str) -> bool:
    try:
        rate.take(client)
    except Refused:
        return False
    return True


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=200), st.floats(0.2, 5))
def test_no_client_gets_more_than_its_rate(asked: list[tuple[str, float]], rate: float) -> None:
    """In every stretch of time: at most the rate times its length, and what may come at once."""
    clock = Clock()
    limit = Rate(rate, clock=clock)
    times: dict[str, list[float]] = {"a": [], "b": []}
    for client, wait in asked:
        clock.now += wait
        if allowed(limit, client):
            times[client].append(clock.now)
    for taken in times.values():
        for first in range(len(taken)):
            for last in range(first, len(taken)):
                most = max(10 * rate, 1) + rate * (taken[last] - taken[first])
                assert last - first + 1 <= most + 1e-6


def test_who_waits_is_let_in_again_and_others_always_are() -> None:
    clock = Clock()
    limit = Rate(1.0, clients=2, clock=clock)
    assert [allowed(limit, "a") for _ in range(12)] == [True] * 10 + [False] * 2
    with pytest.raises(Refused) as refused:
        limit.take("a")
    assert refused.value.status == 429
    assert (b"retry-after", b"1") in refused.value.headers
    assert allowed(limit, "b")
    clock.now += 1.001
    assert [allowed(limit, "a"), allowed(limit, "a")] == [True, False]
    allowed(limit, "c")  # forgets b, the longest silent
    assert len(limit._left) == 2
    assert all(allowed(Rate(0.0), "a") for _ in range(100))


def test_a_client_that_asks_too_often(whole: Path) -> None:
    running = Server(whole, "--max-rate", "0.5")
    try:
        found = [running.score(ROW) for _ in range(9)]
        assert [reply.status for reply in found] == [200] * 5 + [429] * 4
        assert found[-1].headers["retry-after"] == "1"
        assert "more than 0.5 requests a second" in found[-1].error
        assert running.ready  # health is open to probes
        assert running.metric('recsys_requests_total{endpoint="score",status="429"}') == 4
    finally:
        running.stop()
