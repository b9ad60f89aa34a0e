"""Metrics: a registry of their own, bounded labels, OpenMetrics on request."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.inference.scheduler import SchedulerObserver
from service.metrics import ServiceMetrics
from service.metrics.vllm_metrics import LoraRequests

VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:generation_tokens_total",
}
VLLM_LABELS = (("engine", "0"), ("model_name", "base"))
ACCEPTED = (
    "",
    "text/plain",
    "text/plain;version=1.0.0",
    "application/openmetrics-text; version=1.0.0",
    # Prometheus 3, and the last Prometheus 2
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75",
)


def read_samples(metrics: ServiceMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.render("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_two_services_do_not_share_a_registry() -> None:
    first, second = ServiceMetrics(False), ServiceMetrics(False)
    first.observe_batches("text").on_finish(0.1, 3)
    assert read_samples(first)["icm_lora_generated_tokens_total", ()] == 3
    assert read_samples(second)["icm_lora_generated_tokens_total", ()] == 0


def test_unknown_methods_share_one_label() -> None:
    metrics = ServiceMetrics(False)
    for method in ("BREW", "WHEN"):
        metrics.observe_request("/infer", method, 405, 0.1)
    labels = (("method", "other"), ("route", "/infer"), ("status", "405"))
    assert read_samples(metrics)["icm_lora_http_requests_total", labels] == 2


def test_redis_gauges_exist_only_with_redis_and_follow_it() -> None:
    assert ("icm_lora_redis_up", ()) not in read_samples(ServiceMetrics(False))
    metrics = ServiceMetrics(True)
    degraded = ("icm_lora_degraded", (("component", "redis"),))
    metrics.on_redis_state(False)
    samples = read_samples(metrics)
    assert (samples["icm_lora_redis_up", ()], samples[degraded]) == (0, 1)
    metrics.on_redis_state(True)
    samples = read_samples(metrics)
    assert (samples["icm_lora_redis_up", ()], samples[degraded]) == (1, 0)


def test_slots_are_counted_when_scraped() -> None:
    metrics = ServiceMetrics(False)
    counts = {"total": 4, "resident": 1, "leased": 0}
    metrics.watch_slots("text", counts.__getitem__)
    counts["resident"] = 2
    resident = (("modality", "text"), ("state", "resident"))
    assert read_samples(metrics)["icm_lora_slots", resident] == 2


def test_modalities_are_counted_apart() -> None:
    metrics = ServiceMetrics(False)
    metrics.observe_batches("text").on_queue(3, 0)
    metrics.observe_batches("detection").on_queue(1, 0)
    samples = read_samples(metrics)
    depths = [
        samples["icm_lora_queue_depth", (("modality", name),)] for name in ("text", "detection")
    ]
    assert depths == [3, 1]


def test_every_promised_metric_is_exposed() -> None:
    metrics = ServiceMetrics(True)
    metrics.set_build("text", version="1", bundle="b", bundle_version="2")
    metrics.watch_slots("text", lambda state: 0)
    metrics.observe_request("/infer", "POST", 200, 0.1)
    metrics.observe_stages({"encode": 0.01, "decode": 0.02})
    metrics.count_adapter("miss")
    metrics.on_lookup("process", "miss")
    metrics.observe_batches("text").on_queue(0, 0)
    metrics.observe_batches("text").on_step(2, 1)
    metrics.count_boxes(3)
    metrics.on_image_rejection("broken")
    metrics.on_rejection("queue_full")
    metrics.on_redis_value_rejected("corrupt")
    metrics.on_adapter_rejected("spectral_norm")
    metrics.on_generation_batch(4)
    metrics.count_decision("nearest")
    metrics.watch_process_cache(lambda: 2, lambda: 128)
    metrics.watch_pinned(lambda: 1)
    metrics.watch_phase(("ready",), lambda: "ready")
    observer = metrics.observe_batches("text", model_name="base", max_rows=4)
    observer.on_step(2, 2)
    observer.on_first_token(0.1)
    observer.on_finish(0.5, 7)
    observer.on_running(1)
    observer.on_disconnect()
    names = {name for name, _ in read_samples(metrics)}
    assert names >= {
        "icm_lora_http_requests_total",
        "icm_lora_http_request_seconds_bucket",
        "icm_lora_generation_stage_seconds_bucket",
        "icm_lora_cache_lookups_total",
        "icm_lora_redis_up",
        "icm_lora_degraded",
        "icm_lora_slots",
        "icm_lora_queue_depth",
        "icm_lora_batch_rows_bucket",
        "icm_lora_batch_adapters_bucket",
        "icm_lora_generated_tokens_total",
        "icm_lora_adapters_generated_total",
        "icm_lora_rejections_total",
        "icm_lora_detected_boxes_total",
        "icm_lora_image_rejections_total",
        "icm_lora_build_info",
        "icm_lora_breaker_state",
        "icm_lora_redis_values_rejected_total",
        "icm_lora_adapters_rejected_total",
        "icm_lora_decisions_total",
        "icm_lora_generation_batch_rows_bucket",
        "icm_lora_process_cache_adapters",
        "icm_lora_process_cache_bytes",
        "icm_lora_pinned_adapters",
        "icm_lora_phase",
        "icm_lora_queue_work",
        "icm_lora_running_rows",
        "icm_lora_time_to_first_token_seconds_bucket",
        "icm_lora_disconnects_total",
        *VLLM_NAMES,
    }


def test_openmetrics_is_served_where_asked_for() -> None:
    body, content_type = ServiceMetrics(False).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize("accept", ACCEPTED)
def test_names_of_gateways_keep_their_colon(accept: str) -> None:
    metrics = ServiceMetrics(False)
    metrics.observe_batches("text", model_name="base").on_queue(3, 0)
    line = 'vllm:num_requests_waiting{engine="0",model_name="base"} 3.0'
    assert line in metrics.render(accept)[0].decode().splitlines()


def test_gateways_see_the_text_schedulers_load() -> None:
    metrics = ServiceMetrics(False)
    observer = metrics.observe_batches("text", model_name="base", max_rows=4)
    metrics.observe_batches("detection").on_running(3)
    observer.on_running(1)
    observer.on_queue(5, 320)
    observer.on_first_token(0.02)
    observer.on_finish(0.4, 7)
    samples = read_samples(metrics)
    expected = {
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 5,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_sum": 0.4,
        "vllm:generation_tokens_total": 7,
    }
    assert {name: samples[name, VLLM_LABELS] for name in expected} == expected
    assert samples["icm_lora_queue_work", (("modality", "text"),)] == 320
    assert samples["icm_lora_generated_tokens_total", ()] == 7


def test_lora_requests_are_one_series_of_names() -> None:
    metrics = ServiceMetrics(False)
    observer = metrics.observe_batches("text", model_name="base")
    running: list[str | None] = ["a" * 64, None, "a" * 64, "b" * 64]
    aliases = {"b" * 64: ["cook", "chef"]}
    observer.watch_adapters(LoraRequests(8, lambda: running, lambda: ["c" * 64], lambda: aliases))
    before = time.time()
    for count in (4, 0):
        del running[count:]
        found = {
            labels: value
            for (name, labels), value in read_samples(metrics).items()
            if name == "vllm:lora_requests_info"
        }
        expected = (
            ("max_lora", "8"),
            ("running_lora_adapters", f"{'a' * 12},cook,chef" if count else ""),
            ("waiting_lora_adapters", "c" * 12),
        )
        assert list(found) == [expected]
        assert before <= found[expected] <= time.time()


def test_no_histogram_has_an_adapter_for_a_label() -> None:
    metrics = ServiceMetrics(True)
    metrics.observe_batches("text", model_name="base")
    for family in metrics.registry.collect():
        if family.type == "histogram":
            for sample in family.samples:
                assert not any("adapter" in label for label in sample.labels), family.name


def test_one_state_of_breaker_and_life_is_set() -> None:
    metrics = ServiceMetrics(True)
    phase = ["loading"]
    metrics.watch_phase(("loading", "ready"), lambda: phase[0])
    metrics.on_breaker_state("open")
    phase[0] = "ready"
    samples = read_samples(metrics)
    set_now = {
        dict(labels).popitem()[1]
        for (name, labels), value in samples.items()
        if name in ("icm_lora_phase", "icm_lora_breaker_state") and value
    }
    assert set_now == {"ready", "open"}


def test_batch_metrics_are_a_schedulers_observer() -> None:
    assert isinstance(ServiceMetrics(False).observe_batches("text"), SchedulerObserver)
