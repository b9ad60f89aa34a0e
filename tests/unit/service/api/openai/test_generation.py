"""Choices of one request and the tenant's tokens: all of them or none, and paid as they end."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from service.api.bundle_service import BundleService, TextService
from service.api.keys import TenantLimits
from service.api.openai.generation import complete_rows, stream_rows
from service.api.openai.prompts import Row
from service.api.quotas import Quotas
from service.errors import DeadlineExceededError, RateLimitedError
from service.inference.completion import Completion, CompletionRequest, TextDelta
from service.metrics import ServiceMetrics
from service.settings import Settings

NUM_TOKENS = 100


class Script:
    """Stands in for the scheduler (not what these tests test): rows do what their prompt says."""

    def __init__(self) -> None:
        self.begun: list[CompletionRequest] = []

    async def submit(self, request: CompletionRequest, deadline_seconds: float) -> Completion:
        async for item in self.stream(request, deadline_seconds):
            if isinstance(item, Completion):
                return item
        raise AssertionError("no answer")

    async def stream(
        self, request: CompletionRequest, deadline_seconds: float
    ) -> AsyncGenerator[TextDelta | Completion, None]:
        self.begun.append(request)
        yield TextDelta("ab", num_tokens=3)
        yield TextDelta("c", num_tokens=5)
        if request.prompt == "fail":
            await asyncio.sleep(0.01)
            raise DeadlineExceededError("too late")
        if request.prompt == "hang":
            await asyncio.Event().wait()
        yield Completion("abc", "stop", 1, 6, 0, 0)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def service(script: Script) -> TextService:
    limits = {"public": TenantLimits(tokens_per_minute=NUM_TOKENS)}
    quotas = Quotas(Settings(), limits, lambda reason: None, clock=lambda: 0.0)
    parts: Any = (None, None, None, script, quotas)
    service = BundleService("text", Settings(), ServiceMetrics(False), *parts)
    return cast(TextService, service)


def make_rows(*prompts: str, max_tokens: int = 20) -> list[Row]:
    return [
        Row(index, index, "", CompletionRequest(prompt, max_tokens=max_tokens, temperature=1.0))
        for index, prompt in enumerate(prompts)
    ]


def count_left(service: TextService) -> int:
    """Tokens that the tenant could still ask for; asking takes none."""
    for tokens in range(NUM_TOKENS, 0, -1):
        try:
            with service.quotas.reserve_tokens("public", tokens) as (reservation,):
                reservation.settle(0)
        except RateLimitedError:
            continue
        return tokens
    return 0


def test_rows_that_do_not_all_fit_are_not_begun(service: TextService, script: Script) -> None:
    async def scenario() -> None:
        with service.quotas.reserve_tokens("public", 50) as (reservation,):
            rows = make_rows("a", "b", "c")
            with pytest.raises(RateLimitedError):
                await complete_rows(service, rows)
            with pytest.raises(RateLimitedError):
                await anext(stream_rows(service, rows))
            assert not script.begun
            assert len(await complete_rows(service, make_rows("a", "b"))) == 2
            reservation.settle(50)

    asyncio.run(scenario())
    assert count_left(service) == NUM_TOKENS - 50 - 2 * 6


def test_rows_with_the_same_answer_are_reserved_once(service: TextService, script: Script) -> None:
    request = CompletionRequest("a", max_tokens=60)  # greedy
    rows = [Row(index, 0, "", request) for index in range(4)]
    assert len(asyncio.run(complete_rows(service, rows))) == 4
    assert len(script.begun) == 1
    assert count_left(service) == NUM_TOKENS - 6


def test_a_stream_that_fails_late_costs_what_it_has_generated(service: TextService) -> None:
    async def scenario() -> None:
        items = [item async for _, item in stream_rows(service, make_rows("a", "fail", "hang"))]
        raise AssertionError(f"{len(items)} items and no error")

    with pytest.raises(DeadlineExceededError):
        asyncio.run(scenario())
    assert count_left(service) == NUM_TOKENS - 6 - 5 - 5


def test_a_stream_that_is_left_costs_what_its_open_rows_reserved(service: TextService) -> None:
    async def scenario() -> None:
        running = stream_rows(service, make_rows("a", "hang"))
        async for _, item in running:
            if isinstance(item, Completion):
                break
        await running.aclose()

    asyncio.run(scenario())
    assert count_left(service) == NUM_TOKENS - 6 - 20
