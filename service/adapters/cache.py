"""Two cache tiers for adapter records: this process's memory, then Redis where configured.

Redis is an optimisation and never a condition: whatever happens to it, calls here return
(with `degraded` set) instead of raising, and within a bounded time.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from service.adapters.record import AdapterRecord
from service.adapters.redis_cache import LookupResult, RedisAnswer, RedisCache
from service.errors import InvalidAdapterError
from service.threads import Computations

__all__ = ["AdapterCache", "CacheObserver", "Lookup", "ProcessCache", "RedisCache"]

CacheTier = Literal["process", "redis"]


@runtime_checkable
class CacheObserver(Protocol):
    """Receives cache events, for metrics. Called on the event loop: must not block."""

    def on_lookup(self, tier: CacheTier, result: LookupResult) -> None:
        """A tier was asked; `error` is a corrupt value or a Redis that could not be asked."""

    def on_redis_state(self, up: bool) -> None:
        """Redis was found reachable or not for the first time, or changed between the two."""


@dataclass(frozen=True)
class Lookup:
    """Answer of the cache.

    Attributes:
        record: the adapter, or None where no tier that could be asked holds it.
        tier: where it was found.
        degraded: Redis is configured and could not be asked, or, for a record found in this
            process (Redis was not needed), is known to be down.
    """

    record: AdapterRecord | None
    tier: CacheTier | None
    degraded: bool


class ProcessCache:
    """Least-recently-used records, bounded by bytes, each with its own expiry.

    Not thread-safe: used from the event loop's thread only.

    Args:
        max_bytes: bound on the sum of `AdapterRecord.size_bytes`; a record larger than this
            is not kept at all.
        clock: monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[AdapterRecord, float]] = OrderedDict()
        self._size_bytes = 0
        self._tenant_bytes: Counter[str] = Counter()

    def __contains__(self, adapter_id: str) -> bool:
        """Whether there is a live record, which does not become the most recently used one."""
        entry = self._entries.get(adapter_id)
        return entry is not None and entry[1] > self._clock()

    def get(self, adapter_id: str) -> AdapterRecord | None:
        """The record, now the most recently used one; None where absent or expired."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            return None
        record, expires_at = entry
        if expires_at <= self._clock():
            self.delete(adapter_id)
            return None
        self._entries.move_to_end(adapter_id)
        return record

    def put(self, record: AdapterRecord, ttl_seconds: float) -> None:
        """Keeps a record for `ttl_seconds` (may be infinite), dropping the oldest to fit it."""
        self.delete(record.adapter_id)
        self._entries[record.adapter_id] = (record, self._clock() + ttl_seconds)
        self._size_bytes += record.size_bytes
        self._tenant_bytes[record.tenant] += record.size_bytes
        if self._size_bytes > self._max_bytes:
            self._drop_expired()
        if record.size_bytes > self._max_bytes:
            self.delete(record.adapter_id)
        while self._size_bytes > self._max_bytes:
            self.delete(next(iter(self._entries)))

    def delete(self, adapter_id: str) -> bool:
        """Drops a record; False where there was none."""
        entry = self._entries.pop(adapter_id, None)
        if entry is None:
            return False
        self._size_bytes -= entry[0].size_bytes
        self._tenant_bytes[entry[0].tenant] -= entry[0].size_bytes
        return True

    def ids(self) -> list[str]:
        """Ids of the live records, least recently used first."""
        self._drop_expired()
        return list(self._entries)

    def records(self) -> list[AdapterRecord]:
        """The live records, least recently used first."""
        self._drop_expired()
        return [record for record, _ in self._entries.values()]

    def size_bytes(self) -> int:
        """Sum of the live records' sizes in bytes."""
        self._drop_expired()
        return self._size_bytes

    def tenant_bytes(self, tenant: str) -> int:
        """Sum of the sizes of one tenant's live records in bytes."""
        self._drop_expired()
        return self._tenant_bytes[tenant]

    def seconds_to_expiry(self, tenant: str) -> float:
        """Time until the first of one tenant's records expires; infinite where there is none."""
        expiries = [
            expires_at for record, expires_at in self._entries.values() if record.tenant == tenant
        ]
        return min(expiries, default=math.inf) - self._clock()

    def __len__(self) -> int:
        """Number of live records."""
        self._drop_expired()
        return len(self._entries)

    def _drop_expired(self) -> None:
        now = self._clock()
        expired = [key for key, (_, expires_at) in self._entries.items() if expires_at <= now]
        for adapter_id in expired:
            self.delete(adapter_id)


class AdapterCache:
    """The process tier in front of the Redis tier.

    Args:
        process: first tier.
        redis: second tier, or None where not configured (which is no degradation).
        observer: receives the lookups of both tiers.
        check: blocking; raises `InvalidAdapterError` for a record that may not serve. What is
            stored here must pass it, and what Redis holds passes it before it is used.
        computations: where checks run, and the syntheses of what is not cached.
    """

    def __init__(
        self,
        process: ProcessCache,
        redis: RedisCache | None = None,
        observer: CacheObserver | None = None,
        check: Callable[[AdapterRecord], None] | None = None,
        computations: Computations | None = None,
    ) -> None:
        self.process = process
        self.redis = redis
        self._observer = observer
        self._check = check
        self.computations = computations or Computations()

    async def check(self, record: AdapterRecord) -> None:
        """Lets a record pass that may serve.

        Raises:
            InvalidAdapterError: it may not.
        """
        if self._check is not None:
            await self.computations.run(self._check, record)

    @property
    def degraded(self) -> bool:
        """Whether Redis is configured and known to be down; it is not asked."""
        return self.redis is not None and self.redis.is_down

    async def lookup(self, adapter_id: str) -> Lookup:
        """Looks in this process, then in Redis."""
        found = self.lookup_process(adapter_id)
        return found if found.record is not None else await self.lookup_redis(adapter_id)

    def lookup_process(self, adapter_id: str) -> Lookup:
        """Looks in this process only."""
        record = self.process.get(adapter_id)
        if self._observer is not None:
            self._observer.on_lookup("process", "miss" if record is None else "hit")
        return Lookup(record, None if record is None else "process", self.degraded)

    async def lookup_redis(self, adapter_id: str) -> Lookup:
        """Looks in Redis only; what is found also enters this process, with what time it has."""
        if self.redis is None:
            return Lookup(None, None, degraded=False)
        answer = await self.redis.get(adapter_id)
        if self._observer is not None:
            self._observer.on_lookup("redis", answer.result)
        return await self._admit(answer)

    async def claim(self, adapter_id: str) -> tuple[Lookup, str | None]:
        """Looks in Redis and takes the adapter's lock there, if it is free: then a token."""
        if self.redis is None:
            return Lookup(None, None, degraded=False), None
        claim = await self.redis.claim(adapter_id)
        return await self._admit(claim.answer), claim.token

    async def release(self, adapter_id: str, token: str) -> None:
        """Gives a lock back."""
        if self.redis is not None:
            await self.redis.release(adapter_id, token)

    async def store(self, record: AdapterRecord, ttl_seconds: float) -> bool:
        """Stores in both tiers; True (degraded) where a configured Redis did not take it."""
        self.process.put(record, ttl_seconds)
        return self.redis is not None and not await self.redis.put(record, ttl_seconds)

    async def delete(self, adapter_id: str) -> bool | None:
        """Deletes from both tiers: whether there was one, or None where that is unknown.

        None means that a configured Redis could not be asked: it may still hold the record
        until that expires. Other processes keep theirs until it expires, too.
        """
        in_process = self.process.delete(adapter_id)
        if self.redis is None:
            return in_process
        in_redis = await self.redis.delete(adapter_id)
        return None if in_redis is None else in_process or in_redis

    async def _admit(self, answer: RedisAnswer) -> Lookup:
        if answer.record is None:
            return Lookup(None, None, degraded=not answer.asked)
        try:
            await self.check(answer.record)
        except InvalidAdapterError:
            assert self.redis is not None, "Redis answered"
            await self.redis.reject(answer.record.adapter_id, "invalid")
            return Lookup(None, None, degraded=False)
        self.process.put(answer.record, answer.ttl_seconds)
        return Lookup(answer.record, "redis", degraded=False)

    async def close(self) -> None:
        """Closes the connections to Redis."""
        if self.redis is not None:
            await self.redis.close()
