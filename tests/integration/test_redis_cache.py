"""The Redis tier against a real redis-server: what comes back, and what is not trusted."""

import asyncio
import math
import traceback

import pytest
from redis import Redis

from service.adapters.redis_cache import LOCK_PREFIX, RedisCache
from service.adapters.redis_values import ValueSeal
from service.errors import (
    InvalidInputError,
)
from tests.fixtures.adapter_records import LAYOUT, make_record
from tests.fixtures.redis_cache_kit import (
    KEY,
    PLAIN,
    RECORD,
    Events,
    run_with_cache,
)
from tests.fixtures.redis_server import RedisServer

pytestmark = pytest.mark.redis


SECRET = b"a secret of all replicas"
SIGNED = ValueSeal(SECRET).seal(RECORD.adapter_id, RECORD.to_bytes())
OTHER = make_record(1)
FOREIGN = ValueSeal(b"another secret")


def flip(value: bytes, index: int) -> bytes:
    """The value with one bit turned."""
    index %= len(value)
    return value[:index] + bytes([value[index] ^ 1]) + value[index + 1 :]


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


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_an_url_that_is_not_redis_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="redis://host:port/db"):
        RedisCache(url, LAYOUT)


def test_a_bad_url_does_not_leak_its_password() -> None:
    with pytest.raises(InvalidInputError) as refusal:
        RedisCache("redis://:secret/word@localhost", LAYOUT)
    report = "".join(traceback.format_exception(refusal.value, limit=0))
    assert "secret" not in report
