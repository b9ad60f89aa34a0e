"""Adapters are refined between the steps of what runs, within bounds."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from service.errors import DeadlineExceededError, InvalidInputError, QueueFullError
from service.inference import refiner as module
from service.inference.example_reader import call_now
from service.inference.refiner import MAX_TOKENS, Refiner
from service.inference.scheduler import Scheduler
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.example_tasks import ExampleTexts
from service.synthesis.refinement import Refined, Refinement
from service.threads import Computations
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_engine import EngineKit, load_random_base

TEXTS = ["Once upon a time", "there was", "x" * 700]


class Descent(Refinement):
    """Plain gradient descent on the adapter, in the place of a decoder's code."""

    def __init__(self, num_params: int) -> None:
        self._adapter = normal(num_params, seed=3) * 0.1
        self.losses: list[float] = []

    @property
    def vector(self) -> torch.Tensor:
        return self._adapter

    def step(self, loss: float, gradient: torch.Tensor) -> None:
        self.losses.append(loss)
        self._adapter = self.vector - 0.02 * gradient / gradient.norm() * self.vector.norm()

    def finish(self, loss: float) -> Refined:
        return Refined(self.vector, len(self.losses), self.losses[0], loss)


def open_refiner(kit: EngineKit, call: Any, timeout_seconds: float = 60.0) -> Refiner:
    return Refiner(kit.engine, call, Computations(), timeout_seconds)


def test_gradient_is_that_of_the_bare_base(kit: EngineKit, cache: Path) -> None:
    texts = [kit.base.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    vector = normal(kit.layout.num_params, seed=3) * 0.1
    kit.complete(kit.request("a", adapter=1, max_tokens=2))
    nats, gradient = kit.engine.measure_gradient(vector, texts)

    base = load_random_base(cache)
    attachment = Attachment(base.model, AdapterBases.from_model(kit.layout, base.model))
    leaf = vector.clone().requires_grad_()
    attachment.rows.vectors = leaf[None]
    expected = torch.zeros(())
    for text in texts:
        logits = base.model(input_ids=torch.tensor([text])).logits[0, :-1]
        expected = expected + cross_entropy(logits, torch.tensor(text[1:]), reduction="sum")
    expected.backward()  # type: ignore[no-untyped-call]
    assert nats == pytest.approx(float(expected.detach()), rel=1e-4)
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-4)


def test_running_requests_go_on_and_the_result_is_the_same(kit: EngineKit) -> None:
    requests = [kit.request("Once upon", adapter, max_tokens=60) for adapter in (1, None)]
    expected = [result.text for result in kit.complete(*requests)]
    examples = ExampleTexts.build(TEXTS)

    async def scenario() -> tuple[Refined, list[str], Refined]:
        scheduler = Scheduler(kit.engine)
        scheduler.start()
        refiner = open_refiner(kit, scheduler.run_between_steps)
        idle = await refiner.refine(Descent(kit.layout.num_params), examples, 3)
        running = [asyncio.create_task(scheduler.submit(each, 60.0)) for each in requests]
        busy = await refiner.refine(Descent(kit.layout.num_params), examples, 3)
        texts = [each.text for each in await asyncio.gather(*running)]
        await scheduler.drain(10.0)
        return idle, texts, busy

    idle, texts, busy = asyncio.run(scenario())
    assert texts == expected
    assert idle.loss_after < idle.loss_before
    assert torch.equal(idle.vector, busy.vector)


def test_a_step_reads_so_many_tokens_in_parts_that_fit(kit: EngineKit) -> None:
    sizes: list[int] = []

    def call(function: Callable[[], Any]) -> Future[Any]:
        _, part = function.args  # type: ignore[attr-defined]
        sizes.append(len(part) * max(len(text) for text in part))
        return call_now(function)

    refining = open_refiner(kit, call).refine(
        Descent(kit.layout.num_params), ExampleTexts.build(["y" * 4_000]), 1
    )
    assert asyncio.run(refining).steps == 1
    assert sum(sizes) == 2 * MAX_TOKENS  # one step, and what came of it
    assert max(sizes) <= kit.engine.prefill_tokens


def test_bounds_are_kept(kit: EngineKit, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = ExampleTexts.build(TEXTS)

    async def refine(refiner: Refiner, texts: ExampleTexts) -> Refined:
        return await refiner.refine(Descent(kit.layout.num_params), texts, 2)

    with pytest.raises(DeadlineExceededError, match="fewer steps"):
        asyncio.run(refine(open_refiner(kit, call_now, timeout_seconds=0.0), examples))
    with pytest.raises(InvalidInputError, match="too short"):
        asyncio.run(refine(open_refiner(kit, call_now), ExampleTexts.build(["x"])))
    monkeypatch.setattr(module, "MAX_PENDING", 1)

    async def refine_twice() -> None:
        refiner = open_refiner(kit, call_now)
        first = asyncio.create_task(refine(refiner, examples))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="being refined"):
            await refine(refiner, examples)
        await first
        await refine(refiner, examples)  # there is room again

    asyncio.run(refine_twice())
