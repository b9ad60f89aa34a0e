"""The service as a process: loading, losing Redis, draining, and what it writes to its log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_bundle import TinyBundle

ROOT = Path(__file__).parents[2]
PROMPT = "a prompt that no log may hold"
TASK = "a description that no log may hold"
START_SECONDS = 90.0


@dataclass
class ServiceProcess:
    """`python -m service` and a client for it."""

    process: subprocess.Popen[bytes]
    client: httpx2.Client
    log: Path

    def wait_until(self, what: str, check: Callable[[], bool], seconds: float = 30.0) -> None:
        """Polls, and fails with the log where it takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not check():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"not {what}:\n{self.log.read_text()}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether the port is open."""
        try:
            return self.client.get("/health/live").status_code == 200
        except httpx2.ConnectError:
            return False

    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.client.get("/health/ready").status_code == 200

    def read_metric(self, name: str) -> float:
        """One metric's value."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.M)
        assert found is not None, name
        return float(found[1])


def start_process(folder: Path, **settings: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts the service; its log goes to a file."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ICM_")}
    environment |= {f"ICM_LORA_{name.upper()}": value for name, value in settings.items()}
    log = folder / "service.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stderr=file
        )
    return process, log


@pytest.fixture
def service(
    tiny_bundle: TinyBundle, redis_server: RedisServer, tmp_path: Path
) -> Iterator[ServiceProcess]:
    """A service with Redis; only its port is sure to be open."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process, log = start_process(
        tmp_path,
        port=str(port),
        bundle=str(tiny_bundle.folder),
        detection_bundle="none",
        cache_dir=str(tiny_bundle.cache_dir),
        device="cpu",
        dtype="float32",
        torch_threads="1",
        redis_url=redis_server.url,
        redis_timeout_seconds="5",  # a slow test machine is no lost Redis
        redis_retry_seconds="0.3",
        shutdown_delay_seconds="2",
        out_of_distribution="generate",  # the tasks here are like none that was trained
    )
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        running = ServiceProcess(process, client, log)
        try:
            running.wait_until("listening", running.answers, START_SECONDS)
            yield running
        finally:
            process.kill()
            process.wait()


@pytest.mark.redis
def test_life_of_a_process(service: ServiceProcess) -> None:
    client = service.client
    loading = client.get("/health/ready")
    assert (loading.status_code, loading.json()["code"]) == (503, "not_ready")
    early = client.post("/infer", json={"adapter_id": "base", "prompt": PROMPT})
    assert (early.status_code, early.json()["code"]) == (503, "not_ready")
    assert int(early.headers["retry-after"]) >= 1
    service.wait_until("ready", service.is_ready, START_SECONDS)

    def infer(max_tokens: int) -> httpx2.Response:
        body = {"task": TASK, "prompt": PROMPT, "max_tokens": max_tokens}
        return client.post("/infer", json=body, headers={"x-request-id": "traced"})

    assert infer(4).json()["degraded"] == []
    steps = 'icm_lora_batch_rows_count{modality="text"}'
    before = service.read_metric(steps)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(infer, 400)
        service.wait_until("decoding", lambda: service.read_metric(steps) > before)
        service.process.send_signal(signal.SIGTERM)
        service.wait_until("draining", lambda: not service.is_ready())
        draining = client.get("/health/ready")
        assert (draining.status_code, draining.json()["code"]) == (503, "not_ready")
        assert "draining" in draining.json()["detail"]
        assert infer(1).status_code == 200  # until the port closes, requests are answered
        assert running.result().status_code == 200
    assert service.process.wait(30) == 0
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    messages = [line["message"] for line in lines]
    assert "ready" in messages
    traced = [line for line in lines if line.get("request_id") == "traced"]
    assert {"route": "/infer", "status": 200}.items() <= traced[-1].items()
    assert PROMPT not in service.log.read_text()
    assert TASK not in service.log.read_text()


@pytest.mark.redis
def test_no_request_fails_when_redis_dies_and_it_recovers(
    service: ServiceProcess, redis_server: RedisServer
) -> None:
    client = service.client
    service.wait_until("ready", service.is_ready, START_SECONDS)
    redis_server.stop()  # nobody asks for anything, and yet it is noticed
    service.wait_until("down", lambda: service.read_metric("icm_lora_redis_up") == 0)
    redis_server.start()
    service.wait_until("up", lambda: service.read_metric("icm_lora_redis_up") == 1)
    answers: list[httpx2.Response] = []
    stopped = threading.Event()

    def ask(worker: int) -> None:
        turn = 0
        while not stopped.is_set():
            turn += 1
            fields: dict[str, Any] = {"mode": "sample", "seed": 1000 * worker + turn}
            answers.append(client.post("/generate-lora", json={"task": TASK, **fields}))
            body = {"task": f"{TASK} {worker} {turn}", "prompt": PROMPT, "max_tokens": 2}
            answers.append(client.post("/infer", json=body))

    def last_answer_is(degraded: list[str]) -> Callable[[], bool]:
        return lambda: bool(answers) and answers[-1].json().get("degraded") == degraded

    def is_degraded() -> bool:
        return service.read_metric('icm_lora_degraded{component="redis"}') == 1

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask, worker) for worker in range(4)]
        try:
            service.wait_until("answering", lambda: len(answers) > 20)
            assert last_answer_is([])()
            redis_server.stop()
            service.wait_until("degraded", last_answer_is(["redis"]))
            assert is_degraded()
            assert service.read_metric("icm_lora_redis_up") == 0
            assert client.get("/health/ready").json() == {"status": "ready", "degraded": ["redis"]}
            killed_at = len(answers)
            service.wait_until("answering", lambda: len(answers) > killed_at + 20)
            redis_server.start()
            service.wait_until("recovered", last_answer_is([]))
            assert not is_degraded()
        finally:
            stopped.set()
        for worker in workers:
            worker.result()
    assert {answer.status_code for answer in answers} == {200}
    outcomes = {answer.json()["cache"] for answer in answers}
    assert outcomes == {"miss", "degraded"}


def test_bundle_that_cannot_be_read_ends_the_process(tmp_path: Path) -> None:
    process, log = start_process(tmp_path, port="0", bundle=str(tmp_path / "nothing"))
    try:
        assert process.wait(START_SECONDS) == 1
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    [failure] = [line for line in lines if line["level"] == "critical"]
    assert "bundle.json is missing" in failure["detail"]
