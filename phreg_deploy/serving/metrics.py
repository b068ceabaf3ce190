"""What ``/metrics`` reports to Prometheus."""

from __future__ import annotations

from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Images over which the live artifact rate is averaged.
WINDOW = 100
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RATES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Parts of a request that are measured.
STAGES = ("read", "decode", "queue", "run", "encode", "total")


class Metrics:
    """Counters, gauges and histograms of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("phreg_requests_total", "Answers, by route and status.", ("route", "status"), **own)
        self.seconds = Histogram(
            "phreg_latency_seconds",
            "Seconds of an answered request, by stage; run is that of its whole batch.",
            ("model", "stage"),
            buckets=SECONDS,
            **own,
        )
        self.batches = Histogram("phreg_batch_images", "Images in a run.", ("model",), buckets=BATCHES, **own)
        self.failures = Counter("phreg_failed_runs_total", "Runs in which the backend failed.", ("model",), **own)
        self.rate = Gauge(
            "phreg_artifact_rate", f"Mean share of artifact tokens in the last {WINDOW} images.", ("model",), **own
        )
        self.rates = Histogram(
            "phreg_artifact_share", "Share of artifact tokens in an image.", ("model",), buckets=RATES, **own
        )
        self.waiting = Gauge("phreg_waiting_images", "Images that wait for a run.", ("model",), **own)
        self.active = Gauge("phreg_active_requests", "Requests that were accepted and not answered yet.", **own)
        self.ready = Gauge("phreg_ready", "1 while requests are accepted.", **own)
        self.model = Gauge("phreg_model_info", "Always 1.", ("model", "backend", "precision", "weights"), **own)
        self._recent: dict[str, deque[float]] = {}

    def ran(self, model: str, size: int, seconds: float | None) -> None:
        """Count a run; ``seconds`` is None for one that failed."""
        if seconds is None:
            self.failures.labels(model).inc()
        else:
            self.batches.labels(model).observe(size)

    def served(self, model: str, rate: float, seconds: dict[str, float]) -> None:
        """Count an image that was answered: its artifact rate (0-1), and seconds by stage."""
        recent = self._recent.setdefault(model, deque(maxlen=WINDOW))
        recent.append(rate)
        self.rate.labels(model).set(sum(recent) / len(recent))
        self.rates.labels(model).observe(rate)
        for stage, value in seconds.items():
            self.seconds.labels(model, stage).observe(value)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
