"""What a server tells its operator. Never its clients.

Which answers are bent is the secret that a watermark lives on: somebody who asks one question and then reads
a counter of bent answers has learned one bit of it. So

- metrics have a port of their own, on the loopback interface unless told otherwise, and the public
  application has no route that leads to them;
- bent answers are counted in steps: the numbers move when another 1000 queries have been answered, all at
  once. That keeps single queries apart for somebody who sees a dashboard and knows a little of the traffic.
  It is no protection against somebody who sees the numbers *and* sends all the queries: he fills a step with
  queries he knows. Keep the port closed.

Latencies and sizes are the client's own knowledge; they are on the same port for convenience only.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

STEP = 1000
"""Queries after which the numbers of bent answers are brought up to date."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets of the latency histogram."""


class Metrics(Protocol):
    """Whoever wants to know. Called from several threads."""

    def answered(self, *, rows: int, seconds: float) -> None:
        """A request of so many inputs was answered after so many seconds."""

    def refused(self, status: int) -> None:
        """A request was refused with this HTTP status."""

    def marked(self, *, rows: int, bent: int) -> None:
        """A pass through the model marked so many rows, of which so many were bent."""


class NoMetrics:
    """Tells nobody."""

    def answered(self, *, rows: int, seconds: float) -> None: ...

    def refused(self, status: int) -> None: ...

    def marked(self, *, rows: int, bent: int) -> None: ...


class InSteps:
    """Counts of marked and bent rows that are handed on only every so many rows.

    Args:
        step: rows, >= 1. Default 1000.
    """

    def __init__(self, step: int = STEP) -> None:
        self._step = step
        self._rows = self._bent = 0
        self._lock = threading.Lock()

    def add(self, rows: int, bent: int) -> tuple[int, int] | None:
        """What has come together since the last step (rows, bent), once it is a step; else None."""
        with self._lock:
            self._rows, self._bent = self._rows + rows, self._bent + bent
            if self._rows < self._step:
                return None
            whole, self._rows, self._bent = (self._rows, self._bent), 0, 0
            return whole


class PrometheusMetrics:
    """Metrics for Prometheus, in a registry of their own.

    Args:
        registry: a `prometheus_client.CollectorRegistry`. Default: a fresh one, `self.registry`.
        step: see `InSteps`.

    Raises:
        ImportError: prometheus-client is not installed; the message says how to get it.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, step: int = STEP) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError:
            raise ImportError('metrics need prometheus-client: pip install "honeytrace[serve]"') from None
        self.registry = CollectorRegistry() if registry is None else registry
        named: dict[str, Any] = {"registry": self.registry}
        self._queries = Counter("honeytrace_queries", "Inputs that were answered.", **named)
        self._seconds = Histogram(
            "honeytrace_request_seconds", "From a request to its answer.", buckets=SECONDS, **named
        )
        self._refused = Counter("honeytrace_refused", "Refused requests.", ["status"], **named)
        steps = f"In steps of {step} queries or more."
        self._marked = Counter("honeytrace_marked", f"Queries the watermark saw. {steps}", **named)
        self._bent = Counter("honeytrace_bent", f"Queries whose answer was bent. {steps}", **named)
        self._steps = InSteps(step)

    def answered(self, *, rows: int, seconds: float) -> None:
        self._queries.inc(rows)
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        self._refused.labels(status=str(status)).inc()

    def marked(self, *, rows: int, bent: int) -> None:
        whole = self._steps.add(rows, bent)
        if whole is not None:
            self._marked.inc(whole[0])
            self._bent.inc(whole[1])

    def listen(self, port: int, host: str = "127.0.0.1") -> Any:
        """Serve the metrics over HTTP at a port of their own, from a thread of its own.

        Args:
            port: 0 takes a free one.
            host: the interface; 127.0.0.1 (default) is reached from this machine only.

        Returns:
            (server, thread) of prometheus-client; `server.shutdown()` ends it, `server.server_port` is the
            port.

        Raises:
            OSError: the port is taken.
        """
        from prometheus_client import start_http_server

        return start_http_server(port, addr=host, registry=self.registry)
