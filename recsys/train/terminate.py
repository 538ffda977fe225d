"""SIGTERM as a request: finish the step, save, leave; a second one means now."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM ended, 143."""


class Termination:
    """Listens for SIGTERM while a stage trains."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._listens = False

    def listen(self) -> None:
        """Take SIGTERM over; only the main thread of a process can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._listens = True

    def ignore(self) -> None:
        """Give SIGTERM back."""
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
            self._listens = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(TERMINATED)
        self.asked = True
