"""Metrics: a registry of their own, bounded labels, OpenMetrics on request."""

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import ServiceMetrics


def read_samples(metrics: ServiceMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.render("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_two_services_do_not_share_a_registry() -> None:
    first, second = ServiceMetrics(False), ServiceMetrics(False)
    first.observe_batches("text").on_tokens(3)
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
    metrics.observe_batches("text").on_queue(3)
    metrics.observe_batches("detection").on_queue(1)
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
    metrics.observe_batches("text").on_queue(0)
    metrics.observe_batches("text").on_batch(2, 1)
    metrics.count_boxes(3)
    metrics.on_image_rejection("broken")
    metrics.on_rejection("queue_full")
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
    }


def test_openmetrics_is_served_where_asked_for() -> None:
    body, content_type = ServiceMetrics(False).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
