import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.scheduler import Scheduler
from service.inference.text import Completion
from tests.fixtures.tiny_engine import EngineKit, build_engine, load_chained_base

DEADLINE = 30.0
LONG = 480
"""Tokens of a completion that keeps the inference thread busy for a while."""


class Observed:
    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.rejections: list[str] = []
        self.depths: list[int] = []
        self.tokens = 0

    def on_batch(self, rows: int, distinct_adapters: int, /) -> None:
        self.batches.append((rows, distinct_adapters))

    def on_queue(self, depth: int, /) -> None:
        self.depths.append(depth)

    def on_tokens(self, count: int, /) -> None:
        self.tokens += count

    def on_rejection(self, reason: str, /) -> None:
        self.rejections.append(reason)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> EngineKit:
    return build_engine(load_chained_base(tmp_path_factory.mktemp("cache")))


@asynccontextmanager
async def run_scheduler(
    kit: EngineKit, observed: Observed, **limits: float
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(kit.engine, observer=observed, **limits)  # type: ignore[arg-type]
    scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.drain(10.0)


async def start_long(
    kit: EngineKit, scheduler: Scheduler, observed: Observed
) -> "asyncio.Task[Completion]":
    task = asyncio.create_task(scheduler.submit(kit.request("a", max_tokens=LONG), DEADLINE))
    while not observed.batches:
        await asyncio.sleep(0.001)
    return task


def test_requests_that_wait_share_a_batch_whatever_their_adapters(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            requests = [kit.request("a", adapter, max_tokens=3) for adapter in (1, 2, None, 1)]
            done = await asyncio.gather(*(scheduler.submit(r, DEADLINE) for r in requests))
            assert len((await long).text) == LONG
        assert observed.batches == [(1, 1), (4, 3)]
        assert all(each.completion_tokens == 3 for each in done)
        assert all(each.seconds["queue"] >= 0 for each in done)
        assert observed.tokens == LONG + 12

    asyncio.run(scenario())


def test_a_batch_has_at_most_so_many_rows_oldest_first(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_batch_rows=2) as scheduler:
            long = await start_long(kit, scheduler, observed)
            order: list[int] = []

            async def submit(number: int) -> None:
                await scheduler.submit(kit.request("a", max_tokens=2), DEADLINE)
                order.append(number)

            await asyncio.gather(long, *(submit(number) for number in range(5)))
            assert order == [0, 1, 2, 3, 4]
        assert [rows for rows, _ in observed.batches] == [1, 2, 2, 1]

    asyncio.run(scenario())


def test_a_batch_window_waits_for_company_but_not_once_full(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        limits = {"batch_window_seconds": 20.0, "max_batch_rows": 2}
        async with run_scheduler(kit, observed, **limits) as scheduler:
            first = asyncio.create_task(scheduler.submit(kit.request("a", max_tokens=2), DEADLINE))
            await asyncio.sleep(0.05)
            assert not observed.batches
            await scheduler.submit(kit.request("b", max_tokens=2), 10.0)
            await first
        assert observed.batches == [(2, 1)]

    asyncio.run(scenario())


def test_a_loop_that_is_gone_does_not_stop_the_thread(kit: EngineKit) -> None:
    observed = Observed()
    scheduler = Scheduler(kit.engine, observer=observed)
    scheduler.start()

    async def leave() -> None:
        await start_long(kit, scheduler, observed)  # asyncio.run cancels it and closes the loop

    async def ask() -> Completion:
        answer = await scheduler.submit(kit.request("a", max_tokens=1), DEADLINE)
        await scheduler.drain(10.0)
        return answer

    asyncio.run(leave())
    assert asyncio.run(ask()).text == "b"


def test_a_full_queue_refuses_with_a_time_to_retry(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_queue=1) as scheduler:
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
        async with run_scheduler(kit, observed, max_queue=1) as scheduler:
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
        assert len(observed.batches) == 3  # what waited too long never ran

    asyncio.run(scenario())


def test_an_engine_failure_is_its_batch_s_alone(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with run_scheduler(kit, Observed()) as scheduler:
            with monkeypatch.context() as broken:
                broken.setattr(kit.engine, "complete", lambda *_, **__: 1 / 0)
                with pytest.raises(IcmLoraError) as failed:
                    await scheduler.submit(kit.request("a"), DEADLINE)
                assert isinstance(failed.value.__cause__, ZeroDivisionError)
            answer = await scheduler.submit(kit.request("a", max_tokens=1), DEADLINE)
            assert answer.text == "b"

    asyncio.run(scenario())
    assert "a batch failed" in caplog.text


def test_drain_finishes_what_was_accepted_and_refuses_the_rest(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = asyncio.create_task(scheduler.submit(kit.request("b", max_tokens=2), 30))
            await asyncio.sleep(0)
            drained = asyncio.create_task(scheduler.drain(20.0))
            await asyncio.sleep(0)
            with pytest.raises(NotReadyError):
                await scheduler.submit(kit.request("c"), DEADLINE)
            await drained
            assert len((await long).text) == LONG
            assert (await waiting).text == "cd"

    asyncio.run(scenario())


def test_drain_past_its_grace_answers_what_is_left(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            await scheduler.drain(0.01)
            with pytest.raises(NotReadyError):
                await long

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
