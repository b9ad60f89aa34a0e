"""The server's side of a connection: a client that never finishes what it begins is cut off."""

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_MARGIN_SECONDS = 1.0
"""A body that is awaited gets its 408 first; this cuts off what nobody awaits any more."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a time for the head of a request, and one for its body.

    uvicorn itself waits for ever. The head must be there within `header_seconds` of the
    connection's opening, or of its own first byte on a connection that is kept alive. The body
    of a request that was answered before it was there (401, 413) is thrown away, and must end.
    """

    header_seconds: ClassVar[float]
    body_seconds: ClassVar[float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._awaited: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._await("head")

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer is out."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._await(None)

    def _look(self) -> None:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._await("body")
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._await("head")
        else:
            self._await(None)

    def _await(self, part: str | None) -> None:
        if part == self._awaited:
            return
        self._awaited = part
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            seconds = self.header_seconds if part == "head" else self.body_seconds
            self._timer = self.loop.call_later(seconds, self.transport.close)


def build_protocol(header_seconds: float, body_seconds: float) -> type[TimedProtocol]:
    """The protocol with its times, as uvicorn takes it (a class)."""
    times = {"header_seconds": header_seconds, "body_seconds": body_seconds + _MARGIN_SECONDS}
    return type(TimedProtocol.__name__, (TimedProtocol,), times)
