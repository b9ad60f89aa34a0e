"""The metrics by which inference gateways and autoscalers know an LLM server: vLLM's names.

Names, labels, types and buckets are those of vLLM (`vllm/v1/metrics/loggers.py`), so that the
Gateway API inference extension, KEDA triggers and dashboards made for vLLM work unchanged. They
cover the text bundle only: it is what the OpenAI routes serve.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_ENGINE = "0"
"""vLLM numbers its engine cores; there is one."""

_LABELS = ("model_name", "engine")
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_SHORT_ID_DIGITS = 12

AdapterIds = Callable[[], Iterable[str | None]]
"""Ids of the adapters of some requests, one per request; None for the base."""

AdapterNames = Callable[[], Mapping[str, Sequence[str]]]
"""Names (aliases) by adapter id; an adapter without one may be missing."""


@dataclass(frozen=True)
class LoraRequests:
    """What `vllm:lora_requests_info` says, asked once at each scrape.

    Attributes:
        max_lora: adapters that can answer in one batch.
        running: those of the requests that run.
        waiting: those of the requests that wait.
        names: names of adapters.
    """

    max_lora: int
    running: AdapterIds
    waiting: AdapterIds
    names: AdapterNames


class LoraRequestsCollector(Collector):
    """`vllm:lora_requests_info`: which adapters run and wait, by name, as of now.

    The value is the time, as vLLM's is; gateways take the newest. Adapters without a name show
    the first digits of their id. One series at any time, however many adapters come and go.
    """

    def __init__(self) -> None:
        self.requests: LoraRequests | None = None

    def collect(self) -> Iterator[Metric]:
        """The one series; none until there is something to ask."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        if (requests := self.requests) is not None:
            names = requests.names()
            waiting = _join_names(requests.waiting(), names)
            running = _join_names(requests.running(), names)
            family.add_metric([str(requests.max_lora), waiting, running], time.time())
        yield family


class VllmMetrics:
    """vLLM's metrics of one base model.

    Args:
        registry: where they are exposed.
        model_name: the base model, as `GET /v1/models` lists it.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, _LABELS, registry=registry).labels(model_name, _ENGINE)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, _LABELS, buckets=buckets, registry=registry)
            return family.labels(model_name, _ENGINE)

        self.running = gauge(
            "vllm:num_requests_running", "Number of requests in model execution batches."
        )
        self.waiting = gauge(
            "vllm:num_requests_waiting", "Number of requests waiting to be processed."
        )
        self.cache_usage = gauge(
            "vllm:kv_cache_usage_perc",
            "KV-cache usage, 1 is all: rows that run, of the rows that may run at once.",
        )
        self.first_token_seconds = histogram(
            "vllm:time_to_first_token_seconds",
            "Histogram of time to first token in seconds.",
            _FIRST_TOKEN_BUCKETS,
        )
        self.request_seconds = histogram(
            "vllm:e2e_request_latency_seconds",
            "Histogram of e2e request latency in seconds.",
            _LATENCY_BUCKETS,
        )
        self.tokens = Counter(
            "vllm:generation_tokens",
            "Number of generation tokens processed.",
            _LABELS,
            registry=registry,
        ).labels(model_name, _ENGINE)
        self.lora_requests = LoraRequestsCollector()
        registry.register(self.lora_requests)


def _join_names(adapter_ids: Iterable[str | None], names: Mapping[str, Sequence[str]]) -> str:
    """Comma-separated, each once, in the order of their requests; the base is no adapter."""
    found: dict[str, None] = {}
    for adapter_id in adapter_ids:
        if adapter_id is not None:
            known = names.get(adapter_id) or (adapter_id[:_SHORT_ID_DIGITS],)
            found.update(dict.fromkeys(known))
    return ",".join(found)
