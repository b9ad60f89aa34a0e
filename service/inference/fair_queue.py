"""The order in which waiting requests are taken: tenants take turns, and their adapters do."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Protocol, TypeVar, runtime_checkable

MARGIN = 2.0
"""Times its own duration that a request is to have left when it starts."""

_KEPT_COUNTS = 256
"""Counts of flows that wait for nothing, beside as many as wait, before half are forgotten."""


@runtime_checkable
class Queued(Protocol):
    """What the queue knows of a request."""

    @property
    def tenant(self) -> str:
        """Who asks."""

    @property
    def adapter_id(self) -> str | None:
        """The adapter, None for the base."""

    @property
    def work(self) -> int:
        """Estimated work, in tokens."""

    @property
    def deadline(self) -> float:
        """When it must be done."""


@dataclass(frozen=True)
class Pace:
    """How fast work is done.

    Attributes:
        running: seconds per token of a request that runs.
        waiting: seconds in which one token's work of all that waits is taken.
    """

    running: float = 0.0
    waiting: float = 0.0


@dataclass
class Backlog:
    """What waits of one tenant: requests, and their estimated work in tokens."""

    requests: int = 0
    work: int = 0


ItemT = TypeVar("ItemT", bound=Queued)


class _Shares(Generic[ItemT]):
    """Flows that are served in proportion: the one that got least so far is next.

    Sheng et al. 2024, "Fairness in Serving Large Language Models" (virtual token counter): work
    is counted per flow; a flow that comes back after a pause is lifted to the least count of
    those that wait, so that a pause earns no credit.
    """

    def __init__(self) -> None:
        self.flows: dict[str | None, deque[ItemT]] = {}
        self._served: dict[str | None, int] = {}

    def begin(self, name: str | None) -> deque[ItemT]:
        """The flow with this name, now among those that wait."""
        if name not in self.flows:
            self._served[name] = self.count_served(name)
            self.flows[name] = deque()
        return self.flows[name]

    def count_served(self, name: str | None) -> int:
        """Work that the flow got so far; of one that does not wait, what it would begin with."""
        if name in self.flows:
            return self._served[name]
        floor = min((self._served[other] for other in self.flows), default=0)
        return max(self._served.get(name, 0), floor)

    def least_served(self) -> str | None:
        return min(self.flows, key=lambda name: self._served[name])

    def charge(self, name: str | None, work: int) -> None:
        self._served[name] += work

    def end(self, name: str | None) -> None:
        """The flow waits for nothing more; its count is kept, unless others got more."""
        del self.flows[name]
        if not self.flows:
            self._served.clear()
        elif len(self._served) > 2 * len(self.flows) + _KEPT_COUNTS:
            gone = sorted(self._served.keys() - self.flows.keys(), key=self._served.__getitem__)
            for other in gone[: -_KEPT_COUNTS // 2]:  # those that got least lose least
                del self._served[other]


class FairQueue(Generic[ItemT]):
    """Waiting requests. `pop` takes of the tenant, and of its adapters, that got least so far.

    Adapters take turns as long as the deadlines leave time for it: once one of a tenant's requests
    could not start in time after all that must start before it, the tenant's are taken in the order
    in which they must start, so that what was let in is answered in time. They never go before
    another tenant's, as who floods has the latest ones. Not thread-safe.

    Args:
        estimate_pace: how fast work is done now.
        clock: as the deadlines.
    """

    def __init__(
        self,
        estimate_pace: Callable[[], Pace] = Pace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._estimate_pace = estimate_pace
        self._clock = clock
        self._tenants: _Shares[ItemT] = _Shares()
        self._adapters: dict[str, _Shares[ItemT]] = {}
        self._items: dict[ItemT, None] = {}  # in the order of arrival
        self._backlogs: dict[str, Backlog] = {}  # of the tenants that wait
        self.work = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ItemT]:
        return iter(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def push(self, item: ItemT) -> None:
        """Adds a request at the end of its flow."""
        self._tenants.begin(item.tenant)
        adapters = self._adapters.setdefault(item.tenant, _Shares())
        adapters.begin(item.adapter_id).append(item)
        self._items[item] = None
        self._add_work(item)

    def push_back(self, item: ItemT) -> None:
        """Returns a request that was taken, as the next of its flow, and what it was charged."""
        self._tenants.begin(item.tenant)
        adapters = self._adapters.setdefault(item.tenant, _Shares())
        adapters.begin(item.adapter_id).appendleft(item)
        self._tenants.charge(item.tenant, -item.work)
        adapters.charge(item.adapter_id, -item.work)
        self._items = {item: None, **self._items}
        self._add_work(item)

    def pop(self) -> ItemT:
        """Takes the next request; there must be one."""
        tenant = self._tenants.least_served()
        assert tenant is not None
        adapters = self._adapters[tenant]
        item = self._find_urgent(tenant) or adapters.flows[adapters.least_served()][0]
        self._tenants.charge(tenant, item.work)
        adapters.charge(item.adapter_id, item.work)
        self.remove(item)
        return item

    @property
    def tenants(self) -> Collection[str]:
        """Those that wait."""
        return self._backlogs.keys()

    def backlog_of(self, tenant: str) -> Backlog:
        """What waits of a tenant; all zero where nothing does."""
        return self._backlogs.get(tenant, Backlog())

    def estimate_work_before(self, tenant: str, work: int) -> int:
        """Work that is taken before a further request of so much work, if a tenant pushed it.

        The tenant's own that waits, and of every other tenant's what it gets until this one had
        as much. Its adapters' turns are not looked at.
        """
        own = self.backlog_of(tenant).work
        reach = self._tenants.count_served(tenant) + own + work
        others = (
            min(backlog.work, max(0, reach - self._tenants.count_served(other)))
            for other, backlog in self._backlogs.items()
            if other != tenant
        )
        return own + sum(others)

    def remove(self, item: ItemT) -> None:
        """Takes a certain request out, uncharged."""
        del self._items[item]
        self.work -= item.work
        backlog = self._backlogs[item.tenant]
        backlog.requests -= 1
        backlog.work -= item.work
        adapters = self._adapters[item.tenant]
        flow = adapters.flows[item.adapter_id]
        flow.remove(item)
        if not flow:
            adapters.end(item.adapter_id)
        if not adapters.flows:
            del self._adapters[item.tenant], self._backlogs[item.tenant]
            self._tenants.end(item.tenant)

    def clear(self) -> list[ItemT]:
        """Takes everything out, in the order of arrival."""
        items = list(self._items)
        for item in items:
            self.remove(item)
        return items

    def _find_urgent(self, tenant: str) -> ItemT | None:
        """Of a tenant's requests that which must start first, if there is no time to take turns."""
        pace, now = self._estimate_pace(), self._clock()

        def must_start(item: ItemT) -> float:
            return item.deadline - MARGIN * item.work * pace.running

        flows = self._adapters[tenant].flows.values()
        in_order = sorted(chain.from_iterable(flows), key=must_start)
        num_tenants, others = len(self._backlogs), self.work - self._backlogs[tenant].work
        own = 0  # work of the tenant's that must start before
        for item in in_order:
            before = min(own * num_tenants, own + others)
            if now + before * pace.waiting > must_start(item):
                return in_order[0]
            own += item.work
        return None

    def _add_work(self, item: ItemT) -> None:
        self.work += item.work
        backlog = self._backlogs.setdefault(item.tenant, Backlog())
        backlog.requests += 1
        backlog.work += item.work
