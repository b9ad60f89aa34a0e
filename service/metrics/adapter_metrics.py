"""What is known about adapters: how they come to be, where they lie, what was wrong with them."""

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SLOT_STATES = ("total", "resident", "leased")
BREAKER_STATES = ("closed", "open", "half_open")

_STAGE_BUCKETS = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class AdapterMetrics:
    """Generation, caches, residency. The caches and the generator report here as to an observer.

    Args:
        registry: where the metrics are exposed.
        redis_configured: whether there is a Redis to be up or down; without one
            `icm_lora_redis_up` does not exist, as there is nothing to alert on.
    """

    def __init__(self, registry: CollectorRegistry, redis_configured: bool) -> None:
        self._stage_seconds = Histogram(
            "icm_lora_generation_stage_seconds",
            "Time of one stage between a description and its adapter in a slot.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._cache_lookups = Counter(
            "icm_lora_cache_lookups",
            "Adapter cache lookups by tier (process, redis) and result.",
            ["tier", "result"],
            registry=registry,
        )
        self._adapters = Counter(
            "icm_lora_adapters_generated",
            "Adapters provided for a description, by how the cache took part.",
            ["cache"],
            registry=registry,
        )
        self._degraded = Gauge(
            "icm_lora_degraded",
            "1 while a component is lost and the service goes on without it.",
            ["component"],
            registry=registry,
        )
        self._redis_up = None
        if redis_configured:
            self._redis_up = Gauge("icm_lora_redis_up", "1 while Redis answers.", registry=registry)
            self._degraded.labels("redis")
            self._degraded.labels("aliases")
            self._breaker = Gauge(
                "icm_lora_breaker_state",
                "1 for the state that the breaker in front of a component is in.",
                ["component", "state"],
                registry=registry,
            )
            self.on_breaker_state("closed")
        self._redis_values = Counter(
            "icm_lora_redis_values_rejected",
            "Values of Redis that were deleted and not used, by what was wrong with them.",
            ["reason"],
            registry=registry,
        )
        self._invalid_adapters = Counter(
            "icm_lora_adapters_rejected",
            "Adapters that may not serve, by the check that they failed.",
            ["reason"],
            registry=registry,
        )
        self._decisions = Counter(
            "icm_lora_decisions",
            "What was done with descriptions, near to the training tasks or not.",
            ["decision"],
            registry=registry,
        )
        self._generation_rows = Histogram(
            "icm_lora_generation_batch_rows",
            "Adapters generated in one pass of the decoder.",
            buckets=_ROW_BUCKETS,
            registry=registry,
        )
        self._slots = Gauge(
            "icm_lora_slots", "Adapter slots by state.", ["modality", "state"], registry=registry
        )
        self._cached_adapters = Gauge(
            "icm_lora_process_cache_adapters", "Adapters in this process.", registry=registry
        )
        self._cached_bytes = Gauge(
            "icm_lora_process_cache_bytes",
            "Size of the adapters in this process.",
            registry=registry,
        )
        self._pinned_adapters = Gauge(
            "icm_lora_pinned_adapters",
            "Adapters in this process that never leave it for want of room.",
            registry=registry,
        )

    def watch_slots(self, modality: str, count_slots: Callable[[str], int]) -> None:
        """Reads the slots of each state when scraped."""
        for state in SLOT_STATES:
            self._slots.labels(modality, state).set_function(partial(count_slots, state))

    def watch_process_cache(self, count: Callable[[], int], size_bytes: Callable[[], int]) -> None:
        """Reads the adapters in this process, and their size, when scraped."""
        self._cached_adapters.set_function(count)
        self._cached_bytes.set_function(size_bytes)

    def watch_pinned(self, count: Callable[[], int]) -> None:
        """Reads the number of pinned adapters when scraped."""
        self._pinned_adapters.set_function(count)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Records the stages of one generation."""
        for stage, duration in seconds.items():
            self._stage_seconds.labels(stage).observe(duration)

    def count_adapter(self, cache: str) -> None:
        """Counts one adapter provided for a description."""
        self._adapters.labels(cache).inc()

    def on_lookup(self, tier: str, result: str) -> None:
        """Cache observer: one lookup in one tier."""
        self._cache_lookups.labels(tier, result).inc()

    def on_redis_state(self, up: bool) -> None:
        """Cache observer: Redis answered, or did not."""
        assert self._redis_up is not None, "Redis was reported without being configured"
        self._redis_up.set(up)
        self._degraded.labels("redis").set(not up)

    def on_aliases_restored(self, done: bool) -> None:
        """The aliases that Redis holds were read at the start, or could not be."""
        self._degraded.labels("aliases").set(not done)

    def on_breaker_state(self, state: str) -> None:
        """Cache observer: the breaker in front of Redis is `closed`, `open` or `half_open`."""
        assert state in BREAKER_STATES, state
        for each in BREAKER_STATES:
            self._breaker.labels("redis", each).set(each == state)

    def on_redis_value_rejected(self, reason: str) -> None:
        """Cache observer: a value was not what we wrote (`corrupt`, `forged`, ...)."""
        self._redis_values.labels(reason).inc()

    def on_adapter_rejected(self, reason: str) -> None:
        """Counts an adapter that the validity gate kept from serving."""
        self._invalid_adapters.labels(reason).inc()

    def on_generation_batch(self, rows: int) -> None:
        """Records how many adapters were generated together."""
        self._generation_rows.observe(rows)

    def count_decision(self, decision: str) -> None:
        """Counts what was done with one description."""
        self._decisions.labels(decision).inc()
