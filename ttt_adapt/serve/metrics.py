"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable

from ttt_adapt.errors import missing

_METHODS = {"GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"}
FRAME_RESULTS = ("adapted", "skipped", "predicted", "refused")
"""What becomes of a frame: adapted to; taken without an update; predicted only, as was asked; refused."""


class Metrics:
    """The counters of one server.

    Raises:
        MissingPackageError: `prometheus_client` is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise missing("prometheus-client", "serve") from error
        self._registry = registry = prometheus.CollectorRegistry()
        self._render = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST
        self._requests = prometheus.Counter(
            "ttt_adapt_requests", "Requests, by their route.", ("method", "route", "status"), registry=registry
        )
        self._frames = prometheus.Counter(
            "ttt_adapt_frames", "Frames that were decoded, by what became of them.", ("stream", "result"),
            registry=registry,
        )  # fmt: skip
        self._seconds = prometheus.Histogram(
            "ttt_adapt_frame_seconds", "Time that the model spends on a frame, without waiting.", registry=registry
        )
        self._waiting = prometheus.Gauge("ttt_adapt_queue", "Calls that wait for the model.", registry=registry)
        self._streams = prometheus.Gauge("ttt_adapt_streams", "Streams that are open.", registry=registry)

    def watch(self, waiting: Callable[[], int], streams: Callable[[], int]) -> None:
        """Say where the length of the queue and the number of streams are read."""
        self._waiting.set_function(waiting)
        self._streams.set_function(streams)

    def request(self, method: str, route: str, status: int) -> None:
        """Count a request that was answered; `route` is "" where nothing fits its path."""
        self._requests.labels(method if method in _METHODS else "other", route or "none", str(status)).inc()

    def begin(self, stream: str) -> None:
        """Count from 0 for a stream that is opened."""
        for result in FRAME_RESULTS:
            self._frames.labels(stream, result)

    def frame(self, stream: str, result: str, seconds: float | None = None) -> None:
        """Count a frame of a stream."""
        self._frames.labels(stream, result).inc()
        if seconds is not None:
            self._seconds.observe(seconds)

    def forget(self, stream: str) -> None:
        """Drop the counters of a stream that is closed: names would grow without a bound."""
        for result in FRAME_RESULTS:
            self._frames.remove(stream, result)

    def text(self) -> bytes:
        """All counters as Prometheus reads them."""
        found: bytes = self._render(self._registry)
        return found
