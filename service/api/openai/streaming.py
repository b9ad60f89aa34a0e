"""Server-sent events as OpenAI's API sends them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.disconnects import wait_for_disconnect
from service.api.openai.errors import render_error
from service.api.openai.generation import RowStream
from service.errors import IcmLoraError

EVENT_MEDIA_TYPE = "text/event-stream"
DONE = "data: [DONE]\n\n"


class EventStream(Response):
    """Sends chunks as events; once the client leaves, the rows behind them stop.

    An error after the first chunk becomes an event of its own, and ends the stream without
    `[DONE]`: the status has been sent already.

    Args:
        chunks: what to send, made from `rows`.
        rows: what runs.
    """

    media_type = EVENT_MEDIA_TYPE

    def __init__(self, chunks: AsyncGenerator[BaseModel, None], rows: RowStream) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # nobody knows it yet
        self._chunks = chunks
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all, or until the client has gone."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            sending.result()
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._chunks.aclose()
            await self._rows.aclose()

    async def _send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        async with aclosing(self._render()) as events:
            async for event in events:
                body = {"type": "http.response.body", "body": event.encode(), "more_body": True}
                await send(body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _render(self) -> AsyncGenerator[str, None]:
        try:
            async for chunk in self._chunks:
                yield render_event(chunk)
            yield DONE
        except IcmLoraError as error:
            yield render_event(render_error(error))
        except Exception:
            yield render_event(render_error(IcmLoraError("an unexpected error happened")))
            raise  # the middleware logs it


def render_event(content: BaseModel) -> str:
    """One event; what was not set is left out."""
    return f"data: {content.model_dump_json(exclude_unset=True)}\n\n"
