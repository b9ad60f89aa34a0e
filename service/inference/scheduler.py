"""Scheduler: a bounded, fair queue in front of one inference thread."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

from service.errors import (
    DeadlineExceededError,
    IcmLoraError,
    InvalidInputError,
    NotReadyError,
    QueueFullError,
)
from service.inference.admission import QueueLimits
from service.inference.completion import TextDelta
from service.inference.engine import AnswerT, Engine, RequestT, Ticket
from service.inference.fair_queue import FairQueue
from service.inference.load import LoadEstimate
from service.threads import release_workers

T = TypeVar("T")

_WARM_SECONDS = 2.0
"""How long an idle thread keeps its torch workers: a request after that pays 10 ms for new ones."""

_DEADLINE_SHARE = 0.8
"""Of its deadline, how much a request may be estimated to need: the rest is for the estimate."""

_MAX_ADMISSIONS = 4
"""Times that a step looks further down the queue for requests that need no further slot."""

_logger = logging.getLogger("service.scheduler")


@runtime_checkable
class SchedulerObserver(Protocol):
    """Told what happens, from any thread."""

    def on_step(self, rows: int, distinct_adapters: int, /) -> None:
        """A step of all that runs begins; the base counts as one adapter."""

    def on_queue(self, depth: int, work: int, /) -> None:
        """The queue changed: requests, and their estimated tokens."""

    def on_running(self, rows: int, /) -> None:
        """Requests that run."""

    def on_first_token(self, seconds: float, /) -> None:
        """A request got its first token, so long after it arrived."""

    def on_finish(self, seconds: float, tokens: int, /) -> None:
        """A request was answered with so many tokens, so long after it arrived."""

    def on_rejection(self, reason: str, /) -> None:
        """A request was refused: `queue_full`, `not_ready` or `deadline_exceeded`."""

    def on_disconnect(self) -> None:
        """A request was given up by who had asked."""


@dataclass(eq=False)
class _Job(Generic[RequestT, AnswerT]):
    """A request on its way; the engine's ticket. `abandoned` once nobody waits for it."""

    request: RequestT
    owner: "Scheduler[RequestT, AnswerT]"
    loop: asyncio.AbstractEventLoop
    deadline: float  # time.monotonic
    wants_deltas: bool
    events: asyncio.Queue[TextDelta | AnswerT | IcmLoraError] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    abandoned: bool = False

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def adapter_id(self) -> str | None:
        return self.request.adapter_id

    @property
    def work(self) -> int:
        return self.request.work

    def is_abandoned(self) -> bool:
        return self.abandoned or self.owner.is_aborted or time.monotonic() > self.deadline

    def on_first_token(self) -> None:
        self.owner.on_first_token(time.monotonic() - self.submitted)

    def emit(self, delta: TextDelta) -> None:
        self._send(delta)

    def resolve(self, result: AnswerT | IcmLoraError) -> None:
        """Hands the result to the waiting task; may be called from any thread."""
        self.owner.on_resolved(self, result)
        if isinstance(result, DeadlineExceededError):
            return  # abandoned: a waiter, where there is one, is told by its own clock
        if not isinstance(result, IcmLoraError):
            seconds = {"queue": self.started - self.submitted, **result.seconds}
            result = replace(result, seconds=seconds)
        self._send(result)

    def _send(self, event: TextDelta | AnswerT | IcmLoraError) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # its event loop is closed: nobody waits any more
            self.abandoned = True


class Scheduler(Generic[RequestT, AnswerT]):
    """Feeds an engine on one inference thread, with requests of different adapters together.

    Requests join what runs as soon as there is room, between two steps of the engine. Which of
    those that wait is next, says `FairQueue`: tenants take turns, and so do their adapters.

    Args:
        engine: answers texts or images, step by step.
        max_queue: requests that may wait; further ones are refused, see `QueueLimits`.
        max_queue_work: estimated tokens of the requests that may wait.
        max_batch_rows: requests that run at once.
        batch_window_seconds: time that an idle engine waits for more than one request.
        observer: for metrics.

    Raises:
        InvalidInputError: a limit is out of range.
    """

    def __init__(
        self,
        engine: Engine[RequestT, AnswerT],
        *,
        max_queue: int = 256,
        max_queue_work: int = 65_536,
        max_batch_rows: int = 16,
        batch_window_seconds: float = 0.0,
        observer: SchedulerObserver | None = None,
    ) -> None:
        if max_batch_rows < 1 or batch_window_seconds < 0:
            raise InvalidInputError(
                "choose max_batch_rows of at least 1 and a batch window of at least 0 seconds"
            )
        self._engine = engine
        self._limits = QueueLimits(max_queue, max_queue_work)
        self._max_batch_rows = max_batch_rows
        self._batch_window_seconds = batch_window_seconds
        self._observer = observer
        self._load = LoadEstimate(max_batch_rows)
        self._queue: FairQueue[_Job[RequestT, AnswerT]] = FairQueue(self._load.estimate_pace)
        self._running: dict[_Job[RequestT, AnswerT], None] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_open = False
        self.is_aborted = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Starts the inference thread; once."""
        self._is_open = True
        self._thread.start()

    def run_if_idle(self, function: Callable[[], T]) -> Future[T] | None:
        """Runs a short function on the inference thread, whose torch workers are warm.

        Returns:
            None where requests run or wait, or the thread has ended.
        """
        with self._changed:
            if not self._is_open or self._running or len(self._queue) or self._calls:
                return None
            return self._call(function)

    def run_between_steps(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the inference thread, between two steps where requests run.

        They wait for it: it must be as short as a step. There is one such function a step, whoever
        asked first.

        Raises:
            NotReadyError: not started, or shutting down.
        """
        with self._changed:
            if not self._is_open:
                raise NotReadyError("the service takes no requests now: try another replica")
            return self._call(function)

    def _call(self, function: Callable[[], T]) -> Future[T]:
        """Has the inference thread run a function; called with the lock held."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                future.set_result(function())
            except BaseException as error:  # whatever it is, it is the waiter's to see
                future.set_exception(error)

        self._calls.append(call)
        self._changed.notify_all()
        return future

    def running_adapters(self) -> list[str | None]:
        """Adapters of the requests that run, once each; None is the base."""
        with self._changed:
            return list(dict.fromkeys(job.adapter_id for job in self._running))

    def waiting_adapters(self) -> list[str | None]:
        """Adapters of the requests that wait, once each; None is the base."""
        with self._changed:
            return list(dict.fromkeys(job.adapter_id for job in self._queue))

    async def submit(self, request: RequestT, deadline_seconds: float) -> AnswerT:
        """Queues a request and waits for its answer.

        A caller that is cancelled gives its place up, in the queue and in what runs.

        Raises:
            NotReadyError: not started, or shutting down.
            QueueFullError: too many requests wait already, or this one would wait too long.
            DeadlineExceededError: not done within `deadline_seconds`.
            IcmLoraError: what the engine says about this request.
        """
        async with aclosing(self._follow(request, deadline_seconds, wants_deltas=False)) as events:
            async for event in events:
                if not isinstance(event, TextDelta):
                    return event
        raise AssertionError("a request ended without an answer")

    async def stream(
        self, request: RequestT, deadline_seconds: float
    ) -> AsyncGenerator[TextDelta | AnswerT, None]:
        """As `submit`, with the text while it grows; the last item is the answer.

        Closing the iterator gives the request's place up. The first item comes, or the error is
        raised, before anything is lost: a refused request never yields.
        """
        async with aclosing(self._follow(request, deadline_seconds, wants_deltas=True)) as events:
            async for event in events:
                yield event

    async def drain(self, grace_seconds: float) -> None:
        """Refuses new requests, finishes the accepted ones, and stops the thread.

        What is not done after `grace_seconds` fails with `NotReadyError`, what runs at its next
        step. May be called twice, and without `start`.
        """
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        await asyncio.to_thread(self._thread.join, grace_seconds)
        if self._thread.is_alive():
            with self._changed:
                self.is_aborted = True
                left = [*self._running, *self._queue.clear()]
                self._report_queue()
            for job in left:
                job.resolve(NotReadyError("the service is shutting down: try another replica"))
            await asyncio.to_thread(self._thread.join, grace_seconds)

    async def _follow(
        self, request: RequestT, deadline_seconds: float, *, wants_deltas: bool
    ) -> AsyncGenerator[TextDelta | AnswerT, None]:
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + deadline_seconds
        job: _Job[RequestT, AnswerT] = _Job(request, self, loop, deadline, wants_deltas)
        is_over = False
        try:
            self._enqueue(job, deadline_seconds)
            while not is_over:
                async with asyncio.timeout_at(loop.time() + deadline - time.monotonic()):
                    event = await job.events.get()
                is_over = not isinstance(event, TextDelta)
                if isinstance(event, IcmLoraError):
                    raise event
                yield event
        except TimeoutError:
            is_over = True
            self._count_rejection(DeadlineExceededError.code)
            raise DeadlineExceededError(
                f"not done within {deadline_seconds:g} seconds: ask for less or try again"
            ) from None
        except IcmLoraError:
            is_over = True
            raise
        finally:
            job.abandoned = True
            self._forget(job)
            if not is_over and self._observer is not None:
                self._observer.on_disconnect()

    def _enqueue(self, job: _Job[RequestT, AnswerT], deadline_seconds: float) -> None:
        with self._changed:
            refusal = self._refuse(job, deadline_seconds)
            if refusal is None:
                self._queue.push(job)
                self._report_queue()
                self._changed.notify_all()
        if refusal is not None:
            self._count_rejection(refusal.code)
            raise refusal

    def _refuse(
        self, job: _Job[RequestT, AnswerT], deadline_seconds: float
    ) -> QueueFullError | NotReadyError | None:
        """Why a request is not taken now; called with the lock held.

        It would wait for what the fair queue takes before it, however much other tenants ask.
        """
        if not self._is_open:
            return NotReadyError("the service takes no requests now: try another replica")
        depth = len(self._queue)
        if depth + len(self._running) < self._max_batch_rows:
            return None  # it runs at once
        work_before = self._queue.estimate_work_before(job.tenant, job.work)
        running_work = [each.work for each in self._running]
        wait_seconds = self._load.estimate_wait(work_before, running_work)
        retry_seconds = self._load.round_retry(wait_seconds)
        if not self._limits.has_room(self._queue, job.tenant, job.work):
            return QueueFullError(f"{depth} requests are waiting: try again later", retry_seconds)
        needed_seconds = wait_seconds + self._load.estimate_seconds(job.work)
        if needed_seconds > _DEADLINE_SHARE * deadline_seconds:
            return QueueFullError(
                f"this request would wait for {wait_seconds:.0f} seconds and miss its deadline: "
                "try again later, or ask for less",
                retry_seconds,
            )
        return None

    def _forget(self, job: _Job[RequestT, AnswerT]) -> None:
        """Takes a job that nobody waits for out of the queue, so that others may wait."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._report_queue()

    def _run(self) -> None:
        while (jobs := self._collect()) is not None:
            if self._calls:
                self._calls.popleft()()
            try:
                self._step(jobs)
            except Exception as error:  # whatever it is, the thread must live on
                _logger.exception("a step failed")
                self._engine.abort()
                for job in list(self._running):
                    failure = IcmLoraError("the batch failed for a reason of our own: see the log")
                    failure.__cause__ = error
                    job.resolve(failure)
        self._engine.abort()  # gives back the slots of what a drain has answered

    def _collect(self) -> list[_Job[RequestT, AnswerT]] | None:
        """Takes requests that there is room for, and waits where nothing runs; None once drained.

        The requests taken count as running.
        """
        with self._changed:
            if not self._running:
                if not self._changed.wait_for(self._has_work, _WARM_SECONDS):
                    release_workers()  # others may compute meanwhile
                    self._changed.wait_for(self._has_work)
                if not len(self._queue):
                    return [] if self._calls else None
                if self._batch_window_seconds > 0:
                    self._changed.wait_for(
                        lambda: len(self._queue) >= self._max_batch_rows or not self._is_open,
                        self._batch_window_seconds,
                    )
            return self._take(self._max_batch_rows - len(self._running))

    def _has_work(self) -> bool:
        return bool(len(self._queue) or self._calls or not self._is_open)

    def _take(self, room: int) -> list[_Job[RequestT, AnswerT]]:
        """So many requests of the queue, which count as running; called with the lock held."""
        jobs: list[_Job[RequestT, AnswerT]] = []
        while len(self._queue) and len(jobs) < room:
            job = self._queue.pop()
            if not job.is_abandoned():  # its waiter is told by its own clock
                job.started = time.monotonic()
                jobs.append(job)
        self._running.update(dict.fromkeys(jobs))
        self._report_queue()
        return jobs

    def _admit(self, jobs: Sequence[_Job[RequestT, AnswerT]]) -> None:
        """Takes requests in; those that find no slot go back, and the next ones get their room."""
        without_slot: list[Ticket[RequestT, AnswerT]] = []
        for attempt in range(_MAX_ADMISSIONS):
            fresh = self._engine.admit(jobs)
            without_slot += fresh
            if not fresh or attempt == _MAX_ADMISSIONS - 1:
                break
            with self._changed:
                jobs = self._take(len(fresh))
            if not jobs:
                break
        with self._changed:
            for job in reversed(without_slot):
                assert isinstance(job, _Job)
                if job in self._running:  # else a drain has answered it meanwhile
                    del self._running[job]
                    self._queue.push_back(job)
            self._report_queue()

    def _step(self, jobs: Sequence[_Job[RequestT, AnswerT]]) -> None:
        started = time.monotonic()
        if jobs:
            self._admit(jobs)
        rows = list(self._running)
        if not rows:
            return
        if self._observer is not None:
            self._observer.on_running(len(rows))
            self._observer.on_step(len(rows), len({job.adapter_id for job in rows}))
        self._engine.step()
        self._load.observe_step(len(rows), time.monotonic() - started)

    def on_first_token(self, seconds: float) -> None:
        """Of a job."""
        if self._observer is not None:
            self._observer.on_first_token(seconds)

    def on_resolved(self, job: _Job[RequestT, AnswerT], result: AnswerT | IcmLoraError) -> None:
        """A job is over."""
        with self._changed:
            self._running.pop(job, None)
            num_running = len(self._running)
        if self._observer is not None:
            self._observer.on_running(num_running)
        if not isinstance(result, IcmLoraError):
            self._load.observe_answer(job.work, result.completion_tokens)
            if self._observer is not None:
                seconds = time.monotonic() - job.submitted
                self._observer.on_finish(seconds, result.completion_tokens)

    def _report_queue(self) -> None:
        """Called with the lock held, so that the last report is of the last change."""
        if self._observer is not None:
            self._observer.on_queue(len(self._queue), self._queue.work)

    def _count_rejection(self, reason: str) -> None:
        if self._observer is not None:
            self._observer.on_rejection(reason)
