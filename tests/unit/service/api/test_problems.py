"""Errors, middleware and their order, on a small application without models."""

import json
import logging
from collections.abc import Iterator
from typing import Annotated

import pytest
from fastapi import FastAPI
from pydantic import Field
from starlette.testclient import TestClient

from service.api.error_handlers import (
    MAX_FIELD_PROBLEMS,
    PROBLEM_MEDIA_TYPE,
    add_error_handlers,
)
from service.api.error_table import list_errors
from service.api.middleware import UNMATCHED_ROUTE, BodyLimit, RequestScope
from service.api.openapi import build_openapi, document_problems
from service.api.requests import RequestModel
from service.api.schemas import Problem
from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    IcmLoraError,
    NoFreeSlotError,
    NotReadyError,
    QueueFullError,
)
from service.metrics import ServiceMetrics

MAX_BYTES = 2048
SECRET = "the secret prompt"


class Body(RequestModel):
    """A request of the test's own."""

    count: Annotated[int, Field(ge=1)]
    ratio: float = 0.5


@pytest.fixture
def metrics() -> ServiceMetrics:
    return ServiceMetrics(redis_configured=False)


@pytest.fixture
def client(metrics: ServiceMetrics) -> Iterator[TestClient]:
    app = FastAPI(title="test", version="1", redirect_slashes=False)
    errors = {error.__name__: error for error in list_errors()}

    @app.post("/body", responses=document_problems(QueueFullError))
    async def read_body(body: Body) -> Body:
        return body

    @app.get("/errors/{name}")
    async def raise_error(name: str) -> None:
        if name == "bug":
            raise ValueError(SECRET)
        raise errors[name]("what happened and what to change")

    @app.get("/shared")
    async def get_shared() -> None: ...

    @app.delete("/shared")
    async def delete_shared() -> None: ...

    app.add_middleware(BodyLimit, max_bytes=MAX_BYTES)
    app.add_middleware(RequestScope, metrics=metrics)
    add_error_handlers(app)
    app.openapi = lambda: build_openapi(app)  # type: ignore[method-assign]
    with TestClient(app) as test_client:
        yield test_client


def count_requests(metrics: ServiceMetrics, route: str, method: str, status: int) -> float | None:
    labels = {"route": route, "method": method, "status": str(status)}
    return metrics.registry.get_sample_value("icm_lora_http_requests_total", labels)


@pytest.mark.parametrize("error", list_errors(), ids=lambda error: error.code)
def test_every_error_of_the_tree_is_a_problem(
    client: TestClient, error: type[IcmLoraError]
) -> None:
    response = client.get(f"/errors/{error.__name__}")
    assert response.status_code == error.status
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    problem = Problem.model_validate(response.json())
    assert problem.type == f"urn:icm-lora:problem:{error.code}"
    assert (problem.title, problem.status, problem.code) == (error.title, error.status, error.code)
    assert problem.detail == "what happened and what to change"
    assert problem.instance == f"/errors/{error.__name__}"
    assert problem.request_id == response.headers["x-request-id"]


def test_error_codes_are_unique() -> None:
    codes = [error.code for error in list_errors()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("error", [QueueFullError, NotReadyError, NoFreeSlotError])
def test_passing_errors_say_when_to_retry(client: TestClient, error: type[IcmLoraError]) -> None:
    response = client.get(f"/errors/{error.__name__}")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("error", [AdapterNotFoundError, DeadlineExceededError])
def test_other_errors_do_not(client: TestClient, error: type[IcmLoraError]) -> None:
    assert "retry-after" not in client.get(f"/errors/{error.__name__}").headers


def test_unknown_path_is_a_problem_under_one_route_label(
    client: TestClient, metrics: ServiceMetrics
) -> None:
    for path in ("/nowhere", "/nowhere/else", "/body/"):
        response = client.get(path)
        assert (response.status_code, response.json()["code"]) == (404, "route_not_found")
        assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert count_requests(metrics, UNMATCHED_ROUTE, "GET", 404) == 3


def test_wrong_method_is_a_problem_that_names_all_allowed_methods(
    client: TestClient, metrics: ServiceMetrics
) -> None:
    response = client.put("/shared")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET"
    assert count_requests(metrics, "/shared", "PUT", 405) == 1


def test_bug_is_answered_without_details_and_logged_without_its_message(
    client: TestClient, metrics: ServiceMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get("/errors/bug")
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] == response.json()["request_id"]
    assert SECRET not in response.text
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert SECRET not in record.getMessage() + json.dumps(record.fields)  # type: ignore[attr-defined]
    assert record.fields["exception"] == "builtins.ValueError"  # type: ignore[attr-defined]
    assert count_requests(metrics, "/errors/{name}", "GET", 500) == 1


def test_validation_errors_say_where_and_never_echo_the_input(client: TestClient) -> None:
    response = client.post("/body", json={"count": 0, "extra": SECRET, "ratio": SECRET})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    errors = {item["location"]: item["type"] for item in response.json()["errors"]}
    assert errors == {
        "body.count": "greater_than_equal",
        "body.extra": "extra_forbidden",
        "body.ratio": "float_parsing",
    }
    assert SECRET not in response.text


def test_validation_errors_stay_small_whatever_was_sent(client: TestClient) -> None:
    body = {"count": 1, **{f"{'k' * 20}{number}": 0 for number in range(50)}}
    response = client.post("/body", json=body)
    assert len(response.json()["errors"]) == MAX_FIELD_PROBLEMS
    assert "50" in response.json()["detail"]
    [error] = client.post("/body", json={"count": 1, "k" * 1500: 0}).json()["errors"]
    assert len(error["location"]) < 100


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"count": 1', 422, "invalid_request"),
        (b'{"count": 1, "ratio": NaN}', 422, "invalid_request"),
        (b'{"count": 1, "ratio": 1e999}', 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b"", 422, "invalid_request"),
        (b'{"count": "\xc3("}', 400, "malformed_request"),
        (b'{"count": ' + b"[" * 1900, 400, "malformed_request"),
    ],
)
def test_unreadable_bodies_are_problems(
    client: TestClient, content: bytes, status: int, code: str
) -> None:
    response = client.post("/body", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_body_limit_counts_what_arrives(client: TestClient, metrics: ServiceMetrics) -> None:
    def stream(size: int) -> Iterator[bytes]:
        yield b'{"count": 1}'
        for _ in range(size - 12):
            yield b" "

    headers = {"content-type": "application/json"}
    fits = client.post("/body", content=stream(MAX_BYTES), headers=headers)
    assert fits.status_code == 200
    for content in (stream(MAX_BYTES + 1), b" " * (MAX_BYTES + 1)):
        response = client.post("/body", content=content, headers=headers)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert count_requests(metrics, "/body", "POST", 413) == 2


def test_well_formed_request_id_is_kept(client: TestClient) -> None:
    response = client.get("/shared", headers={"x-request-id": "order-66.retry_1"})
    assert response.headers["x-request-id"] == "order-66.retry_1"


@pytest.mark.parametrize("offered", ["", "with space", "x" * 65, "né", 'a"b', "a\tb"])
def test_malformed_request_id_is_replaced(client: TestClient, offered: str) -> None:
    headers = {"x-request-id": offered.encode("latin-1")}
    first = client.get("/shared", headers=headers).headers["x-request-id"]
    second = client.get("/shared", headers=headers).headers["x-request-id"]
    assert first != second
    assert len(first) == 32


def test_access_log_has_the_template_and_not_the_path(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="service.access"):
        client.get("/errors/AdapterNotFoundError?q=secret")
    [record] = [record for record in caplog.records if record.name == "service.access"]
    fields = record.fields  # type: ignore[attr-defined]
    assert fields.pop("milliseconds") > 0
    assert fields == {"method": "GET", "route": "/errors/{name}", "status": 404}


def test_openapi_documents_problems_and_nothing_of_the_framework(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"]["/body"]["post"]["responses"]
    assert set(responses) == {"200", "429", "500"}
    assert "Retry-After" in responses["429"]["headers"]
    content = responses["429"]["content"][PROBLEM_MEDIA_TYPE]
    assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
    Problem.model_validate(content["examples"]["queue_full"]["value"])
    assert {"Problem", "FieldProblem"} <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in json.dumps(document)
