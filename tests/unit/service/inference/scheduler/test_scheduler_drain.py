"""The end of a scheduler, and functions that its thread runs beside requests."""

import asyncio
import threading
import time

import pytest

from service.errors import NotReadyError
from service.inference.scheduler import Scheduler
from tests.fixtures.scheduler_kit import (
    DEADLINE,
    LONG,
    Observed,
    run_scheduler,
    start_long,
)
from tests.fixtures.tiny_engine import EngineKit


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
