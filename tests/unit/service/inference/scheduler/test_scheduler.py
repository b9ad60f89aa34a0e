"""Who shares a batch, and that every waiter is answered once, whatever fails."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from service.errors import (
    AdapterNotFoundError,
    IcmLoraError,
    InvalidInputError,
)
from service.inference.scheduler import Scheduler
from service.inference.text import Completion, CompletionRequest
from tests.fixtures.scheduler_kit import (
    DEADLINE,
    LONG,
    Observed,
    collect,
    failing_step,
    run_scheduler,
    start_long,
)
from tests.fixtures.tiny_engine import (
    LETTERS,
    EngineKit,
    build_engine,
    load_random_base,
)


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
