"""The in-process tier: least recently used goes first, nothing outlives its time or the bound."""

import math

from hypothesis import given
from hypothesis import strategies as st

from service.adapters.cache import ProcessCache
from tests.fixtures.adapter_records import make_record

RECORD_BYTES = make_record().size_bytes


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_least_recently_used_record_goes_first() -> None:
    cache = ProcessCache(2 * RECORD_BYTES)
    first, second, third = (make_record(seed) for seed in range(3))
    cache.put(first, 60)
    cache.put(second, 60)
    assert cache.get(first.adapter_id) is first  # now `second` is the oldest

    cache.put(third, 60)

    assert cache.ids() == [first.adapter_id, third.adapter_id]
    assert cache.records() == [first, third]
    assert cache.get(second.adapter_id) is None


def test_records_expire_each_at_its_time() -> None:
    clock = Clock()
    cache = ProcessCache(10 * RECORD_BYTES, clock)
    short, long, endless = (make_record(seed) for seed in range(3))
    cache.put(short, 1)
    cache.put(long, 5)
    cache.put(endless, math.inf)

    clock.now += 1
    assert cache.get(short.adapter_id) is None
    assert cache.get(long.adapter_id) is long
    clock.now += 1e9
    assert cache.ids() == [endless.adapter_id]
    assert (len(cache), cache.size_bytes()) == (1, RECORD_BYTES)


def test_expired_records_go_before_live_ones() -> None:
    clock = Clock()
    cache = ProcessCache(2 * RECORD_BYTES, clock)
    live, expired, added = (make_record(seed) for seed in range(3))
    cache.put(live, 60)
    cache.put(expired, 1)
    clock.now += 2

    cache.put(added, 60)

    assert cache.ids() == [live.adapter_id, added.adapter_id]


def test_storing_again_replaces_record_and_expiry() -> None:
    clock = Clock()
    cache = ProcessCache(10 * RECORD_BYTES, clock)
    cache.put(make_record(), 1)
    cache.put(make_record(), 60)

    clock.now += 2

    assert (len(cache), cache.size_bytes()) == (1, RECORD_BYTES)


def test_a_record_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    cache = ProcessCache(RECORD_BYTES - 1)

    cache.put(make_record(), 60)

    assert (len(cache), cache.size_bytes()) == (0, 0)


def test_delete_says_whether_there_was_a_record() -> None:
    cache = ProcessCache(RECORD_BYTES)
    cache.put(make_record(), 60)

    assert cache.delete(make_record().adapter_id)
    assert not cache.delete(make_record().adapter_id)
    assert cache.size_bytes() == 0


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "delete", "wait"]), st.integers(0, 5), st.integers(1, 4)
        ),
        max_size=60,
    )
)
def test_size_is_the_sum_of_what_is_held_and_never_over_the_bound(
    steps: list[tuple[str, int, int]],
) -> None:
    clock = Clock()
    cache = ProcessCache(3 * RECORD_BYTES, clock)
    for verb, seed, seconds in steps:
        record = make_record(seed)
        if verb == "put":
            cache.put(record, seconds)
        elif verb == "get":
            cache.get(record.adapter_id)
        elif verb == "delete":
            cache.delete(record.adapter_id)
        else:
            clock.now += seconds
        held = cache.records()
        assert cache.size_bytes() == sum(item.size_bytes for item in held) <= 3 * RECORD_BYTES
        assert [item.adapter_id for item in held] == cache.ids()
