"""Joined runs give each request its own scores; drift counts are those of slow loops, and tell what has moved."""

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.deploy.encode import Encoded
from recsys.deploy.predictor import Predictor, Scores, load
from recsys.deploy.server.batch import Batcher, Job, score_jobs
from recsys.deploy.server.content import _TEXT, check_rows, parse
from recsys.deploy.server.drift import HALF, Drift, index
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.service import inside
from recsys.errors import RequestError

ROWS = made.LOGS.drop("click", "buy").to_dicts()


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


class Slow:
    """Scores that are the first id of each row, once it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.runs: list[list[int]] = []

    def score(self, encoded: Encoded) -> Scores:
        self.go.wait(20)
        ids = encoded.ids[:, 0]
        self.runs.append(ids.tolist())
        if (ids < 0).any():
            raise RequestError("not finite", row=int(np.flatnonzero(ids < 0)[0]) + 1)
        return Scores({"y": ids.astype(float)}, {"y": ids / 100}, np.zeros(len(ids), np.int64))


def encoded(*ids: int) -> Encoded:
    return Encoded(np.array(ids, np.int64)[:, None], None)


async def together(batcher: Batcher, asked: list[tuple[Any, Encoded]], go: Any) -> list[Any]:
    tasks = [asyncio.create_task(batcher.score(predictor, rows)) for predictor, rows in asked]
    await asyncio.sleep(0.2)
    go()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    batcher.close()
    return [f.logit["y"].tolist() if isinstance(f, Scores) else f for f in found]


def test_requests_that_wait_are_joined_and_get_their_own_scores() -> None:
    slow, seen = Slow(), []
    batcher = Batcher(threads=1, rows=6, wait=0.0, queue=100, observe=seen.append)
    asked: list[tuple[Any, Encoded]] = [(slow, encoded(9)), (slow, encoded(9, 9))]

    async def all_of_it() -> list[Any]:
        first = asyncio.create_task(batcher.score(slow, encoded(1)))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)  # it runs alone; what comes now must wait
        asked[:] = [
            (slow, encoded(2)),
            (slow, encoded(3, 4)),
            (slow, encoded(5, 6, 7)),
            (slow, encoded(8)),
            (slow, encoded(*range(10, 20))),
        ]
        rest = await together(batcher, asked, slow.go.set)
        return [(await first).logit["y"].tolist(), *rest]

    assert asyncio.run(all_of_it()) == [[1], [2], [3, 4], [5, 6, 7], [8], list(range(10, 20))]
    assert slow.runs == [[1], [2, 3, 4, 5, 6, 7], [8], list(range(10, 20))]
    assert seen == [1, 6, 1, 10]


def test_waiting_joins_though_a_thread_is_free_and_zero_rows_join_nothing() -> None:
    for rows, wait, runs in ((64, 0.05, [[1, 2, 3]]), (0, 0.05, [[1], [2], [3]])):
        slow = Slow()
        slow.go.set()
        batcher = Batcher(threads=1, rows=rows, wait=wait, queue=100)
        found = asyncio.run(together(batcher, [(slow, encoded(n)) for n in (1, 2, 3)], lambda: None))
        assert found == [[1], [2], [3]]
        assert slow.runs == runs


def test_two_models_are_never_in_one_run() -> None:
    a, b = Slow(), Slow()
    a.go.set(), b.go.set()
    batcher = Batcher(threads=1, rows=64, wait=0.05, queue=100)
    asked = [(a, encoded(1)), (a, encoded(2)), (b, encoded(3)), (a, encoded(4))]
    assert asyncio.run(together(batcher, asked, lambda: None)) == [[1], [2], [3], [4]]
    assert a.runs == [[1, 2], [4]]
    assert b.runs == [[3]]


def test_a_row_without_a_finite_score_fails_its_own_request_only() -> None:
    slow = Slow()
    slow.go.set()
    batcher = Batcher(threads=1, rows=64, wait=0.05, queue=100)
    found = asyncio.run(
        together(batcher, [(slow, encoded(1)), (slow, encoded(2, -1)), (slow, encoded(3))], lambda: None)
    )
    assert found[0] == [1]
    assert found[2] == [3]
    assert isinstance(found[1], RequestError)
    assert found[1].row == 2


def test_one_request_too_many_is_refused_and_one_that_is_given_up_is_not_scored() -> None:
    slow = Slow()
    batcher = Batcher(threads=1, rows=0, wait=0.0, queue=3)

    async def flood() -> list[Any]:
        tasks = [asyncio.create_task(batcher.score(slow, encoded(0)))]  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        tasks += [asyncio.create_task(batcher.score(slow, encoded(n))) for n in range(1, 6)]  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        tasks[2].cancel()
        await asyncio.sleep(0.05)
        slow.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        batcher.close()
        return found

    found = asyncio.run(flood())
    assert [type(f) for f in found] == [Scores, Scores, asyncio.CancelledError, Scores, Refused, Refused]
    assert found[4].status == 503
    assert (b"retry-after", b"1") in found[4].headers
    assert slow.runs == [[0], [1], [3]]


def test_joined_rows_with_lists_of_different_length(predictor: Predictor) -> None:
    parts = [ROWS[0:1], ROWS[1:4], ROWS[4:5], ROWS[13:20], ROWS[6:7]]

    async def jobs() -> list[Job]:
        loop = asyncio.get_running_loop()
        return [Job(predictor, predictor.encoder.rows(part), len(part), loop.create_future()) for part in parts]

    found = score_jobs(asyncio.run(jobs()))
    for part, scores in zip(parts, found, strict=True):
        assert isinstance(scores, Scores)
        wanted = predictor.predict(part)
        assert len(scores) == len(part)
        np.testing.assert_allclose(scores.logit["click"], wanted.logit["click"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(scores.probability["click"], wanted.probability["click"], rtol=0, atol=1e-6)


def told(drift: Drift) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in drift.collect():
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_counts_are_those_of_slow_loops(predictor: Predictor) -> None:
    rows = [dict(row) for row in ROWS[:60]]
    rows[3]["item"], rows[4]["item"], rows[5]["price"] = "never seen", "nor this", None
    rows[7]["tags"], rows[8]["past"], rows[8]["past_shop"] = ["t1", "new", None], ["i1", "new"], [None, "s2"]
    drift = Drift(predictor)
    for first in range(0, 60, 7):
        part = predictor.encoder.rows(rows[first : first + 7])
        drift.saw(part, predictor.score(part))
    found = told(drift)
    vocabulary = {name: set(made.LOGS[name].drop_nulls().to_list()) for name in ("user", "item", "shop")}
    for name, known in vocabulary.items():
        values = [row[name] for row in rows]
        assert found["recsys_values_total"][(name,)] == 60
        assert found["recsys_missing_values_total"][(name,)] == sum(v is None for v in values)
        assert found["recsys_unknown_values_total"][(name,)] == sum(v is not None and v not in known for v in values)
    assert found["recsys_missing_values_total"][("price",)] == sum(row["price"] is None for row in rows)
    assert found["recsys_unknown_values_total"][("price",)] == 0
    events = [event for row in rows for event in row["tags"][-4:]]
    assert found["recsys_values_total"][("tags",)] == len(events)
    assert found["recsys_unknown_values_total"][("tags",)] == 1
    assert found["recsys_missing_values_total"][("tags",)] == 1
    assert found["recsys_missing_values_total"][("past_shop",)] == 1
    assert found["recsys_unknown_values_total"][("past",)] == 1
    probability = predictor.predict(rows).probability["click"]
    for (_, edge), count in found["recsys_scores_bucket"].items():
        assert count == sum(p <= float(edge) for p in probability), edge
    assert found["recsys_scores_sum"][("click",)] == pytest.approx(probability.sum(), abs=1e-4)
    baseline = {c["name"]: c["baseline"] for c in predictor.schema["columns"]}
    assert found["recsys_training_ratio"][("shop", "missing")] == baseline["shop"]["missing"] > 0


def test_recent_rows_weigh_more(predictor: Predictor) -> None:
    drift = Drift(predictor)
    good, bad = predictor.encoder.rows(ROWS[:1]), predictor.encoder.rows([{**ROWS[0], "item": "never seen"}])
    drift.saw(good, predictor.score(good))
    drift.counted()
    drift.unknown.recent *= 0.5
    drift.values.recent *= 0.5
    drift.saw(bad, predictor.score(bad))
    drift.counted()
    ratio = told(drift)["recsys_recent_ratio"][("item", "unknown")]
    assert ratio == pytest.approx(1 / (1 + 0.5), abs=1e-3)
    assert HALF > 0


def test_the_index_finds_what_has_moved_and_nothing_else(predictor: Predictor) -> None:
    def psi(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
        drift = Drift(predictor)
        part = predictor.encoder.rows(rows)
        drift.saw(part, predictor.score(part))
        return told(drift)["recsys_drift_psi"]

    same = psi(ROWS)  # the very rows of training
    assert set(same) == {("number", "price"), ("score", "click")}
    assert max(same.values()) < 1e-3
    half = psi(ROWS[::2])
    assert max(half.values()) < 0.1
    moved = psi([{**row, "price": None if row["price"] is None else row["price"] + 8} for row in ROWS])
    assert moved[("number", "price")] > 0.2
    users = psi([{**row, "user": 3, "item": "i7"} for row in ROWS])
    assert users[("number", "price")] < 1e-3
    assert users[("score", "click")] > 0.2


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_the_index_is_its_formula(first: list[float], second: list[float]) -> None:
    a = [x / sum(first) for x in first]
    b = [x / sum(second[: len(first)]) for x in second[: len(first)]]
    slow = sum((x - y) * math.log(x / y) for x, y in zip(a, b, strict=True))
    assert index(np.cumsum(a)[:-1], np.cumsum(b)[:-1]) == pytest.approx(slow, abs=1e-6)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_strict_json_reads_what_json_is(value: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace"), Limits()) == json.loads(
        json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace")
    )


@given(st.binary(max_size=60) | st.text('{}[]",:\\u0019e-+.ntf', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    limits = Limits(rows=2, values=8, string=20)
    problem = None
    try:
        check_rows(parse(body, limits), limits)
    except Refused as refused:
        problem = refused
    if problem is None:
        assert 1 <= len(check_rows(json.loads(body), limits)) <= 2
    else:
        assert problem.status in (400, 413, 422)
        assert list(json.loads(problem.body)) == ["error"]


@given(st.lists(st.text('"\\,[{a', max_size=8), max_size=6))
def test_values_are_counted_outside_of_texts(texts: list[str]) -> None:
    """The text without its texts has the marks of its structure, and no others."""
    body = json.dumps(texts).encode()
    assert _TEXT.sub(b"", body).replace(b" ", b"") == b"[" + b"," * max(len(texts) - 1, 0) + b"]"
    parse(body, Limits(values=max(len(texts), 1)))
    if len(texts) > 1:
        with pytest.raises(Refused, match=f"more than {len(texts) - 1} values"):
            parse(body, Limits(values=len(texts) - 1))


def test_names_of_bundles_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "root" / "good").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    root = tmp_path / "root"
    assert inside(root, "good") == root / "good"
    for name in (
        "",
        ".",
        "..",
        "../outside",
        "good/../../outside",
        "link",
        str(root / "good"),
        "a\0b",
        5,
        None,
        "x" * 300,
        "a\\b",
    ):
        with pytest.raises(Refused) as refused:
            inside(root, name)
        assert refused.value.status == 422
