"""`python -m service`: serves HTTP with the settings of the environment until told to stop."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys

import uvicorn

from service.api.app import create_app
from service.api.dependencies import ServiceState
from service.errors import InvalidInputError
from service.logs import configure_logs
from service.settings import Settings, read_settings

_USAGE_ERROR = 2
_logger = logging.getLogger("service")


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM turns not ready before it stops listening.

    The delay between the two lets a load balancer notice; then running requests finish
    (at most `drain_grace_seconds`) and the lifespan ends.
    """

    def __init__(self, config: uvicorn.Config, state: ServiceState) -> None:
        super().__init__(config)
        self.state = state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Not ready, delay, then uvicorn's own graceful shutdown."""
        self.state.begin_drain()
        waiting = self.state.settings.shutdown_delay_seconds
        while waiting > 0 and not self.force_exit:
            await asyncio.sleep(min(waiting, 0.1))
            waiting -= 0.1
        await super().shutdown(sockets)


def serve(settings: Settings) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit status.

    Returns:
        0 after a graceful stop, 1 where the models could not be loaded.
    """
    configure_logs(settings.log_level)
    app = create_app(settings)
    state: ServiceState = app.state.service
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_grace_seconds)),
    )
    server = GracefulServer(config, state)
    state.on_load_failure = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again once it has stopped: that is a success, not a kill.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if state.load_failed else 0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 1 if state.load_failed else 0


def main() -> int:
    """Reads the settings and serves; a wrong setting is one line and exit status 2."""
    try:
        settings = read_settings()
    except InvalidInputError as error:
        print(f"error: {error.detail}", file=sys.stderr)
        return _USAGE_ERROR
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
