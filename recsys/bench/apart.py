"""`recsys train` in processes of their own, forked from one that has imported what they need.

Importing torch and Lightning takes several times as long as training a small model.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ("lightning.pytorch",)
"""Without Polars, and thus without our modules that import it: it starts threads, which a fork would lose."""


class Trainers:
    """Starts processes that train, and waits for them; of any thread.

    Args:
        threads: CPU threads of each.
    """

    def __init__(self, threads: int) -> None:
        self._threads = str(threads)
        if sys.platform == "win32":
            self._context = multiprocessing.get_context("spawn")
        else:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(list(PRELOADED))
        # Starting looks at all processes: two threads that read how one has ended would each get a part of it.
        self._lock = threading.Lock()

    def start(self, arguments: Sequence[str], log: Path) -> BaseProcess:
        """Start `recsys train` with these arguments, in this folder and environment; what it prints goes to `log`."""
        limits = {"OMP_NUM_THREADS": self._threads, "POLARS_MAX_THREADS": self._threads}
        with self._lock, _environment(limits):
            what = (tuple(arguments), str(log.absolute()), os.getcwd(), dict(os.environ))
            process = self._context.Process(target=_train, args=what)
            process.start()
        return process

    def end(self, process: BaseProcess) -> int:
        """Wait for its end; returns its exit status, −n if signal n ended it."""
        wait([process.sentinel])
        with self._lock:
            process.join()
        assert process.exitcode is not None
        return process.exitcode


@contextlib.contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    """Change the environment of processes that start here; what they fork from reads it when it imports."""
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _train(arguments: tuple[str, ...], log: str, folder: str, environment: Mapping[str, str]) -> None:
    """Be `recsys train`."""
    os.setsid()  # a group of its own: Ctrl-C reaches the parent alone, which then lets the others save and end
    with open(os.devnull) as nothing, open(log, "a", encoding="utf-8") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["recsys", "train", *arguments]
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    runpy.run_module("recsys.cli", run_name="__main__")
