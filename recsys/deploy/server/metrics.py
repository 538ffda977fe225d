"""What Prometheus reads of a server."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from recsys.deploy.server.drift import Drift

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics(Collector):
    """Counts requests, rows and runs, and gives what the current model has seen."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._requests = Counter("recsys_requests", "Requests that were answered", ["endpoint", "status"], registry=own)
        self._seconds = Histogram(
            "recsys_request_seconds", "From head to answer", ["endpoint"], buckets=_SECONDS, registry=own
        )
        self._rows = Counter("recsys_rows", "Rows that were scored", registry=own)
        self._runs = Histogram("recsys_run_rows", "Rows of one run of the graph", buckets=_ROWS, registry=own)
        self._late = Counter("recsys_late_requests", "Requests that had no scores in time", registry=own)
        self._dropped = Counter("recsys_dropped_connections", "Connections that were ended", ["why"], registry=own)
        self._swaps = Counter("recsys_swaps", "Bundles that took over, or did not", ["outcome"], registry=own)
        self._bundle = Gauge("recsys_bundle", "1 for the bundle that answers", ["bundle"], registry=own)
        self._drift: Drift | None = None
        own.register(self)
        ProcessCollector(registry=own)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def scored(self, rows: int) -> None:
        """Count rows that got scores."""
        self._rows.inc(rows)

    def ran(self, rows: int) -> None:
        """Count a run of the graph."""
        self._runs.observe(rows)

    def late(self) -> None:
        """Count a request that took too long."""
        self._late.inc()

    def dropped(self, why: str) -> None:
        """Count a connection that was ended."""
        self._dropped.labels(why).inc()

    def swapped(self, outcome: str) -> None:
        """Count an attempt to exchange the model."""
        self._swaps.labels(outcome).inc()

    def serves(self, drift: Drift, bundle: str) -> None:
        """Tell of another model from now on."""
        self._bundle.clear()
        self._bundle.labels(bundle).set(1)
        self._drift = drift

    def collect(self) -> Iterable[Metric]:
        """Yield what the current model has seen."""
        drift = self._drift
        return () if drift is None else drift.collect()

    def text(self) -> bytes:
        """Return all of it in Prometheus' format."""
        return generate_latest(self.registry)
