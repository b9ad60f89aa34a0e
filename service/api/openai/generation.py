"""The choices of one request, answered together; equal ones are computed once."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from service.api.bundle_service import TextService
from service.api.openai.prompts import Row
from service.api.quotas import TokenReservation
from service.inference.completion import Completion, TextDelta

RowItem = tuple[Row, TextDelta | Completion]
"""What a choice grew by, or its end."""

RowStream = AsyncGenerator[RowItem, None]


async def complete_rows(service: TextService, rows: Sequence[Row]) -> list[Completion]:
    """Completions of all rows, in their order; where one fails the others are given up.

    Raises:
        RateLimitedError: the tenant's tokens do not suffice for all rows; none is begun.
        IcmLoraError: what became of the first row that failed.
    """
    groups = _group_equal(rows)
    requests = [group[0].request for group in groups]
    with service.reserve_tokens(requests) as reservations:
        tasks = [
            asyncio.create_task(service.answer_reserved(request, reservation))
            for request, reservation in zip(requests, reservations, strict=True)
        ]
        try:
            completions = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
    answers = {
        row: completion
        for group, completion in zip(groups, completions, strict=True)
        for row in group
    }
    return [answers[row] for row in rows]


async def stream_rows(service: TextService, rows: Sequence[Row]) -> RowStream:
    """What all rows grow by, as it comes; the last of each row is its completion.

    Closing the generator stops all rows.

    Raises:
        RateLimitedError: the tenant's tokens do not suffice for all rows; none is begun.
        IcmLoraError: what became of the first row that failed; the others are given up.
    """
    arrived: asyncio.Queue[tuple[Sequence[Row], TextDelta | Completion | Exception]]
    arrived = asyncio.Queue()
    groups = _group_equal(rows)
    with service.reserve_tokens([group[0].request for group in groups]) as reservations:
        tasks = [
            asyncio.create_task(_follow(service, group, reservation, arrived))
            for group, reservation in zip(groups, reservations, strict=True)
        ]
        try:
            num_running = len(groups)
            while num_running:
                group, item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                num_running -= isinstance(item, Completion)
                for row in group:
                    yield row, item
        finally:
            await _cancel(tasks)


async def _follow(
    service: TextService,
    group: Sequence[Row],
    reservation: TokenReservation,
    arrived: "asyncio.Queue[tuple[Sequence[Row], TextDelta | Completion | Exception]]",
) -> None:
    request = group[0].request
    try:
        if request.prompt_logprobs:  # they come first, and are known at the end only
            arrived.put_nowait((group, await service.answer_reserved(request, reservation)))
            return
        async with aclosing(service.stream_reserved(request, reservation)) as items:
            async for item in items:
                arrived.put_nowait((group, item))
    except Exception as error:
        arrived.put_nowait((group, error))


def _group_equal(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that have the same answer: greedy ones of one prompt."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        key = row if row.request.temperature > 0 else row.prompt
        groups.setdefault(key, []).append(row)
    return list(groups.values())


async def _cancel(tasks: Sequence["asyncio.Task[object]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
