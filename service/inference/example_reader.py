"""Example texts as the serving base reads them: the mean of their hidden states (paper Eq. 1)."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError, QueueFullError
from service.inference.text import TextEngine
from service.synthesis.example_tasks import MAX_EXAMPLE_TOKENS, ExampleTexts

Call = Callable[[Callable[[], Any]], Future[Any]]
"""Has a thread run a function."""

MAX_PENDING = 64
"""Requests whose examples are read or wait for it."""


def call_now(function: Callable[[], Any]) -> Future[Any]:
    """Runs a function at once, in the place of a scheduler, where nothing else runs."""
    future: Future[Any] = Future()
    future.set_result(function())
    return future


class ExampleReader:
    """Reads one part of a request's examples a step, so that running requests hardly wait.

    A part takes no longer than a step's share of prompts. Requests take turns, part by part, and
    none shares a part with another: the same examples go through the base in the same shapes and
    give the same bytes, whoever else was waiting. Lives on one event loop.

    Args:
        engine: of the base.
        call: has the engine's thread run a function, as `Scheduler.run_between_steps`.
        max_pending: bound on requests.
    """

    def __init__(self, engine: TextEngine, call: Call, max_pending: int = MAX_PENDING) -> None:
        self._engine = engine
        self._call = call
        self._max_pending = max_pending
        self._num_pending = 0

    async def read(self, examples: ExampleTexts) -> Float[Tensor, " hidden"]:
        """The mean of the examples' hidden states, float32 on the CPU.

        Raises:
            InvalidInputError: an example without a token.
            QueueFullError: too many requests' examples are read or wait for it.
            NotReadyError: shutting down.
        """
        if self._num_pending >= self._max_pending:
            raise QueueFullError(f"{self._num_pending} requests' examples are waiting to be read")
        self._num_pending += 1
        try:
            total = torch.zeros(())
            for part in await asyncio.to_thread(self._cut, examples):
                states = await asyncio.wrap_future(
                    self._call(partial(self._engine.read_states, part))
                )
                total = total + states.sum(0)
        finally:
            self._num_pending -= 1
        return total / len(examples.texts)

    def _cut(self, examples: ExampleTexts) -> list[list[list[int]]]:
        """Tokens of the texts, in parts that are padded as little as may be."""
        tokenizer = self._engine.base.tokenizer
        texts = [tokenizer(text)["input_ids"][:MAX_EXAMPLE_TOKENS] for text in examples.texts]
        if not all(texts):
            raise InvalidInputError("an example is empty to the base model: leave it out")
        return list(group_texts(sorted(texts, key=len), self._engine.prefill_tokens))


def group_texts(texts: list[list[int]], max_tokens: int) -> Iterable[list[list[int]]]:
    """Neighbours of a list of rising lengths, up to so many tokens with padding; at least one."""
    group: list[list[int]] = []
    for text in texts:
        if group and (len(group) + 1) * len(text) > max_tokens:
            yield group
            group = []
        group.append(text)
    yield group
