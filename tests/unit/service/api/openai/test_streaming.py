"""Server-sent events: their end, their errors, and clients that leave."""

import asyncio
import gc
import json
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.api.openai.generation import RowItem
from service.api.openai.streaming import EventStream
from service.errors import DeadlineExceededError

SCOPE: dict[str, Any] = {"type": "http"}


class Chunk(BaseModel):
    """A chunk of the test's own."""

    number: int
    left_out: str | None = None


class Client:
    """What the server gives an application: leaves once `leaves_after` events came."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.leaves_after = leaves_after
        self.messages: list[Message] = []
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if self.leaves_after is not None and len(self.events) >= self.leaves_after:
            self._gone.set()

    @property
    def events(self) -> list[str]:
        text = b"".join(message.get("body", b"") for message in self.messages).decode()
        return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def stream(
    fail: Callable[[], Exception] | None = None, *, endless: bool = False
) -> tuple[EventStream, list[str]]:
    """A stream of two chunks, then a failure, nothing, or a wait for ever; and what was closed."""
    closed: list[str] = []

    async def run_rows() -> AsyncGenerator[RowItem, None]:
        try:
            await asyncio.Event().wait()
            yield  # type: ignore[misc]
        finally:
            closed.append("rows")

    async def make_chunks() -> AsyncGenerator[BaseModel, None]:
        try:
            yield Chunk(number=1)
            yield Chunk(number=2)
            if fail is not None:
                raise fail()
            if endless:
                await asyncio.Event().wait()
        finally:
            closed.append("chunks")

    return EventStream(make_chunks(), run_rows()), closed


async def serve(response: EventStream, client: Client) -> None:
    await response(SCOPE, client.receive, client.send)


def test_chunks_are_events_and_done_ends_them() -> None:
    response, closed = stream()
    client = Client()
    asyncio.run(serve(response, client))
    assert client.events == ['{"number":1}', '{"number":2}', "[DONE]"]
    assert client.messages[0]["status"] == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert client.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert closed == ["chunks"]


def test_an_error_is_the_last_event() -> None:
    response, _ = stream(lambda: DeadlineExceededError("too late"))
    client = Client()
    asyncio.run(serve(response, client))
    assert client.events[:2] == ['{"number":1}', '{"number":2}']
    [last] = client.events[2:]
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"
    assert client.messages[-1]["more_body"] is False


def test_a_bug_is_told_without_details_and_raised_for_the_log() -> None:
    response, _ = stream(lambda: ValueError("secret"))
    client = Client()
    with pytest.raises(ValueError, match="secret"):
        asyncio.run(serve(response, client))
    assert json.loads(client.events[-1])["error"]["code"] == "internal_error"
    assert "secret" not in client.events[-1]


def test_a_client_that_leaves_stops_what_runs() -> None:
    async def leave() -> list[str]:
        response, closed = stream(endless=True)
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(serve(response, Client(leaves_after=2)), 5)
        return closed

    assert asyncio.run(leave()) == ["chunks"]  # the rows had not begun: there was nothing to stop


def test_a_server_that_is_cancelled_stops_what_runs() -> None:
    async def cancel() -> list[str]:
        response, closed = stream(endless=True)
        client = Client()
        serving = asyncio.create_task(serve(response, client))
        while len(client.events) < 2:
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return closed

    assert asyncio.run(cancel()) == ["chunks"]


def test_a_client_that_leaves_while_an_event_is_sent_leaves_no_generator_behind() -> None:
    left: list[object] = []

    class Slow(Client):
        async def send(self, message: Message) -> None:
            await super().send(message)
            if len(self.events) == 2:
                await asyncio.Event().wait()  # its buffers are full

    async def leave() -> list[str]:
        hooks = sys.get_asyncgen_hooks()
        assert hooks.finalizer is not None
        sys.set_asyncgen_hooks(finalizer=left.append)  # told what nobody has closed
        try:
            response, closed = stream(endless=True)
            with pytest.raises(ClientDisconnect):
                await asyncio.wait_for(serve(response, Slow(leaves_after=2)), 5)
            gc.collect()
        finally:
            sys.set_asyncgen_hooks(finalizer=hooks.finalizer)
        return closed

    assert asyncio.run(leave()) == ["chunks"]
    assert not left
