"""The serving base reads examples as Eq. 1 says, in short parts, and disturbs nothing that runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import InvalidInputError, NotReadyError, QueueFullError
from service.inference.example_reader import ExampleReader, call_now
from service.inference.scheduler import Scheduler
from service.synthesis.example_tasks import MAX_EXAMPLE_TOKENS, ExampleTexts
from service.synthesis.task_encoder import HiddenStateEncoder
from tests.fixtures.tiny_engine import EngineKit, load_random_base

TEXTS = ["a", "two words", "x" * 300, "caf\u00e9\n\nwith milk", *(f"text {i}" for i in range(20))]


@pytest.fixture(scope="module")
def reference(cache: Path) -> HiddenStateEncoder:
    """The same base without any adapters beside it."""
    base = load_random_base(cache)
    return HiddenStateEncoder(base.model, base.tokenizer, base.digest, MAX_EXAMPLE_TOKENS)


@asynccontextmanager
async def open_scheduler(kit: EngineKit) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(kit.engine)
    scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.drain(10.0)


def test_states_are_those_of_the_bare_base(kit: EngineKit, reference: HiddenStateEncoder) -> None:
    texts = ["a", "two words", "a longer text than that"]
    kit.complete(kit.request("a", adapter=1, max_tokens=2))
    states = kit.engine.read_states([kit.base.tokenizer(text)["input_ids"] for text in texts])
    torch.testing.assert_close(states, reference.read_states(texts), rtol=1e-5, atol=1e-5)


def test_reading_between_steps_changes_nothing_that_runs(kit: EngineKit) -> None:
    requests = [kit.request("Once upon", adapter, max_tokens=12) for adapter in (1, None, 2)]
    expected = [result.text for result in kit.complete(*requests)]
    told: dict[int, str] = {}
    engine = kit.engine
    step, tokens = engine.step, kit.base.tokenizer("in between")["input_ids"]

    def read_and_step() -> None:
        engine.read_states([tokens, tokens[:3]])
        step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", read_and_step)
        for index, result in enumerate(engine.complete(requests)):
            told[index] = result.text
    assert [told[index] for index in range(len(requests))] == expected


def test_mean_is_that_of_equation_one_however_busy_the_base(
    kit: EngineKit, reference: HiddenStateEncoder
) -> None:
    async def scenario() -> None:
        examples = ExampleTexts.build(TEXTS)
        async with open_scheduler(kit) as scheduler:
            reader = ExampleReader(kit.engine, scheduler.run_between_steps)
            idle = await reader.read(examples)
            running = [
                asyncio.create_task(scheduler.submit(kit.request("a", each, max_tokens=80), 60.0))
                for each in (1, None)
            ]
            busy, other = await asyncio.gather(
                reader.read(ExampleTexts.build(TEXTS[::-1])), reader.read(ExampleTexts.build(["b"]))
            )
            await asyncio.gather(*running)
        expected = reference.read_states(examples.texts).mean(0)
        torch.testing.assert_close(idle, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(busy, idle)
        assert not torch.equal(other, idle)

    asyncio.run(scenario())


def test_no_part_is_longer_than_a_steps_share_of_prompts(kit: EngineKit) -> None:
    sizes: list[tuple[int, int]] = []

    def call(function: Callable[[], Tensor]) -> Future[Tensor]:
        (part,) = function.args  # type: ignore[attr-defined]
        sizes.append((len(part), max(len(text) for text in part)))
        return call_now(function)

    examples = ExampleTexts.build([*TEXTS, "y" * 4_000])
    asyncio.run(ExampleReader(kit.engine, call).read(examples))
    assert sum(rows for rows, _ in sizes) == len(examples.texts)
    assert max(tokens for _, tokens in sizes) == MAX_EXAMPLE_TOKENS
    assert all(rows == 1 or rows * tokens <= kit.engine.prefill_tokens for rows, tokens in sizes)


def test_what_is_too_much_or_nothing_is_refused(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_scheduler(kit) as scheduler:
            reader = ExampleReader(kit.engine, scheduler.run_between_steps, max_pending=1)
            first = asyncio.create_task(reader.read(ExampleTexts.build(TEXTS)))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="1 requests' examples"):
                await reader.read(ExampleTexts.build(["a"]))
            await first
            with monkeypatch.context() as patch:
                patch.setattr(type(kit.base.tokenizer), "__call__", lambda *_: {"input_ids": []})
                with pytest.raises(InvalidInputError, match="empty to the base"):
                    await reader.read(ExampleTexts.build(["a"]))
            await reader.read(ExampleTexts.build(["a"]))  # there is room again
        with pytest.raises(NotReadyError):
            await reader.read(ExampleTexts.build(["a"]))

    asyncio.run(scenario())
