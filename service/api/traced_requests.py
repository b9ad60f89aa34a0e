"""Middleware that makes one span of each request."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.middleware import CLIENT_CLOSED_REQUEST, REQUEST_ID_HEADER, find_template
from service.tracing import Tracing

_UNTRACED_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})


class TracedRequests:
    """Traces requests by method and route template, with status and request id; not probes."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in _UNTRACED_PATHS:
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST
        with self.tracing.trace_request(scope["method"], Headers(scope=scope)) as span:

            async def send_traced(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    request_id = Headers(raw=message["headers"]).get(REQUEST_ID_HEADER)
                    if request_id is not None:
                        span.attributes["icm_lora.request_id"] = request_id
                await send(message)

            try:
                await self.app(scope, receive, send_traced)
            finally:
                route = find_template(scope)
                span.name = f"{scope['method']} {route}"
                span.attributes["http.request.method"] = scope["method"]
                span.attributes["http.route"] = route
                span.attributes["http.response.status_code"] = status
