"""Who shares a batch, who is refused, and that every waiter is answered once, whatever fails."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager

import pytest

from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.completion import TextDelta
from service.inference.load import LoadEstimate
from service.inference.scheduler import Scheduler
from service.inference.text import Completion, CompletionRequest
from tests.fixtures.tiny_engine import (
    LETTERS,
    EngineKit,
    build_engine,
    load_chained_base,
    load_random_base,
)

DEADLINE = 60.0
LONG = 480
"""Tokens of a completion that keeps the inference thread busy for a while."""


class Observed:
    """What an observer is told; `batches` are the steps, equal ones in a row once."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.rejections: list[str] = []
        self.depths: list[int] = []
        self.tokens = 0
        self.first_tokens = 0
        self.disconnects = 0
        self.running = 0

    def on_step(self, rows: int, distinct_adapters: int, /) -> None:
        if self.batches[-1:] != [(rows, distinct_adapters)]:
            self.batches.append((rows, distinct_adapters))

    def on_queue(self, depth: int, work: int, /) -> None:
        assert (depth == 0) == (work == 0)
        self.depths.append(depth)

    def on_running(self, rows: int, /) -> None:
        self.running = rows

    def on_first_token(self, seconds: float, /) -> None:
        assert seconds > 0
        self.first_tokens += 1

    def on_finish(self, seconds: float, tokens: int, /) -> None:
        assert seconds > 0
        self.tokens += tokens

    def on_disconnect(self) -> None:
        self.disconnects += 1

    def on_rejection(self, reason: str, /) -> None:
        self.rejections.append(reason)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> EngineKit:
    return build_engine(load_chained_base(tmp_path_factory.mktemp("cache")))


async def collect(
    items: AsyncGenerator[TextDelta | Completion, None],
) -> tuple[list[TextDelta], Completion]:
    deltas: list[TextDelta] = []
    async for item in items:
        if isinstance(item, Completion):
            return deltas, item
        deltas.append(item)
    raise AssertionError("a stream without an answer")


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
        assert observed.batches[0] == observed.batches[-1] == (1, 1)
        assert (5, 3) in observed.batches  # they joined the long one
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
        assert max(rows for rows, _ in observed.batches) == 2

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
    assert [record.message for record in caplog.records] == ["a step failed"]


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
    assert max(rows for rows, _ in observed.batches) == 5
    assert max(adapters for _, adapters in observed.batches) > 2  # more than there are slots
    assert observed.tokens == sum(each.completion_tokens for answer in answers for each in answer)
    assert observed.depths[-1] == 0
    assert observed.rejections == []


def test_requests_without_a_slot_do_not_keep_others_waiting(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kit = build_engine(load_random_base(tmp_path_factory.mktemp("cache")), num_slots=1)

    async def scenario() -> None:
        observed = Observed()
        scheduler = Scheduler(kit.engine, max_batch_rows=3, max_queue=8, observer=observed)
        scheduler.start()
        long = asyncio.create_task(
            scheduler.submit(kit.request("a", 1, max_tokens=LONG), DEADLINE)  # has the slot
        )
        while not observed.batches:
            await asyncio.sleep(0.001)
        others = [
            asyncio.create_task(scheduler.submit(kit.request("a", adapter, max_tokens=3), DEADLINE))
            for adapter in (2, 3, 4, None)
        ]
        await others[-1]
        assert not any(task.done() for task in (long, *others[:-1]))
        await asyncio.gather(long, *others)
        await scheduler.drain(10.0)

    asyncio.run(scenario())


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
            while observed.running < 3:
                await asyncio.sleep(0.001)
            leaves.cancel()
            assert (await stays).text.startswith("bcdefg")
            await long
        assert leaves.cancelled()
        assert observed.tokens == 2 * LONG
        assert observed.disconnects == 1

    asyncio.run(scenario())


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


def test_an_engine_failure_is_its_batch_s_alone(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with run_scheduler(kit, Observed()) as scheduler:
            with monkeypatch.context() as broken:
                broken.setattr(kit.engine, "step", lambda: 1 / 0)
                with pytest.raises(IcmLoraError) as failed:
                    await scheduler.submit(kit.request("a"), DEADLINE)
                assert isinstance(failed.value.__cause__, ZeroDivisionError)
            answer = await scheduler.submit(kit.request("a", max_tokens=1), DEADLINE)
            assert answer.text == "b"

    asyncio.run(scenario())
    assert "a step failed" in caplog.text


def test_a_request_that_cannot_be_admitted_fails_alone(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenize = kit.engine._tokenize

    def fail(request: CompletionRequest) -> list[int]:
        if request.prompt == "broken":
            raise ZeroDivisionError
        return tokenize(request)

    monkeypatch.setattr(kit.engine, "_tokenize", fail)

    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            long = await start_long(kit, scheduler, observed)
            broken, fine = await asyncio.gather(
                scheduler.submit(kit.request("broken", 1), DEADLINE),
                scheduler.submit(kit.request("a", max_tokens=2), DEADLINE),
                return_exceptions=True,
            )
            assert isinstance(broken, IcmLoraError)
            assert isinstance(broken.__cause__, ZeroDivisionError)
            assert isinstance(fine, Completion)
            assert len((await long).text) == LONG

    asyncio.run(scenario())
    assert [record.message for record in caplog.records] == ["a request failed"]
    assert kit.engine.slots.stats().leased == 0


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


def test_a_stream_tells_final_text_as_it_grows(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            request = kit.request("a", max_tokens=40, stop=("xyz", "klx"), num_logprobs=0)
            deltas, answer = await collect(scheduler.stream(request, DEADLINE))
            assert "".join(delta.text for delta in deltas) == answer.text == LETTERS[1:23]
            assert not any(delta.text.endswith("kl") for delta in deltas)  # klx may have begun
            assert len(deltas) > 10
            counts = [delta.num_tokens for delta in deltas]
            assert counts == sorted(counts)
            assert 0 < counts[0] <= 12
            assert counts[-1] == answer.completion_tokens
            told = [entry for delta in deltas for entry in delta.logprobs]
            assert answer.logprobs == tuple(told)
        assert (observed.first_tokens, observed.disconnects) == (1, 0)

    asyncio.run(scenario())


def test_streams_never_tell_half_a_character(kit: EngineKit) -> None:
    async def scenario() -> None:
        async with run_scheduler(kit, Observed()) as scheduler:
            deltas, answer = await collect(
                scheduler.stream(kit.request("0", max_tokens=15), DEADLINE)
            )
        assert "".join(delta.text for delta in deltas) == answer.text
        assert {delta.text for delta in deltas} >= {"é", "€", "😀"}

    asyncio.run(scenario())


def test_a_closed_stream_stops_its_row(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            async with aclosing(
                scheduler.stream(kit.request("a", max_tokens=LONG), DEADLINE)
            ) as items:
                async for _ in items:
                    break
            assert observed.disconnects == 1
            while observed.running:
                await asyncio.sleep(0.001)
        assert observed.tokens == 0

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


def test_running_and_waiting_adapters_are_told(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed, max_batch_rows=1) as scheduler:
            long = await start_long(kit, scheduler, observed)
            waiting = [
                asyncio.create_task(scheduler.submit(kit.request("b", 1), DEADLINE))
                for _ in range(2)
            ]
            await asyncio.sleep(0)
            assert scheduler.running_adapters() == [None]
            assert scheduler.waiting_adapters() == ["adapter-1"]
            await asyncio.gather(long, *waiting)

    asyncio.run(scenario())


def test_an_idle_thread_runs_short_functions_and_a_busy_one_refuses_them(kit: EngineKit) -> None:
    async def scenario() -> None:
        observed = Observed()
        async with run_scheduler(kit, observed) as scheduler:
            for _ in range(2):
                name = scheduler.run_if_idle(lambda: threading.current_thread().name)
                assert name is not None
                assert await asyncio.wrap_future(name) == "inference"
            failing = scheduler.run_if_idle(lambda: 1 // 0)
            assert failing is not None
            with pytest.raises(ZeroDivisionError):
                await asyncio.wrap_future(failing)
            begun, may_end = threading.Event(), threading.Event()

            def wait() -> None:
                begun.set()
                may_end.wait(10)

            given_up = asyncio.wrap_future(scheduler.run_if_idle(wait))
            await asyncio.to_thread(begun.wait, 10)
            never_begun = scheduler.run_if_idle(lambda: pytest.fail("nobody waits for it"))
            assert never_begun is not None
            assert never_begun.cancel()
            given_up.cancel()
            may_end.set()
            long = await start_long(kit, scheduler, observed)  # the thread goes on
            assert scheduler.run_if_idle(lambda: None) is None
            await long
        assert scheduler.run_if_idle(lambda: None) is None  # it has ended

    asyncio.run(scenario())


def test_functions_run_one_a_step_beside_what_runs_and_at_once_where_nothing_does(
    kit: EngineKit,
) -> None:
    async def scenario() -> None:
        observed = Observed()
        steps: list[int] = []
        step = kit.engine.step

        def count_step() -> None:
            steps.append(0)
            step()

        async with run_scheduler(kit, observed) as scheduler:
            idle = [scheduler.run_between_steps(threading.get_ident) for _ in range(3)]
            names = {await asyncio.wrap_future(each) for each in idle}
            assert len(names) == 1
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kit.engine, "step", count_step)
                long = await start_long(kit, scheduler, observed)
                calls = [scheduler.run_between_steps(lambda: len(steps)) for _ in range(5)]
                failing = scheduler.run_between_steps(lambda: 1 // 0)
                seen = [await asyncio.wrap_future(each) for each in calls]
                with pytest.raises(ZeroDivisionError):
                    await asyncio.wrap_future(failing)
                assert len((await long).text) == LONG
            assert seen == list(range(seen[0], seen[0] + 5))
        with pytest.raises(NotReadyError):
            scheduler.run_between_steps(lambda: None)

    asyncio.run(scenario())


def test_functions_that_wait_are_run_before_a_drained_thread_ends(kit: EngineKit) -> None:
    async def scenario() -> None:
        async with run_scheduler(kit, Observed()) as scheduler:
            calls = [scheduler.run_between_steps(lambda: time.sleep(0.02)) for _ in range(5)]
        assert all(each.done() for each in calls)

    asyncio.run(scenario())
