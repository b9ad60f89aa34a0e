"""SIGTERM to a real process: nothing that was accepted is lost, nothing new gets in."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.fixtures.tiny_bundle import TinyBundle
from tests.integration.test_http_lifecycle import START_SECONDS, ServiceProcess, start_process

LONG = {"adapter_id": "base", "prompt": "x", "max_tokens": 240}
RUNNING = 'icm_lora_queue_depth{modality="text"}'


@contextmanager
def run_service(tiny_bundle: TinyBundle, folder: Path, **settings: str) -> Iterator[ServiceProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {
        "port": str(port),
        "bundle": str(tiny_bundle.folder),
        "detection_bundle": "none",
        "cache_dir": str(tiny_bundle.cache_dir),
        "device": "cpu",
        "dtype": "float32",
        "torch_threads": "1",
        "max_batch_rows": "2",
    }
    process, log = start_process(folder, **(defaults | settings))
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        running = ServiceProcess(process, client, log)
        try:
            running.wait_until("listening", running.answers, START_SECONDS)
            running.wait_until("ready", running.is_ready, START_SECONDS)
            yield running
        finally:
            process.kill()
            process.wait()


def test_everything_accepted_is_answered_and_everything_new_refused(
    tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    with run_service(tiny_bundle, tmp_path, drain_grace_seconds="50") as service:
        url = str(service.client.base_url)
        stopped = threading.Event()
        answers: list[tuple[float, float, httpx2.Response | None]] = []

        def ask(number: int) -> None:
            """Requests one after another, some on connections that are kept, some on new ones."""
            with httpx2.Client(base_url=url, timeout=60) as client:
                while not stopped.is_set():
                    asked = time.monotonic()
                    try:
                        answer = client.post("/infer", json=LONG | {"seed": number})
                    except httpx2.ConnectError:  # the port is closed: never accepted
                        return
                    except httpx2.TransportError:
                        answers.append((asked, time.monotonic(), None))
                        return
                    answers.append((asked, time.monotonic(), answer))
                    if answer.status_code == 503:
                        return

        with ThreadPoolExecutor(12) as pool:
            asking = [pool.submit(ask, number) for number in range(12)]
            service.wait_until("busy", lambda: service.read_metric(RUNNING) > 4)
            time.sleep(0.5)
            asked_to_stop = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            service.wait_until("draining", lambda: not service.is_ready())
            late = service.client.post("/infer", json=LONG)
            assert (late.status_code, late.json()["code"]) == (503, "not_ready")
            assert int(late.headers["retry-after"]) >= 1
            assert late.headers["connection"] == "close"
            for task in asking:
                task.result()
        assert service.process.wait(60) == 0
    accepted = [answer for asked, _, answer in answers if asked < asked_to_stop - 0.2]
    assert len(accepted) >= 12
    assert [answer and answer.status_code for answer in accepted] == [200] * len(accepted)
    finished_late = [ended for _, ended, answer in answers if answer and answer.is_success]
    assert max(finished_late) > asked_to_stop  # some were running
    others = [answer for asked, _, answer in answers if asked > asked_to_stop + 0.2]
    assert all(answer is not None and answer.status_code == 503 for answer in others)


def test_a_stream_that_has_begun_is_finished(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 480, "stream": True}
    with run_service(tiny_bundle, tmp_path) as service:
        with service.client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            service.process.send_signal(signal.SIGTERM)
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert service.process.wait(30) == 0


def test_what_is_not_done_within_the_grace_period_is_told_so(
    tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    settings = {"drain_grace_seconds": "0.2", "max_batch_rows": "1"}
    settings["request_deadline_seconds"] = "600"  # so that none is refused
    with run_service(tiny_bundle, tmp_path, **settings) as service:
        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(service.client.post, "/infer", json=LONG) for _ in range(16)]
            service.wait_until("busy", lambda: service.read_metric(RUNNING) > 8)
            service.process.send_signal(signal.SIGTERM)
            answers = [task.result() for task in asking]
        assert service.process.wait(30) == 0
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert 503 in [answer.status_code for answer in answers]
        lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert "requests did not finish within the grace period" in [line["message"] for line in lines]
    assert not [line for line in lines if line["level"] in ("error", "critical")]


def test_an_idle_service_ends_at_once(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    with run_service(tiny_bundle, tmp_path) as service, httpx2.Client() as idle:
        idle.get(f"{service.client.base_url}/health/live")  # its connection stays open
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == 0
