"""Metrics on a port of their own, so that they can be kept off the network that clients reach."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import InvalidInputError
from service.metrics import ServiceMetrics
from service.settings import ENV_PREFIX, Settings


class _MetricsServer(uvicorn.Server):
    """A second server of the process: signals are the first one's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


@contextlib.asynccontextmanager
async def serve_metrics(settings: Settings, metrics: ServiceMetrics) -> AsyncIterator[None]:
    """Serves `/metrics` and nothing else on the metrics port; does nothing where none is set.

    No key is asked for: the address is what protects it.

    Raises:
        InvalidInputError: the address cannot be listened on.
    """
    if settings.metrics_port is None:
        yield
        return

    async def read_metrics(request: Request) -> Response:
        return render_metrics(request, metrics)

    config = uvicorn.Config(
        Starlette(routes=[Route("/metrics", read_metrics)]),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _MetricsServer(config)
    listener = _listen(settings.metrics_host, settings.metrics_port)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await running


def render_metrics(request: Request, metrics: ServiceMetrics) -> Response:
    """All metrics in Prometheus' text format, or OpenMetrics where the request asks for it."""
    body, content_type = metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InvalidInputError(
            f"cannot serve metrics on {host} port {port} ({error.strerror}): change "
            f"{ENV_PREFIX}METRICS_HOST or {ENV_PREFIX}METRICS_PORT"
        ) from None
