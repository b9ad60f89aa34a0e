"""Limits of tenants, with a clock of the test's own."""

from dataclasses import replace

import pytest

from service.adapters.cache import ProcessCache
from service.api.keys import TenantLimits
from service.api.quotas import Quotas, TokenBucket
from service.errors import IcmLoraError, QuotaExceededError, RateLimitedError
from service.settings import Settings
from service.synthesis.adapter_recipe import AdapterRecipe
from tests.fixtures.adapter_records import make_recipe, make_record


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reasons() -> list[str]:
    return []


def build_quotas(clock: Clock, reasons: list[str], **limits: float) -> Quotas:
    return Quotas(Settings(), {"a": TenantLimits.model_validate(limits)}, reasons.append, clock)


def make_origin(seed: int) -> AdapterRecipe:
    return replace(make_recipe(seed), tenant="a")


def test_bucket_refills_to_its_capacity_and_no_further(clock: Clock) -> None:
    bucket = TokenBucket(rate=2, capacity=3, clock=clock)
    assert [bucket.take(1) for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.5
    assert [bucket.take(1), bucket.take(1)] == [0, 0.5]
    clock.now += 1000
    assert [bucket.take(1) for _ in range(4)] == [0, 0, 0, 0.5]


def test_bucket_owes_what_it_cannot_hold(clock: Clock) -> None:
    bucket = TokenBucket(rate=1, capacity=10, clock=clock)
    assert bucket.take(30) == 0
    assert bucket.take(1) == 21
    bucket.give_back(25)
    assert bucket.take(5) == 0


def test_requests_over_the_rate_are_told_when_to_come_back(
    clock: Clock, reasons: list[str]
) -> None:
    quotas = build_quotas(clock, reasons, requests_per_second=0.1, request_burst=1)
    with quotas.admit("a"):
        pass
    clock.now += 3
    with pytest.raises(RateLimitedError) as refused, quotas.admit("a"):
        pass
    assert refused.value.retry_after_seconds == 7
    assert reasons == ["tenant_requests"]
    with quotas.admit("b"):  # others have their own
        pass
    clock.now += refused.value.retry_after_seconds
    with quotas.admit("a"):
        pass


def test_requests_at_once_are_counted_and_a_refusal_costs_nothing(
    clock: Clock, reasons: list[str]
) -> None:
    quotas = build_quotas(
        clock, reasons, concurrent_requests=1, requests_per_second=1, request_burst=2
    )
    with quotas.admit("a"):
        for _ in range(5):
            with pytest.raises(RateLimitedError), quotas.admit("a"):
                pass
    with pytest.raises(ValueError, match="bug"), quotas.admit("a"):
        raise ValueError("bug")
    clock.now += 1
    with quotas.admit("a"):
        pass
    assert reasons == ["tenant_concurrency"] * 5


def test_tokens_that_were_not_generated_are_given_back(clock: Clock, reasons: list[str]) -> None:
    quotas = build_quotas(clock, reasons, tokens_per_minute=60)
    with quotas.reserve_tokens("a", 60) as (reservation,):
        with pytest.raises(RateLimitedError) as refused, quotas.reserve_tokens("a", 30):
            pass
        assert refused.value.retry_after_seconds == 30
        reservation.settle(20)
    with quotas.reserve_tokens("a", 40):  # given up: the client pays for all of it
        pass
    with pytest.raises(RateLimitedError), quotas.reserve_tokens("a", 1):
        pass
    assert reasons == ["tenant_tokens"] * 2


def test_a_request_that_fails_costs_no_tokens(clock: Clock, reasons: list[str]) -> None:
    quotas = build_quotas(clock, reasons, tokens_per_minute=60)
    for _ in range(3):
        with pytest.raises(IcmLoraError), quotas.reserve_tokens("a", 60):
            raise IcmLoraError("no")
    assert not reasons


def test_all_answers_of_a_request_are_reserved_or_none(clock: Clock, reasons: list[str]) -> None:
    quotas = build_quotas(clock, reasons, tokens_per_minute=60)
    with quotas.reserve_tokens("a", 10, 10) as (first, second):
        with pytest.raises(RateLimitedError), quotas.reserve_tokens("a", 20, 21):
            pass
        with quotas.reserve_tokens("a", 40):  # a refusal took nothing; given up: all of it
            pass
        first.settle(4)
        second.settle(6)
    with pytest.raises(RateLimitedError), quotas.reserve_tokens("a", 11):
        pass
    with quotas.reserve_tokens("a", 5, 5) as (first, _):  # the second is given up
        first.settle(1)
    with pytest.raises(RateLimitedError), quotas.reserve_tokens("a", 5):
        pass
    with quotas.reserve_tokens("a", 4):
        pass
    assert reasons == ["tenant_tokens"] * 3


def test_a_request_that_fails_late_costs_what_was_generated(
    clock: Clock, reasons: list[str]
) -> None:
    quotas = build_quotas(clock, reasons, tokens_per_minute=60)

    def fail_late() -> None:
        with quotas.reserve_tokens("a", 30, 30) as (first, second):
            first.settle(7)
            second.used = 13
            raise IcmLoraError("no")

    with pytest.raises(IcmLoraError):
        fail_late()
    with pytest.raises(RateLimitedError), quotas.reserve_tokens("a", 41):
        pass
    with quotas.reserve_tokens("a", 40):
        pass


def test_without_limits_nothing_is_refused(clock: Clock, reasons: list[str]) -> None:
    quotas = build_quotas(clock, reasons)
    for _ in range(1000):
        with quotas.admit("a"), quotas.reserve_tokens("a", 10**9):
            pass
    with quotas.reserve_bytes("a", "0" * 64, 10**12):
        pass
    assert not reasons


def test_bytes_of_adapters_to_come_are_counted(clock: Clock, reasons: list[str]) -> None:
    cache = ProcessCache(10_000, clock)
    records = [replace(make_record(seed), origin=make_origin(seed)) for seed in range(3)]
    first, second, third = (record.adapter_id for record in records)
    size = records[0].size_bytes
    quotas = build_quotas(clock, reasons, adapter_bytes=2 * size)
    quotas.watch_adapters(cache)

    def is_refused(adapter_id: str) -> bool:
        try:
            with quotas.reserve_bytes("a", adapter_id, size):
                return False
        except QuotaExceededError:
            return True

    with quotas.reserve_bytes("a", first, size):
        with quotas.reserve_bytes("a", second, size):
            assert is_refused(third)
        with pytest.raises(ValueError, match="bug"), quotas.reserve_bytes("a", second, size):
            raise ValueError("bug")
        cache.put(records[0], 60)  # there, and not yet over: counts once
        with quotas.reserve_bytes("a", first, size), quotas.reserve_bytes("a", second, size):
            assert is_refused(third)
        with quotas.reserve_bytes("b", third, 10 * size):  # others have their own
            pass
    cache.put(records[1], 60)
    assert is_refused(third)
    assert not is_refused(first)
    cache.delete(first)
    assert not is_refused(third)
    assert reasons == ["tenant_adapter_bytes"] * 3


def test_an_override_may_lift_a_default(clock: Clock) -> None:
    settings = Settings(tenant_concurrent_requests=1)
    quotas = Quotas(settings, {"a": TenantLimits(concurrent_requests=0)}, print, clock)
    with quotas.admit("a"), quotas.admit("a"), quotas.admit("b"):
        pass
