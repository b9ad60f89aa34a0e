"""Two service processes share one Redis, which comes and goes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import count

import pytest
from redis import Redis

from service.adapters.cache import AdapterCache, ProcessCache
from service.adapters.provider import AdapterProvider
from service.adapters.record import AdapterRecord
from service.adapters.redis_cache import RedisCache
from service.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    NotCachedError,
)
from tests.fixtures.adapter_records import LAYOUT, HeldSynthesizer, make_recipe
from tests.fixtures.redis_cache_kit import (
    KEY,
    PLAIN,
    RECORD,
    RETRY_SECONDS,
    Clock,
    Events,
)
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis


def run_replicas(
    url: str,
    scenario: Callable[[AdapterProvider, AdapterProvider, Events], Awaitable[None]],
    *,
    timeout_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs a scenario with two service processes' worth of providers that share one Redis."""

    async def main() -> None:
        events = Events()

        def make_replica() -> AdapterProvider:
            redis = RedisCache(
                url,
                LAYOUT,
                timeout_seconds=timeout_seconds,
                retry_seconds=RETRY_SECONDS,
                on_state=events.on_redis_state,
            )
            cache = AdapterCache(ProcessCache(max_bytes=100_000, clock=clock), redis, events)
            return AdapterProvider(HeldSynthesizer(), cache)

        here, there = make_replica(), make_replica()
        try:
            await scenario(here, there, events)
        finally:
            await here.close()
            await there.close()

    asyncio.run(main())


def test_what_one_replica_generates_the_other_finds(redis_server: RedisServer) -> None:
    async def scenario(here: AdapterProvider, there: AdapterProvider, events: Events) -> None:
        made = await here.provide(make_recipe(), ttl_seconds=60)
        events.lookups.clear()
        found = await there.provide(make_recipe(), policy="only", ttl_seconds=60)
        again = await there.provide(make_recipe(), ttl_seconds=60)

        assert (made.cache, made.degraded) == ("miss", False)
        assert (found.cache, found.tier, found.degraded) == ("hit", "redis", False)
        assert (again.cache, again.tier) == ("hit", "process")
        assert found.record.to_bytes() == made.record.to_bytes()
        assert events.lookups == [("process", "miss"), ("redis", "hit"), ("process", "hit")]

        assert await here.delete(made.record.adapter_id) is False
        with pytest.raises(AdapterNotFoundError):
            await here.get(made.record.adapter_id)

    run_replicas(redis_server.url, scenario)


def test_promotion_keeps_the_expiry(redis_server: RedisServer) -> None:
    clock = Clock()

    async def scenario(here: AdapterProvider, there: AdapterProvider, events: Events) -> None:
        await here.provide(make_recipe(), ttl_seconds=60)
        promoted = await there.provide(make_recipe(), ttl_seconds=3600)
        assert promoted.tier == "redis"
        assert there.list() == (promoted.record,)
        clock.now += 60
        assert there.list() == ()

    run_replicas(redis_server.url, scenario, clock=clock)


def test_requests_survive_the_loss_of_redis_and_say_so(redis_server: RedisServer) -> None:
    async def scenario(here: AdapterProvider, there: AdapterProvider, events: Events) -> None:
        cached = await here.provide(make_recipe(0), ttl_seconds=60)
        redis_server.stop()

        lost = await here.provide(make_recipe(1), ttl_seconds=60)
        still = await here.provide(make_recipe(0), ttl_seconds=60)
        assert (lost.cache, lost.degraded) == ("degraded", True)
        assert (still.cache, still.tier, still.degraded) == ("hit", "process", True)
        assert still.record is cached.record
        assert await here.get(lost.record.adapter_id) is lost.record
        with pytest.raises(NotCachedError, match="Redis could not be asked"):
            await here.provide(make_recipe(2), policy="only", ttl_seconds=60)
        with pytest.raises(AdapterNotFoundError, match="Redis could not be asked"):
            await here.get(make_recipe(2).adapter_id)
        assert await here.delete(lost.record.adapter_id) is True

        redis_server.start()
        await asyncio.sleep(RETRY_SECONDS)
        recovered = await here.provide(make_recipe(3), ttl_seconds=60)
        assert (recovered.cache, recovered.degraded) == ("miss", False)
        assert (await there.provide(make_recipe(3), ttl_seconds=60)).tier == "redis"
        assert events.states == [True, False, True, True]

    run_replicas(redis_server.url, scenario)


@pytest.mark.parametrize("trouble", ["stop", "pause"])
def test_no_request_fails_while_redis_comes_and_goes(
    trouble: str, redis_server: RedisServer
) -> None:
    seeds = count()

    async def scenario(here: AdapterProvider, there: AdapterProvider, events: Events) -> None:
        done: list[bool] = []
        running = True

        async def request_forever(replica: AdapterProvider) -> None:
            while running:
                recipe = make_recipe(next(seeds) // 2)  # every adapter twice
                provided = await replica.provide(recipe, ttl_seconds=60)
                assert provided.record.adapter_id == recipe.adapter_id
                done.append(provided.degraded)
                await asyncio.sleep(0.002)

        async def wait_for(degraded: bool) -> None:
            done.clear()
            async with asyncio.timeout(50):
                while len(done) < 20 or any(item is not degraded for item in done[-20:]):
                    await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as clients:
            for replica in (here, there) * 4:
                clients.create_task(request_forever(replica))
            await wait_for(degraded=False)
            getattr(redis_server, trouble)()
            await wait_for(degraded=True)
            redis_server.start() if trouble == "stop" else redis_server.resume()
            await wait_for(degraded=False)
            running = False

    run_replicas(redis_server.url, scenario, timeout_seconds=1.0)


def test_a_record_that_may_not_serve_is_deleted_counted_and_generated_again(
    redis_server: RedisServer, inspector: Redis
) -> None:
    inspector.set(KEY, PLAIN)
    checked: list[str] = []

    def check(record: AdapterRecord) -> None:
        checked.append(record.vector_sha256)
        if len(checked) == 1:
            raise InvalidAdapterError("too large", "spectral")

    async def main() -> None:
        events = Events()
        redis = RedisCache(
            redis_server.url, LAYOUT, timeout_seconds=10, on_rejected=events.rejected.append
        )
        cache = AdapterCache(ProcessCache(100_000), redis, events, check)
        provider = AdapterProvider(HeldSynthesizer(), cache)
        provided = await provider.provide(RECORD.recipe, ttl_seconds=60)
        assert (provided.cache, provided.degraded) == ("miss", False)
        assert events.rejected == ["invalid"]
        assert len(checked) == 2
        await provider.close()

    asyncio.run(main())
    assert inspector.get(KEY) == PLAIN
