"""Streams that end early: clients that leave, deadlines, and a full queue."""

import json
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fixtures.http_service import make_settings, serve_in_thread
from tests.fixtures.tiny_bundle import TinyBundle

LONG = {"model": "base", "prompt": "Preheat", "max_tokens": 400, "temperature": 1, "stream": True}


@pytest.fixture(scope="module")
def http(tiny_bundle: TinyBundle) -> Iterator[httpx2.Client]:
    """One row runs at a time, so that what is left running shows."""
    with serve_in_thread(make_settings(tiny_bundle, max_batch_rows=1, max_queue=16)) as client:
        yield client


def count(http: httpx2.Client, name: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == name)


def wait_until_idle(http: httpx2.Client) -> float:
    started = time.monotonic()
    while count(http, "vllm:num_requests_running") + count(http, "vllm:num_requests_waiting"):
        assert time.monotonic() < started + 20, "rows run on without anybody waiting for them"
        time.sleep(0.01)
    return time.monotonic() - started


def test_a_client_that_leaves_frees_all_its_rows(http: httpx2.Client) -> None:
    with http.stream("POST", "/v1/completions", json={**LONG, "n": 12}) as response:
        assert next(response.iter_lines()).startswith("data: ")
    assert wait_until_idle(http) < 1
    answer = http.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 1})
    assert answer.status_code == 200


def test_a_full_queue_is_429_before_the_stream_begins(http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json={**LONG, "prompt": ["a", "b"], "n": 16})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full"
    assert response.json()["error"]["type"] == "rate_limit_error"
    wait_until_idle(http)


def test_a_deadline_within_a_stream_is_an_error_event(tiny_bundle: TinyBundle) -> None:
    body = {**LONG, "n": 8, "logprobs": 20}  # all rows run at once, and none is done in time
    settings = make_settings(tiny_bundle, max_batch_rows=8, request_deadline_seconds=0.25)
    with serve_in_thread(settings) as http:
        address = f"{http.base_url}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            chunks = client.completions.create(**body)  # type: ignore[call-overload]
            with pytest.raises(openai.APIError) as caught:
                list(chunks)
        assert caught.value.code == "deadline_exceeded"
        wait_until_idle(http)
        response = http.post("/v1/completions", json=body)
        *_, last, end = response.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert end == ""
        assert "[DONE]" not in response.text
        wait_until_idle(http)
        whole = http.post("/v1/completions", json={**body, "stream": False})
        assert (whole.status_code, whole.json()["error"]["type"]) == (504, "server_error")
        wait_until_idle(http)
