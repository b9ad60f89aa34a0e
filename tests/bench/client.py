"""A lean HTTP/1.1 client on asyncio: the same few microseconds a request for every server.

It keeps connections open, reads bodies by length or in chunks, and hands server-sent events on
as they arrive. A benchmark of two servers on one machine shares the processor with its client,
so the client must cost little and cost both the same.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LIMIT_BYTES = 2**24


@dataclass(frozen=True)
class Reply:
    """An answer that was read to its end.

    Attributes:
        status: of HTTP.
        headers: names in lower case.
        body: bytes.
        seconds: from before the request was sent to the body's end.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    broken: bool = False


@dataclass
class _Head:
    status: int
    headers: dict[str, str] = field(default_factory=dict)


class HttpClient:
    """Requests to one server.

    Args:
        url: of the server, without a path.
        headers: sent with every request, say a key.
        timeout_seconds: longest time for one request.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        assert parts.port is not None, url
        self.url = url
        self._host, self._port = parts.hostname, parts.port
        self._headers = dict(headers or {})
        self._timeout_seconds = timeout_seconds
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open."""
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Sends a request and reads the whole answer.

        Raises:
            OSError: the server cannot be reached or broke off.
            asyncio.IncompleteReadError: it broke off within its answer.
            TimeoutError: it took too long.
        """
        started = time.perf_counter()
        async with (
            asyncio.timeout(self._timeout_seconds),
            self._exchange(method, path, body, headers or {}) as (connection, head),
        ):
            content = b"".join([part async for part in _read_body(connection, head)])
        return Reply(head.status, head.headers, content, time.perf_counter() - started)

    async def post(self, path: str, body: Mapping[str, Any] | bytes) -> Reply:
        """`request` with a JSON body."""
        return await self.request("POST", path, body)

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[tuple[float, dict[str, Any]]]:
        """Server-sent events of an answer as (seconds since the request, data), `[DONE]` left out.

        Raises:
            RefusedError: the answer is no stream.
        """
        started = time.perf_counter()
        async with (
            asyncio.timeout(self._timeout_seconds),
            self._exchange("POST", path, body, {}) as (connection, head),
        ):
            if "text/event-stream" not in head.headers.get("content-type", ""):
                content = b"".join([part async for part in _read_body(connection, head)])
                raise RefusedError(
                    Reply(head.status, head.headers, content, time.perf_counter() - started)
                )
            waiting = b""
            async for part in _read_body(connection, head):
                now = time.perf_counter() - started
                waiting = (waiting + part).replace(b"\r\n", b"\n")
                while b"\n\n" in waiting:
                    event, waiting = waiting.split(b"\n\n", 1)
                    data = b"\n".join(
                        line[5:].strip() for line in event.split(b"\n") if line[:5] == b"data:"
                    )
                    if data and data != b"[DONE]":
                        yield now, json.loads(data)

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None,
        headers: Mapping[str, str],
    ) -> AsyncIterator[tuple[_Connection, _Head]]:
        content = body if isinstance(body, bytes) else b"" if body is None else _encode(body)
        lines = {
            "Host": f"{self._host}:{self._port}",
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **self._headers,
            **headers,
        }
        message = f"{method} {path} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in lines.items()
        )
        connection, head = await self._send(message.encode("latin-1") + b"\r\n" + content)
        connection.broken = True  # until the answer was read to its end
        try:
            yield connection, head
            connection.broken = head.headers.get("connection", "").lower() == "close"
        finally:
            if connection.broken:
                connection.writer.close()
            else:
                self._idle.append(connection)

    async def _send(self, message: bytes) -> tuple[_Connection, _Head]:
        """On an idle connection, or on a new one where the server has closed that meanwhile."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reader.at_eof() or connection.writer.is_closing():
                connection.writer.close()
                continue
            try:
                return connection, await _converse(connection, message)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                connection.writer.close()
                if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                    raise
            except BaseException:
                connection.writer.close()
                raise
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LIMIT_BYTES)
        connection = _Connection(reader, writer)
        try:
            return connection, await _converse(connection, message)
        except BaseException:
            writer.close()
            raise


class RefusedError(Exception):
    """An answer that is no stream where one was asked for."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.status}: {reply.body[:500].decode(errors='replace')}")
        self.reply = reply


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def _converse(connection: _Connection, message: bytes) -> _Head:
    connection.writer.write(message)
    await connection.writer.drain()
    raw = await connection.reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").split("\r\n")
    head = _Head(int(first.split(" ", 2)[1]))
    for line in lines:
        name, _, value = line.partition(":")
        if name:
            head.headers[name.strip().lower()] = value.strip()
    return head


async def _read_body(connection: _Connection, head: _Head) -> AsyncIterator[bytes]:
    reader = connection.reader
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif (length := int(head.headers.get("content-length", "0"))) > 0:
        yield await reader.readexactly(length)
