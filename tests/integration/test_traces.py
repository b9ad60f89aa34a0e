"""Traces as a collector receives them: OTLP over HTTP, from the real service."""

import gzip
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.api.app import create_app
from service.errors import MissingDependencyError
from service.tracing import trace
from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

TASK = "Write a cooking recipe."
PROMPT = "Preheat the secret oven"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """What arrived at `url`."""

    url: str = ""
    paths: set[str] = field(default_factory=set)
    content: bytes = b""
    spans: list[Span] = field(default_factory=list)

    def by_name(self, trace_id: str) -> dict[str, Span]:
        found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            request = ExportTraceServiceRequest.FromString(content)
            collector.paths.add(self.path)
            collector.content += content
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    collector.spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        collector.url = f"http://127.0.0.1:{server.server_port}"
        yield collector
        server.shutdown()


def test_a_request_is_one_trace_below_its_callers(
    tiny_bundle: TinyBundle, collector: Collector
) -> None:
    settings = make_settings(tiny_bundle, otlp_endpoint=collector.url)
    with serve_in_thread(settings) as client:
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-ID": "find-me"}
        made = client.post("/generate-lora", json={"task": TASK}, headers=headers)
        assert made.status_code == 200
        headers["traceparent"] = f"00-{'1' * 32}-{PARENT_ID}-01"
        body = {"task": TASK, "prompt": PROMPT, "max_tokens": 4}
        assert client.post("/infer", json=body, headers=headers).status_code == 200
        headers["traceparent"] = f"00-{'2' * 32}-{PARENT_ID}-01"
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 4, "stream": True}
        streamed = client.post("/v1/completions", json=body, headers=headers)
        assert "[DONE]" in streamed.text
        headers["traceparent"] = "nonsense"
        body = {"adapter_id": "0" * 64, "prompt": PROMPT}
        assert client.post("/infer", json=body, headers=headers).status_code == 404
        client.get("/health/ready")
    assert collector.paths == {"/v1/traces"}
    assert not any("/health" in span.name for span in collector.spans)

    spans = collector.by_name(TRACE_ID)
    root = spans["POST /generate-lora"]
    assert root.parent_span_id.hex() == PARENT_ID
    values = {item.key: item.value for item in root.attributes}
    assert values["http.response.status_code"].int_value == 200
    assert values["icm_lora.request_id"].string_value == "find-me"
    for stage in ("encode", "decode", "cache_write"):
        assert spans[stage].parent_span_id == spans["provide"].span_id
        assert spans[stage].end_time_unix_nano >= spans[stage].start_time_unix_nano
    assert spans["write_slot"].parent_span_id == spans["load"].span_id
    assert {spans[name].parent_span_id for name in ("provide", "load")} == {root.span_id}
    assert spans["encode"].start_time_unix_nano <= spans["decode"].start_time_unix_nano

    spans = collector.by_name("1" * 32)
    assert {"POST /infer", "provide", "answer", "queue", "prefill", "decode"} <= set(spans)
    assert spans["prefill"].parent_span_id == spans["answer"].span_id

    spans = collector.by_name("2" * 32)
    assert {"POST /v1/completions", "answer", "prefill", "decode"} <= set(spans)
    assert spans["answer"].parent_span_id == spans["POST /v1/completions"].span_id

    (failed,) = [span for span in collector.spans if not span.parent_span_id]
    values = {item.key: item.value for item in failed.attributes}
    assert values["http.response.status_code"].int_value == 404


def test_no_span_holds_what_people_wrote(tiny_bundle: TinyBundle, collector: Collector) -> None:
    with serve_in_thread(make_settings(tiny_bundle, otlp_endpoint=collector.url)) as client:
        body = {"task": TASK, "prompt": PROMPT, "max_tokens": 4}
        client.post("/infer", json=body)
        client.post("/infer", json={**body, "seed": -1})
        client.get(f"/v1/{PROMPT}")
    assert collector.spans
    for words in (TASK, PROMPT, "secret"):
        assert words.encode() not in collector.content


def test_a_block_that_fails_is_marked_without_its_message(
    tiny_bundle: TinyBundle, collector: Collector
) -> None:
    app = create_app(make_settings(tiny_bundle, otlp_endpoint=collector.url))
    tracing = app.state.service.tracing
    with (
        pytest.raises(ValueError, match="a prompt"),
        tracing.trace_request("GET", {}),
        trace("inner"),
    ):
        raise ValueError("a prompt")
    tracing.close()
    assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_ERROR}
    assert b"a prompt" not in collector.content


def test_without_a_traced_request_nothing_is_recorded() -> None:
    with trace("provide") as span:
        span.attributes["icm_lora.cache"] = "hit"


def test_a_missing_extra_is_said_at_the_start(
    tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'icm-lora\[otel\]'"):
        create_app(make_settings(tiny_bundle, otlp_endpoint="http://127.0.0.1:4318"))
