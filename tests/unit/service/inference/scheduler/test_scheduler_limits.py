"""Full queues, deadlines and tenants: who is refused, when, and with what."""

import asyncio
import time

import pytest

from service.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.load import LoadEstimate
from service.inference.scheduler import Scheduler
from tests.fixtures.scheduler_kit import (
    DEADLINE,
    LONG,
    Observed,
    run_scheduler,
    start_long,
)
from tests.fixtures.tiny_engine import EngineKit


def test_a_full_queue_refuses_with_a_time_to_retry(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        limits = {"max_queue": 1, "max_batch_rows": 1}
        async with run_scheduler(kit, observed, **limits) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = asyncio.create_task(scheduler.submit(kit.request("b"), DEADLINE))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as refused:
                await scheduler.submit(kit.request("c"), DEADLINE)
            assert refused.value.retry_after_seconds >= 1
            assert observed.rejections == ["queue_full"]
            await asyncio.gather(long, waiting)

    asyncio.run(scenario())


def test_a_cancelled_request_gives_up_its_place(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        limits = {"max_queue": 1, "max_batch_rows": 1}
        async with run_scheduler(kit, observed, **limits) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = asyncio.create_task(scheduler.submit(kit.request("b"), DEADLINE))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert observed.depths[-1] == 0
            long.cancel()
            answer = await scheduler.submit(kit.request("c", max_tokens=2), DEADLINE)
            assert answer.text == "de"
        assert observed.tokens == 2  # the long one was stopped, not finished in vain

    asyncio.run(scenario())


def test_a_deadline_ends_waiting_and_running_requests(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            with pytest.raises(DeadlineExceededError):
                await scheduler.submit(kit.request("a", max_tokens=LONG), 0.05)
            long = await start_long(kit, scheduler, observed)
            with pytest.raises(DeadlineExceededError):
                await scheduler.submit(kit.request("b"), 0.0)
            await long
            answer = await scheduler.submit(kit.request("a", max_tokens=1), DEADLINE)
            assert answer.text == "b"
        assert observed.rejections == ["deadline_exceeded"] * 2

    asyncio.run(scenario())


def test_a_deadline_is_told_by_the_waiter_s_clock_even_when_its_loop_is_late(
    kit: EngineKit,
) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            task = asyncio.create_task(scheduler.submit(kit.request("a", max_tokens=LONG), 0.02))
            while not (observed.batches or task.done()):
                await asyncio.sleep(0)
            time.sleep(0.2)  # meanwhile the thread notices, and drops the row
            with pytest.raises(DeadlineExceededError, match=r"within 0\.02 seconds"):
                await task
        assert observed.rejections == ["deadline_exceeded"]

    asyncio.run(scenario())


def test_what_waited_too_long_does_not_run_even_when_its_loop_is_late(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_batch_rows=1) as scheduler:
            long = await start_long(kit, scheduler, observed)
            monkeypatch.setattr(scheduler._load, "estimate_wait", lambda *_: 0.0)
            monkeypatch.setattr(scheduler._load, "estimate_seconds", lambda *_: 0.0)
            waiting = asyncio.create_task(scheduler.submit(kit.request("b"), 0.001))
            await asyncio.sleep(0)
            while not observed.tokens:
                time.sleep(0.01)  # the loop can take nothing out of the queue
            while observed.depths[-1]:
                time.sleep(0.01)
            await long
            with pytest.raises(DeadlineExceededError):
                await waiting
        assert observed.batches == [(1, 1)]

    asyncio.run(scenario())


def test_limits_out_of_range_and_a_scheduler_that_was_not_started(kit: EngineKit) -> None:
    with pytest.raises(InvalidInputError):
        Scheduler(kit.engine, max_queue=0)

    async def scenario() -> None:
        scheduler = Scheduler(kit.engine)
        with pytest.raises(NotReadyError):
            await scheduler.submit(kit.request("a"), DEADLINE)
        await scheduler.drain(1.0)

    asyncio.run(scenario())


def test_a_request_that_would_miss_its_deadline_is_refused_at_once(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_batch_rows=1) as scheduler:
            long = await start_long(kit, scheduler, observed)
            while scheduler._load.estimate_seconds(1) == 0:
                await asyncio.sleep(0.001)
            started = time.monotonic()
            with pytest.raises(QueueFullError, match="miss its deadline"):
                await scheduler.submit(kit.request("b", max_tokens=400), 0.01)
            assert time.monotonic() - started < 0.05
            await long
        assert observed.rejections == ["queue_full"]

    asyncio.run(scenario())


def test_estimated_work_bounds_the_queue(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        limits = {"max_queue_work": 100, "max_batch_rows": 1}
        async with run_scheduler(kit, observed, **limits) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = asyncio.create_task(
                scheduler.submit(kit.request("b", max_tokens=60), DEADLINE)
            )
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await scheduler.submit(kit.request("b", max_tokens=60), DEADLINE)
            await asyncio.gather(long, waiting)

    asyncio.run(scenario())


def test_a_flood_gets_no_other_tenant_refused(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = LoadEstimate(1)
    load.observe_step(1, 0.02)
    monkeypatch.setattr(load, "observe_step", lambda *_: None)

    async def scenario() -> None:
        observed = Observed()
        limits = {"max_queue": 4, "max_batch_rows": 1}
        async with run_scheduler(kit, observed, **limits) as scheduler:
            long = await start_long(kit, scheduler, observed)
            scheduler._load = load  # 5 seconds are left of the long one
            flood = [
                asyncio.create_task(
                    scheduler.submit(kit.request("b", max_tokens=100, tenant="flood"), DEADLINE)
                )
                for _ in range(4)  # 8 seconds
            ]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await scheduler.submit(kit.request("c", tenant="flood"), DEADLINE)
            quiet = kit.request("c", max_tokens=3, tenant="quiet")
            assert (await scheduler.submit(quiet, 10.0)).text == "def"
            with pytest.raises(QueueFullError, match="miss its deadline"):
                await scheduler.submit(kit.request("c", max_tokens=600, tenant="quiet"), 10.0)
            for task in flood:
                task.cancel()
            await long

    asyncio.run(scenario())
