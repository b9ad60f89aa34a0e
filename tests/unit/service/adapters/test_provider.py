"""One synthesis for identical requests, none for cached ones, and nobody's work is lost."""

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from service.adapters.cache import AdapterCache, ProcessCache
from service.adapters.provider import AdapterProvider, CachePolicy
from service.adapters.record import AdapterRecord
from service.adapters.synthesis_batches import MAX_BATCH
from service.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NotCachedError,
    NotReadyError,
    QueueFullError,
    QuotaExceededError,
)
from tests.fixtures.adapter_records import HeldSynthesizer, make_recipe, make_record

Scenario = Callable[[AdapterProvider, HeldSynthesizer], Awaitable[None]]


def play(scenario: Scenario, *, max_pending: int = 64) -> None:
    """Runs a scenario on a loop of its own, with a provider without Redis."""

    async def main() -> None:
        synthesizer = HeldSynthesizer()
        cache = AdapterCache(ProcessCache(max_bytes=10_000))
        provider = AdapterProvider(synthesizer, cache, max_pending=max_pending)
        try:
            await scenario(provider, synthesizer)
        finally:
            synthesizer.gate.set()
            await provider.close()

    asyncio.run(main())


async def wait_until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until the condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_miss_then_hit() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        first = await provider.provide(make_recipe(), ttl_seconds=60)
        second = await provider.provide(make_recipe(), ttl_seconds=60)

        assert (first.cache, first.tier, first.degraded) == ("miss", None, False)
        assert list(first.seconds) == ["lookup", "queue", "encode", "decode", "store"]
        assert (second.cache, second.tier, second.degraded) == ("hit", "process", False)
        assert second.record is first.record
        assert list(second.seconds) == ["lookup"]
        assert len(synthesizer.recipes) == 1

    play(scenario)


def test_identical_concurrent_recipes_share_one_synthesis() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        waiters = [
            asyncio.create_task(provider.provide(make_recipe(seed), ttl_seconds=60))
            for seed in (0, 0, 1, 0)
        ]
        await wait_until(lambda: bool(synthesizer.recipes))
        synthesizer.gate.set()
        provided = await asyncio.gather(*waiters)

        assert [item.cache for item in provided] == ["miss", "coalesced", "miss", "coalesced"]
        assert provided[0].record is provided[1].record is provided[3].record
        assert list(provided[1].seconds) == ["wait"]
        assert synthesizer.recipes == [make_recipe(0), make_recipe(1)]

    play(scenario)


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_waiter_that_goes_away_takes_nothing_from_the_others(leaver: int) -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        waiters = [
            asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60)) for _ in range(2)
        ]
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        waiters.pop(leaver).cancel()
        synthesizer.gate.set()

        provided = await waiters[0]

        assert provided.record.adapter_id == make_recipe().adapter_id
        assert len(synthesizer.recipes) == 1

    play(scenario)


def test_work_that_nobody_waits_for_is_finished_and_cached() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        waiter = asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60))
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        waiter.cancel()
        synthesizer.gate.set()

        await wait_until(lambda: len(provider.list()) == 1)

        assert (await provider.provide(make_recipe(), ttl_seconds=60)).cache == "hit"

    play(scenario)


def test_a_failure_reaches_every_waiter_and_is_not_remembered() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.error = InvalidAdapterError("not finite")
        outcomes = await asyncio.gather(
            *(provider.provide(make_recipe(), ttl_seconds=60) for _ in range(3)),
            return_exceptions=True,
        )
        assert outcomes == [synthesizer.error] * 3

        synthesizer.error = None
        assert (await provider.provide(make_recipe(), ttl_seconds=60)).cache == "miss"

    play(scenario)


def test_a_failure_that_nobody_waits_for_is_not_reported_as_lost() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        reports: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        synthesizer.gate.clear()
        synthesizer.error = InvalidAdapterError("not finite")
        waiter = asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60))
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        waiter.cancel()
        synthesizer.gate.set()
        with pytest.raises(InvalidAdapterError):  # one thread: after this, the first is done too
            await provider.provide(make_recipe(1), ttl_seconds=60)
        del waiter  # asyncio reports an exception as lost when nothing can reach its task
        gc.collect()
        assert not reports

    play(scenario)


def test_bypass_generates_again_and_stores() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        await provider.provide(make_recipe(), ttl_seconds=60)
        again = await provider.provide(make_recipe(), policy="bypass", ttl_seconds=60)
        fresh = await provider.provide(make_recipe(1), policy="bypass", ttl_seconds=60)

        assert (again.cache, fresh.cache) == ("bypass", "bypass")
        assert len(synthesizer.recipes) == 3
        assert await provider.get(fresh.record.adapter_id) is fresh.record

    play(scenario)


def test_only_never_generates() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        with pytest.raises(NotCachedError, match=make_recipe().adapter_id):
            await provider.provide(make_recipe(), policy="only", ttl_seconds=60)
        assert not synthesizer.recipes

        await provider.provide(make_recipe(), ttl_seconds=60)
        assert (await provider.provide(make_recipe(), policy="only", ttl_seconds=60)).cache == "hit"

    play(scenario)


def test_too_many_pending_recipes_are_refused() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        waiters = [
            asyncio.create_task(provider.provide(make_recipe(seed), ttl_seconds=60))
            for seed in (0, 1, 0)
        ]
        await wait_until(lambda: bool(synthesizer.recipes))
        with pytest.raises(QueueFullError) as refusal:
            await provider.provide(make_recipe(2), ttl_seconds=60)
        assert refusal.value.retry_after_seconds > 0

        synthesizer.gate.set()
        await asyncio.gather(*waiters)
        assert (await provider.provide(make_recipe(2), ttl_seconds=60)).cache == "miss"

    play(scenario, max_pending=2)


@pytest.mark.parametrize("policy", ["use", "bypass", "only"])
@pytest.mark.parametrize("ttl_seconds", [0, -1, math.inf, math.nan])
def test_lifetime_must_be_positive_and_finite(policy: CachePolicy, ttl_seconds: float) -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        with pytest.raises(InvalidInputError, match="ttl_seconds"):
            await provider.provide(make_recipe(), policy=policy, ttl_seconds=ttl_seconds)

    play(scenario)


def test_get_list_and_delete() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        old, new = [
            (await provider.provide(make_recipe(seed), ttl_seconds=60)).record for seed in (0, 1)
        ]
        assert provider.list() == (new, old)
        assert await provider.get(old.adapter_id) is old

        assert await provider.delete(old.adapter_id) is False
        assert provider.list() == (new,)
        with pytest.raises(AdapterNotFoundError):
            await provider.get(old.adapter_id)
        with pytest.raises(AdapterNotFoundError):
            await provider.delete(old.adapter_id)

    play(scenario)


def test_closing_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        waiter = asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60))
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        closing = asyncio.create_task(provider.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError):
            await provider.provide(make_recipe(1), ttl_seconds=60)
        synthesizer.gate.set()
        await closing
        assert (await waiter).record.adapter_id == make_record().adapter_id

    play(scenario)


def test_different_recipes_that_wait_go_in_one_batch() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.gate.clear()
        first = asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60))
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        others = [
            asyncio.create_task(provider.provide(make_recipe(seed), ttl_seconds=60))
            for seed in (*range(1, MAX_BATCH + 3), 1)
        ]
        await asyncio.sleep(0.01)
        synthesizer.gate.set()
        provided = await asyncio.gather(first, *others)

        assert synthesizer.batches == [1, MAX_BATCH, 2]
        assert provided[-1].cache == "coalesced"
        for each, seed in zip(provided, (*range(MAX_BATCH + 3), 1), strict=True):
            assert torch.equal(each.record.vector, make_record(seed).vector)

    play(scenario)


def test_an_unexpected_failure_reaches_the_whole_batch_and_the_next_one_runs() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        synthesizer.error = RuntimeError("out of memory")
        outcomes = await asyncio.gather(
            *(provider.provide(make_recipe(seed), ttl_seconds=60) for seed in range(3)),
            return_exceptions=True,
        )
        assert outcomes == [synthesizer.error] * 3
        synthesizer.error = None
        assert (await provider.provide(make_recipe(), ttl_seconds=60)).cache == "miss"

    play(scenario)


def test_an_adapter_that_may_not_serve_is_neither_provided_nor_kept() -> None:
    refusal = InvalidAdapterError("too large", "frobenius")

    def check(record: AdapterRecord) -> None:
        if record.recipe.seed == 1:
            raise refusal

    async def main() -> None:
        batches: list[int] = []
        cache = AdapterCache(ProcessCache(10_000), check=check)
        provider = AdapterProvider(HeldSynthesizer(), cache, on_batch=batches.append)
        assert (await provider.provide(make_recipe(), ttl_seconds=60)).cache == "miss"
        with pytest.raises(InvalidAdapterError):
            await provider.provide(make_recipe(1), ttl_seconds=60)
        assert [record.recipe.seed for record in provider.list()] == [0]
        assert batches == [1, 1]
        await provider.close()

    asyncio.run(main())


def test_what_its_request_rejects_is_provided_and_not_stored() -> None:
    async def scenario(provider: AdapterProvider, synthesizer: HeldSynthesizer) -> None:
        near = await provider.provide(make_recipe(1), keep="in_distribution", ttl_seconds=60)
        synthesizer.in_distribution = 0.0
        for policy in ("use", "bypass", "use"):
            provided = await provider.provide(
                make_recipe(), policy=policy, keep="in_distribution", ttl_seconds=60
            )
            assert (provided.record.in_distribution, provided.degraded) == (0.0, False)
        assert provider.list() == (near.record,)
        assert len(synthesizer.recipes) == 4

        # One that keeps it does not get the result of one that does not.
        synthesizer.gate.clear()
        rejecting = provider.provide(make_recipe(), keep="in_distribution", ttl_seconds=60)
        keeping = provider.provide(make_recipe(), ttl_seconds=60)
        both = [asyncio.create_task(each) for each in (rejecting, keeping)]
        await wait_until(lambda: len(synthesizer.recipes) > 4)
        synthesizer.gate.set()
        _, kept = await asyncio.gather(*both)
        assert provider.list() == (kept.record, near.record)

    play(scenario)


def test_room_is_held_from_before_the_generation_until_it_is_stored() -> None:
    held: list[str] = []
    refuses = False

    @contextmanager
    def reserve(tenant: str, adapter_id: str, size_bytes: int) -> Iterator[None]:
        assert (tenant, size_bytes) == ("public", make_record().size_bytes)
        if refuses:
            raise QuotaExceededError("full", 1)
        held.append(adapter_id)
        yield
        held.remove(adapter_id)

    async def main() -> None:
        nonlocal refuses
        synthesizer = HeldSynthesizer()
        cache = AdapterCache(ProcessCache(max_bytes=10_000))
        provider = AdapterProvider(synthesizer, cache, reserve_bytes=reserve)
        synthesizer.gate.clear()
        waiter = asyncio.create_task(provider.provide(make_recipe(), ttl_seconds=60))
        await wait_until(lambda: len(synthesizer.recipes) == 1)
        assert held == [make_recipe().adapter_id]
        waiter.cancel()  # what it waited for goes on, and will be stored
        await asyncio.gather(waiter, return_exceptions=True)
        assert held == [make_recipe().adapter_id]
        synthesizer.gate.set()
        await wait_until(lambda: not held)
        assert [record.adapter_id for record in provider.list()] == [make_recipe().adapter_id]
        refuses = True
        assert (await provider.provide(make_recipe(), ttl_seconds=60)).cache == "hit"
        for policy in ("use", "bypass", "only"):
            with pytest.raises(QuotaExceededError):
                await provider.provide(make_recipe(1), policy=policy, ttl_seconds=60)
        await provider.close()
        assert len(synthesizer.recipes) == 1

    asyncio.run(main())
