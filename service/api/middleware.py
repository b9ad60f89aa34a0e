"""Pure ASGI middleware: request id, metrics and access log, and the limits on bodies."""

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.error_handlers import HeadTooLargeError, problem_response
from service.errors import IcmLoraError
from service.logs import describe_exception, request_id_context
from service.metrics import ServiceMetrics

REQUEST_ID_HEADER = "X-Request-ID"
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_HEAD_BYTES = 16_384
MAX_PATH_BYTES = 1_024
UNMATCHED_ROUTE = "unmatched"
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request that ended without an answer (nginx's convention)."""
_QUIET_ROUTES = frozenset({"/health/live", "/health/ready", "/metrics"})

_logger = logging.getLogger("service.access")


class RequestScope:
    """Gives a request its id, and counts, times and logs it by route template.

    A well-formed `X-Request-ID` is kept, anything else replaced; the id is in every log line
    and in the answer. An exception that no handler maps is a bug: it is logged without its
    message (which may quote a prompt) and answered with 500.
    """

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = accept_request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        token = request_id_context.set(request_id)
        status: int | None = None
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            _logger.error("unexpected exception", extra={"fields": describe_exception(error)})
            if status is not None:
                raise  # half an answer is out: the server must close the connection
            bug = IcmLoraError("an unexpected error happened: report it with the request id")
            await problem_response(bug, scope["path"])(scope, receive, send_with_id)
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)
            request_id_context.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = find_template(scope)
        self.metrics.observe_request(route, scope["method"], status, seconds)
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": round(seconds * 1000, 3),
        }
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        _logger.log(level, "request", extra={"fields": fields})


class HeadLimit:
    """Refuses requests whose path, query and headers are larger than any that is meant, with 431.

    The server refuses much larger ones itself, with 400, before they are in memory.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEAD_BYTES:
                error = HeadTooLargeError(
                    f"path and headers have {size} bytes, at most {MAX_HEAD_BYTES} are accepted"
                )
                headers = {"Connection": "close"}
                response = problem_response(error, scope["path"][:MAX_PATH_BYTES], headers=headers)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large with 413, and too slow ones with 408.

    What arrives is counted, not what is declared, and the time is that of the whole body, so
    that a client cannot hold a place by sending a byte now and then.

    Args:
        app: what answers.
        max_bytes: limit of all paths that `larger` does not name.
        larger: limits of the paths that take more.
        timeout_seconds: time within which a body must be there.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        larger: Mapping[str, int] = MappingProxyType({}),
        timeout_seconds: float = math.inf,
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.larger = larger
        self.timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        received = 0
        is_complete = scope["type"] != "http"
        limit = self.larger.get(scope.get("path", ""), self.max_bytes)
        deadline = asyncio.get_running_loop().time() + self.timeout_seconds

        async def receive_limited() -> Message:
            nonlocal received, is_complete
            if is_complete:  # what comes now is the client's leaving
                return await receive()
            # FastAPI's own class of exception passes its body reader unchanged.
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, headers={"Connection": "close"}) from None
            is_complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413)
            return message

        await self.app(scope, receive_limited, send)


def find_template(scope: Scope) -> str:
    """Template of the route that matched, or one constant for all paths that match none."""
    if (route := scope.get("route")) is not None:
        return str(route.path)
    # FastAPI's documentation pages are plain routes without parameters: they leave only this.
    return str(scope["path"]) if "endpoint" in scope else UNMATCHED_ROUTE


def accept_request_id(offered: str | None) -> str:
    """The client's id where it is well formed, else a new random one."""
    if offered is not None and REQUEST_ID_PATTERN.fullmatch(offered):
        return offered
    return uuid.uuid4().hex
