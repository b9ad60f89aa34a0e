"""Few-shot refinement beside running requests: the gradient of a few texts at a time."""

import asyncio
import time
from functools import partial

from jaxtyping import Float
from torch import Tensor

from service.errors import DeadlineExceededError, InvalidInputError, QueueFullError
from service.inference.example_reader import Call, group_texts
from service.inference.text import TextEngine
from service.synthesis.example_tasks import ExampleTexts
from service.synthesis.refinement import Refined, Refinement
from service.threads import Computations

MAX_TOKENS = 512
"""Of all examples together, in equal shares: what a step costs."""

MAX_PENDING = 4
"""Refinements that run at once; they take turns."""


class Refiner:
    """Measures adapters on examples with the serving base; lives on one event loop.

    Examples are read in parts of as many tokens as a step reads of prompts, forward and backward:
    running requests wait for one part at a time.

    Args:
        engine: of the base.
        call: has the engine's thread run a function, as `Scheduler.run_between_steps`.
        computations: where the decoder runs.
        timeout_seconds: longest time for one refinement.
    """

    def __init__(
        self,
        engine: TextEngine,
        call: Call,
        computations: Computations,
        timeout_seconds: float,
    ) -> None:
        self._engine = engine
        self._call = call
        self._computations = computations
        self._timeout_seconds = timeout_seconds
        self._num_pending = 0

    async def refine(
        self, refinement: Refinement, examples: ExampleTexts, num_steps: int
    ) -> Refined:
        """Takes the steps; the same examples and steps give the same bytes.

        Raises:
            DeadlineExceededError: they take too long; nothing of them is kept.
            InvalidInputError: no example is longer than one token.
            QueueFullError: too many refinements run.
            NotReadyError: shutting down.
        """
        if self._num_pending >= MAX_PENDING:
            raise QueueFullError(f"{self._num_pending} adapters are being refined")
        self._num_pending += 1
        try:
            deadline = time.monotonic() + self._timeout_seconds
            parts = await asyncio.to_thread(self._cut, examples)
            for _ in range(num_steps):
                loss, gradient = await self._measure(refinement.vector, parts, deadline)
                await self._computations.run(refinement.step, loss, gradient)
            loss, _ = await self._measure(refinement.vector, parts, deadline)
            return refinement.finish(loss)
        finally:
            self._num_pending -= 1

    async def _measure(
        self, vector: Float[Tensor, " num_params"], parts: list[list[list[int]]], deadline: float
    ) -> tuple[float, Float[Tensor, " num_params"]]:
        """Nats a token and their gradient."""
        num_tokens = sum(len(text) - 1 for part in parts for text in part)
        loss, gradient = 0.0, vector.new_zeros(vector.shape)
        for part in parts:
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"refinement takes longer than {self._timeout_seconds:g} seconds: ask for "
                    "fewer steps"
                )
            nats, change = await asyncio.wrap_future(
                self._call(partial(self._engine.measure_gradient, vector, part))
            )
            loss += nats / num_tokens
            gradient += change / num_tokens
        return loss, gradient

    def _cut(self, examples: ExampleTexts) -> list[list[list[int]]]:
        """Tokens of the examples, each within what one part may hold."""
        tokenizer, most = self._engine.base.tokenizer, self._engine.prefill_tokens
        share = MAX_TOKENS // len(examples.texts)
        texts = [tokenizer(text)["input_ids"][:share] for text in examples.texts]
        pieces = [
            text[start : start + most] for text in texts for start in range(0, len(text), most)
        ]
        pieces = [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise InvalidInputError("the examples are too short to refine on: send longer ones")
        return list(group_texts(sorted(pieces, key=len), most))
