"""Recipe to adapter: from a cache where one has it, generated once where none has."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from service.adapters.cache import AdapterCache, CacheTier
from service.adapters.distribution import is_in_distribution
from service.adapters.record import AdapterRecord
from service.adapters.single_flight import take_turn
from service.adapters.synthesis_batches import MAX_BATCH, SynthesisBatches
from service.errors import (
    AdapterNotFoundError,
    InvalidInputError,
    NotCachedError,
    NotReadyError,
)
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.example_tasks import ExampleTexts
from service.synthesis.refinement import Refined, Refinement
from service.synthesis.synthesizer import VECTOR_DTYPE, Examples, Synthesizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CachePolicy = Literal["use", "bypass", "only"]
"""`use`: caches, then synthesis. `bypass`: synthesis without reading a cache (the result is
stored, so that its id can be used). `only`: caches, and an error where none has it."""

KeepPolicy = Literal["all", "in_distribution"]
"""What is stored of what was generated: all of it; or only adapters of tasks like the training
tasks, for a request that rejects the others."""

Reservation = Callable[[str, str, int], AbstractContextManager[None]]
"""Holds room for a tenant's adapter, by its id and size in bytes, while the block runs."""

ReadTexts = Callable[[ExampleTexts], Awaitable["Tensor"]]
"""What the base makes of example texts: the mean of their hidden states."""

Refine = Callable[[Refinement, ExampleTexts, int], Awaitable[Refined]]
"""Takes gradient steps with example texts."""

SentExamples = ExampleTexts | Sequence["Image"]
"""Examples of a task as they were sent: texts or images."""

CacheOutcome = Literal["hit", "miss", "coalesced", "degraded", "bypass"]


_FlightKey = tuple[str, CachePolicy, KeepPolicy]


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
        seconds: duration by stage: `lookup`, `read_examples` (texts, by the base), `queue` (for the
            synthesis thread), those of the synthesizer (`encode`, `decode`), `store`; `wait` for
            another request or process; `refine`.
        refined: what refinement came to, where this request did it.
    """

    record: AdapterRecord
    cache: CacheOutcome
    tier: CacheTier | None
    degraded: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    refined: Refined | None = None


class AdapterProvider:
    """Provides adapters to any number of concurrent requests; lives on one event loop.

    Identical recipes in flight share one lookup and one synthesis, also across the processes
    that share a Redis; different ones that wait at
    the same time share one decoder forward. Syntheses run a batch at a time (torch uses all
    cores for each). A request that goes away
    does not stop the work that others wait for, and work that nobody waits for any more is
    finished and cached.

    Args:
        synthesizer: generates adapters; blocking.
        cache: the cache tiers.
        max_pending: bound on syntheses that run or wait for the thread.
        max_batch: most recipes of one decoder forward.
        on_batch: told the size of every batch, on the event loop.
        reserve_bytes: holds room for what may enter this process; raises where there is none.
        read_texts: reads example texts, for bundles that take them.
        refine: refines adapters with them.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        cache: AdapterCache,
        *,
        max_pending: int = 64,
        max_batch: int = MAX_BATCH,
        on_batch: Callable[[int], None] | None = None,
        reserve_bytes: Reservation = lambda tenant, adapter_id, size_bytes: nullcontext(),
        read_texts: ReadTexts | None = None,
        refine: Refine | None = None,
    ) -> None:
        self._synthesizer = synthesizer
        self._refine = refine
        self._layout = synthesizer.bundle.layout
        self._reserve_bytes = reserve_bytes
        self._read_texts = read_texts
        self._cache = cache
        self._batches = SynthesisBatches(
            synthesizer,
            max_pending=max_pending,
            max_batch=max_batch,
            on_batch=on_batch,
            computations=cache.computations,
        )
        self._flights: dict[_FlightKey, asyncio.Task[Provided]] = {}
        self._closed = False

    async def provide(
        self,
        recipe: AdapterRecipe,
        *,
        policy: CachePolicy = "use",
        keep: KeepPolicy = "all",
        ttl_seconds: float,
        examples: SentExamples | None = None,
    ) -> Provided:
        """The adapter of a recipe.

        Args:
            recipe: what to generate.
            policy: what caches are for.
            keep: what is stored.
            ttl_seconds: lifetime in the caches of an adapter generated now. One that is found
                there keeps the expiry it has; a shared synthesis takes the first request's.
            examples: those that the recipe was built from, where it was.

        Raises:
            InvalidInputError: `ttl_seconds` is not positive or not finite.
            NotCachedError: policy `only`, and no cache that could be asked has it.
            InvalidAdapterError: what was generated may not serve.
            QueueFullError: too many adapters are waiting to be generated.
            QuotaExceededError: `reserve_bytes` has no room for it.
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
        return await self._join_flight(
            recipe, (recipe.adapter_id, policy, keep), ttl_seconds, examples
        )

    async def get(self, adapter_id: str) -> AdapterRecord:
        """The cached adapter with this id.

        Raises:
            AdapterNotFoundError: no cache that could be asked has it.
        """
        found = await self._cache.lookup(adapter_id)
        if found.record is None:
            raise AdapterNotFoundError(describe_absence(adapter_id, found.degraded))
        return found.record

    async def keep(self, record: AdapterRecord, ttl_seconds: float) -> bool:
        """Stores an adapter (again) for this long; True (degraded) where Redis did not take it.

        Raises:
            InvalidAdapterError: it may not serve.
        """
        await self._cache.check(record)
        return await self._cache.store(record, ttl_seconds)

    async def delete(self, adapter_id: str) -> bool:
        """Deletes an adapter from the caches; True (degraded) where Redis may still have it.

        An adapter that is being generated is stored when it is done, deleted or not.

        Raises:
            AdapterNotFoundError: neither this process nor Redis had it.
        """
        deleted = await self._cache.delete(adapter_id)
        if deleted is False:
            raise AdapterNotFoundError(describe_absence(adapter_id, degraded=False))
        return deleted is None

    def list(self) -> tuple[AdapterRecord, ...]:
        """Adapters in this process, most recently used first; Redis may hold more."""
        return tuple(reversed(self._cache.process.records()))

    async def close(self) -> None:
        """Refuses new work, waits for what is in flight, then closes thread and caches."""
        self._closed = True
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
        await self._cache.close()

    async def _provide_cached(self, recipe: AdapterRecipe) -> Provided:
        start = time.perf_counter()
        with self._reserve(recipe):
            found = await self._cache.lookup_redis(recipe.adapter_id)
        if found.record is None:
            raise NotCachedError(describe_absence(recipe.adapter_id, found.degraded))
        return Provided(found.record, "hit", found.tier, found.degraded, _since(start))

    async def _join_flight(
        self,
        recipe: AdapterRecipe,
        key: _FlightKey,
        ttl_seconds: float,
        examples: SentExamples | None,
    ) -> Provided:
        # No await between finding no flight and starting one: there is never a second.
        start = time.perf_counter()
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
        flight = asyncio.create_task(self._fly(recipe, key, ttl_seconds, examples))
        self._flights[key] = flight
        flight.add_done_callback(lambda _: self._land(key))
        return await asyncio.shield(flight)

    def _land(self, key: _FlightKey) -> None:
        flight = self._flights.pop(key)
        if not flight.cancelled():
            flight.exception()  # counts as seen, also where every waiter has gone away

    def _reserve(self, recipe: AdapterRecipe) -> AbstractContextManager[None]:
        size_bytes = self._layout.num_params * VECTOR_DTYPE.itemsize
        return self._reserve_bytes(recipe.tenant, recipe.adapter_id, size_bytes)

    async def _fly(
        self,
        recipe: AdapterRecipe,
        key: _FlightKey,
        ttl_seconds: float,
        examples: SentExamples | None,
    ) -> Provided:
        _, policy, keep = key
        with self._reserve(recipe):  # also where every waiter has gone away
            return await self._provide_new(recipe, policy, keep, ttl_seconds, examples)

    async def _provide_new(
        self,
        recipe: AdapterRecipe,
        policy: CachePolicy,
        keep: KeepPolicy,
        ttl_seconds: float,
        examples: SentExamples | None,
    ) -> Provided:
        seconds: dict[str, float] = {}
        outcome: CacheOutcome = "bypass"
        token: str | None = None
        if policy == "use":
            start = time.perf_counter()
            found = await self._cache.lookup_redis(recipe.adapter_id)
            seconds["lookup"] = time.perf_counter() - start
            if found.record is not None:
                return Provided(found.record, "hit", found.tier, found.degraded, seconds)
            outcome = "degraded" if found.degraded else "miss"
            if not found.degraded:
                start = time.perf_counter()
                turn = await take_turn(self._cache, recipe.adapter_id)
                if turn.waited:
                    seconds["wait"] = time.perf_counter() - start
                if turn.record is not None:
                    return Provided(turn.record, "coalesced", "redis", False, seconds)
                token = turn.token
                outcome = "degraded" if turn.degraded else "miss"
        try:
            record, refined = await self._synthesize(recipe, keep, examples, seconds)
            not_stored = False
            if keep == "all" or is_in_distribution(record):
                start = time.perf_counter()
                not_stored = await self._cache.store(record, ttl_seconds)
                seconds["store"] = time.perf_counter() - start
        finally:
            if token is not None:
                await self._cache.release(recipe.adapter_id, token)
        degraded = not_stored or outcome == "degraded"
        return Provided(record, outcome, None, degraded, seconds, refined)

    async def _synthesize(
        self,
        recipe: AdapterRecipe,
        keep: KeepPolicy,
        examples: SentExamples | None,
        seconds: dict[str, float],
    ) -> tuple[AdapterRecord, Refined | None]:
        read: Examples | None
        if isinstance(examples, ExampleTexts):
            assert self._read_texts is not None, "the bundle takes no example texts"
            start = time.perf_counter()
            read = await self._read_texts(examples)
            seconds["read_examples"] = time.perf_counter() - start
        else:
            read = examples
        adapter = await self._batches.synthesize(recipe, read)
        seconds.update(adapter.seconds)
        record = AdapterRecord.from_synthesized(adapter, self._layout)
        refined = None
        if recipe.refine_steps and (keep == "all" or is_in_distribution(record)):
            assert isinstance(examples, ExampleTexts), "the recipe says that there are some"
            assert self._refine is not None, "the bundle takes no example texts"
            assert read is not None, "they were read"
            start = time.perf_counter()
            run = self._cache.computations.run
            steps = await run(self._synthesizer.open_refinement, recipe, read)
            refined = await self._refine(steps, examples, recipe.refine_steps)
            adapter = self._synthesizer.take_refined(adapter, refined)
            record = AdapterRecord.from_synthesized(adapter, self._layout)
            seconds["refine"] = time.perf_counter() - start
        await self._cache.check(record)
        return record, refined


def _since(start: float) -> dict[str, float]:
    return {"lookup": time.perf_counter() - start}


def describe_absence(adapter_id: str, degraded: bool) -> str:
    """Why an adapter is not found, and what to do; the same for one of another tenant."""
    if degraded:
        return (
            f"adapter {adapter_id} is not in this process and Redis could not be asked: "
            "try again later, or generate it again"
        )
    return f"adapter {adapter_id} is not cached: generate it (again) from its description"
