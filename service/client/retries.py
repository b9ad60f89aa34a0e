"""When a call is sent again: only where the service refused it before doing anything."""

import random
from dataclasses import dataclass

from service.client.errors import ApiError

RETRIED_STATUSES = frozenset({429, 503})
_FIRST_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try.

    Attributes:
        max_retries: further attempts after the first; 0 never tries again.
        max_wait_seconds: bound on the sum of the pauses of one call. An error that asks for a
            longer pause than is left is raised at once.
    """

    max_retries: int = 4
    max_wait_seconds: float = 30.0

    def choose_pause(self, error: ApiError, attempt: int, waited_seconds: float) -> float | None:
        """Seconds until the next attempt; None where the error is to be raised.

        What the service asks for is kept to; without it, pauses double, and are spread so that
        clients that were refused together do not come back together.
        """
        if error.status not in RETRIED_STATUSES or attempt >= self.max_retries:
            return None
        pause = error.retry_after_seconds
        if pause is None:
            pause = _FIRST_PAUSE_SECONDS * 2.0**attempt
        pause *= random.uniform(1.0, 1.25)
        return pause if waited_seconds + pause <= self.max_wait_seconds else None


DEFAULT_RETRIES = RetryPolicy()
