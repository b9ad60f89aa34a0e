"""One generation for a stampede over several processes, against a real redis-server."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
from redis import Redis

from service.adapters.cache import AdapterCache, ProcessCache
from service.adapters.provider import AdapterProvider
from service.adapters.redis_cache import LOCK_PREFIX, RedisCache
from service.errors import InvalidAdapterError
from tests.fixtures.adapter_records import LAYOUT, HeldSynthesizer, make_recipe
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis
LOCK_SECONDS = 0.5
STAMPEDE = """
import asyncio, json, sys, time
from tests.integration.test_single_flight import make_replica
from tests.fixtures.adapter_records import make_recipe

async def main(url, start_at):
    provider, synthesizer = make_replica(url, lock_seconds=20.0)
    await provider._cache.redis.ping()
    synthesizer.gate.clear()
    asyncio.get_running_loop().call_later(start_at - time.time() + 0.3, synthesizer.gate.set)
    await asyncio.sleep(start_at - time.time())
    seeds = [0, 1, 2, 3] * 5
    provided = await asyncio.gather(
        *(provider.provide(make_recipe(seed), ttl_seconds=60) for seed in seeds)
    )
    vectors = {item.record.adapter_id: item.record.vector_sha256 for item in provided}
    generated = [recipe.seed for recipe in synthesizer.recipes]
    await provider.close()
    print(json.dumps({"generated": generated, "vectors": vectors}))

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


def make_replica(
    url: str, *, lock_seconds: float = LOCK_SECONDS
) -> tuple[AdapterProvider, HeldSynthesizer]:
    """A process's worth of provider."""
    synthesizer = HeldSynthesizer()
    redis = RedisCache(url, LAYOUT, timeout_seconds=10, lock_seconds=lock_seconds)
    cache = AdapterCache(ProcessCache(max_bytes=100_000), redis)
    return AdapterProvider(synthesizer, cache), synthesizer


Replica = tuple[AdapterProvider, HeldSynthesizer]


def run_replicas(url: str, scenario: Callable[[Replica, Replica], Awaitable[None]]) -> None:
    async def main() -> None:
        here, there = make_replica(url), make_replica(url)
        try:
            await scenario(here, there)
        finally:
            for provider, synthesizer in (here, there):
                synthesizer.gate.set()
                await provider.close()

    asyncio.run(main())


def test_processes_generate_each_adapter_of_a_stampede_once(redis_server: RedisServer) -> None:
    start_at = str(time.time() + 25)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STAMPEDE, redis_server.url, start_at],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    reports = [json.loads(output) for output in outputs]

    assert sorted(seed for report in reports for seed in report["generated"]) == [0, 1, 2, 3]
    assert len(reports[0]["vectors"]) == 4
    assert reports[0]["vectors"] == reports[1]["vectors"]


def test_the_other_replica_waits_and_finds(redis_server: RedisServer) -> None:
    async def scenario(here: Replica, there: Replica) -> None:
        here[1].gate.clear()
        first = asyncio.create_task(here[0].provide(make_recipe(), ttl_seconds=60))
        while not here[1].recipes:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(there[0].provide(make_recipe(), ttl_seconds=60))
        await asyncio.sleep(0.05)
        here[1].gate.set()

        made, found = await asyncio.gather(first, second)

        assert (made.cache, made.tier) == ("miss", None)
        assert (found.cache, found.tier, found.degraded) == ("coalesced", "redis", False)
        assert list(found.seconds) == ["lookup", "wait"]
        assert found.record.to_bytes() == made.record.to_bytes()
        assert not there[1].recipes
        assert (await there[0].provide(make_recipe(), ttl_seconds=60)).tier == "process"

    run_replicas(redis_server.url, scenario)


def test_a_holder_that_fails_hands_the_lock_on(redis_server: RedisServer) -> None:
    async def scenario(here: Replica, there: Replica) -> None:
        here[1].error = InvalidAdapterError("not finite")
        with pytest.raises(InvalidAdapterError):
            await here[0].provide(make_recipe(), ttl_seconds=60)
        provided = await there[0].provide(make_recipe(), ttl_seconds=60)
        assert (provided.cache, list(provided.seconds)[1]) == ("miss", "queue")

    run_replicas(redis_server.url, scenario)


@pytest.mark.parametrize("lock_expires", [True, False])
def test_a_dead_holder_delays_by_no_more_than_the_deadline(
    lock_expires: bool, redis_server: RedisServer
) -> None:
    recipe = make_recipe()
    with Redis.from_url(redis_server.url) as client:
        life = round(LOCK_SECONDS * 500) if lock_expires else 60_000
        client.set(LOCK_PREFIX + recipe.adapter_id, "a dead process's", px=life)

    async def scenario(here: Replica, there: Replica) -> None:
        start = time.perf_counter()
        provided = await here[0].provide(recipe, ttl_seconds=60)
        waited = time.perf_counter() - start
        assert provided.cache == "miss"
        assert life / 1000 <= waited if lock_expires else waited >= LOCK_SECONDS
        assert waited < LOCK_SECONDS + 5, "a busy machine included"

    run_replicas(redis_server.url, scenario)


@pytest.mark.parametrize("trouble", ["stop", "pause"])
def test_waiting_ends_with_redis(trouble: str, redis_server: RedisServer) -> None:
    recipe = make_recipe()
    with Redis.from_url(redis_server.url) as client:
        client.set(LOCK_PREFIX + recipe.adapter_id, "another's", px=60_000)

    async def main() -> None:
        synthesizer = HeldSynthesizer()
        redis = RedisCache(redis_server.url, LAYOUT, timeout_seconds=0.5, lock_seconds=30)
        provider = AdapterProvider(synthesizer, AdapterCache(ProcessCache(100_000), redis))
        waiter = asyncio.create_task(provider.provide(recipe, ttl_seconds=60))
        await asyncio.sleep(0.2)
        assert not waiter.done()
        getattr(redis_server, trouble)()
        provided = await asyncio.wait_for(waiter, 15)
        assert (provided.cache, provided.degraded) == ("degraded", True)
        await provider.close()

    try:
        asyncio.run(main())
    finally:
        if trouble == "pause":
            redis_server.resume()
