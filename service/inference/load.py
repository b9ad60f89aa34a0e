"""How long requests are likely to take, from what the last ones took."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.inference.fair_queue import Pace

MAX_RETRY_SECONDS = 60
KEPT_SECONDS = 60.0
"""A measurement counts for so long; then requests are let in to find out how it is now."""

_WEIGHT = 0.1
"""Of the newest measurement in a moving average."""


@dataclass(frozen=True)
class _Average:
    """A moving average of seconds, and when it was last measured."""

    seconds: float
    measured: float


class LoadEstimate:
    """Moving averages of an engine's steps; one token of every running request is a step.

    While nothing is known, or nothing newer than `KEPT_SECONDS`, everything is estimated to take
    no time. Reads and writes are of single values: safe from any thread.

    Args:
        max_rows: requests that run at once.
        clock: in seconds.
    """

    def __init__(self, max_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_rows = max_rows
        self._clock = clock
        self._steps: list[_Average | None] = [None] * (max_rows + 1)  # by rows
        self._used = 1.0  # part of their estimated work that requests really took

    def observe_step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long, prompts that it read included."""
        known, now = self._find_step(rows), self._clock()
        average = seconds if known is None else known + _WEIGHT * (seconds - known)
        self._steps[rows] = _Average(average, now)

    def observe_answer(self, estimated_work: int, tokens: int) -> None:
        """A request of so much estimated work was answered with so many tokens.

        An answer of no tokens tells nothing: a prompt was scored, or a picture held no object,
        which is as much work as one with many.
        """
        if estimated_work > 0 and tokens > 0:
            self._used += _WEIGHT * (min(1.0, tokens / estimated_work) - self._used)

    def estimate_pace(self) -> Pace:
        """How fast work is done now; what runs may take as long as its work is estimated."""
        seconds = self._full_step_seconds()
        return Pace(seconds, seconds * self._used / self._max_rows)

    def estimate_seconds(self, work: int) -> float:
        """Most that a request takes once it runs."""
        return work * self.estimate_pace().running

    def estimate_wait(self, queued_work: int, running_work: Sequence[int]) -> float:
        """Time until what waits is done; what runs is half done on average."""
        return (queued_work + sum(running_work) / 2) * self.estimate_pace().waiting

    def round_retry(self, wait_seconds: float) -> int:
        """Whole seconds for a `Retry-After`."""
        return min(max(1, math.ceil(wait_seconds)), MAX_RETRY_SECONDS)

    def _full_step_seconds(self) -> float:
        """Of the fullest batch that was measured."""
        for rows in range(self._max_rows, -1, -1):
            seconds = self._find_step(rows)
            if seconds is not None:
                return seconds
        return 0.0

    def _find_step(self, rows: int) -> float | None:
        """Seconds of a step of so many rows; None where it is not known any more."""
        known = self._steps[rows]
        if known is None or self._clock() - known.measured > KEPT_SECONDS:
            return None
        return known.seconds
