"""The alias registry on a real Redis: long reads in a bound of their own, and so many names."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from service.adapters import registry
from service.adapters.alias_store import RedisAliasStore
from service.adapters.redis_cache import RedisCache, RedisUnavailableError
from service.adapters.registry import AliasRegistry
from service.errors import InvalidInputError
from tests.fixtures.adapter_records import LAYOUT, make_recipe
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis

RECIPE = make_recipe()
TENANT = "acme"

Scenario = Callable[[RedisCache, RedisAliasStore], Awaitable[None]]


def play(redis_server: RedisServer, scenario: Scenario, timeout_seconds: float = 2.0) -> None:
    async def main() -> None:
        redis = RedisCache(
            redis_server.url, LAYOUT, timeout_seconds=timeout_seconds, retry_seconds=60
        )
        try:
            await scenario(redis, RedisAliasStore(redis, redis.seal))
        finally:
            await redis.close()

    asyncio.run(main())


async def put(aliases: AliasRegistry, name: str, ttl_seconds: float | None = None) -> int:
    alias = await aliases.put(
        TENANT, name, RECIPE.adapter_id, recipe=RECIPE, ttl_seconds=ttl_seconds
    )
    return alias.generation


def test_many_names_of_many_tenants_are_restored(redis_server: RedisServer) -> None:
    async def scenario(redis: RedisCache, store: RedisAliasStore) -> None:
        before = AliasRegistry(store)
        names = {f"name-{number}" for number in range(700)}  # more than one step of a scan
        for name in names:
            await put(before, name)
        await before.put("other", "x", RECIPE.adapter_id, recipe=RECIPE)
        after = AliasRegistry(store)
        restored = await after.restore()
        assert {alias.name for alias in restored if alias.tenant == TENANT} == names
        assert len(restored) == 701
        assert not after.restore_failed

    play(redis_server, scenario)


def test_a_long_read_has_its_own_bound_and_leaves_the_breaker_alone(
    redis_server: RedisServer,
) -> None:
    async def slow(client: Redis) -> bool:
        for _ in range(6):
            await asyncio.sleep(0.1)
            await client.ping()
        return True

    async def scenario(redis: RedisCache, store: RedisAliasStore) -> None:
        assert await redis.scan(slow, 10)
        with pytest.raises(RedisUnavailableError):
            await redis.scan(slow, 0.15)
        assert (redis.is_down, redis.breaker_state) == (False, "closed")
        with pytest.raises(RedisUnavailableError):
            await redis.run(slow)
        assert (redis.is_down, redis.breaker_state) == (True, "open")
        started = time.monotonic()
        with pytest.raises(RedisUnavailableError):  # nobody waits for a Redis that is down
            await redis.scan(slow, 10)
        assert time.monotonic() - started < 0.1

    play(redis_server, scenario, timeout_seconds=0.3)


def test_the_bound_on_names_counts_those_that_a_restart_has_not_read(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_NAMES", 3)

    async def scenario(redis: RedisCache, store: RedisAliasStore) -> None:
        now = time.time()
        before = AliasRegistry(store, clock=lambda: now)
        for name in ("a", "b"):
            await put(before, name)
        await put(before, "brief", ttl_seconds=1)
        with pytest.raises(InvalidInputError, match="3 aliases"):
            await put(before, "d")

        after = AliasRegistry(store, clock=lambda: now)  # it has read none of them
        with pytest.raises(InvalidInputError, match="3 aliases"):
            await put(after, "d")
        assert await put(after, "a") == 2
        now += registry.MEMORY_SECONDS + 2
        later = AliasRegistry(store, clock=lambda: now)
        assert await put(later, "d") == 1  # in place of the one that ended long ago
        with pytest.raises(InvalidInputError, match="3 aliases"):
            await put(later, "e")

    play(redis_server, scenario)


def test_the_bound_on_names_holds_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_NAMES", 2)

    async def main() -> None:
        now = 1000.0
        aliases = AliasRegistry(clock=lambda: now)
        await put(aliases, "a")
        await put(aliases, "brief", ttl_seconds=1)
        with pytest.raises(InvalidInputError, match="2 aliases"):
            await put(aliases, "c")
        now += registry.MEMORY_SECONDS + 2
        assert await put(aliases, "c") == 1

    asyncio.run(main())
