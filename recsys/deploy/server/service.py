"""The model that a server answers with, and the exchange of one for another while requests go on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recsys.deploy.encode import Encoded, Row
from recsys.deploy.explain import Explanation
from recsys.deploy.predictor import Predictor, Scores, load
from recsys.deploy.server.batch import Batcher, busy
from recsys.deploy.server.drift import Drift
from recsys.deploy.server.limits import Limits, Refused
from recsys.deploy.server.metrics import Metrics

T = TypeVar("T")
_SMALL = 16 << 10
"""Bodies up to so many bytes are parsed and encoded at once; larger ones in a thread, so that others need not wait."""

Reader = Callable[[bytes, Predictor, Limits], Sequence[Row]]


@dataclass(frozen=True)
class Served:
    """A model that has proven itself, and what it has seen since."""

    predictor: Predictor
    drift: Drift


@dataclass(frozen=True)
class Answer:
    """Scores, and the id of the bundle that gave them."""

    bundle: str
    scores: Scores


class Service:
    """Answers requests with the current model.

    Args:
        limits: of requests.
        metrics: that are counted.
        threads: requests that are scored at once.
        batch_rows: rows of one run of the graph; 0 joins no requests.
        batch_wait: seconds that a request waits for others.
        graph_threads: that one run may use.
        key: that must have signed every bundle; None asks for no signature.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        *,
        threads: int,
        batch_rows: int = 64,
        batch_wait: float = 0.0,
        graph_threads: int = 1,
        key: bytes | None = None,
    ) -> None:
        self._key = key
        self.limits = limits
        self.metrics = metrics
        self._batcher = Batcher(
            threads=threads, rows=batch_rows, wait=batch_wait, queue=limits.queue, observe=metrics.ran
        )
        self._graph_threads = graph_threads
        self._served: Served | None = None
        self._admitted = 0
        self._loading = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether a model has proven itself."""
        return self._served is not None

    def current(self) -> Served:
        """Return the model that is served.

        Raises:
            Refused: there is none yet.
        """
        if self._served is None:
            raise Refused(503, "the model is being loaded and checked; try again later")
        return self._served

    def swap(self, folder: Path) -> str:
        """Load a bundle, let it prove itself, and answer with it from then on; return its id.

        Requests that have begun are answered by the model that they began with. May be called from any thread.

        Raises:
            BundleError: the bundle is not what was written, or gives other scores; the model stays the one it was.
            Refused: another bundle is being loaded.
        """
        if not self._loading.acquire(blocking=False):
            raise Refused(409, "another bundle is being loaded; try again later")
        try:
            predictor = load(folder, threads=self._graph_threads, key=self._key)
            predictor.warm_up()
            served = Served(predictor, Drift(predictor))
            self._served = served
            self.metrics.serves(served.drift, predictor.id)
        finally:
            self._loading.release()
        return predictor.id

    async def answer(self, body: bytes, read: Reader) -> Answer:
        """Score the rows of a body.

        Args:
            body: of the request.
            read: gives its rows.

        Raises:
            Refused: the request is none, is too large, or comes when too many others wait.
            RequestError: a row cannot be read.
        """
        served = self.current()
        return await self._admit(self._answer(served, body, read))

    async def explain(self, body: bytes, read: Reader) -> tuple[str, Explanation]:
        """Return the id of the bundle, and what the columns of a body's rows do to their scores.

        Raises:
            Refused: as `answer`.
            RequestError: a row cannot be read.
        """
        predictor = self.current().predictor

        def explained() -> Explanation:
            return predictor.explain(read(body, predictor, self.limits))

        return predictor.id, await self._admit(self._batcher.call(explained))

    async def _admit(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what is asked for, unless too much is asked for at once, or it takes too long."""
        if self._admitted >= self.limits.queue:
            work.close()
            raise busy(self._admitted)
        self._admitted += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await work
        except TimeoutError:
            self.metrics.late()
            raise Refused(503, f"no scores within {self.limits.timeout:g} seconds; try again later") from None
        finally:
            self._admitted -= 1

    async def _answer(self, served: Served, body: bytes, read: Reader) -> Answer:
        predictor = served.predictor

        def encoded() -> Encoded:
            return predictor.encoder.rows(read(body, predictor, self.limits))

        rows = encoded() if len(body) <= _SMALL else await self._batcher.call(encoded)
        scores = await self._batcher.score(predictor, rows)
        self.metrics.scored(len(scores))
        served.drift.saw(rows, scores)
        return Answer(predictor.id, scores)

    def close(self) -> None:
        """Start no more work."""
        self._batcher.close()


def inside(root: Path, name: Any) -> Path:
    """Return the folder of a bundle by its plain name, below the one folder that bundles are taken from.

    Raises:
        Refused: it is no plain name, or leads elsewhere.
    """
    if not isinstance(name, str) or not name or len(name) > 200 or name in (".", "..") or not name.isprintable():
        raise Refused(422, "expected the name of a bundle's folder")
    if any(mark in name for mark in ("/", "\\", "\0")):
        raise Refused(422, "expected the name of a folder, not a path")
    path = root / name
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), name):
        raise Refused(422, "the name leads elsewhere")
    return path
