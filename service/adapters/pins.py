"""Adapters of pinned aliases, which stay in this process's memory beside the cache."""

import contextlib
from collections.abc import Callable

from service.adapters.record import AdapterRecord
from service.errors import QuotaExceededError

_RETRY_SECONDS = 60


class Pins:
    """Adapters by tenant and name; used from the event loop's thread only.

    Args:
        max_bytes: bound on all of them.
        find_tenant_bytes: bound on those of a tenant; 0: `max_bytes` alone.
    """

    def __init__(
        self, max_bytes: int, find_tenant_bytes: Callable[[str], int] = lambda tenant: 0
    ) -> None:
        self._max_bytes = max_bytes
        self._find_tenant_bytes = find_tenant_bytes
        self._records: dict[tuple[str, str], AdapterRecord] = {}

    def count(self) -> int:
        """Adapters, each once."""
        return len({record.adapter_id for record in self._records.values()})

    def check_room(self, tenant: str, name: str, record: AdapterRecord) -> None:
        """Refuses an adapter for which there is no room; it may take the place of its name's.

        Raises:
            QuotaExceededError: the pinned adapters fill what is set aside for all of them, or
                the tenant's fill its part.
        """
        others = {key: held.size_bytes for key, held in self._records.items()}
        others.pop((tenant, name), None)
        own = sum(size for (owner, _), size in others.items() if owner == tenant)
        tenant_bytes = self._find_tenant_bytes(tenant)
        if tenant_bytes and own + record.size_bytes > tenant_bytes:
            raise _refuse("pinned adapters of this tenant", own, tenant_bytes)
        used = sum(others.values())
        if used + record.size_bytes > self._max_bytes:
            raise _refuse("pinned adapters", used, self._max_bytes)

    def keep(self, tenant: str, name: str, record: AdapterRecord) -> None:
        """Keeps an adapter where there is room for it."""
        with contextlib.suppress(QuotaExceededError):
            self.check_room(tenant, name, record)
            self._records[tenant, name] = record

    def find(self, tenant: str, name: str) -> AdapterRecord | None:
        """What is kept under a name."""
        return self._records.get((tenant, name))

    def drop(self, tenant: str, name: str) -> None:
        """Lets go of what is kept under a name, if anything is."""
        self._records.pop((tenant, name), None)


def _refuse(what: str, used: int, bound: int) -> QuotaExceededError:
    return QuotaExceededError(
        f"{what} hold {used} of {bound} bytes: leave `pinned` out, or unpin another",
        _RETRY_SECONDS,
    )
