"""Aliases in Redis: one hash per tenant, changed by compare-and-set of whole values."""

import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from service.adapters.alias import Alias
from service.adapters.redis_cache import RedisCache
from service.adapters.redis_values import RejectedValueError, ValueSeal
from service.errors import InvalidInputError

KEY_PREFIX = "icm-lora:aliases:v1:"
"""Prefix of the hash of a tenant's aliases; its fields are their names."""

SCAN_SECONDS = 10.0
"""Bound on reading all aliases of a tenant, or all tenants: many short calls in a row."""

_SCAN_COUNT = 256

_COMPARE_AND_SET = """
local current = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if current == ARGV[2] then
  if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1])
  else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
  return ARGV[3]
end
return current
"""
"""Writes a field where it still holds what was read; returns what it holds then ('': nothing)."""

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """What Redis holds of a name.

    Attributes:
        value: the bytes there; empty where there are none.
        alias: what they mean; None where there are none, or none to be trusted.
    """

    value: bytes = b""
    alias: Alias | None = None


class RedisAliasStore:
    """Reads and writes sealed aliases; every call raises `RedisUnavailableError` for its trouble.

    Args:
        redis: gives connections, the bound on a call and the breaker.
        seal: proves that a value is ours and belongs to its name.
    """

    def __init__(self, redis: RedisCache, seal: ValueSeal) -> None:
        self._redis = redis
        self._seal = seal

    async def read(self, tenant: str, name: str) -> Stored:
        """What is stored of a name."""
        value = await self._ask(tenant, lambda client, key: client.hget(key, name))
        return self._open(tenant, name, _read_bytes(value))

    async def read_all(self, tenant: str) -> dict[str, Stored]:
        """What is stored of all names of a tenant."""

        async def scan(client: Redis, key: str) -> dict[bytes, bytes]:
            pairs = client.hscan_iter(key, count=_SCAN_COUNT)
            return {_read_bytes(name): value async for name, value in pairs}

        held = await self._ask(tenant, scan, self._scan)
        values = {name.decode(errors="replace"): value for name, value in held.items()}
        return {name: self._open(tenant, name, _read_bytes(v)) for name, v in values.items()}

    async def count_names(self, tenant: str) -> int:
        """How many names of a tenant are stored."""
        return await self._ask(tenant, lambda client, key: client.hlen(key))

    async def list_tenants(self) -> list[str]:
        """Tenants that have aliases."""

        async def scan(client: Redis) -> list[str]:
            keys = client.scan_iter(match=f"{KEY_PREFIX}*", count=_SCAN_COUNT)
            return [key.decode(errors="replace") async for key in keys]

        return sorted(key.removeprefix(KEY_PREFIX) for key in set(await self._scan(scan)))

    async def compare_and_set(self, old: Stored, new: Alias) -> Stored:
        """Writes where Redis still holds `old`; what it holds then, which is `new` on success."""
        value = self._seal.seal(_digest_key(new.tenant, new.name), new.to_bytes())
        return await self._swap(new.tenant, new.name, old.value, value)

    async def forget(self, tenant: str, name: str, old: Stored) -> None:
        """Removes a name where Redis still holds `old`."""
        await self._swap(tenant, name, old.value, b"")

    async def _swap(self, tenant: str, name: str, old: bytes, new: bytes) -> Stored:
        held = await self._ask(
            tenant, lambda client, key: client.eval(_COMPARE_AND_SET, 1, key, name, old, new)
        )
        return self._open(tenant, name, _read_bytes(held))

    async def _scan(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        return await self._redis.scan(operation, SCAN_SECONDS)

    async def _ask(
        self,
        tenant: str,
        operation: Callable[[Redis, str], Awaitable[T]],
        ask: Callable[[Callable[[Redis], Awaitable[T]]], Awaitable[T]] | None = None,
    ) -> T:
        key = KEY_PREFIX + tenant

        async def run(client: Redis) -> T:
            try:
                return await operation(client, key)
            except ResponseError as error:
                if "WRONGTYPE" not in str(error):
                    raise
                _logger.warning("deleting a key of Redis that is no hash of aliases")
                await client.delete(key)
                return await operation(client, key)

        return await (ask or self._redis.run)(run)

    def _open(self, tenant: str, name: str, value: bytes) -> Stored:
        if not value:
            return Stored()
        try:
            alias = Alias.from_bytes(self._seal.open(_digest_key(tenant, name), value))
            if (alias.tenant, alias.name) != (tenant, name):
                raise InvalidInputError("it is another alias's")
        except (RejectedValueError, InvalidInputError) as error:
            reason = error.reason if isinstance(error, RejectedValueError) else "invalid"
            _logger.warning("an alias in Redis is not to be trusted and not used: %s", reason)
            self._redis.count_rejected(reason)
            return Stored(value)
        return Stored(value, alias)


def _digest_key(tenant: str, name: str) -> str:
    """What a value is sealed to: 32 bytes that no adapter has as its id."""
    return hashlib.sha256(f"{KEY_PREFIX}{tenant}\n{name}".encode()).hexdigest()


def _read_bytes(answer: object) -> bytes:
    """What Redis answered, which is bytes: the client is not told to decode; b"" for nothing."""
    assert answer is None or isinstance(answer, bytes), "the client decodes what it should not"
    return answer or b""
