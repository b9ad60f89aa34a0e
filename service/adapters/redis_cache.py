"""Adapter records in Redis: bounded in time, never in the way."""

import asyncio
import contextlib
import logging
import math
import secrets
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

from service.adapters.breaker import Breaker, BreakerState
from service.adapters.record import AdapterRecord
from service.adapters.redis_values import (
    SCHEMA_VERSION,
    RejectedValueError,
    RejectionReason,
    ValueSeal,
)
from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.layout import AdapterLayout

KEY_PREFIX = f"icm-lora:adapter:v{SCHEMA_VERSION}:"
"""Prefix of every record's key; releases of another schema do not see each other's."""

LOCK_PREFIX = f"icm-lora:lock:v{SCHEMA_VERSION}:"
"""Prefix of the key that says: somebody generates this adapter now."""

_RELEASE = (
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"
)
"""Deletes a lock that is still ours, and nobody else's."""

LookupResult = Literal["hit", "miss", "error"]

MAX_CONNECTIONS = 16
"""Of one process; more concurrent calls wait for each other."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisAnswer:
    """Answer of `RedisCache.get`.

    Attributes:
        result: `error` is a value not to be trusted (deleted by now), or a Redis that could
            not be asked.
        asked: False where Redis could not be asked.
        record: set for a hit.
        ttl_seconds: remaining lifetime of the record.
    """

    result: LookupResult
    asked: bool = True
    record: AdapterRecord | None = None
    ttl_seconds: float = 0.0


@dataclass(frozen=True)
class Claim:
    """Answer of `RedisCache.claim`.

    Attributes:
        answer: the record that was there meanwhile, or why there is none.
        token: proof that the lock is ours; None where another process holds it.
    """

    answer: RedisAnswer
    token: str | None = None


class RedisCache:
    """Records in Redis, sealed (`redis_values`), with an expiry; no call raises for its trouble.

    Each call ends within `timeout_seconds`, connecting included. After a failure the breaker
    opens: calls return at once for `retry_seconds`, then one call at a time tries again.

    Locks let processes agree on who generates an adapter. They are a courtesy: one that is lost
    or expired costs a second generation of the same bytes.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        layouts: records of any other layout are refused.
        timeout_seconds: bound of one call.
        retry_seconds: pause after a failure.
        secret: signs values; empty: values carry a checksum, no authentication.
        lock_seconds: life of a lock whose holder died, and the longest wait for a lock.
        on_state: called with whether Redis is up: at the first answer or failure, then at
            each change. Runs on the event loop: must not block.
        on_breaker: called with each new state of the breaker.
        on_rejected: called with the reason for each value that was deleted and not used.
        clock: monotonic seconds.

    Attributes:
        seal: of every value, other stores' too.

    Raises:
        InvalidInputError: the URL cannot be understood.
    """

    def __init__(
        self,
        url: str,
        *layouts: AdapterLayout,
        timeout_seconds: float = 0.25,
        retry_seconds: float = 2.0,
        secret: bytes = b"",
        lock_seconds: float = 2.0,
        on_state: Callable[[bool], None] | None = None,
        on_breaker: Callable[[BreakerState], None] | None = None,
        on_rejected: Callable[[RejectionReason], None] | None = None,
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
        self.seal = ValueSeal(secret)
        self.lock_seconds = lock_seconds
        self._lock_ms = max(1, round(lock_seconds * 1000))
        self._breaker = Breaker(retry_seconds, on_breaker, clock)
        self._on_state = on_state
        self._on_rejected = on_rejected
        self._up: bool | None = None

    @property
    def is_down(self) -> bool:
        """Whether the last call failed; Redis is not asked."""
        return self._up is False

    @property
    def breaker_state(self) -> BreakerState:
        """State of the breaker in front of Redis."""
        return self._breaker.state

    async def get(self, adapter_id: str) -> RedisAnswer:
        """Reads a record with its remaining lifetime; a value not to be trusted is deleted."""
        key = KEY_PREFIX + adapter_id

        async def fetch() -> tuple[bytes | None, int]:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.get(key)
                pipeline.pttl(key)
                content, remaining_ms = await pipeline.execute()
            return content, remaining_ms

        try:
            value, remaining_ms = await self._ask(fetch)
        except RedisUnavailableError:
            return RedisAnswer("error", asked=False)
        return await self._judge(adapter_id, value, remaining_ms)

    async def claim(self, adapter_id: str) -> Claim:
        """Takes the adapter's lock if it is free, and looks whether the record is there.

        In this order and in one round trip: who gets the lock without a record is the one to
        generate it. A lock taken where the record is there is given back at once.
        """
        key, lock, token = KEY_PREFIX + adapter_id, LOCK_PREFIX + adapter_id, secrets.token_hex(16)

        async def fetch() -> tuple[bool, bytes | None, int]:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.set(lock, token, nx=True, px=self._lock_ms)
                pipeline.get(key)
                pipeline.pttl(key)
                taken, content, remaining_ms = await pipeline.execute()
            return bool(taken), content, remaining_ms

        try:
            taken, value, remaining_ms = await self._ask(fetch)
        except RedisUnavailableError:
            return Claim(RedisAnswer("error", asked=False))
        answer = await self._judge(adapter_id, value, remaining_ms)
        if taken and answer.record is not None:
            await self.release(adapter_id, token)
            return Claim(answer)
        return Claim(answer, token if taken else None)

    async def release(self, adapter_id: str, token: str) -> None:
        """Gives a lock back, where it is still ours."""
        with contextlib.suppress(RedisUnavailableError):
            await self._ask(lambda: self._client.eval(_RELEASE, 1, LOCK_PREFIX + adapter_id, token))

    async def put(self, record: AdapterRecord, ttl_seconds: float) -> bool:
        """Writes a record that expires after `ttl_seconds`; False where Redis did not take it."""
        adapter_id, expiry_ms = record.adapter_id, max(1, round(ttl_seconds * 1000))
        value = self.seal.seal(adapter_id, record.to_bytes())
        try:
            await self._ask(lambda: self._client.set(KEY_PREFIX + adapter_id, value, px=expiry_ms))
        except RedisUnavailableError:
            return False
        return True

    def count_rejected(self, reason: RejectionReason) -> None:
        """Counts a value that may not be used."""
        if self._on_rejected is not None:
            self._on_rejected(reason)

    async def reject(self, adapter_id: str, reason: RejectionReason) -> None:
        """Deletes a value that may not be used, and counts it."""
        logger.warning(
            "deleting the value of adapter %s from Redis, which is not to be trusted: %s",
            adapter_id,
            reason,
        )
        self.count_rejected(reason)
        await self.delete(adapter_id)

    async def delete(self, adapter_id: str) -> bool | None:
        """Deletes a record: whether there was one, or None where Redis could not be asked."""
        try:
            return await self._ask(lambda: self._client.delete(KEY_PREFIX + adapter_id)) > 0
        except RedisUnavailableError:
            return None

    async def ping(self) -> bool:
        """Whether Redis answers; within the pause after a failure it is not asked."""
        try:
            await self._ask(lambda: self._client.ping())
        except RedisUnavailableError:
            return False
        return True

    async def run(self, operation: Callable[["Redis"], Awaitable[T]]) -> T:
        """Runs another store's operation on the same connections, bound and breaker.

        Raises:
            RedisUnavailableError: Redis cannot be asked.
        """
        return await self._ask(lambda: operation(self._client))

    async def scan(self, operation: Callable[["Redis"], Awaitable[T]], timeout_seconds: float) -> T:
        """Runs another store's long read in a bound of its own, on the same connections.

        That it takes long does not open the breaker in front of the short calls.

        Raises:
            RedisUnavailableError: Redis is down, or the read was not done in time.
        """
        if self.is_down:
            raise RedisUnavailableError
        try:
            async with asyncio.timeout(timeout_seconds):
                return await operation(self._client)
        except (RedisError, OSError) as error:
            raise RedisUnavailableError from error

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _judge(self, adapter_id: str, value: bytes | None, remaining_ms: int) -> RedisAnswer:
        if value is None:
            return RedisAnswer("miss")
        try:
            record = self._read(self.seal.open(adapter_id, value))
            if record.adapter_id != adapter_id:
                raise RejectedValueError("wrong_key")
        except RejectedValueError as error:
            await self.reject(adapter_id, error.reason)
            return RedisAnswer("error")
        no_expiry = remaining_ms == -1  # PTTL: "-1 if the key exists but has no expire"
        ttl_seconds = math.inf if no_expiry else remaining_ms / 1000
        return RedisAnswer("hit", record=record, ttl_seconds=ttl_seconds)

    def _read(self, content: bytes) -> AdapterRecord:
        for layout in self._layouts:
            with contextlib.suppress(InvalidAdapterError):
                return AdapterRecord.from_bytes(content, layout)
        raise RejectedValueError("invalid")

    async def _ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        if not self._breaker.allow():
            raise RedisUnavailableError
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answer = await operation()
        except (RedisError, OSError) as error:  # the builtin TimeoutError is an OSError
            self._breaker.record_failure()
            self._set_state(up=False, reason=f"{type(error).__name__}: {error}")
            raise RedisUnavailableError from error
        self._breaker.record_success()
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


class RedisUnavailableError(Exception):
    """Redis failed, or is within its pause after a failure."""
