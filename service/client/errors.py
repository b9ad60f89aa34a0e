"""What can go wrong with a call.

ClientError
├── ApiError           the service answered with an error: status, code, detail
└── UnreachableError   it did not answer, or not with what the interface promises
"""

from collections.abc import Mapping
from typing import Any

import httpx2


class ClientError(Exception):
    """Base of every error of this client.

    Attributes:
        code: stable machine-readable code.
        detail: what happened and what to change.
    """

    code = "client_error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnreachableError(ClientError):
    """No answer: nobody listens there, the connection broke, or it took too long."""

    code = "unreachable"


class ApiError(ClientError):
    """The service's own error, whichever of its two shapes it came in.

    Attributes:
        status: HTTP status; 200 where a stream broke off with an error.
        code: the service's stable code.
        retry_after_seconds: when to try again, where the service said so.
        request_id: for the service's operator.
        errors: what is wrong where, for invalid requests.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        retry_after_seconds: float | None = None,
        request_id: str | None = None,
        errors: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        places = "; ".join(f"{each.get('location')}: {each.get('message')}" for each in errors)
        super().__init__(f"{detail} ({places})" if places else detail)
        self.status = status
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id
        self.errors = errors


def read_error(response: httpx2.Response) -> ApiError:
    """The error of an answer that has been read: RFC 9457, OpenAI's, or of a proxy between."""
    status, headers = response.status_code, response.headers
    retry_after = parse_retry_after(headers.get("Retry-After"))
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {"detail": f"{response.url} answered {status}", "code": "http_error"}
    if isinstance(body.get("error"), dict):
        return read_openai_error(body["error"], status, retry_after, headers.get("X-Request-ID"))
    return ApiError(
        status,
        str(body.get("code", "http_error")),
        str(body.get("detail", f"{response.url} answered {status}")),
        retry_after_seconds=retry_after,
        request_id=body.get("request_id") or headers.get("X-Request-ID"),
        errors=tuple(body.get("errors") or ()),
    )


def read_openai_error(
    body: Mapping[str, Any],
    status: int,
    retry_after_seconds: float | None = None,
    request_id: str | None = None,
) -> ApiError:
    """The error of OpenAI's shape, in an answer or in a stream."""
    return ApiError(
        status,
        str(body.get("code") or body.get("type") or "http_error"),
        str(body.get("message", "the service gave no reason")),
        retry_after_seconds=retry_after_seconds,
        request_id=request_id,
    )


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header; None without one, or where it is a date (RFC 9110)."""
    return float(value) if value is not None and value.isascii() and value.isdigit() else None


def describe(error: Exception) -> str:
    """An exception in one line; many of httpx2's have no message of their own."""
    return str(error) or type(error).__name__
