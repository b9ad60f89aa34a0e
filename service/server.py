"""The HTTP server: runs an application until told to stop, and then stops gracefully."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app
from service.api.connections import build_protocol
from service.api.dependencies import ServiceState
from service.logs import configure_logs
from service.settings import Settings

_POLL_SECONDS = 0.05
_CLOSING_SECONDS = 2
"""Time that connections get to close once all requests are answered."""

_logger = logging.getLogger("service")


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM turns not ready before it refuses anything.

    The delay between the two lets a load balancer notice; then new requests get 503, running
    ones finish (those that do not within `drain_grace_seconds` get 503, too), the port closes
    and the lifespan ends.
    """

    def __init__(self, config: uvicorn.Config, state: ServiceState) -> None:
        super().__init__(config)
        self.state = state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Not ready, delay, refuse what is new, finish what runs, then uvicorn's own shutdown.

        The port stays open while requests run: a connection that the kernel has taken already
        gets a 503 that says so, and not a reset.
        """
        settings = self.state.settings
        self.state.begin_drain()
        await self._wait(settings.shutdown_delay_seconds, lambda: False)
        self.state.refuses_requests = True
        await self._wait(settings.drain_grace_seconds, lambda: self.state.running_requests == 0)
        if self.state.running_requests:
            _logger.warning(
                "requests did not finish within the grace period",
                extra={"fields": {"requests": self.state.running_requests}},
            )
            await self.state.give_up()
        await super().shutdown(sockets)

    async def _wait(self, seconds: float, is_over: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (is_over() or self.force_exit):
            await asyncio.sleep(_POLL_SECONDS)


def build_server(app: FastAPI) -> GracefulServer:
    """The server of an application, with the application's settings."""
    state: ServiceState = app.state.service
    settings = state.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=build_protocol(settings.header_timeout_seconds, settings.body_timeout_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    return GracefulServer(config, state)


def serve(settings: Settings) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit status.

    Returns:
        0 after a graceful stop, 1 where the models could not be loaded.

    Raises:
        InvalidInputError: a file that the settings name is missing or wrong.
    """
    configure_logs(settings.log_level)
    app = create_app(settings)
    if settings.api_keys_file is None and not _is_loopback(settings.host):
        _logger.warning(
            "everybody who reaches this address may do everything: set ICM_LORA_API_KEYS_FILE",
            extra={"fields": {"host": settings.host}},
        )
    state: ServiceState = app.state.service
    server = build_server(app)
    state.on_loaded = _freeze_objects
    state.on_load_failure = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again once it has stopped: that is a success, not a kill.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if state.load_failed else 0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 1 if state.load_failed else 0


def _freeze_objects() -> None:
    """Has Python's collector never look at models and libraries again.

    It would for 0.3 s, with every thread stopped, as often as many objects were made since.
    """
    gc.collect()
    gc.freeze()


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
