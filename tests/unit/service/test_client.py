"""Retries, errors and streams of the client, against a server that says what a test wants."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.client import ApiError, Client, RetryPolicy, UnreachableError
from service.client.errors import parse_retry_after

PROBLEM = {"code": "queue_full", "detail": "too many", "status": 429, "request_id": "r1"}
FAST = RetryPolicy(max_retries=3, max_wait_seconds=0.3)


@dataclass
class Script:
    """Answers in order, as (status, headers, body), and the requests that they answered."""

    url: str = ""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def add(self, status: int, body: object, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers.append((status, named, content))


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(content) if content else None
            script.requests.append((self.path, dict(self.headers), body))
            status, headers, answer = script.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    for method in ("POST", "PUT", "DELETE"):
        setattr(Answer, f"do_{method}", Answer.do_GET)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script.url = f"http://127.0.0.1:{server.server_port}"
        yield script
        server.shutdown()


def test_refused_calls_are_sent_again(script: Script) -> None:
    for status in (429, 503):
        script.add(status, PROBLEM, Retry_After="0")
    script.add(200, {"adapters": [], "total": 0})
    with Client(script.url, "a-key", retry=FAST) as client:
        assert client.list_adapters(limit=5).total == 0
    assert [path for path, _, _ in script.requests] == ["/v1/adapters?limit=5&offset=0"] * 3
    assert script.requests[0][1]["Authorization"] == "Bearer a-key"


@pytest.mark.parametrize("retry", [RetryPolicy(max_retries=0), FAST])
def test_a_pause_longer_than_allowed_is_an_error_at_once(
    script: Script, retry: RetryPolicy
) -> None:
    script.add(429, PROBLEM, Retry_After="30")
    started = time.monotonic()
    with Client(script.url, retry=retry) as client, pytest.raises(ApiError) as caught:
        client.infer("x", adapter_id="base")
    assert time.monotonic() - started < 5
    error = caught.value
    assert (error.status, error.code, error.detail) == (429, "queue_full", "too many")
    assert (error.retry_after_seconds, error.request_id) == (30.0, "r1")
    assert len(script.requests) == 1


def test_pauses_without_a_header_double_up_to_the_bound(script: Script) -> None:
    for _ in range(3):
        script.add(503, PROBLEM)
    policy = RetryPolicy(max_retries=5, max_wait_seconds=0.6)
    with Client(script.url, retry=policy) as client, pytest.raises(ApiError):
        client.models()
    assert len(script.requests) == 2  # pauses of at least 0.25 and 0.5 seconds


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 504])
def test_other_errors_are_not_sent_again(script: Script, status: int) -> None:
    script.add(status, {**PROBLEM, "errors": [{"location": "body.seed", "message": "too low"}]})
    with Client(script.url, retry=FAST) as client, pytest.raises(ApiError) as caught:
        client.generate("Write.")
    assert caught.value.status == status
    assert caught.value.detail == "too many (body.seed: too low)"
    assert len(script.requests) == 1


def test_health_is_asked_once(script: Script) -> None:
    script.add(503, PROBLEM)
    with Client(script.url) as client, pytest.raises(ApiError):
        client.health()
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("body", "code", "detail"),
    [
        ({"error": {"message": "no such model", "code": "adapter_not_found"}}, None, None),
        ({"error": {"message": "no such model", "type": "adapter_not_found"}}, None, None),
        (b"<html>bad gateway</html>", "http_error", "answered 502"),
        ([1], "http_error", "answered 502"),
    ],
)
def test_errors_of_other_shapes_are_read(
    script: Script, body: object, code: str | None, detail: str | None
) -> None:
    script.add(502, body)
    with Client(script.url) as client, pytest.raises(ApiError) as caught:
        client.complete("x")
    assert caught.value.code == (code or "adapter_not_found")
    assert (detail or "no such model") in caught.value.detail


def test_answers_that_are_none_are_errors(script: Script) -> None:
    script.add(200, b"not json")
    script.add(200, {"text": "no receipt"})
    with Client(script.url) as client:
        for _ in range(2):
            with pytest.raises(UnreachableError):
                client.infer("x", adapter_id="base")
    with Client("http://127.0.0.1:9") as client, pytest.raises(UnreachableError):
        client.health()


def test_stream_is_read_piece_by_piece(script: Script) -> None:
    pieces = [
        {"id": "c", "model": "base", "choices": [{"index": 0, "text": text}]} for text in "ab"
    ]
    lines = [": hello", *(f"data: {json.dumps(piece)}" for piece in pieces), "data: [DONE]"]
    script.add(200, "\n\n".join(lines).encode() + b"\n\n", Content_Type="text/event-stream")
    with Client(script.url) as client:
        found = [piece.choices[0].text for piece in client.complete("x", stream=True, n=1)]
    assert found == ["a", "b"]
    assert script.requests[0][2] == {"n": 1, "model": "base", "prompt": "x", "stream": True}


def test_chat_stream_gives_deltas_and_errors(script: Script) -> None:
    delta = {"index": 0, "delta": {"content": "hi"}}
    events = [{"id": "c", "model": "m", "choices": [delta]}, {"error": {"message": "late"}}]
    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    script.add(200, content, Content_Type="text/event-stream")
    with Client(script.url) as client:
        stream = client.chat([{"role": "user", "content": "hello"}], model="m", stream=True)
        assert next(stream).choices[0].message.content == "hi"
        with pytest.raises(ApiError, match="late"):
            next(stream)


def test_names_are_quoted(script: Script) -> None:
    script.add(404, PROBLEM)
    with Client(script.url) as client, pytest.raises(ApiError):
        client.delete_alias("a/../b?c", expected_generation=2)
    assert script.requests[0][0] == "/v1/aliases/a%2F..%2Fb%3Fc?expected_generation=2"


def test_retry_after_is_read_as_seconds_only() -> None:
    assert parse_retry_after("7") == 7.0
    assert parse_retry_after(None) is None
    assert parse_retry_after("Wed, 21 Oct 2026 07:28:00 GMT") is None


def test_adapters_and_pictures_are_sent_as_files_or_bytes(script: Script, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "x.png").write_bytes(b"picture")
    for _ in range(4):
        script.add(422, PROBLEM)
    with Client(script.url) as client:
        for adapter in (tmp_path, (b"{}", b"weights")):
            with pytest.raises(ApiError):
                client.upload_adapter(adapter, ttl_seconds=60)
        for image in (tmp_path / "x.png", b"picture"):
            with pytest.raises(ApiError):
                client.detect(image, task="Spot the sofa.", max_boxes=2)
    uploads, pictures = script.requests[:2], script.requests[2:]
    encoded = {"config": "e30=", "weights": "d2VpZ2h0cw==", "ttl_seconds": 60}
    assert [(path, body) for path, _, body in uploads] == [("/v1/adapters", encoded)] * 2
    expected = {"image": "cGljdHVyZQ==", "task": "Spot the sofa.", "max_boxes": 2}
    assert [body for _, _, body in pictures] == [expected] * 2
