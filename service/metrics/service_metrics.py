"""Prometheus metrics of one service, on a registry of its own.

Every label has a bounded set of values: route templates instead of paths, known methods,
stages, cache tiers, modalities. The cache and the schedulers report here as to observers.
"""

from collections.abc import Callable, Collection
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from service.metrics.adapter_metrics import AdapterMetrics
from service.metrics.batch_metrics import BatchFamilies, BatchMetrics
from service.metrics.vllm_metrics import VllmMetrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "other"

_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServiceMetrics(AdapterMetrics):
    """All metrics of the service, named `icm_lora_*`; times in seconds.

    Args:
        redis_configured: whether there is a Redis to be up or down; without one
            `icm_lora_redis_up` does not exist, as there is nothing to alert on.
    """

    def __init__(self, redis_configured: bool) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        super().__init__(registry, redis_configured)
        self._requests = Counter(
            "icm_lora_http_requests",
            "HTTP requests answered.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "icm_lora_http_request_seconds",
            "Time from the request's head to the end of its answer.",
            ["route"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._phase = Gauge(
            "icm_lora_phase",
            "1 for the phase of its life that the service is in.",
            ["phase"],
            registry=registry,
        )
        self._batches = BatchFamilies(registry)
        self._boxes = Counter(
            "icm_lora_detected_boxes", "Boxes in the answers about images.", registry=registry
        )
        self._image_rejections = Counter(
            "icm_lora_image_rejections",
            "Images refused, by what was wrong with them.",
            ["reason"],
            registry=registry,
        )
        self._rejections = Counter(
            "icm_lora_rejections",
            "Requests refused before an answer was computed.",
            ["reason"],
            registry=registry,
        )
        self._build = Info(
            "icm_lora_build", "Version and bundles in service.", ["modality"], registry=registry
        )

    def set_build(self, modality: str, *, version: str, bundle: str, bundle_version: str) -> None:
        """Fills `icm_lora_build_info` for the bundle of a modality."""
        self._build.labels(modality).info(
            {"version": version, "bundle": bundle, "bundle_version": bundle_version}
        )

    def watch_phase(self, phases: Collection[str], current: Callable[[], str]) -> None:
        """Reads the phase of the service when scraped; `phases` are all that there are."""
        for phase in phases:
            self._phase.labels(phase).set_function(partial(_is_equal, phase, current))

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one answered request; `route` is a template, never a raw path."""
        method = method if method in METHODS else OTHER_METHOD
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def count_boxes(self, count: int) -> None:
        """Counts the boxes of one answer."""
        self._boxes.inc(count)

    def on_image_rejection(self, reason: str) -> None:
        """Counts an image that was refused."""
        self._image_rejections.labels(reason).inc()

    def on_rejection(self, reason: str) -> None:
        """Counts a request that was refused."""
        self._rejections.labels(reason).inc()

    def observe_batches(
        self, modality: str, *, model_name: str | None = None, max_rows: int = 1
    ) -> BatchMetrics:
        """The observer for the scheduler of a modality.

        Args:
            modality: label of its metrics.
            model_name: counts under vLLM's names as well, as this model; for one modality only.
            max_rows: rows that may run at once.
        """
        vllm = None if model_name is None else VllmMetrics(self.registry, model_name)
        return BatchMetrics(self._batches, modality, self.on_rejection, vllm, max_rows)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Exposition and its content type, OpenMetrics where `accept` asks for it.

        Every name here is a legacy name, which no escaping scheme changes (OpenMetrics 1.0 and
        Prometheus allow the colon). prometheus_client's underscore scheme replaces the colon in
        samples all the same, so the scheme that keeps names is used whichever was agreed on.
        """
        _, content_type = choose_encoder(accept)
        body: bytes
        if content_type.startswith("application/openmetrics-text"):
            body = openmetrics.generate_latest(self.registry, openmetrics.ALLOWUTF8)
        else:
            body = generate_latest(self.registry, openmetrics.ALLOWUTF8)
        return body, content_type


def _is_equal(phase: str, current: Callable[[], str]) -> float:
    return float(phase == current())
