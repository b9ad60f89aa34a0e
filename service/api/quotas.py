"""Limits of one tenant, so that none takes the service from the others."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from service.adapters.cache import ProcessCache
from service.api.auth import find_principal
from service.api.error_handlers import problem_response
from service.api.keys import TenantLimits
from service.errors import IcmLoraError, QuotaExceededError, RateLimitedError
from service.settings import Settings

_SECONDS_PER_MINUTE = 60
_MAX_RETRY_SECONDS = 3600


class TokenBucket:
    """The classic limiter: it holds `capacity` and refills at `rate` a second.

    Args:
        rate: units a second; 0 is no limit at all.
        capacity: most units that can be saved up.
        clock: monotonic seconds.
    """

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._updated = clock()

    def take(self, amount: float) -> float:
        """Takes units; returns 0, or (nothing taken) the seconds until they are there.

        More than the bucket can hold is granted when it is full, and owed.
        """
        if self._rate == 0:
            return 0.0
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._updated) * self._rate)
        self._updated = now
        missing = min(amount, self._capacity) - self._level
        if missing > 0:
            return missing / self._rate
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Returns units that were not used; a negative amount takes more."""
        self._level = min(self._capacity, self._level + amount)


@dataclass
class _Tenant:
    """Where a tenant stands; `coming` counts reserved adapters by id and size in bytes."""

    requests: TokenBucket
    tokens: TokenBucket
    max_running: int
    adapter_bytes: int
    pinned_bytes: int
    running: int = 0
    coming: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass
class TokenReservation:
    """Tokens that one answer of a running request may hold.

    Attributes:
        reserved: taken from the tenant's bucket.
        used: generated, as far as is known.
        is_over: whether that is all.
    """

    reserved: int
    used: int = 0
    is_over: bool = False

    def settle(self, used: int) -> None:
        """Says what was generated in the end."""
        self.used, self.is_over = used, True


class Quotas:
    """Limits of all tenants. Used from the event loop's thread only.

    Args:
        defaults: of every tenant.
        overrides: of single tenants.
        on_rejection: told the reason of each refusal, for metrics.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        defaults: Settings,
        overrides: Mapping[str, TenantLimits],
        on_rejection: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = defaults
        self._overrides = overrides
        self._on_rejection = on_rejection
        self._clock = clock
        self._adapters: ProcessCache | None = None
        self._tenants: dict[str, _Tenant] = {}  # bounded: only the keys file makes tenants

    @contextlib.contextmanager
    def admit(self, name: str) -> Iterator[None]:
        """Counts a request as running while the block runs.

        Raises:
            RateLimitedError: too many, in time or at once.
        """
        tenant = self._find(name)
        if tenant.max_running and tenant.running >= tenant.max_running:
            self._on_rejection("tenant_concurrency")
            raise RateLimitedError(
                f"{tenant.running} requests of this tenant are in progress: wait for one to end"
            )
        if wait := tenant.requests.take(1):
            self._on_rejection("tenant_requests")
            raise RateLimitedError("too many requests of this tenant: slow down", math.ceil(wait))
        tenant.running += 1
        try:
            yield
        finally:
            tenant.running -= 1

    @contextlib.contextmanager
    def reserve_tokens(self, name: str, *amounts: int) -> Iterator[list[TokenReservation]]:
        """Takes what the answers of a request may hold, all of it or nothing.

        What they did not use is given back at the end. A request that fails costs what is known
        to have been generated; one that is given up by its client costs all that was reserved
        for answers that were not over.

        Args:
            name: of the tenant.
            amounts: most tokens of each answer.

        Raises:
            RateLimitedError: the tenant's tokens are used up for now.
        """
        bucket = self._find(name).tokens
        if wait := bucket.take(sum(amounts)):
            self._on_rejection("tenant_tokens")
            raise RateLimitedError(
                "the tokens of this tenant are used up for now: wait, or ask for fewer",
                math.ceil(wait),
            )
        reservations = [TokenReservation(amount) for amount in amounts]
        try:
            yield reservations
        except IcmLoraError:
            for each in reservations:
                each.is_over = True
            raise
        finally:
            bucket.give_back(
                sum(each.reserved - each.used for each in reservations if each.is_over)
            )

    def watch_adapters(self, process: ProcessCache) -> None:
        """Counts the adapters of this cache from now on."""
        self._adapters = process

    @contextlib.contextmanager
    def reserve_bytes(self, name: str, adapter_id: str, size_bytes: int) -> Iterator[None]:
        """Holds room for an adapter until it is there; one that is there already needs none.

        Args:
            name: of the tenant.
            adapter_id: of the adapter to come.
            size_bytes: of its vector.

        Raises:
            QuotaExceededError: it does not fit.
        """
        tenant, adapters = self._find(name), self._adapters
        quota = tenant.adapter_bytes
        if not quota or adapters is None or adapter_id in adapters:
            yield
            return
        coming = sum(size for each, size in tenant.coming.elements() if each not in adapters)
        used = adapters.tenant_bytes(name) + coming
        if used + size_bytes > quota:
            self._on_rejection("tenant_adapter_bytes")
            raise QuotaExceededError(
                f"adapters of this tenant hold {used} of {quota} bytes, and this one needs "
                f"{size_bytes}: delete one, or let one expire",
                max(1, math.ceil(min(adapters.seconds_to_expiry(name), _MAX_RETRY_SECONDS))),
            )
        tenant.coming[adapter_id, size_bytes] += 1
        try:
            yield
        finally:
            tenant.coming -= Counter({(adapter_id, size_bytes): 1})

    def find_pinned_bytes(self, name: str) -> int:
        """Bound on a tenant's pinned adapters in bytes; 0: none of its own."""
        return self._find(name).pinned_bytes

    def _find(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = self._build(self._overrides.get(name, TenantLimits()))
        return tenant

    def _build(self, own: TenantLimits) -> _Tenant:
        def choose(limit: float | None, default: float) -> float:
            return default if limit is None else limit

        settings = self._defaults
        per_second = choose(own.requests_per_second, settings.tenant_requests_per_second)
        burst = choose(own.request_burst, settings.tenant_request_burst)
        per_minute = choose(own.tokens_per_minute, settings.tenant_tokens_per_minute)
        running = choose(own.concurrent_requests, settings.tenant_concurrent_requests)
        return _Tenant(
            TokenBucket(per_second, burst, self._clock),
            TokenBucket(per_minute / _SECONDS_PER_MINUTE, per_minute, self._clock),
            int(running),
            int(choose(own.adapter_bytes, settings.tenant_adapter_bytes)),
            int(choose(own.pinned_bytes, settings.tenant_pinned_bytes)),
        )


class RequestLimit:
    """Pure ASGI middleware: refuses a tenant's requests over its limits, before their bodies.

    Args:
        app: what answers.
        quotas: of all tenants.
    """

    def __init__(self, app: ASGIApp, quotas: Quotas) -> None:
        self.app = app
        self.quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        principal = find_principal(scope)
        if principal is None:  # a probe, or the lifespan
            await self.app(scope, receive, send)
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.quotas.admit(principal.tenant))
            except RateLimitedError as error:
                await problem_response(error, scope["path"])(scope, receive, send)
                return
            await self.app(scope, receive, send)
