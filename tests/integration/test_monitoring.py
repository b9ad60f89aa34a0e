"""A real Prometheus scrapes the real service: what rules and dashboard ask for is there."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_bundle import TinyBundle
from tests.integration.test_deployment import (
    DEPLOY,
    RULES,
    find_program,
    list_used_names,
)

INCIDENTS = {
    "icm_lora_redis_values_rejected_total",
    "icm_lora_adapters_rejected_total",
    "icm_lora_decisions_total",
    "icm_lora_image_rejections_total",
}
"""Counters with a label that have no series before there was one: their family must exist."""


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[httpx2.Client]:
    """Prometheus with our configuration and rules, its target and intervals changed."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (job,) = [each for each in config["scrape_configs"] if each["job_name"] == "icm-lora"]
    job["static_configs"] = [{"targets": [target]}]
    config["scrape_configs"] = [job]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = find_free_port()
    command = [
        find_program("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def ask(prometheus: httpx2.Client, path: str, **parameters: str) -> Any:
    """Data of an answer; None while Prometheus starts."""
    try:
        response = prometheus.get(path, params=parameters)
    except httpx2.ConnectError:
        return None
    return response.json()["data"] if response.status_code == 200 else None


def make_traffic(client: httpx2.Client) -> None:
    """One of everything that an ordinary day has, refusals and lost clients too."""
    for task in ("Write a cooking recipe.", "Write a cooking recipe.", "Write Python source code."):
        assert client.post("/generate-lora", json={"task": task}).status_code == 200
    body = {"adapter_id": "base", "prompt": "x", "max_tokens": 100}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/infer", json=body), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert client.post("/infer", json={**body, "adapter_id": "0" * 64}).status_code == 404


@pytest.mark.redis
def test_prometheus_finds_what_rules_and_dashboard_ask_for(
    tiny_bundle: TinyBundle, redis_server: RedisServer, tmp_path: Path
) -> None:
    find_program("prometheus")
    settings = make_settings(tiny_bundle, redis_url=redis_server.url, max_queue=1, max_batch_rows=1)
    with serve_in_thread(settings) as client:
        make_traffic(client)
        with running_prometheus(tmp_path, client.base_url.netloc.decode()) as prometheus:
            deadline = time.monotonic() + 30
            while not (targets := ask(prometheus, "/targets")) or {
                target["health"] for target in targets["activeTargets"]
            } != {"up"}:
                assert time.monotonic() < deadline, f"not scraped: {targets}"
                time.sleep(0.2)
            known = set(ask(prometheus, "/label/__name__/values"))
            families = {item["metric"] for item in ask(prometheus, "/targets/metadata")}
            while (data := ask(prometheus, "/rules")) is None or any(
                rule["health"] != "ok" for group in data["groups"] for rule in group["rules"]
            ):
                assert time.monotonic() < deadline, f"rules fail: {json.dumps(data)[:2000]}"
                time.sleep(0.2)
            assert all(
                alert["labels"]["alertname"] != "IcmLoraDown"
                for alert in ask(prometheus, "/alerts")["alerts"]
            )
    missing = list_used_names() - known
    assert missing <= INCIDENTS, f"no series of {sorted(missing - INCIDENTS)}"
    assert missing <= {name.removesuffix("_total") + "_total" for name in families}
    assert {"vllm:num_requests_waiting", "vllm:e2e_request_latency_seconds_bucket"} <= known
