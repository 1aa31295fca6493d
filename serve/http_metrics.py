"""What ``/metrics`` says, for Prometheus, from a registry of each application's own.

Counters of the engine are read when they are asked for. Labels hold routes as they are declared, statuses, and names
of edits, so that no client can make new series.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from excise.serve.engine import Engine

#: The route of a request that no route takes.
UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_STEPS = (1, 5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150)


class Metrics:
    """The metrics of one application."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "excise_http_requests", "Answered requests", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "excise_http_request_seconds",
            "From a request's headers to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._images = Counter(
            "excise_images",
            "Images asked for, by what became of them: done, blurred, refused, or why there is none",
            ["edit", "outcome"],
            registry=self.registry,
        )
        self._steps = Histogram(
            "excise_image_steps", "Denoising steps of finished images", buckets=_STEPS, registry=self.registry
        )
        self._verdicts = Counter(
            "excise_filter_verdicts", "Images that the output filter looked at", ["verdict"], registry=self.registry
        )
        self._ready = Gauge("excise_ready", "1 while the server takes requests", registry=self.registry)
        served = engine.served
        info = Gauge(
            "excise_edit_info",
            "1 for each edit served",
            ["model", "edit", "edit_id", "manifest"],
            registry=self.registry,
        )
        for edit in served.edits:
            info.labels(served.model, edit.name, edit.id or "", served.manifest or "").set(1)
        self.registry.register(_EngineLoad(engine))
        ProcessCollector(registry=self.registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def image(self, edit: str, outcome: str, steps: int) -> None:
        """An image is done, or won't be."""
        self._images.labels(edit, outcome).inc()
        if outcome in ("done", "blurred"):
            self._steps.observe(steps)

    def judged(self, flagged: bool) -> None:
        """The output filter has looked at an image."""
        self._verdicts.labels("flagged" if flagged else "passed").inc()

    def ready(self, ready: bool) -> None:
        """Whether the server takes requests."""
        self._ready.set(ready)


class _EngineLoad(Collector):
    """``engine.load`` as metrics."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        load = self._engine.load
        yield GaugeMetricFamily("excise_queue_waiting", "Images that wait for the model", load.waiting)
        yield GaugeMetricFamily("excise_images_running", "Images that are being denoised", load.running)
        yield CounterMetricFamily("excise_unet_calls", "Calls of the UNet", load.steps)
        yield CounterMetricFamily(
            "excise_unet_images", "Images in those calls: divided by the calls, the mean batch size", load.batched
        )
        yield CounterMetricFamily("excise_unet_seconds", "Seconds spent in those calls", load.seconds)
        # Every reason is there from the start: a rate over a counter that appears with its first failure misses it.
        failed = CounterMetricFamily(
            "excise_images_failed", "Images that the engine took and didn't make", labels=["reason"]
        )
        for reason, count in asdict(load.failed).items():
            failed.add_metric([reason], count)
        yield failed


def metrics_router(metrics: Metrics) -> APIRouter:
    """``/metrics``."""
    router = APIRouter(tags=["health"])

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    def show() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
