"""Recipe to adapter: from a cache where one has it, generated once where none has."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from service.adapters.cache import AdapterCache, CacheTier
from service.adapters.record import AdapterRecord
from service.errors import (
    AdapterNotFoundError,
    InvalidInputError,
    NotCachedError,
    NotReadyError,
    QueueFullError,
)
from service.synthesis.synthesizer import AdapterRecipe, Synthesizer

if TYPE_CHECKING:
    from PIL.Image import Image

CachePolicy = Literal["use", "bypass", "only"]
"""`use`: caches, then synthesis. `bypass`: synthesis without reading a cache (the result is
stored, so that its id can be used). `only`: caches, and an error where none has it."""

CacheOutcome = Literal["hit", "miss", "coalesced", "degraded", "bypass"]


@dataclass(frozen=True)
class Provided:
    """An adapter, and how it was come by.

    Attributes:
        record: the adapter.
        cache: `hit`, found in a cache; `miss`, in none, so generated; `degraded`, not in this
            process and Redis could not be asked, so generated; `coalesced`, generated for a
            request that was already running; `bypass`, generated because no cache was read.
        tier: where a hit was found, else None.
        degraded: Redis is configured, and a read or write of it failed for this adapter or
            it was known to be down. Without a configured Redis nothing is degraded.
        seconds: duration by stage: `lookup`, `queue` (for the synthesis thread), those of the
            synthesizer (`encode`, `decode`), `store`; only `wait` where coalesced.
    """

    record: AdapterRecord
    cache: CacheOutcome
    tier: CacheTier | None
    degraded: bool
    seconds: Mapping[str, float] = field(default_factory=dict)


class AdapterProvider:
    """Provides adapters to any number of concurrent requests; lives on one event loop.

    Identical recipes in flight share one lookup and one synthesis. Syntheses run one at a
    time in a thread of their own (torch uses all cores for each). A request that goes away
    does not stop the work that others wait for, and work that nobody waits for any more is
    finished and cached.

    Args:
        synthesizer: generates adapters; blocking.
        cache: the cache tiers.
        max_pending: bound on syntheses that run or wait for the thread.
    """

    def __init__(
        self, synthesizer: Synthesizer, cache: AdapterCache, *, max_pending: int = 64
    ) -> None:
        self._synthesizer = synthesizer
        self._layout = synthesizer.bundle.layout
        self._cache = cache
        self._max_pending = max_pending
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="synthesis")
        self._flights: dict[tuple[str, CachePolicy], asyncio.Task[Provided]] = {}
        self._num_pending = 0
        self._closed = False

    async def provide(
        self,
        recipe: AdapterRecipe,
        *,
        policy: CachePolicy = "use",
        ttl_seconds: float,
        images: Sequence["Image"] | None = None,
    ) -> Provided:
        """The adapter of a recipe.

        Args:
            recipe: what to generate.
            policy: what caches are for.
            ttl_seconds: lifetime in the caches of an adapter generated now. One that is found
                there keeps the expiry it has; a shared synthesis takes the first request's.
            images: the example images, where the recipe was built from some.

        Raises:
            InvalidInputError: `ttl_seconds` is not positive or not finite.
            NotCachedError: policy `only`, and no cache that could be asked has it.
            QueueFullError: too many adapters are waiting to be generated.
            NotReadyError: closed.
        """
        if not 0 < ttl_seconds < math.inf:
            raise InvalidInputError(f"ttl_seconds is {ttl_seconds}: make it positive and finite")
        if policy != "bypass":
            start = time.perf_counter()
            found = self._cache.lookup_process(recipe.adapter_id)
            if found.record is not None:
                return Provided(found.record, "hit", found.tier, found.degraded, _since(start))
        if policy == "only":
            return await self._provide_cached(recipe)
        return await self._join_flight(recipe, policy, ttl_seconds, images)

    async def get(self, adapter_id: str) -> AdapterRecord:
        """The cached adapter with this id.

        Raises:
            AdapterNotFoundError: no cache that could be asked has it.
        """
        found = await self._cache.lookup(adapter_id)
        if found.record is None:
            raise AdapterNotFoundError(_describe_absence(adapter_id, found.degraded))
        return found.record

    async def delete(self, adapter_id: str) -> bool:
        """Deletes an adapter from the caches; True (degraded) where Redis may still have it.

        An adapter that is being generated is stored when it is done, deleted or not.

        Raises:
            AdapterNotFoundError: neither this process nor Redis had it.
        """
        deleted = await self._cache.delete(adapter_id)
        if deleted is False:
            raise AdapterNotFoundError(_describe_absence(adapter_id, degraded=False))
        return deleted is None

    def list(self) -> tuple[AdapterRecord, ...]:
        """Adapters in this process, most recently used first; Redis may hold more."""
        return tuple(reversed(self._cache.process.records()))

    async def close(self) -> None:
        """Refuses new work, waits for what is in flight, then closes thread and caches."""
        self._closed = True
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
        self._executor.shutdown()
        await self._cache.close()

    async def _provide_cached(self, recipe: AdapterRecipe) -> Provided:
        start = time.perf_counter()
        found = await self._cache.lookup_redis(recipe.adapter_id)
        if found.record is None:
            raise NotCachedError(_describe_absence(recipe.adapter_id, found.degraded))
        return Provided(found.record, "hit", found.tier, found.degraded, _since(start))

    async def _join_flight(
        self,
        recipe: AdapterRecipe,
        policy: CachePolicy,
        ttl_seconds: float,
        images: Sequence["Image"] | None,
    ) -> Provided:
        # No await between finding no flight and starting one: there is never a second.
        start = time.perf_counter()
        key = (recipe.adapter_id, policy)
        flight = self._flights.get(key)
        if flight is not None:
            provided = await asyncio.shield(flight)
            generated = provided.cache != "hit"
            return replace(
                provided,
                cache="coalesced" if generated else "hit",
                seconds={"wait": time.perf_counter() - start},
            )
        if self._closed:
            raise NotReadyError("the service is shutting down")
        flight = asyncio.create_task(self._fly(recipe, policy, ttl_seconds, images))
        self._flights[key] = flight
        flight.add_done_callback(lambda _: self._land(key))
        return await asyncio.shield(flight)

    def _land(self, key: tuple[str, CachePolicy]) -> None:
        flight = self._flights.pop(key)
        if not flight.cancelled():
            flight.exception()  # counts as seen, also where every waiter has gone away

    async def _fly(
        self,
        recipe: AdapterRecipe,
        policy: CachePolicy,
        ttl_seconds: float,
        images: Sequence["Image"] | None,
    ) -> Provided:
        seconds: dict[str, float] = {}
        outcome: CacheOutcome = "bypass"
        if policy == "use":
            start = time.perf_counter()
            found = await self._cache.lookup_redis(recipe.adapter_id)
            seconds["lookup"] = time.perf_counter() - start
            if found.record is not None:
                return Provided(found.record, "hit", found.tier, found.degraded, seconds)
            outcome = "degraded" if found.degraded else "miss"
        record = await self._synthesize(recipe, images, seconds)
        start = time.perf_counter()
        not_stored = await self._cache.store(record, ttl_seconds)
        seconds["store"] = time.perf_counter() - start
        return Provided(record, outcome, None, not_stored or outcome == "degraded", seconds)

    async def _synthesize(
        self,
        recipe: AdapterRecipe,
        images: Sequence["Image"] | None,
        seconds: dict[str, float],
    ) -> AdapterRecord:
        if self._num_pending >= self._max_pending:
            raise QueueFullError(f"{self._num_pending} adapters are waiting to be generated")
        queued = time.perf_counter()

        def synthesize() -> AdapterRecord:
            seconds["queue"] = time.perf_counter() - queued
            adapter = self._synthesizer.synthesize(recipe, images)
            seconds.update(adapter.seconds)
            return AdapterRecord.from_synthesized(adapter, self._layout)

        self._num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, synthesize)
        finally:
            self._num_pending -= 1


def _since(start: float) -> dict[str, float]:
    return {"lookup": time.perf_counter() - start}


def _describe_absence(adapter_id: str, degraded: bool) -> str:
    if degraded:
        return (
            f"adapter {adapter_id} is not in this process and Redis could not be asked: "
            "try again later, or generate it again"
        )
    return f"adapter {adapter_id} is not cached: generate it (again) from its description"
