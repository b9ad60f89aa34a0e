"""The synthesis thread, and the recipes that wait for it: all of them go in one batch."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from service.errors import IcmLoraError, QueueFullError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.synthesizer import Examples, SynthesizedAdapter, Synthesizer
from service.threads import Computations

MAX_BATCH = 4
"""Recipes of one decoder forward. Equal bytes leave a batch little to share (the shipped text
generator: 11.2 ms alone, 9.7 ms a recipe in a batch of 4, 9.5 in one of 16), and a batch ends
for all when it ends for the last: larger ones would only make the first wait longer."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    recipe: AdapterRecipe
    examples: Examples | None
    since: float
    done: asyncio.Future[SynthesizedAdapter]


class SynthesisBatches:
    """Runs one batch of syntheses at a time; whoever waits when it is done goes together.

    Lives on one event loop. Nothing waits for company: a recipe that finds none running is
    a batch of one.

    Args:
        synthesizer: generates adapters; blocking.
        computations: where they run.
        max_pending: bound on recipes that run or wait.
        max_batch: most recipes of one batch.
        on_batch: told the size of every batch, on the event loop.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        *,
        computations: Computations,
        max_pending: int = 64,
        max_batch: int = MAX_BATCH,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._synthesizer = synthesizer
        self._max_pending = max_pending
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._computations = computations
        self._waiting: deque[_Waiting] = deque()
        self._num_pending = 0
        self._worker: asyncio.Task[None] | None = None

    async def synthesize(
        self, recipe: AdapterRecipe, examples: Examples | None
    ) -> SynthesizedAdapter:
        """The adapter, its stages including `queue`: the wait for the thread.

        Raises:
            QueueFullError: too many recipes run or wait.
            IcmLoraError: as `Synthesizer.synthesize`.
        """
        if self._num_pending >= self._max_pending:
            raise QueueFullError(f"{self._num_pending} adapters are waiting to be generated")
        done: asyncio.Future[SynthesizedAdapter] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(recipe, examples, time.perf_counter(), done))
        self._num_pending += 1
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            return await done
        finally:
            self._num_pending -= 1

    async def _work(self) -> None:
        """Batch after batch, until nothing waits."""
        try:
            while self._waiting:
                size = min(len(self._waiting), self._max_batch)
                batch = [self._waiting.popleft() for _ in range(size)]
                if self._on_batch is not None:
                    self._on_batch(size)
                try:
                    results = await self._computations.run(self._run, batch)
                except Exception as error:  # whatever it is, it is the waiters' to see
                    results = [error] * size
                for waiting, result in zip(batch, results, strict=True):
                    if waiting.done.cancelled():
                        continue
                    if isinstance(result, SynthesizedAdapter):
                        waiting.done.set_result(result)
                    else:
                        waiting.done.set_exception(result)
        finally:
            self._worker = None

    def _run(self, batch: Sequence[_Waiting]) -> list[SynthesizedAdapter | Exception]:
        started = time.perf_counter()
        orders = [(waiting.recipe, waiting.examples) for waiting in batch]
        return [
            result
            if isinstance(result, IcmLoraError)
            else replace(result, seconds={"queue": started - waiting.since, **result.seconds})
            for waiting, result in zip(
                batch, self._synthesizer.synthesize_batch(orders), strict=True
            )
        ]
