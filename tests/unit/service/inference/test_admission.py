"""Who may still queue: anyone up to the bounds, then whoever has less than an equal share."""

from dataclasses import dataclass

import pytest

from service.errors import InvalidInputError
from service.inference.admission import OVERFLOW, QueueLimits
from service.inference.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    tenant: str
    work: int = 10
    deadline: float = 60.0
    adapter_id: str | None = None


def fill(limits: QueueLimits, queue: FairQueue[Item], tenant: str, work: int = 10) -> int:
    """Queues all that a tenant may, and says how many that were."""
    count = 0
    while limits.has_room(queue, tenant, work):
        queue.push(Item(tenant, work))
        count += 1
    return count


def test_one_tenant_may_fill_the_queue_and_no_more() -> None:
    assert fill(QueueLimits(8, 1_000), FairQueue(), "only") == 8
    assert fill(QueueLimits(100, 85), FairQueue(), "only") == 8


@pytest.mark.parametrize("limits", [QueueLimits(8, 1_000), QueueLimits(100, 80)])
def test_a_flood_does_not_close_the_queue_to_others(limits: QueueLimits) -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(limits, queue, "flood")
    assert fill(limits, queue, "quiet") == 4  # half of the bounds
    assert fill(limits, queue, "third") == 2  # a third of them, in whole requests
    assert not limits.has_room(queue, "flood", 10)


@pytest.mark.parametrize("limits", [QueueLimits(8, 10_000), QueueLimits(1_000, 80)])
def test_all_together_stay_within_the_outer_bounds(limits: QueueLimits) -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(200):
        fill(limits, queue, str(number))
    assert len(queue) <= OVERFLOW * limits.max_requests
    assert queue.work <= OVERFLOW * limits.max_work


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0)])
def test_bounds_are_positive(bounds: tuple[int, int]) -> None:
    with pytest.raises(InvalidInputError):
        QueueLimits(*bounds)
