"""The door of a service that shuts down: who is in finishes, who comes is sent elsewhere."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.auth import find_principal
from service.api.dependencies import ServiceState
from service.api.error_handlers import problem_response
from service.errors import NotReadyError

_REASON = "draining"


class DrainGate:
    """Pure ASGI middleware: counts running requests, and answers 503 once the door is closed.

    The connection is closed with the answer, so that a client's next try meets another replica.

    Args:
        app: what answers.
        state: of the application.
        on_rejection: told of each refusal, for metrics.
    """

    def __init__(
        self, app: ASGIApp, state: ServiceState, on_rejection: Callable[[str], None]
    ) -> None:
        self.app = app
        self.state = state
        self.on_rejection = on_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http" or find_principal(scope) is None:  # probes are answered
            await self.app(scope, receive, send)
            return
        if self.state.refuses_requests:
            self.on_rejection(_REASON)
            error = NotReadyError("the service is shutting down: try another replica")
            response = problem_response(error, scope["path"], headers={"Connection": "close"})
            await response(scope, receive, send)
            return
        self.state.running_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.state.running_requests -= 1
