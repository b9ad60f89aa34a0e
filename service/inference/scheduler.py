"""Scheduler: a bounded queue in front of one inference thread."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, runtime_checkable

from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.engine import AnswerT, Engine, RequestT

_logger = logging.getLogger("service.scheduler")

_MAX_RETRY_SECONDS = 60


@runtime_checkable
class SchedulerObserver(Protocol):
    """Told what happens, from any thread."""

    def on_batch(self, rows: int, distinct_adapters: int, /) -> None:
        """A batch starts; the base counts as one adapter."""

    def on_queue(self, depth: int, /) -> None:
        """The queue's length changed."""

    def on_tokens(self, count: int, /) -> None:
        """An answer of so many tokens is done."""

    def on_rejection(self, reason: str, /) -> None:
        """A request was refused: `queue_full`, `not_ready` or `deadline_exceeded`."""


@dataclass(eq=False)
class _Job(Generic[RequestT, AnswerT]):
    """A request on its way; `abandoned` once nobody waits for it."""

    request: RequestT
    future: asyncio.Future[AnswerT]
    loop: asyncio.AbstractEventLoop
    deadline: float  # time.monotonic
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    abandoned: bool = False

    def is_void(self) -> bool:
        return self.abandoned or time.monotonic() > self.deadline

    def resolve(self, result: AnswerT | IcmLoraError) -> None:
        """Hands the result to the waiting task; may be called from any thread."""
        if not isinstance(result, IcmLoraError):
            seconds = {"queue": self.started - self.submitted, **result.seconds}
            result = replace(result, seconds=seconds)
        try:
            self.loop.call_soon_threadsafe(self._set, result)
        except RuntimeError:  # its event loop is closed: nobody waits any more
            self.abandoned = True

    def _set(self, result: AnswerT | IcmLoraError) -> None:
        if self.future.done():
            return
        if isinstance(result, IcmLoraError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Scheduler(Generic[RequestT, AnswerT]):
    """Batches waiting requests, with different adapters too, on one inference thread.

    A batch takes the requests that wait when the thread is free, oldest first, and is not
    held back for more unless `batch_window_seconds` says so.

    Args:
        engine: answers a batch, of text or of images.
        max_queue: requests that may wait; further ones are refused.
        max_batch_rows: requests in one batch.
        batch_window_seconds: time that a batch which is not full waits for more.
        observer: for metrics.

    Raises:
        InvalidInputError: a limit is out of range.
    """

    def __init__(
        self,
        engine: Engine[RequestT, AnswerT],
        *,
        max_queue: int = 256,
        max_batch_rows: int = 16,
        batch_window_seconds: float = 0.0,
        observer: SchedulerObserver | None = None,
    ) -> None:
        if max_queue < 1 or max_batch_rows < 1 or batch_window_seconds < 0:
            raise InvalidInputError(
                "choose max_queue and max_batch_rows of at least 1, and a batch window of at "
                "least 0 seconds"
            )
        self._engine = engine
        self._max_queue = max_queue
        self._max_batch_rows = max_batch_rows
        self._batch_window_seconds = batch_window_seconds
        self._observer = observer
        self._queue: deque[_Job[RequestT, AnswerT]] = deque()
        self._running: list[_Job[RequestT, AnswerT]] = []
        self._changed = threading.Condition()
        self._is_open = False
        self._is_aborted = False
        self._batch_seconds = 1.0  # of the last batch
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Starts the inference thread; once."""
        self._is_open = True
        self._thread.start()

    async def submit(self, request: RequestT, deadline_seconds: float) -> AnswerT:
        """Queues a request and waits for its answer.

        A caller that is cancelled gives its place up, in the queue and in a running batch.

        Raises:
            NotReadyError: not started, or shutting down.
            QueueFullError: too many requests wait already.
            DeadlineExceededError: not done within `deadline_seconds`.
            IcmLoraError: what the engine says about this request.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + deadline_seconds
        future: asyncio.Future[AnswerT] = loop.create_future()
        job = _Job(request, future, loop, deadline)
        try:
            self._enqueue(job)
            async with asyncio.timeout(deadline_seconds):
                return await job.future
        except TimeoutError:
            self._count_rejection(DeadlineExceededError.code)
            raise DeadlineExceededError(
                f"not done within {deadline_seconds:g} seconds: ask for less or try again"
            ) from None
        finally:
            job.abandoned = True
            self._forget(job)

    async def drain(self, grace_seconds: float) -> None:
        """Refuses new requests, finishes the accepted ones, and stops the thread.

        What is not done after `grace_seconds` fails with `NotReadyError`, a running batch at
        its next token. May be called twice, and without `start`.
        """
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        await asyncio.to_thread(self._thread.join, grace_seconds)
        if self._thread.is_alive():
            with self._changed:
                self._is_aborted = True
                left = [*self._running, *self._queue]
                self._queue.clear()
                self._report_depth()
            for job in left:
                job.resolve(NotReadyError("the service is shutting down: try another replica"))
            await asyncio.to_thread(self._thread.join, grace_seconds)

    def _enqueue(self, job: _Job[RequestT, AnswerT]) -> None:
        refusal: QueueFullError | NotReadyError | None = None
        with self._changed:
            depth = len(self._queue)
            if self._is_open and depth < self._max_queue:
                self._queue.append(job)
                self._report_depth()
                self._changed.notify_all()
            elif self._is_open:
                refusal = QueueFullError(
                    f"{depth} requests are waiting: try again later", self._estimate_wait(depth)
                )
            else:
                refusal = NotReadyError("the service takes no requests now: try another replica")
        if refusal is not None:
            self._count_rejection(refusal.code)
            raise refusal

    def _forget(self, job: _Job[RequestT, AnswerT]) -> None:
        """Takes a job that nobody waits for out of the queue, so that others may wait."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._report_depth()

    def _run(self) -> None:
        while (jobs := self._collect()) is not None:
            if jobs:
                self._run_batch(jobs)

    def _collect(self) -> list[_Job[RequestT, AnswerT]] | None:
        """Waits for requests and takes a batch of them; None once drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._is_open)
            if not self._queue:
                return None
            if self._batch_window_seconds > 0:
                self._changed.wait_for(
                    lambda: len(self._queue) >= self._max_batch_rows or not self._is_open,
                    self._batch_window_seconds,
                )
            jobs: list[_Job[RequestT, AnswerT]] = []
            while self._queue and len(jobs) < self._max_batch_rows:
                job = self._queue.popleft()
                if not job.is_void():  # its waiter is told by its own clock
                    job.started = time.monotonic()
                    jobs.append(job)
            self._running = jobs
            self._report_depth()
        return jobs

    def _run_batch(self, jobs: list[_Job[RequestT, AnswerT]]) -> None:
        started = time.monotonic()
        try:
            if self._observer is not None:
                self._observer.on_batch(len(jobs), len({job.request.adapter_id for job in jobs}))
            self._engine.complete(
                [job.request for job in jobs],
                on_done=lambda index, result: self._deliver(jobs[index], result),
                is_abandoned=lambda index: self._is_aborted or jobs[index].is_void(),
            )
        except Exception as error:  # whatever it is, the thread must live on for the next batch
            _logger.exception("a batch failed")
            for job in jobs:
                failure = IcmLoraError("the batch failed for a reason of our own: see the log")
                failure.__cause__ = error
                job.resolve(failure)
        self._running = []
        self._batch_seconds = time.monotonic() - started

    def _deliver(self, job: _Job[RequestT, AnswerT], result: AnswerT | IcmLoraError) -> None:
        if isinstance(result, DeadlineExceededError):
            return  # abandoned: a waiter, where there is one, is told by its own clock
        if self._observer is not None and not isinstance(result, IcmLoraError):
            self._observer.on_tokens(result.completion_tokens)
        job.resolve(result)

    def _estimate_wait(self, depth: int) -> int:
        """Whole seconds until a queue of this length is likely to be gone."""
        num_batches = math.ceil(depth / self._max_batch_rows)
        return min(max(1, math.ceil(num_batches * self._batch_seconds)), _MAX_RETRY_SECONDS)

    def _report_depth(self) -> None:
        """Called with the lock held, so that the last report is of the last change."""
        if self._observer is not None:
            self._observer.on_queue(len(self._queue))

    def _count_rejection(self, reason: str) -> None:
        if self._observer is not None:
            self._observer.on_rejection(reason)
