"""Scheduler: a bounded queue, and one thread that runs what waits as mixed-adapter batches."""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from service.errors import (
    DeadlineExceededError,
    NoFreeSlotError,
    NotReadyError,
    QueueFullError,
)
from service.inference.text import Completion, CompletionRequest, Result, TextEngine


@runtime_checkable
class SchedulerObserver(Protocol):
    """What metrics want to know; called from the event loop and from the inference thread."""

    def on_batch(self, rows: int, distinct_adapters: int) -> None:
        """A batch starts; the base counts as an adapter."""
        ...

    def on_queue(self, depth: int) -> None:
        """The number of waiting requests changed."""
        ...

    def on_tokens(self, count: int) -> None:
        """A completion with this many tokens is done."""
        ...

    def on_rejection(self, reason: str) -> None:
        """A request was refused: `queue_full`, `deadline` or `shutting_down`."""
        ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: CompletionRequest
    future: "asyncio.Future[Completion]"
    enqueued: float
    deadline: float  # of time.monotonic()


class Scheduler:
    """Runs completions on one inference thread, batched whatever their adapters are.

    A batch is what waits when the thread becomes free, oldest first; there is no pause for
    more requests unless a window is set.

    Args:
        engine: decodes batches; used by this scheduler's thread alone.
        max_queue: requests that may wait.
        max_batch_rows: rows of a batch.
        batch_window_seconds: time that a batch waits for more rows.
        observer: told of batches, queue, tokens and refusals.
    """

    def __init__(
        self,
        engine: TextEngine,
        *,
        max_queue: int,
        max_batch_rows: int,
        batch_window_seconds: float,
        observer: SchedulerObserver,
    ) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._max_batch_rows = max_batch_rows
        self._batch_window_seconds = batch_window_seconds
        self._observer = observer
        self._queue: deque[_Waiting] = deque()
        self._running = 0
        self._accepting = False
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Starts the inference thread."""
        self._accepting = True
        self._thread.start()

    async def submit(self, request: CompletionRequest, deadline_seconds: float) -> Completion:
        """Queues a request and waits for its completion.

        Cancelling the call takes the request out of the queue, or out of its batch before the
        next decode step.

        Raises:
            QueueFullError: too many requests wait.
            NotReadyError: not started, or shutting down.
            DeadlineExceededError: not done within `deadline_seconds`.
            InvalidInputError: the prompt is too long.
            NoFreeSlotError: the adapter finds no slot.
        """
        now = time.monotonic()
        waiting = _Waiting(
            request, asyncio.get_running_loop().create_future(), now, now + deadline_seconds
        )
        with self._changed:
            if not self._accepting:
                self._observer.on_rejection("shutting_down")
                raise NotReadyError("the service is starting or shutting down: try again later")
            depth = len(self._queue)
            if depth >= self._max_queue:
                self._observer.on_rejection("queue_full")
                retry = max(1, math.ceil(depth / self._max_batch_rows))
                raise QueueFullError(f"{depth} requests are waiting: try again later", retry)
            self._queue.append(waiting)
            self._observer.on_queue(len(self._queue))
            self._changed.notify_all()
        try:
            async with asyncio.timeout(deadline_seconds):
                return await waiting.future
        except TimeoutError:
            self._observer.on_rejection("deadline")
            raise DeadlineExceededError(
                f"not done within {deadline_seconds:g} s: ask for fewer tokens, or try again"
            ) from None
        finally:
            waiting.future.cancel()
            self._forget(waiting)

    async def drain(self, grace_seconds: float) -> None:
        """Accepts nothing more, finishes what was accepted, then stops the thread.

        What is not done after `grace_seconds` gets a `NotReadyError`.
        """
        with self._changed:
            self._accepting = False
        deadline = time.monotonic() + grace_seconds
        while (self._queue or self._running) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._changed:
            self._stopping = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for waiting in left:
            self._resolve(waiting, NotReadyError("the service shut down before its turn"))
        await asyncio.to_thread(self._thread.join, max(0.0, deadline - time.monotonic()) + 1.0)

    def _forget(self, waiting: _Waiting) -> None:
        """Takes a request out of the queue where it still is there."""
        with self._changed, contextlib.suppress(ValueError):
            self._queue.remove(waiting)
            self._observer.on_queue(len(self._queue))

    def _run(self) -> None:
        while (batch := self._take_batch()) is not None:
            try:
                self._run_batch(batch)
            except Exception as error:  # the engine failed: this batch's fault, not the thread's
                for waiting in batch:
                    self._resolve(waiting, error)
            finally:
                with self._changed:
                    self._running = 0

    def _take_batch(self) -> list[_Waiting] | None:
        """The oldest waiting requests, or None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if self._batch_window_seconds > 0:
                self._changed.wait_for(
                    lambda: len(self._queue) >= self._max_batch_rows or self._stopping,
                    timeout=self._batch_window_seconds,
                )
            if self._stopping:
                return None
            batch: list[_Waiting] = []
            while self._queue and len(batch) < self._max_batch_rows:
                waiting = self._queue.popleft()
                if not waiting.future.done() and time.monotonic() < waiting.deadline:
                    batch.append(waiting)
            self._running = len(batch)
            self._observer.on_queue(len(self._queue))
            return batch

    def _run_batch(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        started = time.monotonic()
        self._observer.on_batch(len(batch), len({w.request.adapter_id for w in batch}))
        crowded_out: list[_Waiting] = []

        def deliver(index: int, result: Result) -> None:
            waiting = batch[index]
            if isinstance(result, NoFreeSlotError) and len(batch) > 1:
                crowded_out.append(waiting)  # by its own batch, which is about to let go
                return
            if isinstance(result, Completion):
                self._observer.on_tokens(result.completion_tokens)
                result.seconds["queue"] = started - waiting.enqueued
            self._resolve(waiting, result)

        def is_wanted(index: int) -> bool:
            return not batch[index].future.done() and not self._stopping

        self._engine.complete([waiting.request for waiting in batch], deliver, is_wanted)
        if self._stopping:
            for waiting in batch:
                self._resolve(waiting, NotReadyError("the service shut down before it was done"))
        with self._changed:
            self._queue.extendleft(reversed(crowded_out))

    def _resolve(self, waiting: _Waiting, result: Result | Exception) -> None:
        """Hands a result to the event loop that waits for it, if it still does."""

        def set_result() -> None:
            if waiting.future.done():
                return
            if isinstance(result, Completion):
                waiting.future.set_result(result)
            else:
                waiting.future.set_exception(result)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            waiting.future.get_loop().call_soon_threadsafe(set_result)
