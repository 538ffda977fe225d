"""Train the recipes of a table in processes of their own; what is finished is not repeated, what stopped goes on."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recsys.bench.apart import Trainers
from recsys.bench.table import Bench, Entry
from recsys.errors import RunError

_TAIL = 8


@contextlib.contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that its jobs save and end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Job:
    """One recipe with one seed, and the folder of its run."""

    entry: Entry
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return (self.folder / "metrics.json").is_file()

    def result(self) -> dict[str, Any]:
        """Return what the run measured."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found


def jobs(bench: Bench, out: Path) -> list[Job]:
    """Return the jobs of a table: first every recipe with the first seed, then with the second, and so on."""
    return [Job(entry, seed, out / entry.name / f"seed-{seed}") for seed in bench.seeds for entry in bench.entries]


class Workers:
    """Runs jobs, several at a time, each in a process that ends with this one.

    Args:
        arguments: options of `recsys train` for every job, such as `--data-root`.
        at_once: number of processes.
        threads: CPU threads of each process.
    """

    def __init__(self, arguments: Sequence[str], at_once: int, threads: int) -> None:
        self._arguments = tuple(arguments)
        self._at_once = at_once
        self._trainers = Trainers(threads)
        self._running: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(self, todo: Sequence[Job], tell: Callable[[Job, RunError | None], None]) -> list[RunError]:
        """Run all jobs; a failed one does not stop the others.

        Args:
            todo: the jobs.
            tell: called, in this thread, with every job that ended, and why it failed, if it did.

        Returns:
            The failures.
        """
        failures = []
        with _sigterm_ends(), ThreadPoolExecutor(self._at_once) as pool:
            waiting: Mapping[Future[None], Job] = {pool.submit(self._train, job): job for job in todo}
            left = set(waiting)
            try:
                while left:
                    ended, left = wait(left, return_when=FIRST_COMPLETED)
                    for future in ended:
                        error = future.exception()
                        if error is not None and not isinstance(error, RunError):
                            raise error
                        if error is not None:
                            failures.append(error)
                        tell(waiting[future], error)
            except BaseException:
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return failures

    def _train(self, job: Job) -> None:
        if self._stopping.is_set() or job.done:
            return
        arguments = list(self._arguments)
        if (job.folder / "run.json").is_file():
            arguments += ["--resume", str(job.folder)]
        else:
            arguments += [str(job.entry.path), *job.entry.overrides, f"train.seed={job.seed}", "--out", str(job.folder)]
        log = job.folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._stopping.is_set():
                return
            process = self._trainers.start(arguments, log)
            self._running.add(process)
        try:
            code = self._trainers.end(process)
        finally:
            self._running.discard(process)
        if code and not self._stopping.is_set():
            last = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_TAIL:]
            text = "\n  ".join(last)
            raise RunError(f"{job.entry.name}, seed {job.seed}: exit status {code}; the end of {log}:\n  {text}")

    def _stop(self) -> None:
        """Let the running jobs finish their step and save."""
        with self._lock:
            self._stopping.set()
            for process in self._running:
                process.terminate()
