"""How many requests one client may send."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from recsys.deploy.server.limits import Refused

_BURST = 10.0
"""Seconds whose requests may come at once."""


class Rate:
    """Refuses clients that ask too often: a bucket for each, filled at the rate and emptied by requests.

    Args:
        rate: requests of one client in a second, on average; 0 refuses nobody.
        clients: that are remembered; the one that has been silent for longest is forgotten first.
        clock: seconds, from anywhere.
    """

    def __init__(self, rate: float, clients: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._full = max(rate * _BURST, 1.0)
        self._clients = clients
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request, or raise `Refused` (429) where the client has asked too often."""
        if not self._rate:
            return
        now = self._clock()
        left, then = self._left.pop(client, (self._full, now))
        left = min(left + (now - then) * self._rate, self._full)
        allowed = left >= 1
        self._left[client] = (left - 1 if allowed else left, now)
        if len(self._left) > self._clients:
            self._left.popitem(last=False)
        if not allowed:
            raise Refused(429, f"more than {self._rate:g} requests a second from this address; try again later")
