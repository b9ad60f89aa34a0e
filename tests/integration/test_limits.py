"""Limits over real HTTP: tenants' quotas, slow clients, large heads, and what a log never holds."""

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.api.keys import make_key
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

ALL_SCOPES = ["infer", "generate"]
MARKER = "xyzzymarker"
JSON_HEAD = "POST /infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Tenants:
    """Keys of tenants, each with limits of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.json"
        self.entries: list[dict[str, Any]] = []

    def add(self, tenant: str, scopes: list[str] = ALL_SCOPES, **limits: float) -> dict[str, str]:
        key, entry = make_key(tenant, scopes)
        self.entries.append({**json.loads(entry), "limits": limits or None})
        self.path.write_text(json.dumps(self.entries))
        return {"authorization": f"Bearer {key}"}


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path)


@contextmanager
def connect(client: httpx2.Client) -> Iterator[socket.socket]:
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What the server says until it closes the connection."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def infer(client: httpx2.Client, headers: dict[str, str], **fields: Any) -> httpx2.Response:
    body = {"adapter_id": "base", "prompt": "x", "max_tokens": 4, **fields}
    return client.post("/infer", json=body, headers=headers)


def complete(client: httpx2.Client, headers: dict[str, str], **fields: Any) -> httpx2.Response:
    body = {"model": "base", "prompt": "x", "temperature": 1, "seed": 1, **fields}
    return client.post("/v1/completions", json=body, headers=headers)


def read_rejections(client: httpx2.Client, headers: dict[str, str]) -> dict[str, float]:
    lines = client.get("/metrics", headers=headers).text.splitlines()
    prefix = 'icm_lora_rejections_total{reason="'
    found = [line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix)]
    return {reason: float(value) for reason, value in found}


def test_each_tenant_has_its_own_limits(tiny_bundle: TinyBundle, tenants: Tenants) -> None:
    often = tenants.add("often", requests_per_second=0.01, request_burst=2)
    many = tenants.add("many", concurrent_requests=1)
    much = tenants.add("much", tokens_per_minute=30)
    whole = tenants.add("whole", tokens_per_minute=100)
    full = tenants.add("full", adapter_bytes=2 * tiny_bundle.bundle.layout.num_params)
    admin = tenants.add("admin", ["admin"])
    with serve_in_thread(make_settings(tiny_bundle, api_keys_file=tenants.path)) as client:
        answers = [infer(client, often) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].json()["code"] == "rate_limited"
        assert 90 <= int(answers[2].headers["retry-after"]) <= 100

        with ThreadPoolExecutor(4) as pool:
            runs = list(pool.map(lambda _: infer(client, many, max_tokens=64), range(4)))
        statuses = [run.status_code for run in runs]
        assert 200 in statuses
        assert 429 in statuses
        assert infer(client, many).status_code == 200

        assert infer(client, much, max_tokens=28).status_code == 200
        refused = infer(client, much, max_tokens=28)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) >= 1

        stream = complete(client, much, max_tokens=28, stream=True)
        assert stream.status_code == 429  # and not a stream that breaks off
        assert stream.json()["error"]["code"] == "rate_limited"
        assert int(stream.headers["retry-after"]) >= 1

        together = complete(client, whole, n=2, max_tokens=15)
        assert together.status_code == 200
        used = together.json()["usage"]["completion_tokens"]
        left = 100 - used
        refused = complete(client, whole, n=2, max_tokens=left // 2 + 2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        again = complete(client, whole, n=2, max_tokens=left // 2)  # nothing was taken
        assert again.status_code == 200

        def generate(task: str, **fields: Any) -> httpx2.Response:
            return client.post("/generate-lora", json={"task": task, **fields}, headers=full)

        first = generate("Write a recipe.", ttl_seconds=50)
        assert first.status_code == 200
        assert generate("Write a recipe.").json()["cache"] == "hit"
        second = generate("Write a poem.")
        assert (second.status_code, second.json()["code"]) == (429, "quota_exceeded")
        assert 1 <= int(second.headers["retry-after"]) <= 50
        path = f"/v1/adapters/{first.json()['adapter_id']}"
        assert client.get(path, headers=much).status_code == 404  # another tenant's
        assert client.delete(path, headers=full).status_code == 200
        assert generate("Write a poem.").status_code == 200

        rejections = read_rejections(client, admin)
        assert rejections["tenant_requests"] == 1
        assert rejections["tenant_concurrency"] == statuses.count(429)
        assert rejections["tenant_tokens"] == 3
        assert rejections["tenant_adapter_bytes"] == 1


def test_adapters_that_come_at_once_share_the_bytes(
    tiny_bundle: TinyBundle, tenants: Tenants
) -> None:
    size_bytes = 2 * tiny_bundle.bundle.layout.num_params
    full = tenants.add("full", adapter_bytes=2 * size_bytes)
    with serve_in_thread(make_settings(tiny_bundle, api_keys_file=tenants.path)) as client:

        def generate(number: int) -> httpx2.Response:
            body = {"task": f"Write a recipe of {number} steps."}
            return client.post("/generate-lora", json=body, headers=full)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(generate, range(8)))
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 6
        assert client.get("/v1/adapters", headers=full).json()["total"] == 2


@pytest.fixture(scope="module")
def hasty(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    """A service with little patience."""
    settings = make_settings(tiny_bundle, header_timeout_seconds=0.5, body_timeout_seconds=0.5)
    with serve_in_thread(settings) as client:
        yield client


def test_a_body_that_never_ends_is_answered_with_408(hasty: httpx2.Client) -> None:
    for path in ("/infer", "/generate-lora"):
        with connect(hasty) as connection:
            head = JSON_HEAD.replace("/infer", path)
            connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"task"'.encode())
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer


def test_a_body_that_drips_is_answered_with_408(hasty: httpx2.Client) -> None:
    started = time.monotonic()
    with connect(hasty) as connection:
        connection.sendall(f"{JSON_HEAD}Content-Length: 1000\r\n\r\n".encode())
        connection.settimeout(0.1)
        answer = b""
        while not answer:
            connection.sendall(b" ")
            try:
                answer = connection.recv(65_536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 5


def drip(connection: socket.socket, content: Callable[[], bytes]) -> float:
    """Sends a little now and then until the server closes; the time that took."""
    started = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - started < 8:
        try:
            connection.sendall(content())
            if connection.recv(65_536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:  # reset
            break
    return time.monotonic() - started


def test_a_head_that_never_ends_is_cut_off(hasty: httpx2.Client) -> None:
    with connect(hasty) as silent:
        started = time.monotonic()
        assert read_all(silent) == b""
        assert time.monotonic() - started < 5
    with connect(hasty) as slow:
        slow.sendall(b"GET /health/live HTTP/1.1\r\n")
        assert drip(slow, lambda: b"X-A: b\r\n") < 5
    with connect(hasty) as second:  # also a later one of the same connection
        second.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert second.recv(65_536).startswith(b"HTTP/1.1 200 ")
        second.sendall(b"GET /health/live HTTP/1.1\r\n")
        assert drip(second, lambda: b"X-A: b\r\n") < 5


def test_a_body_that_nobody_awaits_is_cut_off(hasty: httpx2.Client) -> None:
    with connect(hasty) as connection:
        head = "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 404 ")
        assert drip(connection, lambda: b"x") < 5


def test_waiting_for_an_answer_is_no_slowness(tiny_bundle: TinyBundle) -> None:
    settings = make_settings(tiny_bundle, header_timeout_seconds=0.05, body_timeout_seconds=0.05)
    with serve_in_thread(settings) as client:
        answer = infer(client, {}, max_tokens=480)
    assert answer.status_code == 200
    assert answer.json()["milliseconds"]["total"] > 100  # else this shows nothing


def test_a_head_that_is_too_large_is_refused(hasty: httpx2.Client) -> None:
    assert hasty.get("/health/live", headers={"x-large": "x" * 70_000}).status_code in (400, 431)
    for large in ({"headers": {"x-large": "x" * 17_000}}, {"params": {"q": "x" * 17_000}}):
        answer = hasty.get("/health/live", **large)
        assert (answer.status_code, answer.json()["code"]) == (431, "head_too_large")
    assert hasty.get("/health/live", headers={"x-large": "x" * 8_000}).status_code == 200


def test_descriptions_hold_text_only(hasty: httpx2.Client) -> None:
    refused = {
        "a\u202eb": "control character U+202E",
        "a\u2066b": "control character U+2066",
        "a\u0007b": "control character U+0007",
        "a\ue000b": "private-use character U+E000",
        "a\U0010fffdb": "private-use character U+10FFFD",
        "a\u0378b": "unassigned character U+0378",
        "a\ufffeb": "unassigned character U+FFFE",
        "x" * 1001: "1000",
        " \u2003\n": "empty",
    }
    for route in ("/generate-lora", "/infer"):
        for task, hint in refused.items():
            answer = hasty.post(
                route, json={"task": task, **({"prompt": "x"} if route == "/infer" else {})}
            )
            assert answer.status_code == 422, ascii(task)
            assert hint in answer.text
    for task in ("Schreibe ein Märchen 🏰", "اكتب قصة", "写一个故事", "नमस्ते\nकहानी", "e\u0301"):
        assert hasty.post("/generate-lora", json={"task": task}).status_code == 200


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate-lora", {"images": ["aGk="] * 17}),
        ("/generate-lora", {"examples": ["x"] * 33}),
        ("/generate-lora", {"examples": ["x" * 4_001]}),
        ("/infer", {"num_beams": 6, "image": "aGk=", "task": "x"}),
        ("/infer", {"max_tokens": 1025, "prompt": "x", "task": "x"}),
        ("/infer", {"prompt": "x" * 65_537, "task": "x"}),
    ],
)
def test_counts_over_their_limits_are_refused(
    hasty: httpx2.Client, route: str, body: dict[str, Any]
) -> None:
    answer = hasty.post(route, json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_the_log_holds_nothing_of_what_was_sent(
    tiny_bundle: TinyBundle, caplog: pytest.LogCaptureFixture, tenants: Tenants
) -> None:
    key = tenants.add("tenant", ["admin"])
    settings = make_settings(tiny_bundle, api_keys_file=tenants.path, log_level="debug")
    with caplog.at_level(logging.DEBUG), serve_in_thread(settings) as client:
        client.headers.update(key)
        generated = client.post("/generate-lora", json={"task": f"Write about {MARKER}."})
        assert generated.status_code == 200
        bodies: list[tuple[str, Any]] = [
            ("/infer", {"task": MARKER, "prompt": MARKER, "stop": [MARKER]}),
            ("/infer", {"adapter_id": MARKER, "prompt": MARKER}),
            ("/infer", {"adapter_id": "base", "prompt": MARKER * 400}),
            ("/infer", {"task": f"{MARKER}\u202e", "prompt": MARKER}),
            ("/infer", {"task": MARKER, "image": MARKER}),
            ("/infer", {MARKER: MARKER}),
            ("/generate-lora", {"task": MARKER, "cache": "only"}),
            ("/generate-lora", {"images": [MARKER]}),
            ("/generate-lora", {"examples": [MARKER, f"{MARKER} again"], "task": MARKER}),
            ("/generate-lora", {"examples": [MARKER, " "]}),
            ("/generate-lora", {"examples": [MARKER], "images": [MARKER]}),
            ("/generate-lora", {"task": MARKER, "seed": MARKER}),
            (f"/{MARKER}", {}),
            ("/v1/completions", {"model": f"task:{MARKER}", "prompt": MARKER}),
            ("/v1/completions", {"model": "base", "prompt": MARKER, "stream": True}),
            ("/v1/completions", {"model": MARKER, "prompt": MARKER, MARKER: MARKER}),
            ("/v1/chat/completions", {"model": "base", "messages": [{"content": MARKER}]}),
            ("/v1/adapters", {MARKER: MARKER}),
        ]
        for path, body in bodies:
            client.post(path, json=body)
        client.post("/infer", content=f"{{{MARKER}", headers={"content-type": "application/json"})
        client.post("/infer", data={"task": MARKER}, files={"image": (MARKER, MARKER.encode())})
        client.get(f"/v1/adapters/{MARKER}", params={"q": MARKER})
        client.post("/infer", json={}, headers={"authorization": f"Bearer {MARKER}"})
        client.get("/health/live", headers={"x-request-id": f"{MARKER} {MARKER}"})
    lines = [json.dumps({**vars(record), "text": record.getMessage()}, default=repr)
             for record in caplog.records if not record.name.startswith("httpx")]  # fmt: skip
    assert len(lines) > len(bodies)
    assert not [line for line in lines if MARKER in line]
    assert not [line for line in lines if key["authorization"].split()[1] in line]
