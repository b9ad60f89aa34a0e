"""Adapter records in Redis: bounded in time, never in the way."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.adapters.record import AdapterRecord
from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.layout import AdapterLayout

KEY_PREFIX = "icm-lora:adapter:v1:"
"""Prefix of every key; the version changes when `AdapterRecord.to_bytes` does."""

LookupResult = Literal["hit", "miss", "error"]

MAX_CONNECTIONS = 16
"""Of one process; more concurrent calls wait for each other."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisAnswer:
    """Answer of `RedisCache.get`.

    Attributes:
        result: `error` is a corrupt value, or a Redis that could not be asked.
        asked: False where Redis could not be asked.
        record: set for a hit.
        ttl_seconds: remaining lifetime of the record.
    """

    result: LookupResult
    asked: bool = True
    record: AdapterRecord | None = None
    ttl_seconds: float = 0.0


class RedisCache:
    """Records in Redis, as safetensors bytes with an expiry; no call raises for its trouble.

    Each call ends within `timeout_seconds`, connecting included. After a failure Redis counts
    as down: calls return at once for `retry_seconds`, then one call at a time tries again.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        layouts: records of any other layout are refused.
        timeout_seconds: bound of one call.
        retry_seconds: pause after a failure.
        on_state: called with whether Redis is up: at the first answer or failure, then at
            each change. Runs on the event loop: must not block.
        clock: monotonic seconds.

    Raises:
        InvalidInputError: the URL cannot be understood.
    """

    def __init__(
        self,
        url: str,
        *layouts: AdapterLayout,
        timeout_seconds: float = 0.25,
        retry_seconds: float = 2.0,
        on_state: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from_url = parse_url(url)
        except ValueError:  # its message may quote a part of the password
            raise InvalidInputError(
                "the Redis URL cannot be understood: write it as redis://host:port/db"
            ) from None
        options: dict[str, Any] = {
            **from_url,  # ours come after: a URL cannot lift the bound on a call
            "max_connections": MAX_CONNECTIONS,
            "timeout": None,  # of waiting for a free connection: `_ask` bounds the whole call
            "socket_connect_timeout": timeout_seconds,
            "socket_timeout": timeout_seconds,
            # One retry replaces a pooled connection that a restarted server has closed.
            "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            "protocol": 2,  # spares the HELLO round trip; nothing of RESP3 is used
        }
        self._client = Redis.from_pool(BlockingConnectionPool(**options))
        self._layouts = layouts
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds
        self._on_state = on_state
        self._clock = clock
        self._up: bool | None = None
        self._retry_at = -math.inf

    @property
    def is_down(self) -> bool:
        """Whether the last call failed; Redis is not asked."""
        return self._up is False

    async def get(self, adapter_id: str) -> RedisAnswer:
        """Reads a record with its remaining lifetime; a corrupt value is deleted."""
        key = KEY_PREFIX + adapter_id

        async def fetch() -> tuple[bytes | None, int]:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.get(key)
                pipeline.pttl(key)
                content, remaining_ms = await pipeline.execute()
            return content, remaining_ms

        try:
            content, remaining_ms = await self._ask(fetch)
        except _RedisUnavailableError:
            return RedisAnswer("error", asked=False)
        if content is None:
            return RedisAnswer("miss")
        try:
            record = self._read(content)
            if record.adapter_id != adapter_id:
                raise InvalidAdapterError(f"the record is that of adapter {record.adapter_id}")
        except InvalidAdapterError as error:
            logger.warning("deleting the corrupt value of %s from Redis: %s", key, error)
            await self.delete(adapter_id)
            return RedisAnswer("error")
        no_expiry = remaining_ms == -1  # PTTL: "-1 if the key exists but has no expire"
        ttl_seconds = math.inf if no_expiry else remaining_ms / 1000
        return RedisAnswer("hit", record=record, ttl_seconds=ttl_seconds)

    async def put(self, record: AdapterRecord, ttl_seconds: float) -> bool:
        """Writes a record that expires after `ttl_seconds`; False where Redis did not take it."""
        key, expiry_ms = KEY_PREFIX + record.adapter_id, max(1, round(ttl_seconds * 1000))
        try:
            await self._ask(lambda: self._client.set(key, record.to_bytes(), px=expiry_ms))
        except _RedisUnavailableError:
            return False
        return True

    async def delete(self, adapter_id: str) -> bool | None:
        """Deletes a record: whether there was one, or None where Redis could not be asked."""
        try:
            return await self._ask(lambda: self._client.delete(KEY_PREFIX + adapter_id)) > 0
        except _RedisUnavailableError:
            return None

    async def ping(self) -> bool:
        """Whether Redis answers; within the pause after a failure it is not asked."""
        try:
            await self._ask(lambda: self._client.ping())
        except _RedisUnavailableError:
            return False
        return True

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    def _read(self, content: bytes) -> AdapterRecord:
        *others, last = self._layouts
        for layout in others:
            with contextlib.suppress(InvalidAdapterError):
                return AdapterRecord.from_bytes(content, layout)
        return AdapterRecord.from_bytes(content, last)

    async def _ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        if self.is_down:
            if self._clock() < self._retry_at:
                raise _RedisUnavailableError
            self._retry_at = self._clock() + self._retry_seconds  # others skip meanwhile
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answer = await operation()
        except (RedisError, OSError) as error:  # the builtin TimeoutError is an OSError
            self._retry_at = self._clock() + self._retry_seconds
            self._set_state(up=False, reason=f"{type(error).__name__}: {error}")
            raise _RedisUnavailableError from error
        self._set_state(up=True, reason="it answers")
        return answer

    def _set_state(self, *, up: bool, reason: str) -> None:
        if up is self._up:
            return
        self._up = up
        level = logging.INFO if up else logging.WARNING
        logger.log(level, "Redis is %s: %s", "up" if up else "down", reason)
        if self._on_state is not None:
            self._on_state(up)


class _RedisUnavailableError(Exception):
    """Redis failed, or is within its pause after a failure."""
