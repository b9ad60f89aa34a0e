"""Redis dies, freezes or refuses: calls are bounded in time, and it is found again."""

import asyncio
import random

import pytest
from redis import Redis

from service.adapters.redis_cache import MAX_CONNECTIONS, RedisCache
from tests.fixtures.adapter_records import make_record
from tests.fixtures.redis_cache_kit import (
    RECORD,
    RETRY_SECONDS,
    Clock,
    Events,
    measure,
    run_with_cache,
    wait_until_up,
)
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis


def test_a_killed_server_is_skipped_then_found_again(redis_server: RedisServer) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        assert await cache.ping()
        redis_server.stop()

        answer = await cache.get(RECORD.adapter_id)
        assert (answer.result, answer.asked) == ("error", False)
        assert await cache.put(RECORD, ttl_seconds=60) is False
        assert await cache.delete(RECORD.adapter_id) is None
        assert await cache.ping() is False
        assert cache.is_down

        redis_server.start()
        await wait_until_up(cache)
        assert await cache.put(RECORD, ttl_seconds=60)
        assert (await cache.get(RECORD.adapter_id)).result == "hit"
        assert events.states == [True, False, True]

    run_with_cache(redis_server.url, scenario)


def test_a_frozen_server_costs_one_timeout_then_nothing(redis_server: RedisServer) -> None:
    timeout_seconds, clock = 0.5, Clock()

    async def scenario(cache: RedisCache, events: Events) -> None:
        await wait_until_up(cache)
        redis_server.pause()

        first = await measure(cache.get(RECORD.adapter_id))
        skipped = await measure(cache.get(RECORD.adapter_id))
        clock.now += RETRY_SECONDS
        crowd = [asyncio.create_task(measure(cache.ping())) for _ in range(10)]
        waits = sorted(await asyncio.gather(*crowd))

        assert first >= timeout_seconds > skipped
        assert waits[-1] >= timeout_seconds, "one call tries again"
        assert waits[-2] < timeout_seconds, "the others do not wait for it"

        redis_server.resume()
        clock.now += RETRY_SECONDS
        await wait_until_up(cache)
        assert events.states == [True, False, True]
        assert events.breaker == ["open", "half_open", "open", "half_open", "closed"]

    run_with_cache(redis_server.url, scenario, timeout_seconds=timeout_seconds, clock=clock)


def test_the_bound_holds_for_the_whole_call(redis_server: RedisServer) -> None:
    """Also where the URL gives the sockets more time, and while waiting for a connection."""
    url = f"{redis_server.url}?socket_timeout=60&socket_connect_timeout=60"

    async def scenario(cache: RedisCache, events: Events) -> None:
        redis_server.pause()
        calls = [measure(cache.get(RECORD.adapter_id)) for _ in range(3 * MAX_CONNECTIONS)]
        assert max(await asyncio.gather(*calls)) < 30
        assert cache.is_down

    run_with_cache(url, scenario, timeout_seconds=0.25)


def test_a_server_that_never_was_is_an_answer_too(redis_server: RedisServer) -> None:
    redis_server.stop()

    async def scenario(cache: RedisCache, events: Events) -> None:
        assert (await cache.get(RECORD.adapter_id)).asked is False
        assert events.states == [False]

    run_with_cache(redis_server.url, scenario)


def test_a_restart_between_two_calls_goes_unnoticed(redis_server: RedisServer) -> None:
    """The pooled connection is dead, the server is not: no degradation."""

    async def scenario(cache: RedisCache, events: Events) -> None:
        await cache.put(RECORD, ttl_seconds=60)
        redis_server.stop()
        redis_server.start()
        assert (await cache.get(RECORD.adapter_id)).result == "miss"
        assert events.states == [True]

    run_with_cache(redis_server.url, scenario)


def test_a_refusing_server_counts_as_down(redis_server: RedisServer, inspector: Redis) -> None:
    inspector.config_set("requirepass", "secret")

    async def scenario(cache: RedisCache, events: Events) -> None:
        assert (await cache.get(RECORD.adapter_id)).asked is False

    run_with_cache(redis_server.url, scenario)


def test_cancelled_calls_do_not_mix_up_replies(redis_server: RedisServer) -> None:
    records = [make_record(seed) for seed in range(8)]
    random.seed(0)

    async def scenario(cache: RedisCache, events: Events) -> None:
        for record in records:
            await cache.put(record, ttl_seconds=60)
        for _ in range(40):
            calls = [asyncio.create_task(cache.get(record.adapter_id)) for record in records]
            for _ in range(random.randrange(12)):
                await asyncio.sleep(0)
            for call in random.sample(calls, 4):
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            for call, record in zip(calls, records, strict=True):
                if not call.cancelled():
                    found = call.result().record
                    assert found is not None
                    assert found.adapter_id == record.adapter_id
        assert events.states == [True]

    run_with_cache(redis_server.url, scenario)
