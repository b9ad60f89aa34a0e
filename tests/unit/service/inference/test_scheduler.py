"""Who shares a batch, who is refused, and that every waiter is answered once, whatever fails."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

import pytest

from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.scheduler import Scheduler
from service.inference.text import Completion, CompletionRequest
from tests.fixtures.tiny_engine import (
    EngineKit,
    build_engine,
    load_chained_base,
    load_random_base,
)

DEADLINE = 60.0
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


@contextmanager
def failing_step(kit: EngineKit) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The next step of the model sets the first event, waits for the second, and then fails."""
    reached, go_on = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        hook.remove()
        reached.set()
        go_on.wait(30.0)
        raise RuntimeError("out of memory")

    hook = kit.base.model.register_forward_pre_hook(fail)
    try:
        yield reached, go_on
    finally:
        go_on.set()
        hook.remove()


@pytest.mark.parametrize("loop_is_closed", [False, True])
def test_answers_that_come_when_nobody_waits_any_more_are_dropped(
    kit: EngineKit, caplog: pytest.LogCaptureFixture, loop_is_closed: bool
) -> None:
    observed = Observed()
    scheduler = Scheduler(kit.engine, observer=observed)
    scheduler.start()

    async def leave(reached: threading.Event, go_on: threading.Event) -> None:
        long = await start_long(kit, scheduler, observed)
        await asyncio.to_thread(reached.wait)
        long.cancel()
        if not loop_is_closed:
            await asyncio.wait([long])
            go_on.set()
            await ask()

    async def ask() -> None:
        answer = await scheduler.submit(kit.request("a", max_tokens=1), DEADLINE)
        assert answer.text == "b"

    with failing_step(kit) as (reached, go_on):
        asyncio.run(leave(reached, go_on))
        go_on.set()
        asyncio.run(ask())
    asyncio.run(scheduler.drain(10.0))
    assert [record.message for record in caplog.records] == ["a batch failed"]


def test_loops_in_several_threads_get_the_answers_to_their_own_requests(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kit = build_engine(load_random_base(tmp_path_factory.mktemp("cache")), num_slots=2)
    requests = [
        kit.request("x" * (1 + number % 5), number % 7 or None, max_tokens=4 + number % 3)
        for number in range(24)
    ]
    alone = [kit.complete(request)[0] for request in requests]
    observed = Observed()
    scheduler = Scheduler(kit.engine, max_batch_rows=5, max_queue=48, observer=observed)
    scheduler.start()

    async def ask_all() -> list[Completion]:
        return await asyncio.gather(*(scheduler.submit(each, DEADLINE) for each in requests))

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(asyncio.run, [ask_all(), ask_all()]))
    asyncio.run(scheduler.drain(10.0))

    expected = [result.text for result in alone if isinstance(result, Completion)]
    for answer in answers:
        assert [each.text for each in answer] == expected
    assert sum(rows for rows, _ in observed.batches) == 48
    assert max(rows for rows, _ in observed.batches) == 5
    assert max(adapters for _, adapters in observed.batches) > 2  # more than there are slots
    assert observed.tokens == sum(each.completion_tokens for answer in answers for each in answer)
    assert observed.depths[-1] == 0
    assert observed.rejections == []


def test_a_bad_request_fails_alone(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            requests = [
                kit.request("a", 1, max_tokens=3),
                kit.request("a", max_tokens=10_000),
                CompletionRequest("a", "never-loaded"),
                kit.request("b", max_tokens=3),
            ]
            good, wide, unknown, other = await asyncio.gather(
                *(scheduler.submit(each, DEADLINE) for each in requests), return_exceptions=True
            )
            await long
        assert isinstance(wide, InvalidInputError)
        assert isinstance(unknown, AdapterNotFoundError)
        assert isinstance(good, Completion)
        assert isinstance(other, Completion)
        assert other.text == "cde"
        assert observed.batches[1] == (4, 3)

    asyncio.run(scenario())


def test_cancelled_rows_leave_a_batch_that_goes_on(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            stays, leaves = (
                asyncio.create_task(
                    scheduler.submit(kit.request(prompt, max_tokens=LONG), DEADLINE)
                )
                for prompt in "ab"
            )
            await long
            while len(observed.batches) < 2:
                await asyncio.sleep(0.001)
            leaves.cancel()
            assert (await stays).text.startswith("bcdefg")
        assert leaves.cancelled()
        assert observed.batches == [(1, 1), (2, 1)]
        assert observed.tokens == 2 * LONG

    asyncio.run(scenario())


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


def test_what_waited_too_long_does_not_run_even_when_its_loop_is_late(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
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


def test_drain_returns_at_once_where_nothing_runs(kit: EngineKit) -> None:
    async def scenario() -> None:
        scheduler = Scheduler(kit.engine)
        scheduler.start()
        async with asyncio.timeout(10.0):
            await scheduler.drain(60.0)
            await scheduler.drain(60.0)

    asyncio.run(scenario())


def test_drain_past_its_grace_answers_what_is_left(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_batch_rows=1) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = asyncio.create_task(scheduler.submit(kit.request("b"), DEADLINE))
            await asyncio.sleep(0)
            await scheduler.drain(0.01)
            for task in (long, waiting):
                with pytest.raises(NotReadyError, match="shutting down"):
                    await task
        assert len(observed.batches) == 1
        assert observed.depths[-1] == 0
        assert observed.tokens == 0

    asyncio.run(scenario())


def test_drain_does_not_wait_for_a_step_that_hangs(kit: EngineKit) -> None:
    go_on = threading.Event()
    hook = kit.base.model.register_forward_pre_hook(lambda *_: not go_on.wait(30.0))

    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            hanging = await start_long(kit, scheduler, observed)
            started = time.monotonic()
            await scheduler.drain(0.1)
            with pytest.raises(NotReadyError):
                await hanging
            assert time.monotonic() - started < 5.0
            go_on.set()

    try:
        asyncio.run(scenario())
    finally:
        go_on.set()
        hook.remove()


def test_limits_out_of_range_and_a_scheduler_that_was_not_started(kit: EngineKit) -> None:
    with pytest.raises(InvalidInputError):
        Scheduler(kit.engine, max_queue=0)

    async def scenario() -> None:
        scheduler = Scheduler(kit.engine)
        with pytest.raises(NotReadyError):
            await scheduler.submit(kit.request("a"), DEADLINE)
        await scheduler.drain(1.0)

    asyncio.run(scenario())
