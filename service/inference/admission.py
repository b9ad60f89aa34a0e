"""Which requests may wait: bounds for all together, and no tenant at another's cost."""

from dataclasses import dataclass

from service.errors import InvalidInputError
from service.inference.fair_queue import FairQueue, ItemT

OVERFLOW = 2
"""The queue may exceed its bounds by this factor, for tenants below their equal share."""


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of a queue.

    Once it is full, a tenant may still queue what keeps it within its equal share of the bounds
    (those, by the number of tenants that wait): who floods the queue does not close it to the
    others. All together never exceed `OVERFLOW` times the bounds.

    Attributes:
        max_requests: that wait.
        max_work: estimated tokens of these.

    Raises:
        InvalidInputError: a bound is not positive.
    """

    max_requests: int
    max_work: int

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_work) < 1:
            raise InvalidInputError("choose max_queue and max_queue_work of at least 1")

    def has_room(self, queue: FairQueue[ItemT], tenant: str, work: int) -> bool:
        """Whether a tenant may queue one more request, of so much work."""
        requests, total = len(queue) + 1, queue.work + work
        if requests <= self.max_requests and total <= self.max_work:
            return True
        if requests > OVERFLOW * self.max_requests or total > OVERFLOW * self.max_work:
            return False
        num_tenants = len({*queue.tenants, tenant})
        own = queue.backlog_of(tenant)
        return (
            own.requests + 1 <= self.max_requests / num_tenants
            and own.work + work <= self.max_work / num_tenants
        )
