"""A breaker: after a failure nobody calls for a while, then one call at a time tries again."""

import math
import time
from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """Decides whether a component may be called; not thread-safe.

    `closed`: all calls go through. `open`: none, for `retry_seconds` after the last failure.
    `half_open`: one call tries while the others still skip; its success closes the breaker, its
    failure opens it. A trial that never reports (its caller was cancelled) is replaced by
    another after `retry_seconds`.

    Args:
        retry_seconds: pause after a failure.
        on_state: called with every new state; must not block.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        retry_seconds: float,
        on_state: Callable[[BreakerState], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._on_state = on_state
        self._clock = clock
        self._state: BreakerState = "closed"
        self._retry_at = -math.inf

    @property
    def state(self) -> BreakerState:
        """Where it stands; reading it changes nothing."""
        return self._state

    def allow(self) -> bool:
        """Whether the caller may call now; whoever is told so reports the outcome."""
        if self._state == "closed":
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + self._retry_seconds  # others skip meanwhile
        self._enter("half_open")
        return True

    def record_success(self) -> None:
        """A call went well."""
        self._enter("closed")

    def record_failure(self) -> None:
        """A call failed."""
        self._retry_at = self._clock() + self._retry_seconds
        self._enter("open")

    def _enter(self, state: BreakerState) -> None:
        if state != self._state:
            self._state = state
            if self._on_state is not None:
                self._on_state(state)
