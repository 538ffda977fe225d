"""Scores the rows of requests that come in at the same time in one run of the graph."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from recsys.deploy.encode import Encoded
from recsys.deploy.predictor import Predictor, Scores
from recsys.deploy.server.limits import Refused
from recsys.errors import RequestError

T = TypeVar("T")
_AT_ONCE = 0.0005
"""Runs that take no more seconds happen where requests are read: to wake a thread, and be woken, takes as long."""
_SMOOTH = 0.1


@dataclass(frozen=True)
class Job:
    """Encoded rows that wait for their scores."""

    predictor: Predictor
    encoded: Encoded
    rows: int
    scores: asyncio.Future[Scores]


class Batcher:
    """Runs work in a few threads, and joins small requests.

    While all threads are busy, requests gather; the next free thread takes as many of the oldest as one run may have.
    Requests for different models are never joined. Runs that are known to be short need no thread.

    Args:
        threads: that score at once.
        rows: of one run, at most; a request of more rows has a run for itself. 0 joins no requests.
        wait: seconds that a request waits for others although a thread is free.
        queue: pieces of work that may wait for a thread.
        observe: is told of the rows of each run.
    """

    def __init__(
        self, *, threads: int, rows: int, wait: float, queue: int, observe: Callable[[int], None] = lambda rows: None
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self._threads = threads
        self._rows = rows
        self._wait = wait
        self._queue = queue
        self._observe = observe
        self._jobs: deque[Job] = deque()
        self._running = 0
        self._calls = 0
        self._row_seconds = float("inf")
        self._timer: asyncio.Handle | None = None

    async def call(self, work: Callable[[], T]) -> T:
        """Do a piece of work in one of the threads.

        Raises:
            Refused: too many wait already.
        """
        if self._calls >= self._queue:
            raise busy(self._calls)
        self._calls += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._called)
        return await future

    def _called(self, future: asyncio.Future[Any]) -> None:
        self._calls -= 1
        if not future.cancelled():
            future.exception()  # was given to the caller, if one still waits

    async def score(self, predictor: Predictor, encoded: Encoded) -> Scores:
        """Score encoded rows, perhaps together with those of other requests.

        Raises:
            RequestError: a score is not finite.
            Refused: too many wait already.
        """
        if len(self._jobs) >= self._queue:
            raise busy(len(self._jobs))
        loop = asyncio.get_running_loop()
        job = Job(predictor, encoded, len(encoded.ids), loop.create_future())
        self._jobs.append(job)
        if self._timer is None and self._running < self._threads:
            self._timer = loop.call_later(self._wait, self._start) if self._wait else loop.call_soon(self._start)
        return await job.scores

    def close(self) -> None:
        """Start no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._jobs and self._running < self._threads:
            jobs = self._next()
            rows = sum(job.rows for job in jobs)
            if not jobs:
                return
            self._observe(rows)
            if rows * self._row_seconds <= _AT_ONCE:
                self._settle(jobs, *_timed(jobs))
                if self._jobs:  # what else is ready comes first
                    self._timer = loop.call_soon(self._start)
                return
            self._running += 1
            work = loop.run_in_executor(self._pool, _timed, jobs)
            work.add_done_callback(partial(self._finish, jobs))

    def _next(self) -> list[Job]:
        jobs: list[Job] = []
        rows = 0
        while self._jobs:
            job = self._jobs[0]
            if job.scores.done():  # its client has gone, or has waited too long
                self._jobs.popleft()
                continue
            if jobs and (job.predictor is not jobs[0].predictor or rows + job.rows > self._rows):
                break
            jobs.append(self._jobs.popleft())
            rows += job.rows
        return jobs

    def _finish(self, jobs: Sequence[Job], done: asyncio.Future[tuple[list[Scores | Exception], float]]) -> None:
        self._running -= 1
        if done.cancelled():
            for job in jobs:
                job.scores.cancel()
        else:
            self._settle(jobs, *done.result())
        self._start()

    def _settle(self, jobs: Sequence[Job], results: Sequence[Scores | Exception], seconds: float) -> None:
        """Give the jobs their results, and learn how long a row takes."""
        now = seconds / max(sum(job.rows for job in jobs), 1)
        known = self._row_seconds < float("inf")
        self._row_seconds = (1 - _SMOOTH) * self._row_seconds + _SMOOTH * now if known else now
        for job, result in zip(jobs, results, strict=True):
            if job.scores.done():
                continue
            if isinstance(result, Exception):
                job.scores.set_exception(result)
            else:
                job.scores.set_result(result)


def _timed(jobs: Sequence[Job]) -> tuple[list[Scores | Exception], float]:
    """Return the scores of each job, and the seconds of this thread's processor that they took together."""
    began = time.thread_time()
    try:
        results = score_jobs(jobs)
    except Exception as error:  # whatever it is, every request gets an answer
        results = [error] * len(jobs)
    return results, time.thread_time() - began


def score_jobs(jobs: Sequence[Job]) -> list[Scores | Exception]:
    """Return the scores of each job; rows of one job that cannot be scored are no other job's trouble."""
    predictor = jobs[0].predictor
    if len(jobs) > 1:
        try:
            return list(_split(predictor.score(joined([job.encoded for job in jobs])), [job.rows for job in jobs]))
        except RequestError:
            pass
    found: list[Scores | Exception] = []
    for job in jobs:
        try:
            found.append(predictor.score(job.encoded))
        except RequestError as error:
            found.append(error)
    return found


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Return the rows of all parts, one after the other; lists are padded to the longest."""
    ids = np.concatenate([part.ids for part in parts])
    values = None if parts[0].values is None else np.concatenate([p.values for p in parts if p.values is not None])
    lists = []
    for group in range(len(parts[0].lists)):
        found = [part.lists[group][0] for part in parts]
        padded = np.zeros((len(ids), max(events.shape[1] for events in found), found[0].shape[2]), dtype=np.int64)
        first = 0
        for events in found:
            padded[first : first + len(events), : events.shape[1]] = events
            first += len(events)
        lists.append((padded, np.concatenate([part.lists[group][1] for part in parts])))
    return Encoded(ids, values, tuple(lists))


def _split(scores: Scores, rows: Sequence[int]) -> Sequence[Scores]:
    ends = np.cumsum(rows).tolist()
    return [
        Scores(
            {task: z[end - n : end] for task, z in scores.logit.items()},
            {task: p[end - n : end] for task, p in scores.probability.items()},
            scores.clipped[end - n : end],
        )
        for n, end in zip(rows, ends, strict=True)
    ]


def busy(waiting: int) -> Refused:
    """Return the refusal for one request too many."""
    return Refused(503, f"{waiting:,} requests are waiting; try again later")
