"""The Redis tier against a real redis-server: exact, bounded in time, and never in the way."""

import asyncio
import math
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from itertools import count

import pytest
from redis import Redis

from service.adapters.cache import AdapterCache, ProcessCache
from service.adapters.provider import AdapterProvider
from service.adapters.record import AdapterRecord
from service.adapters.redis_cache import KEY_PREFIX, LOCK_PREFIX, MAX_CONNECTIONS, RedisCache
from service.adapters.redis_values import ValueSeal
from service.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NotCachedError,
)
from tests.fixtures.adapter_records import LAYOUT, HeldSynthesizer, make_recipe, make_record
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis
RECORD = make_record()
KEY = KEY_PREFIX + RECORD.adapter_id
RETRY_SECONDS = 0.2


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Events:
    """Observer that keeps what it is told."""

    def __init__(self) -> None:
        self.lookups: list[tuple[str, str]] = []
        self.states: list[bool] = []
        self.breaker: list[str] = []
        self.rejected: list[str] = []

    def on_lookup(self, tier: str, result: str) -> None:
        self.lookups.append((tier, result))

    def on_redis_state(self, up: bool) -> None:
        self.states.append(up)


def run_with_cache(
    url: str,
    scenario: Callable[[RedisCache, Events], Awaitable[None]],
    *,
    timeout_seconds: float = 10.0,
    secret: bytes = b"",
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs a scenario on a loop of its own; the default timeout leaves room on a busy machine."""

    async def main() -> None:
        events = Events()
        cache = RedisCache(
            url,
            LAYOUT,
            timeout_seconds=timeout_seconds,
            retry_seconds=RETRY_SECONDS,
            secret=secret,
            on_state=events.on_redis_state,
            on_breaker=events.breaker.append,
            on_rejected=events.rejected.append,
            clock=clock,
        )
        try:
            await scenario(cache, events)
        finally:
            await cache.close()

    asyncio.run(main())


async def wait_until_up(cache: RedisCache) -> None:
    async with asyncio.timeout(10):
        while not await cache.ping():
            await asyncio.sleep(0.02)


async def measure(call: Awaitable[object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    await call
    return time.perf_counter() - start


@pytest.fixture
def inspector(redis_server: RedisServer) -> Iterator[Redis]:
    """A client beside the cache's own, to look at and alter what is stored."""
    with Redis.from_url(redis_server.url) as client:
        yield client


def test_record_comes_back_with_its_remaining_lifetime(
    redis_server: RedisServer, inspector: Redis
) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        assert (await cache.get(RECORD.adapter_id)).result == "miss"
        assert await cache.put(RECORD, ttl_seconds=60)

        answer = await cache.get(RECORD.adapter_id)

        assert answer.result == "hit"
        assert answer.record is not None
        assert answer.record.to_bytes() == RECORD.to_bytes()
        assert inspector.get(KEY) == ValueSeal().seal(RECORD.adapter_id, RECORD.to_bytes())
        assert 50 < answer.ttl_seconds <= 60
        assert events.states == [True]

    run_with_cache(redis_server.url, scenario)


def test_records_expire(redis_server: RedisServer, inspector: Redis) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        await cache.put(RECORD, ttl_seconds=0.02)
        await asyncio.sleep(0.05)
        assert (await cache.get(RECORD.adapter_id)).result == "miss"

        await cache.put(RECORD, ttl_seconds=60)
        inspector.persist(KEY)
        assert (await cache.get(RECORD.adapter_id)).ttl_seconds == math.inf

    run_with_cache(redis_server.url, scenario)


SECRET = b"a secret of all replicas"
SIGNED = ValueSeal(SECRET).seal(RECORD.adapter_id, RECORD.to_bytes())
PLAIN = ValueSeal().seal(RECORD.adapter_id, RECORD.to_bytes())
OTHER = make_record(1)
FOREIGN = ValueSeal(b"another secret")


def flip(value: bytes, index: int) -> bytes:
    """The value with one bit turned."""
    index %= len(value)
    return value[:index] + bytes([value[index] ^ 1]) + value[index + 1 :]


@pytest.mark.parametrize(
    ("secret", "value", "reason"),
    [
        (SECRET, b"garbage", "truncated"),
        (SECRET, b"\x00" * 500, "version"),
        (SECRET, RECORD.to_bytes(), "version"),
        (SECRET, SIGNED[:-2], "truncated"),
        (SECRET, SIGNED + b"more", "truncated"),
        (SECRET, flip(SIGNED, 4), "version"),
        (SECRET, flip(SIGNED, -1), "forged"),
        (SECRET, flip(SIGNED, 50), "forged"),
        (SECRET, PLAIN, "forged"),
        (SECRET, FOREIGN.seal(RECORD.adapter_id, RECORD.to_bytes()), "forged"),
        (SECRET, ValueSeal(SECRET).seal(OTHER.adapter_id, OTHER.to_bytes()), "wrong_key"),
        (SECRET, ValueSeal(SECRET).seal(RECORD.adapter_id, OTHER.to_bytes()), "wrong_key"),
        (SECRET, ValueSeal(SECRET).seal(RECORD.adapter_id, b"no record"), "invalid"),
        (b"", b"", "truncated"),
        (b"", flip(PLAIN, -1), "corrupt"),
        (b"", SIGNED, "unverifiable"),
        (b"", ValueSeal().seal(OTHER.adapter_id, OTHER.to_bytes()), "wrong_key"),
    ],
)
def test_values_not_to_be_trusted_are_deleted_and_counted(
    secret: bytes, value: bytes, reason: str, redis_server: RedisServer, inspector: Redis
) -> None:
    inspector.set(KEY, value)

    async def scenario(cache: RedisCache, events: Events) -> None:
        answer = await cache.get(RECORD.adapter_id)
        assert (answer.result, answer.asked, answer.record) == ("error", True, None)
        assert not inspector.exists(KEY)
        assert not cache.is_down
        assert events.rejected == [reason]

    run_with_cache(redis_server.url, scenario, secret=secret)


def test_signed_values_come_back(redis_server: RedisServer, inspector: Redis) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        await cache.put(RECORD, ttl_seconds=60)
        answer = await cache.get(RECORD.adapter_id)
        assert answer.record is not None
        assert answer.record.to_bytes() == RECORD.to_bytes()
        assert inspector.get(KEY) == SIGNED
        assert not events.rejected

    run_with_cache(redis_server.url, scenario, secret=SECRET)


# ---------------------------------------------------------------- locks


def test_a_lock_is_one_process_s_until_released(
    redis_server: RedisServer, inspector: Redis
) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        adapter_id = RECORD.adapter_id
        first = await cache.claim(adapter_id)
        assert first.answer.result == "miss"
        assert first.token is not None
        assert (await cache.claim(adapter_id)).token is None
        assert 0 < inspector.pttl(LOCK_PREFIX + adapter_id) <= 2000

        await cache.release(adapter_id, "somebody else's")
        assert (await cache.claim(adapter_id)).token is None
        await cache.release(adapter_id, first.token)
        again = await cache.claim(adapter_id)
        assert again.token is not None

        await cache.put(RECORD, ttl_seconds=60)
        assert (await cache.claim(adapter_id)).answer.record is not None
        await cache.release(adapter_id, again.token)
        found = await cache.claim(adapter_id)
        assert found.answer.record is not None
        assert found.token is None
        assert not inspector.exists(LOCK_PREFIX + adapter_id), "not kept where nobody needs it"

    run_with_cache(redis_server.url, scenario)


def test_locks_without_a_server(redis_server: RedisServer) -> None:
    redis_server.stop()

    async def scenario(cache: RedisCache, events: Events) -> None:
        claim = await cache.claim(RECORD.adapter_id)
        assert (claim.answer.asked, claim.token) == (False, None)
        await cache.release(RECORD.adapter_id, "token")
        assert cache.breaker_state == "open"

    run_with_cache(redis_server.url, scenario)


def test_delete_says_whether_there_was_a_record(redis_server: RedisServer) -> None:
    async def scenario(cache: RedisCache, events: Events) -> None:
        await cache.put(RECORD, ttl_seconds=60)
        assert await cache.delete(RECORD.adapter_id) is True
        assert await cache.delete(RECORD.adapter_id) is False
        assert (await cache.get(RECORD.adapter_id)).result == "miss"

    run_with_cache(redis_server.url, scenario)


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


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_an_url_that_is_not_redis_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="redis://host:port/db"):
        RedisCache(url, LAYOUT)


def test_a_bad_url_does_not_leak_its_password() -> None:
    with pytest.raises(InvalidInputError) as refusal:
        RedisCache("redis://:secret/word@localhost", LAYOUT)
    report = "".join(traceback.format_exception(refusal.value, limit=0))
    assert "secret" not in report


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
