"""Every error as RFC 9457 problem details (`application/problem+json`) with a stable code."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.openai.errors import find_status, render_error, speaks_openai
from service.api.schemas import FieldProblem, Problem
from service.errors import (
    IcmLoraError,
    NoFreeSlotError,
    NotReadyError,
    QueueFullError,
    QuotaExceededError,
    RateLimitedError,
    RegistryUnavailableError,
    UnauthenticatedError,
)
from service.logs import request_id_context

PROBLEM_MEDIA_TYPE = "application/problem+json"
MAX_FIELD_PROBLEMS = 20
MAX_LOCATION_CHARS = 64
RETRY_AFTER_SECONDS: Mapping[type[IcmLoraError], int] = {
    NotReadyError: 5,
    NoFreeSlotError: 1,
    RegistryUnavailableError: 2,
}
"""Seconds to wait before trying again, for errors that do not carry their own."""
RETRY_STATUSES = frozenset({QueueFullError.status, *(kind.status for kind in RETRY_AFTER_SECONDS)})
"""Statuses whose answers say when to try again."""


class MalformedRequestError(IcmLoraError):
    """The request's body cannot be read at all."""

    status = 400
    code = "malformed_request"
    title = "Malformed request"


class RouteNotFoundError(IcmLoraError):
    """No route has this path."""

    status = 404
    code = "route_not_found"
    title = "Route not found"


class MethodNotAllowedError(IcmLoraError):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"


class RequestTimeoutError(IcmLoraError):
    """The request did not arrive within the time that it has for that."""

    status = 408
    code = "request_timeout"
    title = "Request timeout"


class BodyTooLargeError(IcmLoraError):
    """The request's body exceeds the limit."""

    status = 413
    code = "body_too_large"
    title = "Request body too large"


class HeadTooLargeError(IcmLoraError):
    """The request's path and headers together exceed the limit."""

    status = 431
    code = "head_too_large"
    title = "Request header fields too large"


class InvalidRequestError(IcmLoraError):
    """The body can be read, but is not what the schema asks for; `errors` says where."""

    status = 422
    code = "invalid_request"
    title = "Invalid request"


_FRAMEWORK_ERRORS: dict[int, IcmLoraError] = {
    error.status: error
    for error in (
        MalformedRequestError("the request body cannot be parsed: see /openapi.json"),
        RouteNotFoundError("no such path: see /openapi.json"),
        MethodNotAllowedError("the path does not support this method: see the Allow header"),
        RequestTimeoutError("the request body did not arrive in time: send it faster"),
        BodyTooLargeError("the request body is larger than this service accepts"),
    )
}


def problem_response(
    error: IcmLoraError,
    instance: str,
    *,
    errors: Sequence[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Renders an error: as problem details, on OpenAI's routes in OpenAI's shape.

    Args:
        error: gives status, code, title and detail.
        instance: path of the request (RFC 9457 `instance`).
        errors: what is wrong where, for requests that fail validation.
        headers: further headers; `Retry-After` (RFC 9110, seconds) is added by itself.
    """
    headers = {**_error_headers(error), **(headers or {})}
    if speaks_openai(instance):
        content = render_error(error, errors).model_dump()
        return JSONResponse(content, find_status(error), headers=headers)
    problem = Problem(
        type=f"urn:icm-lora:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        instance=instance,
        code=error.code,
        request_id=request_id_context.get(),
        errors=list(errors) if errors is not None else None,
    )
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        error.status,
        headers=headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def add_error_handlers(app: FastAPI) -> None:
    """Maps our exception tree, validation errors and the framework's own errors, once each.

    Exceptions outside these are bugs: `service.api.middleware` logs them and answers 500.
    """
    app.add_exception_handler(IcmLoraError, handle_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_framework_error)


async def handle_error(request: Request, error: Exception) -> Response:
    """An error of our tree."""
    assert isinstance(error, IcmLoraError)
    return problem_response(error, request.url.path)


async def handle_validation_error(request: Request, error: Exception) -> Response:
    """Pydantic's findings: where and what, never the input itself, which may be huge."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    problems = [_describe_field(item) for item in found[:MAX_FIELD_PROBLEMS]]
    detail = f"{len(found)} field(s) of the request are wrong: see `errors`"
    return problem_response(InvalidRequestError(detail), request.url.path, errors=problems)


async def handle_framework_error(request: Request, error: Exception) -> Response:
    """Errors that Starlette or FastAPI raise: unknown path or method, unreadable body."""
    assert isinstance(error, HTTPException)
    known = _FRAMEWORK_ERRORS[error.status_code]
    headers = dict(error.headers or {})
    if known.status == MethodNotAllowedError.status:
        # The router names only the methods of the first route that has this path.
        operations = request.app.openapi()["paths"].get(request.scope["route"].path)
        if operations is not None:
            headers["Allow"] = ", ".join(sorted(method.upper() for method in operations))
    return problem_response(known, request.url.path, headers=headers)


def _error_headers(error: IcmLoraError) -> dict[str, str]:
    if isinstance(error, UnauthenticatedError):
        return {"WWW-Authenticate": "Bearer"}  # RFC 9110, 11.6.1
    if isinstance(error, QueueFullError | RateLimitedError | QuotaExceededError):
        return {"Retry-After": str(error.retry_after_seconds)}
    seconds = RETRY_AFTER_SECONDS.get(type(error))
    return {} if seconds is None else {"Retry-After": str(seconds)}


def _describe_field(item: Mapping[str, Any]) -> FieldProblem:
    location = ".".join(str(part)[:MAX_LOCATION_CHARS] for part in item["loc"])
    return FieldProblem(
        location=location[: 4 * MAX_LOCATION_CHARS], message=item["msg"], type=item["type"]
    )
